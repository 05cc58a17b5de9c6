# SPDX-License-Identifier: Apache-2.0
"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020).

    python -m vlp_jax.train --config=configs/detr.py:variant=r50 --config.data.dir=DATA --workdir=RUN

Follows the released code (commit 29901c51): 300 epochs of COCO's 118,287 pictures in batches of 16 (as coded, 2 on each
of 8 GPUs; the released weights are from 500 epochs), the rate divided by ten after 200. Weight decay reaches biases and
norms too. The backbone starts from ImageNet weights: --config.init_from=resnet50.pth.
"""

from ml_collections import ConfigDict

from configs import common

# width, encoder and decoder layers, heads, mlp width, queries, stages of the ResNet, their widths, steps, batch
VARIANTS = {
    # The laptop: scenes of level 1, 64 x 64 pixels; two stages, so that a cell is 8 pixels wide.
    "tiny": (128, 2, 4, 256, 16, (2, 2), (64, 128), 3000, 32),
    "r50": (256, 6, 8, 2048, 100, (3, 4, 6, 3), (256, 512, 1024, 2048), 2_217_900, 16),
    "r101": (256, 6, 8, 2048, 100, (3, 4, 23, 3), (256, 512, 1024, 2048), 2_217_900, 16),
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of `variant=NAME` (tiny, r50, r101), made small by `,smoke`."""
    options = common.parse(arg, variant="tiny", smoke=False)
    width, depth, heads, mlp, queries, depths, widths, steps, batch = common.pick(VARIANTS, options.variant)
    config = common.get_config()
    config.system = "detr"
    config.variant = options.variant
    released = options.variant != "tiny"

    config.data.inputs = ("grid", "boxes")
    config.data.index = "pictures"
    config.data.flip = 0.5
    config.data.image_size = 800 if released else 64
    config.data.max_boxes = 100 if released else 8
    if released:
        config.data.image_sizes = tuple(range(480, 801, 32))
        config.data.size_crop = 0.5
        config.data.categories = "coco91"
        # Landscape, portrait, and one that holds every picture: the longer side may pass 1,333 by a few pixels. 26 % of
        # the pixels are padding on COCO in batches of 16; without the first two 39 %, on one square 70 %.
        wide = ((640, 864), (800, 1088), (800, 1344))
        config.data.canvases = tuple(side for one in wide for side in (one, one[::-1])) + ((1344, 1344),)

    config.model = model = ConfigDict()
    model.width = width
    # Of activations; parameters, costs, boxes and losses are float32 always. The original is float32 throughout.
    model.dtype = "bfloat16" if released else "float32"
    model.unroll = 1 if options.smoke else max(depth, *depths)  # 1 is quick to compile, this is quick to run
    model.dropout = 0.1 if released else 0.0
    stem = 64 if released else 32
    model.grid_embed = ConfigDict(dict(depths=depths, widths=widths, stem_width=stem))
    stack = dict(depth=depth, num_heads=heads, mlp_width=mlp, eps=1e-5, remat=False)
    model.encoder, model.decoder = ConfigDict(stack), ConfigDict(stack)
    model.object_queries = ConfigDict(dict(queries=queries))
    model.heads = ConfigDict(dict(classes=-1))  # without "no object"; -1: as the data has it

    # As the original; every decoder layer counts alike.
    config.objectives = ConfigDict(dict(box_class=1.0, box_l1=5.0, giou=2.0))

    config.optimizer.b2 = 0.999
    config.optimizer.eps_placement = "corrected"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 0.1  # helps the original's stability
    config.optimizer.warmup = 0.0
    config.optimizer.decay = "step"
    config.optimizer.drops = (2 / 3,)
    if released:
        # Stem and first stage keep ImageNet's values.
        config.optimizer.frozen = (r"(^|/)frozen/", r"^grid_embed/resnet/(stem|stage1)/")
        config.optimizer.lr_multipliers = ((r"^grid_embed/resnet/", 0.1),)
    config.train.steps = steps
    config.train.batch_size = batch
    if not released:
        config.data.image_limit = 64  # so that every picture fits one small square
        config.optimizer.lr = 5e-4
        config.checkpoint.every = 500
        config.train.evaluate_every = 500
    return common.smoke(config) if options.smoke else config
