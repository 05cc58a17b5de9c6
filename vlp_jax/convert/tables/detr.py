# SPDX-License-Identifier: Apache-2.0
"""DETR: as released (commit 29901c51), as transformers names it with either backbone, and the ResNet it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlp_jax.convert import hub_detr
from vlp_jax.convert.ops import FUSED_BIAS, FUSED_KERNEL, POINT, Shape
from vlp_jax.convert.tables import Classes, Row, Size, Table, axis, norm, projection, resnet
from vlp_jax.data import categories

CONFIG = "detr:variant=r50"
HUB = hub_detr
HEADS = r"heads/(\w+)/"  # may be fresh, or unused, as a whole
COCO = 91  # classes, by COCO's own numbers
# Config key -> its value where no array says it, and why.
UNKNOWN = {"model.heads.classes": (COCO, "COCO, which DETR is trained on")}
HEAD_WIDTHS: dict[str, int] = {}
CLASSES = (
    Classes(
        "model.heads.classes",
        ("heads/class/dense/bias", "heads/class/dense/kernel"),
        more=1,
        blank=("", "N/A"),
        unsaid=lambda count: categories.names("coco91", categories.COCO.values()) if count == COCO else (),
        facts=True,
    ),
)
STACKS = {"encoder": ("attention",), "decoder": ("self_attention", "cross_attention")}
QUERY_KEY_VALUE = ("query", "key", "value")
VARIANTS = {(3, 4, 6, 3): "r50", (3, 4, 23, 3): "r101"}


def _classes(shapes: Mapping[str, Shape]) -> int | None:
    return CLASSES[0].count(shapes) or None


# What arrays say of the config; whatever they do not say stays as the config has it.
SIZES: dict[str, Size] = {
    **resnet.SIZES,
    "model.width": axis(-1, "object_queries/table", "decoder/norm/scale", "grid_embed/projection/bias"),
    "model.object_queries.queries": axis(0, "object_queries/table"),
    "model.heads.classes": _classes,
}
for _stack in STACKS:
    SIZES[f"model.{_stack}.depth"] = axis(0, f"{_stack}/layers/norm1/scale")
    SIZES[f"model.{_stack}.mlp_width"] = axis(1, f"{_stack}/layers/mlp/hidden/bias")
WHOLE: dict[str, Size] = {}
# A parameter of what has seen whole pictures; how colors are scaled, by whom.
SEEN = "grid_embed/projection/kernel"
COLORS = "DETR", "pixels by ImageNet's mean and deviation", [hub_detr.MEAN, hub_detr.DEVIATION]
RELEASED = 800  # shorter side, for which the config has canvases and the sizes of training
FROM_DATA = ()
# Key of a `config.json` -> config key whose size must be the same.
STATED = {
    "d_model": "model.width",
    "num_queries": "model.object_queries.queries",
    "depths": resnet.DEPTHS,
    "hidden_sizes": resnet.WIDTHS,
    "backbone_config.depths": resnet.DEPTHS,
    "backbone_config.hidden_sizes": resnet.WIDTHS,
    **{f"{name}_layers": f"model.{name}.depth" for name in STACKS},
    **{f"{name}_ffn_dim": f"model.{name}.mlp_width" for name in STACKS},
}
# Config key -> what follows for it from the config found so far, where the user gave none; None leaves it.
IMPLIED = {
    "variant": lambda config, whole: VARIANTS.get(tuple(config.model.grid_embed.depths), ""),
    "data.categories": lambda config, whole: "coco91" if config.model.heads.classes in (COCO, -1) else "data",
    "model.unroll": lambda config, whole: max(
        config.model.encoder.depth, config.model.decoder.depth, *config.model.grid_embed.depths
    ),
    "model.dtype": lambda config, whole: "float32",  # as the published scores were computed
}
# Our path -> how it takes another shape, see resizing.py.
RESIZE = {
    "object_queries/table": "rows",
    "heads/class/dense/kernel": "answers",
    "heads/class/dense/bias": "answers",
}
OWNED = tuple(f"model.{name}.eps" for name in STACKS)
SETTINGS = {f"model.{name}.num_heads": f"{name}_attention_heads" for name in STACKS}
DEFAULTS = {**dict.fromkeys(SETTINGS, 8), **dict.fromkeys(OWNED, 1e-5)}
FIXED = {
    "dilation": False,
    "position_embedding_type": "sine",
    "activation_function": "relu",
    "backbone_kwargs.output_stride": 32,
    "backbone_config.output_stride": 32,
    **{f"backbone_config.{key}": value for key, value in resnet.FIXED.items()},
}
NO_MASKS = "ours has no head for the masks of panoptic segmentation"
DROP = {r"(?:mask_head|bbox_attention)\..*": NO_MASKS, **resnet.COUNTS}
PANOPTIC = ((r"^detr\.", ""),)  # its files hold a whole detector under this name


def sides(shorter: int, longer: int) -> dict[str, Any]:
    """What follows from the sides of pictures that a `preprocessor_config.json` states; 0 = it does not."""
    usual = int(hub_detr.LONGEST * shorter)
    if shorter == RELEASED and longer in (0, usual):
        return {}
    limit = 0 if longer in (0, usual) else longer
    return {
        "data.image_size": shorter,
        "data.image_limit": limit,
        "data.image_sizes": (),
        "data.canvases": (),
    }


def _ends(layer: str, hidden: str, last: str, norms: tuple[str, ...], target: str) -> tuple[Row, ...]:
    """What a layer has besides its attentions."""
    rows = projection(f"{layer}.{hidden}", f"{target}/mlp/hidden")
    rows += projection(f"{layer}.{last}", f"{target}/mlp/out")
    for number, name in enumerate(norms, 1):
        rows += norm(f"{layer}.{name}", f"{target}/norm{number}")
    return rows


def _packed(source: str, target: str) -> tuple[Row, ...]:
    """torch.nn.MultiheadAttention: query, key and value in one tensor."""
    kernels, biases = (
        tuple(f"{target}/{name}/{end}" for name in QUERY_KEY_VALUE) for end in ("kernel", "bias")
    )
    return (
        Row(f"{source}.in_proj_weight", kernels, FUSED_KERNEL),
        Row(f"{source}.in_proj_bias", biases, FUSED_BIAS),
        *projection(f"{source}.out_proj", f"{target}/out"),
    )


def _apart(source: str, target: str) -> tuple[Row, ...]:
    """Query, key and value as transformers has them."""
    rows = projection(f"{source}.out_proj", f"{target}/out")
    for name in QUERY_KEY_VALUE:
        rows += projection(f"{source}.{name[0]}_proj", f"{target}/{name}")
    return rows


def _original_rows() -> tuple[Row, ...]:
    encoder, decoder = (f"transformer.{name}.layers.{{layer}}" for name in STACKS)
    return (
        *resnet.torchvision_rows("backbone.0.body."),
        *projection("input_proj", "grid_embed/projection", POINT),
        *_packed(f"{encoder}.self_attn", "encoder/layers/attention"),
        *_ends(encoder, "linear1", "linear2", ("norm1", "norm2"), "encoder/layers"),
        *_packed(f"{decoder}.self_attn", "decoder/layers/self_attention"),
        *_packed(f"{decoder}.multihead_attn", "decoder/layers/cross_attention"),
        *_ends(decoder, "linear1", "linear2", ("norm1", "norm2", "norm3"), "decoder/layers"),
        *norm("transformer.decoder.norm", "decoder/norm"),
        Row("query_embed.weight", "object_queries/table"),
        *projection("class_embed", "heads/class/dense"),
        *_boxes("bbox_embed"),
    )


def _huggingface_rows() -> tuple[Row, ...]:
    """All but the backbone."""
    encoder, decoder = (f"model.{name}.layers.{{layer}}" for name in STACKS)
    before, behind = "self_attn_layer_norm", "final_layer_norm"
    return (
        *projection("model.input_projection", "grid_embed/projection", POINT),
        *_apart(f"{encoder}.self_attn", "encoder/layers/attention"),
        *_ends(encoder, "fc1", "fc2", (before, behind), "encoder/layers"),
        *_apart(f"{decoder}.self_attn", "decoder/layers/self_attention"),
        *_apart(f"{decoder}.encoder_attn", "decoder/layers/cross_attention"),
        *_ends(decoder, "fc1", "fc2", (before, "encoder_attn_layer_norm", behind), "decoder/layers"),
        *norm("model.decoder.layernorm", "decoder/norm"),
        Row("model.query_position_embeddings.weight", "object_queries/table"),
        *projection("class_labels_classifier", "heads/class/dense"),
        *_boxes("bbox_predictor"),
    )


def _boxes(source: str) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = ()
    for number, name in enumerate(("hidden1", "hidden2", "out")):
        rows += projection(f"{source}.layers.{number}", f"heads/box/{name}")
    return rows


def _other_detr(shapes: Mapping[str, Shape]) -> str:
    """Why a file of the authors' code is not of the models that they have released; "" = it is."""
    if "transformer.encoder.norm.weight" in shapes:
        return "it was trained with --pre_norm; our layers have their norms behind them. Give a DETR without."
    if "backbone.1.row_embed.weight" in shapes:
        return (
            "it has learned positions (--position_embedding=learned), ours are sines. Give a DETR with those."
        )
    return resnet.unfit("backbone.0.body.layer1.0.conv2.weight", "backbone.0.body.layer1.0.conv3.weight")(
        shapes
    )


