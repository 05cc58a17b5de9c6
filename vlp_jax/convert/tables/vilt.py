# SPDX-License-Identifier: Apache-2.0
"""ViLT: as released (Lightning checkpoints, commit 762fd39), as transformers names it, and the parts it starts from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from vlp_jax.convert import hub
from vlp_jax.convert.ops import LINEAR, TOKEN, Shape
from vlp_jax.convert.tables import (
    BARE_SETTINGS,
    Classes,
    Copy,
    Row,
    Table,
    axis,
    bert,
    count,
    either,
    norm,
    patch_side,
    present,
    projection,
    vit,
)

CONFIG = "vilt:variant=b32"
HUB = hub
# Config key -> its value where neither an array nor the user says it, and why.
UNKNOWN = {"model.text_embed.vocab_size": (30522, "bert-base-uncased, which ViLT reads")}
HEADS = r"heads/(\w+)/"  # may be fresh, or unused, as a whole
HEAD_WIDTHS = {"model.fusion.num_heads": 64}  # of every released ViT and BERT
CLASSES = (
    Classes("model.heads.answer", ("heads/answer/out/bias",)),
    Classes("model.heads.tag", ("heads/tag/dense/bias",)),
    Classes("model.heads.pair", ("heads/pair/out/bias",)),
)
# What an export writes for our import alone: a ViltConfig has one place for the epsilons.
OWNED = ("model.text_embed.eps", "model.fusion.eps", "model.heads.eps", "model.text_embed.pad_id")

WORD, STACK = "text_embed/word", "fusion/stack/layers"
# What arrays say of the config; whatever they do not say stays as the config has it.
SIZES = {
    "model.width": either(axis(0, "patch_embed/class_token", "fusion/norm/scale"), axis(1, WORD)),
    "model.patch_embed.patch_size": patch_side("patch_embed/projection/kernel"),
    "model.patch_embed.grid": axis(0, "patch_embed/position"),
    "model.fusion.depth": axis(0, f"{STACK}/norm1/scale"),
    "model.fusion.mlp_width": axis(1, f"{STACK}/mlp/hidden/bias"),
    "model.text_embed.vocab_size": axis(0, WORD),
    "model.text_embed.segments": axis(0, "text_embed/segment"),
}
WHOLE = {
    "model.text_embed.length": axis(0, "text_embed/position"),
    "model.modalities": axis(0, "fusion/modality"),
    "model.heads.pooler": present("heads/pooler/"),
    "model.heads.mlm": present("heads/mlm/"),
    "model.heads.itm": present("heads/itm/"),
    "model.heads.mpp": present("heads/mpp/"),
    "model.heads.rank": present("heads/rank/"),
    "model.heads.answer": count("heads/answer/out/bias", "heads/answer/out/kernel", "heads/answer/"),
    "model.heads.pair": count("heads/pair/out/bias", "heads/pair/out/kernel", "heads/pair/"),
    "model.heads.tag": count("heads/tag/dense/bias", "heads/tag/dense/kernel"),
}
# Key of a `config.json` -> config key whose size must be the same.
STATED = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.fusion.depth",
    "intermediate_size": "model.fusion.mlp_width",
    "vocab_size": "model.text_embed.vocab_size",
    "patch_size": "model.patch_embed.patch_size",
}
# A parameter of what has seen pictures; how colors are scaled, by whom.
SEEN = "patch_embed/position"
COLORS = "ViLT", "pixels to [-1, 1]", [[0.5] * 3] * 2
# What a config that the user gave says by its data.
FROM_DATA = ("model.text_embed.length", "model.patch_embed.patch_size", "model.patch_embed.grid")
# Config key -> what follows for it from the config found so far, where the user gave none; None leaves it.
IMPLIED = {
    "data.patch_size": lambda config, whole: known(config.model.patch_embed.patch_size),
    "data.image_size": lambda config, whole: known(config.model.patch_embed.grid, config.data.patch_size),
    "data.text_length": lambda config, whole: known(config.model.text_embed.length),
    # 200 patches are drawn in pretraining at 384 pixels; elsewhere as many as there are.
    "data.max_patches": lambda config, whole: None if config.data.image_size == 384 else 0,
    "model.unroll": lambda config, whole: config.model.fusion.depth,
    "model.dtype": lambda config, whole: "float32",  # as the published scores were computed
    "objectives.mlm": lambda config, whole: 0.0 if whole and not config.model.heads.mlm else None,
    "objectives.itm": lambda config, whole: 0.0 if whole and not config.model.heads.itm else None,
    "objectives.wpa": lambda config, whole: 0.0 if whole and not config.model.heads.itm else None,
}
# Our path -> how it takes another shape, see resizing.py.
RESIZE = {
    "patch_embed/position": "grid",
    "text_embed/position": "rows",
    "fusion/modality": "repeated",
    "heads/answer/out/kernel": "answers",
    "heads/answer/out/bias": "answers",
}


def sides(shorter: int, longer: int) -> dict[str, int]:
    """What follows from the sides of pictures that a `preprocessor_config.json` states; 0 = it does not."""
    return {"data.image_size": shorter}


def known(*factors: int) -> int | None:
    """The product of sizes, None where one of them is -1."""
    return None if -1 in factors else math.prod(factors)


def hidden_classifier(source: str, target: str) -> tuple[Row, ...]:
    """Linear, LayerNorm, GELU, linear: numbers 0, 1 and 3 of a PyTorch Sequential."""
    rows = projection(f"{source}.0", f"{target}/hidden") + norm(f"{source}.1", f"{target}/norm")
    return rows + projection(f"{source}.3", f"{target}/out")


def for_pairs(shapes: Mapping[str, Shape]) -> bool:
    """Whether the classifier of a file of transformers reads more than one pooled vector."""
    classifier, pooler = shapes.get("classifier.0.weight"), shapes.get("vilt.pooler.dense.weight")
    return bool(classifier and pooler and classifier[-1:] != pooler[-1:])


SETTINGS = {
    "model.fusion.num_heads": "num_attention_heads",
    "model.fusion.eps": "layer_norm_eps",
    "model.text_embed.eps": "layer_norm_eps",
    "model.heads.eps": "layer_norm_eps",
    "model.text_embed.pad_id": "pad_token_id",
    "model.gelu": "hidden_act",
}
EPSILONS = {"model.fusion.eps": 1e-6, "model.text_embed.eps": 1e-12, "model.heads.eps": 1e-12}
NOT_THERE = {"patch_embed/mask_vector": "the file was not trained with masked patches"}

ORIGINAL = Table(
    name="ViLT as released",
    format="original",
    complete=True,
    marks=("text_embeddings.word_embeddings.weight", "transformer.blocks.{layer}.attn.qkv.weight"),
    rows=(
        *bert.embedding_rows("text_embeddings."),
        Row("token_type_embeddings.weight", "fusion/modality"),
        *vit.timm_rows("transformer."),
        Row("transformer.mask_token", "patch_embed/mask_vector", TOKEN),
        *projection("pooler.dense", "heads/pooler/dense"),
        *projection("mlm_score.transform.dense", "heads/mlm/dense"),
        *norm("mlm_score.transform.LayerNorm", "heads/mlm/norm"),
        Row("mlm_score.decoder.weight", "heads/mlm/decoder/kernel", LINEAR),
        Row("mlm_score.bias", "heads/mlm/decoder/bias"),
        *projection("itm_score.fc", "heads/itm/dense"),
        *projection("mpp_score.transform.dense", "heads/mpp/dense"),
        *norm("mpp_score.transform.LayerNorm", "heads/mpp/norm"),
        *projection("mpp_score.decoder", "heads/mpp/decoder"),
        *projection("rank_output", "heads/rank/dense"),
        *hidden_classifier("vqa_classifier", "heads/answer"),
        *hidden_classifier("nlvr2_classifier", "heads/pair"),
    ),
    drop={
        r"text_embeddings\.position_ids": "counts 0, 1, 2, ...: no weight",
        r"(transformer\.)?head\.(weight|bias)": "ViLT has no image classifier",
        r"(train|val|dev|test)_\w+\..*": "a metric's count",
    },
    fresh=NOT_THERE,
    settings=BARE_SETTINGS,
    defaults={"model.gelu": "exact", "model.text_embed.pad_id": 0, **EPSILONS},
)

HUGGINGFACE = Table(
    name="ViLT of transformers",
    format="hf",
    complete=True,
    prefix="vilt.",
    marks=(
        "vilt.embeddings.text_embeddings.word_embeddings.weight",
        "vilt.embeddings.patch_embeddings.projection.weight",
    ),
    rows=(
        *bert.embedding_rows("vilt.embeddings.text_embeddings."),
        Row("vilt.embeddings.token_type_embeddings.weight", "fusion/modality"),
        *vit.huggingface_rows("vilt."),
        *projection("vilt.pooler.dense", "heads/pooler/dense"),
        *projection("mlm_score.transform.dense", "heads/mlm/dense"),
        *norm("mlm_score.transform.LayerNorm", "heads/mlm/norm"),
        Row("mlm_score.decoder.weight", "heads/mlm/decoder/kernel", LINEAR),
        Row(("mlm_score.decoder.bias", "mlm_score.bias"), "heads/mlm/decoder/bias"),
        *projection("rank_output", "heads/rank/dense"),
        *projection("classifier", "heads/tag/dense"),
        *hidden_classifier("classifier", "heads/answer"),
    ),
    fits=lambda shapes: not for_pairs(shapes),
    drop={r"vilt\.embeddings\.text_embeddings\.position_ids": "counts 0, 1, 2, ...: no weight"},
    fresh=NOT_THERE,
    copies=(
        Copy(
            Row("vilt.embeddings.text_embeddings.word_embeddings.weight", "heads/mlm/decoder/kernel", LINEAR),
            when="mlm_score.transform.dense.weight",
            because="the file has no decoder: transformers stores it tied to the word table",
        ),
    ),
    settings=SETTINGS,
    model_types=("vilt",),
    defaults={"model.gelu": "exact", "model.text_embed.pad_id": 0, **dict.fromkeys(EPSILONS, 1e-12)},
)

# The same names as of the head for answers.
PAIRS = dataclasses.replace(
    HUGGINGFACE,
    name="ViLT of transformers for pairs of pictures",
    fits=lambda shapes: for_pairs(shapes),
    rows=tuple(row for row in HUGGINGFACE.rows if not row.sources[0].startswith("classifier"))
    + hidden_classifier("classifier", "heads/pair"),
)

TABLES = (ORIGINAL, HUGGINGFACE, PAIRS, *vit.TABLES, *bert.TABLES)
