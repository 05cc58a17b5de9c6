# SPDX-License-Identifier: Apache-2.0
"""ViLT: Vision-and-Language Transformer without convolution or region supervision (Kim et al., ICML 2021).

    python -m vlp_jax.train --config=configs/vilt.py:variant=b32 --config.data.dir=DATA --workdir=RUN

Follows the released code (commit 762fd39), not the paper, where they differ: warm-up 2,500 steps (paper: 10 %),
longest side 639 pixels (paper: 640), all objectives at every step. Drawn patches: 200, as in pretraining.
"""

from ml_collections import ConfigDict

from configs import common

# width, depth, heads, text length, picture size, patch size, patch slots, steps, batch
VARIANTS = {
    # The laptop: scenes of level 1, 64 x 64 pixels, at most 28 pieces.
    "tiny": (128, 4, 4, 28, 64, 16, 16, 1200, 64),
    "small": (384, 8, 6, 40, 192, 16, 0, 50_000, 512),
    "b32": (768, 12, 12, 40, 384, 32, 200, 100_000, 4096),  # ViLT-B/32 as released
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of `variant=NAME` (tiny, small, b32), made small by `,smoke`."""
    options = common.parse(arg, variant="tiny", smoke=False)
    width, depth, heads, text, size, patch, slots, steps, batch = common.pick(VARIANTS, options.variant)
    config = common.get_config()
    config.system = "vilt"
    config.variant = options.variant

    config.data.text_length = text
    config.data.image_size = size
    config.data.patch_size = patch
    config.data.max_patches = slots

    config.model = model = ConfigDict()
    model.width = width
    # Of activations; parameters and moments are float32 always.
    model.dtype = "bfloat16" if options.variant == "b32" else "float32"
    model.unroll = 1 if options.smoke else depth  # 1 is quick to compile, depth is quick to run
    model.dropout = 0.1 if options.variant == "b32" else 0.0
    model.gelu = "exact"  # erf; or an approximation: sigmoid (2.9e-5 off), tanh (4.8e-4 off)
    model.token_multiple = 16 if options.variant == "b32" else 1  # 241 tokens are padded to a TPU's tiles
    # -1: as the data has it. eps of LayerNorm: 1e-12 as in BERT here and in the heads, 1e-6 as in timm in the body.
    model.text_embed = ConfigDict(dict(vocab_size=-1, length=-1, pad_id=0, segments=2, eps=1e-12))
    model.patch_embed = ConfigDict(dict(patch_size=-1, grid=-1))  # grid: rows of learned positions
    model.modalities = 2  # rows of the modality table: text, picture, and for NLVR2 (pair) a second picture
    model.fusion = ConfigDict(dict(depth=depth, num_heads=heads, mlp_width=4 * width, eps=1e-6, remat=False))
    # An objective switches its own head on. The others come with converted weights: rank (one score of a pair, for
    # retrieval), answer (VQA), pair (NLVR2), tag (word pieces), as numbers of classes; 0 = none.
    off = dict(mlm=False, itm=False, mpp=False, rank=False, answer=0, pair=0, tag=0)
    model.heads = ConfigDict(dict(pooler=True, eps=1e-12, **off))

    # The original adds the losses with these coefficients; mpp (masked patches) is its ablation.
    config.objectives = ConfigDict(dict(mlm=1.0, itm=1.0, wpa=0.1, mpp=0.0))

    # As released: biases and LayerNorm scales do not decay, but embeddings and the scale inside a classifier do.
    config.optimizer.no_decay = (r"bias$", r"(?<!answer/)(?<!pair/)norm\w*/scale$")
    config.train.steps = steps
    config.train.batch_size = batch
    if options.variant == "b32":
        config.data.mask_counts_padding = True
        config.evaluation.max_patches = 0  # 200 are drawn in pretraining only
        config.optimizer.warmup = 2500.0
    else:
        config.optimizer.lr = 1e-3
    if options.variant == "tiny":
        # Twice the published rate: 1,200 small batches hold few words. Scores are taken at 0.15 all the same.
        config.data.mask_rate = 0.3
        config.checkpoint.every = 200
        config.train.evaluate_every = 200
    return common.smoke(config) if options.smoke else config
