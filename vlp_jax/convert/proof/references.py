# SPDX-License-Identifier: Apache-2.0
"""Which reference runs a file: found by one name that only files of its kind have, apart from the tables."""

from __future__ import annotations

from collections.abc import Collection

from vlp_jax.convert.proof import bert, vilt, vit
from vlp_jax.convert.proof.blocks import Reference

# In this order: a file of ViLT has all the names of a vision transformer too.
TELLTALES: tuple[tuple[str, Reference], ...] = (
    ("transformer.pos_embed", vilt.vilt_original),
    ("vilt.embeddings.text_embeddings.word_embeddings.weight", vilt.vilt_transformers),
    ("embeddings.text_embeddings.word_embeddings.weight", vilt.vilt_transformers),
    ("pos_embed", vit.vit_timm),
    ("vit.embeddings.cls_token", vit.vit_transformers),
    ("deit.embeddings.cls_token", vit.vit_transformers),
    ("embeddings.cls_token", vit.vit_transformers),
    ("Transformer/posembed_input/pos_embedding", vit.vit_google),
    ("bert.embeddings.word_embeddings.weight", bert.bert_transformers),
    ("embeddings.word_embeddings.weight", bert.bert_transformers),
    ("bert/embeddings/word_embeddings", bert.bert_google),
)


def find(names: Collection[str]) -> Reference | None:
    """Returns the reference for a file that has `names` (wrapper prefixes gone), None if there is none.

    A reference is called with `(get, names, settings, batch)`: `get(name)` reads a tensor, `batch` is one of
    vlp_jax.data.spec (a second picture under the same keys with "_1"; BERT's head reads "features"). It runs in
    float32 and returns the parts that the file has, B rows, T pieces, L patch slots, D width:

    - "text_embed" [B, T, D] and "patch_embed" [B, 1+L, D], class token first, both before the modality row;
    - "layer 0" ... and "norm" [B, T+1+L, D], text first (a vision transformer alone: [B, 1+L, D]);
    - "pooled" [B, D], "mlm" [B, T, vocabulary], "tag" [B, T, classes];
    - "itm" [B, 2], "rank" [B, 1], "answer" [B, answers], "pair" [B, 2].

    Rows of padding hold nothing of meaning. Where two pictures are needed, all but "pair" is of the first.
    """
    return next((reference for name, reference in TELLTALES if name in names), None)
