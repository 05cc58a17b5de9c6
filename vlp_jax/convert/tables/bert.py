# SPDX-License-Identifier: Apache-2.0
"""The text embedding of ViLT, and its head for masked words, from BERT."""

from __future__ import annotations

from collections.abc import Mapping

from vlp_jax.convert.ops import LINEAR, SAME, Shape
from vlp_jax.convert.tables import Copy, Row, Table, norm, projection

WORDS, HEAD = "text_embed/word", "heads/mlm"
DECODER = f"{HEAD}/decoder/kernel"


def embedding_rows(prefix: str) -> tuple[Row, ...]:
    """The rows of BERT's text embedding in PyTorch, behind `prefix` ("bert.embeddings.")."""
    return (
        Row(f"{prefix}word_embeddings.weight", WORDS),
        Row(f"{prefix}position_embeddings.weight", "text_embed/position"),
        Row(f"{prefix}token_type_embeddings.weight", "text_embed/segment"),
        *norm(f"{prefix}LayerNorm", "text_embed/norm"),
    )


EMBEDDING = embedding_rows("bert.embeddings.")
PREDICTION = (
    *projection("cls.predictions.transform.dense", f"{HEAD}/dense"),
    *norm("cls.predictions.transform.LayerNorm", f"{HEAD}/norm"),
    Row("cls.predictions.decoder.weight", DECODER, LINEAR),
    Row(("cls.predictions.bias", "cls.predictions.decoder.bias"), f"{HEAD}/decoder/bias"),
)
TENSORFLOW = (
    Row("bert/embeddings/word_embeddings", WORDS),
    Row("bert/embeddings/position_embeddings", "text_embed/position"),
    Row("bert/embeddings/token_type_embeddings", "text_embed/segment"),
    Row("bert/embeddings/LayerNorm/gamma", "text_embed/norm/scale"),
    Row("bert/embeddings/LayerNorm/beta", "text_embed/norm/bias"),
    # TensorFlow stores kernels as [in, out], as we do.
    Row("cls/predictions/transform/dense/kernel", f"{HEAD}/dense/kernel", SAME),
    Row("cls/predictions/transform/dense/bias", f"{HEAD}/dense/bias"),
    Row("cls/predictions/transform/LayerNorm/gamma", f"{HEAD}/norm/scale"),
    Row("cls/predictions/transform/LayerNorm/beta", f"{HEAD}/norm/bias"),
    Row("cls/predictions/output_bias", f"{HEAD}/decoder/bias"),
)

# The names of LayerNorm's parameters before PyTorch had a LayerNorm; the hub's oldest files keep them.
SPELLINGS = ((r"^(.*LayerNorm)\.gamma$", r"\1.weight"), (r"^(.*LayerNorm)\.beta$", r"\1.bias"))
NO_LAYERS = "ViLT's body is a ViT"
NO_POOLER = "ViLT's pooler reads another body and starts anew"
NO_SENTENCES = "ViLT does not predict the next sentence"
FRESH = {
    r"patch_embed/.*": "BERT sees no picture",
    r"fusion/.*": NO_LAYERS,
    r"heads/pooler/.*": NO_POOLER,
    r"heads/(?!pooler/|mlm/).*": "BERT has no such head",
}
DROP = {
    r"bert\.encoder\.layer\..*": NO_LAYERS,
    r"bert\.pooler\.dense\.(?:weight|bias)": NO_POOLER,
    r"bert\.embeddings\.position_ids": "a buffer that counts positions",
    r"cls\.seq_relationship\.(?:weight|bias)": NO_SENTENCES,
}
SEGMENTS = "bert.embeddings.token_type_embeddings.weight"
MARKS = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.{layer}.attention.self.query.weight")
EPS = 1e-12
SETTINGS = {
    "model.text_embed.eps": "layer_norm_eps",
    "model.text_embed.pad_id": "pad_token_id",
}
HEAD_SETTINGS = {**SETTINGS, "model.heads.eps": "layer_norm_eps", "model.gelu": "hidden_act"}
DEFAULTS = {"model.text_embed.eps": EPS, "model.text_embed.pad_id": 0}
HEAD_DEFAULTS = {**DEFAULTS, "model.heads.eps": EPS}


def _two_segments(shapes: Mapping[str, Shape]) -> bool:
    """Whether it is not RoBERTa, which has BERT's names and one segment, and counts positions from row 2."""
    return shapes.get(SEGMENTS, (2,))[0] > 1


TABLES = (
    Table(
        "BERT of transformers without its head for masked words",
        EMBEDDING,
        marks=MARKS,
        drop=DROP,
        fresh={**FRESH, r"heads/mlm/.*": "the file has no head for masked words"},
        prefix="bert.",
        spellings=SPELLINGS,
        settings=SETTINGS,
        defaults=DEFAULTS,
        fits=_two_segments,
        model_types=("bert",),
    ),
    Table(
        "BERT of transformers",
        (*EMBEDDING, *PREDICTION),
        marks=(*MARKS, "cls.predictions.transform.dense.weight"),
        drop=DROP,
        fresh=FRESH,
        copies=(
            Copy(
                Row("bert.embeddings.word_embeddings.weight", DECODER, LINEAR),
                "cls.predictions.transform.dense.weight",
                "transformers stores the decoder tied to the word table",
            ),
        ),
        prefix="bert.",
        spellings=SPELLINGS,
        settings=HEAD_SETTINGS,
        defaults=HEAD_DEFAULTS,
        fits=_two_segments,
        model_types=("bert",),
    ),
    Table(
        "BERT of Google (TensorFlow)",
        TENSORFLOW,
        marks=("bert/embeddings/word_embeddings", "cls/predictions/transform/dense/kernel"),
        drop={
            r".*/adam_[mv]|global_step": "the state of an optimizer",
            r"bert/encoder/layer_\d+/.*": NO_LAYERS,
            r"bert/pooler/dense/(?:kernel|bias)": NO_POOLER,
            r"cls/seq_relationship/output_(?:weights|bias)": NO_SENTENCES,
        },
        fresh=FRESH,
        copies=(
            Copy(
                Row("bert/embeddings/word_embeddings", DECODER, LINEAR),
                "cls/predictions/transform/dense/kernel",
                "BERT ties the decoder to the word table",
            ),
        ),
        settings=HEAD_SETTINGS,
        defaults=HEAD_DEFAULTS,
    ),
)
