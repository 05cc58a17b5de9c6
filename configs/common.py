# SPDX-License-Identifier: Apache-2.0
"""Every key that a run reads, with its default. A system file starts from this and overwrites.

"" and 0 and () mean off; -1 means "filled from the data or the checkpoint when the run starts".
"""

import difflib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults; `config.model` and `config.objectives` belong to the system file."""
    config = ConfigDict()
    config.system = ""  # module name in vlp_jax/systems
    config.variant = ""  # size, for the record; set by the argument after the colon
    config.seed = 0  # of initialisation, order, masking, dropout
    config.init_from = (
        ""  # what the run starts with: a checkpoint, or files that convert reads, joined by commas
    )

    config.model = ConfigDict()  # mirrors the module tree
    config.objectives = ConfigDict()  # name -> coefficient; 0 switches the objective off

    config.data = data = ConfigDict()
    data.dir = ""  # a prepared directory, or a mixture: "coco=DIR:1,vg=DIR:2", or by size "coco=DIR,vg=DIR"
    data.sources = ()  # their names, for the metrics; filled from data.dir
    data.split = "train"  # of the prepared data
    data.inputs = ("text", "patches")  # parts of a batch (data/spec.py): text, patches or grid, boxes
    data.index = "pairs"  # pairs: uniform over (picture, caption); pictures: one caption drawn of each
    data.text_length = 40  # word pieces with [CLS] and [SEP], padded and cut
    data.image_size = 384  # shorter side in pixels after resizing
    data.image_sizes = ()  # of a grid: shorter sides, one of which is drawn in training; () = image_size alone
    data.image_limit = 0  # longest side in pixels; 0 = int(1333 / 800 * image_size), as the original
    data.patch_size = 32  # pixels
    data.max_patches = 0  # patch slots of a picture; 0 = as many as the resize rule can give
    data.buckets = ()  # patch slots that a batch may have, e.g. (192, 216, 228): less padding, a program each; () = one
    data.canvases = ()  # the same for a grid: (rows, columns) in pixels, the last holds all; () = one square
    data.randaugment = ()  # (operations a picture, magnitude to 30), e.g. (2, 9); () = off
    data.crop = ()  # least and greatest share of the area of a random crop, made a square of image_size; () = off
    data.size_crop = 0.0  # of a grid: share of pictures that are cut before the last resizing, to 384 ... 600 pixels of 800
    data.max_boxes = 100  # slots of boxes; those beyond are left out and counted
    data.categories = "data"  # classes of boxes: data (its own names), coco91 (by raw id) or coco80
    data.flip = 0.0  # share of pictures that are mirrored; never one whose text says left or right
    data.mask_rate = 0.15  # of the word pieces, for masked language modelling
    data.mask_counts_padding = False  # ViLT's quirk: padding takes part in whole-word masking
    data.threads = 0  # decoding threads; 0 = tf.data decides
    data.prefetch = 2  # batches made ahead

    config.optimizer = optimizer = ConfigDict()
    optimizer.lr = 1e-4  # peak
    optimizer.b1 = 0.9  # decay of the first moment
    optimizer.b2 = 0.98  # decay of the second moment
    optimizer.eps = 1e-8  # added to the root of the second moment
    optimizer.eps_placement = (
        "uncorrected"  # sqrt(v) + eps before bias correction, as BERT's AdamW; or "corrected"
    )
    optimizer.weight_decay = 0.01  # decoupled, times the learning rate
    optimizer.no_decay = ()  # regular expressions on parameter paths "a/b/kernel"
    optimizer.lr_multipliers = ()  # ((regular expression, factor), ...): first match wins
    optimizer.frozen = ("(^|/)frozen/",)  # regular expressions: no gradient, no decay
    optimizer.clip_norm = 0.0  # global gradient norm; 0 = off
    optimizer.warmup = 0.1  # share of all steps when below 1, else steps
    optimizer.decay = "linear"  # after the warm-up: linear, cosine, constant or step
    optimizer.drops = ()  # of "step": when the rate falls to a tenth, in steps or, below 1, as a share of the run
    optimizer.end_lr = 0.0  # at the last step

    config.ema = ema = ConfigDict()
    ema.decay = 0.0  # 0 = off
    ema.parameters = (".*",)  # regular expressions: which parameters get an average

    config.train = train = ConfigDict()
    train.steps = 1000  # optimizer steps of the whole run
    train.batch_size = 128  # global, over all hosts and micro-batches
    train.accumulation = 1  # micro-batches a step
    train.log_every = 10  # steps
    train.evaluate_every = 0  # steps; 0 = only at the end
    train.max_skipped = 10  # non-finite steps in a row before the run gives up
    train.watchdog = 0  # seconds from step to step, compiling, evaluation and saving included, that mean hung: exit 77; 0 = off

    config.parallel = parallel = ConfigDict()
    parallel.rules = "dp"  # dp, fsdp or fsdp_tp, see vlp_jax/parallel/rules.py
    parallel.mesh = ()  # devices along data, fsdp, tensor, -1 = the rest; () = as the preset says
    parallel.coordinator = ""  # host:port of process 0 when there are several processes
    parallel.processes = 1  # how many start this command, one a host
    parallel.process = 0  # which of them this one is

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 500  # steps
    checkpoint.keep = 2  # newest ones; the newest finite and the best are kept besides
    checkpoint.best = ""  # validation metric whose highest value is kept for ever, e.g. itm/accuracy
    checkpoint.asynchronous = True  # write while training goes on

    config.evaluation = evaluation = ConfigDict()
    evaluation.split = "test"  # scored by evaluate
    evaluation.train_split = "validation"  # looked at while training
    evaluation.train_examples = 512  # how many of them
    evaluation.batch_size = 128  # global; pairs
    evaluation.mask_rate = 0.15  # of the word pieces; apart from data.mask_rate, so that runs compare
    evaluation.max_patches = -1  # patch slots of a picture; -1 = data.max_patches, 0 = none is left out
    evaluation.examples = 0  # 0 = all
    evaluation.gallery = 100  # pictures among which retrieval searches; 0 = all
    evaluation.captions = 1  # of each of these pictures; 0 = all
    evaluation.pictures = 6  # drawn into the report, a kind

    config.compilation_cache = "~/.cache/vlp_jax"  # "" = off
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Two steps of four examples, to see that everything runs."""
    config.train.steps = 2
    config.train.batch_size = 4
    config.train.log_every = 1
    config.optimizer.warmup = 0.1  # a warm-up in steps may be longer than the run
    config.checkpoint.every = 1
    config.evaluation.batch_size = 4
    config.evaluation.examples = 8
    config.evaluation.gallery = 4
    config.evaluation.train_examples = 4
    return config


def parse(arg: str, **defaults: str | bool) -> ConfigDict:
    """Reads the argument after the colon: "variant=b32,smoke" with the defaults of the known names.

    Raises:
        ValueError: a name that is not among the defaults.
    """
    options = ConfigDict(defaults)
    for part in filter(None, arg.split(",")):
        name, given, value = part.partition("=")
        if name not in defaults:
            raise ValueError(_unknown("option after the colon", name, defaults))
        options[name] = value if given else True
    return options


def pick(table: dict, name: str) -> tuple:
    """Returns the row of a variant.

    Raises:
        ValueError: an unknown variant, with the list and the closest one.
    """
    if name not in table:
        raise ValueError(_unknown("variant", name, table))
    return table[name]


def _unknown(kind: str, name: str, possible: dict) -> str:
    near = difflib.get_close_matches(name, possible, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Possible: {', '.join(sorted(possible))}."
