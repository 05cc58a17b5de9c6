# SPDX-License-Identifier: Apache-2.0
"""BERT's embedding of a text and its vocabulary head, by the names of transformers and of Google's release."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from vlp_jax.convert.proof.blocks import Batch, Get, Pair, Parts, Tensor, Weights, arrays, gelu, linear, norm
from vlp_jax.convert.proof.settings import Settings


def embed_text(ids: np.ndarray, tables: Callable[[str], Tensor], scale: Pair, eps: float) -> Tensor:
    """`LayerNorm(word + segment 0 + position)`, `[batch, text, width]`.

    `tables` reads "word", "position" and "token_type": rows of each, one table at a time.
    """
    import torch

    x = tables("word")[torch.tensor(ids).long()]
    x = x + tables("token_type")[0] + tables("position")[: ids.shape[1]]
    return norm(x, scale, eps)


def predict_words(x: Tensor, dense: Pair, scale: Pair, decoder: Pair, settings: Settings) -> Tensor:
    """BERT's head `decoder(LayerNorm(gelu(dense x)))`: logits `[batch, text, vocabulary]`."""
    return linear(norm(gelu(linear(x, dense), settings), scale, settings.head_eps), decoder)


def text(weights: Weights, stem: str, ids: np.ndarray, eps: float) -> Tensor:
    """Embeds ids by the names that BERT and ViLT share, in the original and in transformers."""
    return embed_text(
        ids,
        lambda table: weights(f"{stem}.{table}_embeddings.weight"),
        weights.pair(f"{stem}.LayerNorm"),
        eps,
    )


def words(weights: Weights, stem: str, tied: str, x: Tensor, settings: Settings) -> Tensor:
    """The vocabulary head by its names in PyTorch.

    A file without `decoder.weight` has it tied to the table `tied`. The bias is `decoder.bias`, `bias`, or both as
    one tensor, by the age of transformers.
    """
    weight, bias = f"{stem}.decoder.weight", f"{stem}.decoder.bias"
    decoder = (
        weights(weight if weight in weights.names else tied),
        weights(bias if bias in weights.names else f"{stem}.bias"),
    )
    dense, scale = weights.pair(f"{stem}.transform.dense"), weights.pair(f"{stem}.transform.LayerNorm")
    return predict_words(x, dense, scale, decoder, settings)


def bert_transformers(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """BertModel ("text_embed" only), BertForMaskedLM, BertForPreTraining; a `blocks.Reference`.

    Reads text_ids, and for "mlm" `features` `[batch, text, width]`, to which the head is applied.
    """
    import torch

    weights = Weights(get, names)
    stem = weights.prefix("embeddings.word_embeddings.weight", "bert.") + "embeddings"
    with torch.no_grad():
        parts = {"text_embed": text(weights, stem, batch["text_ids"], settings.text_eps)}
        if "cls.predictions.transform.dense.weight" in names:
            x = torch.tensor(batch["features"]).float()
            parts["mlm"] = words(weights, "cls.predictions", f"{stem}.word_embeddings.weight", x, settings)
        return arrays(parts)


def bert_google(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """Google's TensorFlow checkpoint, kernels `[in, out]`, the decoder always the word table; else as above."""
    import torch

    weights = Weights(get, names)
    stem, head = "bert/embeddings", "cls/predictions/transform"

    def pair(stem: str) -> Pair:
        return weights(f"{stem}/gamma"), weights(f"{stem}/beta")

    def table(name: str) -> Tensor:
        return weights(f"{stem}/{name}_embeddings")

    with torch.no_grad():
        norm_of_text = pair(f"{stem}/LayerNorm")
        parts = {"text_embed": embed_text(batch["text_ids"], table, norm_of_text, settings.text_eps)}
        if f"{head}/dense/kernel" in names:
            x = torch.tensor(batch["features"]).float()
            dense = weights(f"{head}/dense/kernel").T, weights(f"{head}/dense/bias")
            decoder = table("word"), weights("cls/predictions/output_bias")
            parts["mlm"] = predict_words(x, dense, pair(f"{head}/LayerNorm"), decoder, settings)
        return arrays(parts)
