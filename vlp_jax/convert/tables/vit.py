# SPDX-License-Identifier: Apache-2.0
"""The patch embedding and the transformer of ViLT from a vision transformer, in all the ways ViTs are stored."""

from __future__ import annotations

from vlp_jax.convert.ops import (
    CONVOLUTION,
    DISTILLED_POSITIONS,
    FLAT_CONVOLUTION,
    FUSED_BIAS,
    FUSED_KERNEL,
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    POSITIONS,
    SAME,
    TOKEN,
    Op,
)
from vlp_jax.convert.tables import BARE_SETTINGS, Row, Table, norm, projection

TOKENS = "patch_embed/class_token"
PLACES = ("patch_embed/class_position", "patch_embed/position")
PATCHES = "patch_embed/projection"
BLOCK = "fusion/stack/layers"
ATTENTION = f"{BLOCK}/attention"
QUERY_KEY_VALUE = ("query", "key", "value")


def timm_rows(prefix: str = "", places: Op = POSITIONS) -> tuple[Row, ...]:
    """The rows of a ViT in the names of timm, behind `prefix` (the original ViLT: "transformer.")."""
    block = f"{prefix}blocks.{{layer}}"
    return (
        Row(f"{prefix}cls_token", TOKENS, TOKEN),
        Row(f"{prefix}pos_embed", PLACES, places),
        *projection(f"{prefix}patch_embed.proj", PATCHES, CONVOLUTION),
        *norm(f"{block}.norm1", f"{BLOCK}/norm1"),
        Row(
            f"{block}.attn.qkv.weight",
            tuple(f"{ATTENTION}/{name}/kernel" for name in QUERY_KEY_VALUE),
            FUSED_KERNEL,
        ),
        Row(
            f"{block}.attn.qkv.bias",
            tuple(f"{ATTENTION}/{name}/bias" for name in QUERY_KEY_VALUE),
            FUSED_BIAS,
        ),
        *projection(f"{block}.attn.proj", f"{ATTENTION}/out"),
        *norm(f"{block}.norm2", f"{BLOCK}/norm2"),
        *projection(f"{block}.mlp.fc1", f"{BLOCK}/mlp/hidden"),
        *projection(f"{block}.mlp.fc2", f"{BLOCK}/mlp/out"),
        *norm(f"{prefix}norm", "fusion/norm"),
    )


def huggingface_rows(prefix: str, places: Op = POSITIONS) -> tuple[Row, ...]:
    """The rows of a ViT in the names that transformers writes, of any version, behind `prefix` ("vit.", "vilt.")."""
    layer = f"{prefix}encoder.layer.{{layer}}"
    return (
        *_huggingface_ends(prefix, places),
        *(
            row
            for name in QUERY_KEY_VALUE
            for row in projection(f"{layer}.attention.attention.{name}", f"{ATTENTION}/{name}")
        ),
        *projection(f"{layer}.attention.output.dense", f"{ATTENTION}/out"),
        *norm(f"{layer}.layernorm_before", f"{BLOCK}/norm1"),
        *norm(f"{layer}.layernorm_after", f"{BLOCK}/norm2"),
        *projection(f"{layer}.intermediate.dense", f"{BLOCK}/mlp/hidden"),
        *projection(f"{layer}.output.dense", f"{BLOCK}/mlp/out"),
    )


def huggingface_memory_rows(prefix: str, places: Op = POSITIONS) -> tuple[Row, ...]:
    """The rows of a ViT in the names of transformers 5 in memory, which `torch.save(model.state_dict())` keeps."""
    layer = f"{prefix}layers.{{layer}}"
    return (
        *_huggingface_ends(prefix, places),
        *(
            row
            for name in (*QUERY_KEY_VALUE, "out")
            for row in projection(f"{layer}.attention.{name[0]}_proj", f"{ATTENTION}/{name}")
        ),
        *norm(f"{layer}.layernorm_before", f"{BLOCK}/norm1"),
        *norm(f"{layer}.layernorm_after", f"{BLOCK}/norm2"),
        *projection(f"{layer}.mlp.fc1", f"{BLOCK}/mlp/hidden"),
        *projection(f"{layer}.mlp.fc2", f"{BLOCK}/mlp/out"),
    )


def _huggingface_ends(prefix: str, places: Op) -> tuple[Row, ...]:
    """What lies before and behind the layers."""
    return (
        Row(f"{prefix}embeddings.cls_token", TOKENS, TOKEN),
        Row(f"{prefix}embeddings.position_embeddings", PLACES, places),
        *projection(f"{prefix}embeddings.patch_embeddings.projection", PATCHES, CONVOLUTION),
        *norm(f"{prefix}layernorm", "fusion/norm"),
    )


def _flax_norm(source: str, target: str) -> tuple[Row, Row]:
    return Row(f"{source}/scale", f"{target}/scale"), Row(f"{source}/bias", f"{target}/bias")


def _flax_projection(source: str, target: str, kernel: Op = SAME, bias: Op = SAME) -> tuple[Row, Row]:
    return Row(f"{source}/kernel", f"{target}/kernel", kernel), Row(f"{source}/bias", f"{target}/bias", bias)