ORIGINAL = Table(
    name="DETR as released",
    rows=_original_rows(),
    marks=("backbone.0.body.conv1.weight", "transformer.encoder.layers.{layer}.self_attn.in_proj_weight"),
    format="original",
    drop=DROP,
    spellings=PANOPTIC,
    settings=SETTINGS,
    fixed=FIXED,
    defaults=DEFAULTS,
    unfit=_other_detr,
    complete=True,
)

BACKBONE = "model.backbone.conv_encoder.model."
# As transformers writes them, of any version; the left sides are the names of transformers 5 in memory.
MEMORY = (
    (r"^((?:model\.)?backbone)\.model\.", r"\1.conv_encoder.model."),
    (r"^((?:model\.)?(?:en|de)coder\.layers\.\d+\.\w+_attn)\.o_proj\.", r"\1.out_proj."),
    (r"^((?:model\.)?(?:en|de)coder\.layers\.\d+)\.mlp\.", r"\1."),
)
HUGGINGFACE = Table(
    name="DETR of transformers",
    rows=(*resnet.huggingface_rows(BACKBONE), *_huggingface_rows()),
    marks=(f"{BACKBONE}embedder.embedder.convolution.weight", "model.query_position_embeddings.weight"),
    format="hf",
    drop=DROP,
    prefix="model.",
    spellings=(*PANOPTIC, *MEMORY),
    settings=SETTINGS,
    fixed=FIXED,
    model_types=("detr",),
    defaults=DEFAULTS,
    unfit=resnet.unfit(
        f"{BACKBONE}encoder.stages.0.layers.0.layer.1.convolution.weight",
        f"{BACKBONE}encoder.stages.0.layers.0.layer.2.convolution.weight",
    ),
    complete=True,
)
# The files on the hub: a backbone of timm.
TIMM = dataclasses.replace(
    HUGGINGFACE,
    name="DETR of transformers with a backbone of timm",
    rows=(*resnet.torchvision_rows(BACKBONE), *_huggingface_rows()),
    marks=(f"{BACKBONE}conv1.weight", "model.query_position_embeddings.weight"),
    format="",
    unfit=resnet.unfit(f"{BACKBONE}layer1.0.conv2.weight", f"{BACKBONE}layer1.0.conv3.weight"),
)

TABLES = (ORIGINAL, HUGGINGFACE, TIMM, *resnet.TABLES)