def _google_rows() -> tuple[Row, ...]:
    """The rows of vision_transformer; flax numbered all modules of a block together when these files were made."""
    block = "Transformer/encoderblock_{layer}"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    return (
        Row("cls", TOKENS, TOKEN),
        Row("Transformer/posembed_input/pos_embedding", PLACES, POSITIONS),
        *_flax_projection("embedding", PATCHES, FLAT_CONVOLUTION),
        *_flax_norm(f"{block}/LayerNorm_0", f"{BLOCK}/norm1"),
        *(
            row
            for name in QUERY_KEY_VALUE
            for row in _flax_projection(f"{attention}/{name}", f"{ATTENTION}/{name}", HEADS_IN, HEADS_BIAS)
        ),
        *_flax_projection(f"{attention}/out", f"{ATTENTION}/out", HEADS_OUT),
        *_flax_norm(f"{block}/LayerNorm_2", f"{BLOCK}/norm2"),
        *_flax_projection(f"{block}/MlpBlock_3/Dense_0", f"{BLOCK}/mlp/hidden"),
        *_flax_projection(f"{block}/MlpBlock_3/Dense_1", f"{BLOCK}/mlp/out"),
        *_flax_norm("Transformer/encoder_norm", "fusion/norm"),
    )


NO_CLASSES = "ViLT has no image classifier"
NO_DISTILLATION = "ViLT has no distillation token; its row of the positions is left away too"
NO_MASK = "ViLT learns its own vector for hidden patches"
FRESH = {
    r"text_embed/.*": "a ViT reads no text",
    r"fusion/modality": "a ViT has one modality",
    r"patch_embed/mask_vector": NO_MASK,
    r"heads/.*": "a ViT has none of ViLT's heads",
}
# Google's own code has the tanh form of GELU (jax.nn.gelu's default); timm and ViLT run the same files with erf.
TIMM_DEFAULTS = {"model.fusion.eps": 1e-6, "model.gelu": "exact"}
TIMM_MARKS = ("cls_token", "blocks.{layer}.attn.qkv.weight")
# As left by flax.optim ("opt/target/", "opt/state/"), and by train.py of vision_transformer: (parameters, optimizer,
# step), the modules of a block numbered class by class, as flax does since Linen.
GOOGLE_SPELLINGS = (
    (r"^(?:opt/)?target/(.*)$", r"\1"),
    (r"^0/(.*)$", r"\1"),
    (r"^(Transformer/encoderblock_\d+/MultiHeadDotProductAttention)_0/(.*)$", r"\1_1/\2"),
    (r"^(Transformer/encoderblock_\d+/LayerNorm)_1/(.*)$", r"\1_2/\2"),
    (r"^(Transformer/encoderblock_\d+/MlpBlock)_0/(.*)$", r"\1_3/\2"),
)


def _huggingface(name: str, model: str, rows: tuple[Row, ...], *marks: str, **drop: str) -> Table:
    """A table of names behind `model` and a dot; `drop` holds what only it leaves away: name of a part -> reason."""
    return Table(
        name,
        rows,
        marks=tuple(f"{model}.{mark}" for mark in ("embeddings.cls_token", *marks)),
        drop={
            r"(?:cls_|distillation_)?classifier\.(?:weight|bias)": NO_CLASSES,
            rf"{model}\.pooler\.dense\.(?:weight|bias)": "ViLT pools the text's [CLS], not the picture's",
            rf"{model}\.embeddings\.mask_token": NO_MASK,
            **{rf"{model}\.embeddings\.{part}": why for part, why in drop.items()},
        },
        fresh=FRESH,
        prefix=f"{model}.",
        model_types=("vit", "deit"),
        settings={
            "model.fusion.num_heads": "num_attention_heads",
            "model.fusion.eps": "layer_norm_eps",
            "model.gelu": "hidden_act",
        },
        defaults={"model.fusion.eps": 1e-12, "model.gelu": "exact"},
    )


DISK = "encoder.layer.{layer}.attention.attention.query.weight"
MEMORY = "layers.{layer}.attention.q_proj.weight"
SECOND_TOKEN = "embeddings.distillation_token"
TABLES = (
    Table(
        "ViT or DeiT of timm",
        timm_rows(),
        marks=TIMM_MARKS,
        # Older files of ImageNet-21k have one more layer before the classes.
        drop={r"(?:head|pre_logits\.fc)\.(?:weight|bias)": NO_CLASSES},
        fresh=FRESH,
        settings=BARE_SETTINGS,
        defaults=TIMM_DEFAULTS,
    ),
    Table(
        "distilled DeiT of timm",
        timm_rows(places=DISTILLED_POSITIONS),
        marks=(*TIMM_MARKS, "dist_token"),
        drop={r"head(?:_dist)?\.(?:weight|bias)": NO_CLASSES, r"dist_token": NO_DISTILLATION},
        fresh=FRESH,
        settings=BARE_SETTINGS,
        defaults=TIMM_DEFAULTS,
    ),
    _huggingface("ViT of transformers", "vit", huggingface_rows("vit."), DISK),
    _huggingface("ViT of transformers 5 in memory", "vit", huggingface_memory_rows("vit."), MEMORY),
    _huggingface(
        "distilled DeiT of transformers",
        "deit",
        huggingface_rows("deit.", DISTILLED_POSITIONS),
        DISK,
        SECOND_TOKEN,
        distillation_token=NO_DISTILLATION,
    ),
    _huggingface(
        "distilled DeiT of transformers 5 in memory",
        "deit",
        huggingface_memory_rows("deit.", DISTILLED_POSITIONS),
        MEMORY,
        SECOND_TOKEN,
        distillation_token=NO_DISTILLATION,
    ),
    Table(
        "ViT of Google's vision_transformer",
        _google_rows(),
        marks=("cls", "Transformer/encoderblock_{layer}/MultiHeadDotProductAttention_1/query/kernel"),
        drop={
            r"(?:head|pre_logits)/(?:kernel|bias)": NO_CLASSES,
            r"(?:opt/)?state/.*|1/.*": "the state of an optimizer",
            r"2": "the number of the step",
        },
        fresh=FRESH,
        spellings=GOOGLE_SPELLINGS,
        settings=BARE_SETTINGS,
        defaults=TIMM_DEFAULTS,
    ),
)
