# SPDX-License-Identifier: Apache-2.0
"""ViLT by the names of its authors and of transformers: one body, and every head that the file has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from vlp_jax.convert.proof import bert, vit
from vlp_jax.convert.proof.blocks import Batch, Get, Parts, Tensor, Weights, arrays, linear, norm
from vlp_jax.convert.proof.settings import Settings

CLASSIFIER_EPS = 1e-5  # PyTorch's default, which both houses leave in the heads of two maps


@dataclasses.dataclass(frozen=True)
class Names:
    """Where things lie: the text's embedding, the modality table, the body, and the head of each result."""

    text: str
    modality: str
    body: vit.Layout
    pooler: str
    linear_heads: Mapping[str, str]  # on the pooled vector
    deep_heads: Mapping[str, str]
    tag: str = ""


def vilt_original(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """The authors' five kinds of file (dandelin/ViLT); a `blocks.Reference`."""
    weights = Weights(get, names)
    layout = Names(
        "text_embeddings",
        "token_type_embeddings.weight",
        vit.Timm(weights, "transformer."),
        "pooler.dense",
        {"itm": "itm_score.fc", "rank": "rank_output"},
        {"answer": "vqa_classifier", "pair": "nlvr2_classifier"},
    )
    return _run(weights, layout, settings, batch)


def vilt_transformers(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """The six classes of transformers, with or without "vilt."; a `blocks.Reference`."""
    weights = Weights(get, names)
    body = vit.transformers(weights)
    deep = {}
    if "classifier.0.weight" in names:
        # Two classes share this name; the one for pairs of pictures reads two pooled vectors side by side.
        out, inputs = get("classifier.0.weight").shape
        deep = {"pair" if out == inputs else "answer": "classifier"}
    layout = Names(
        f"{body.prefix}embeddings.text_embeddings",
        f"{body.prefix}embeddings.token_type_embeddings.weight",
        body,
        f"{body.prefix}pooler.dense",
        {"rank": "rank_output"},
        deep,
        "classifier",
    )
    return _run(weights, layout, settings, batch)


def _run(weights: Weights, layout: Names, settings: Settings, batch: Batch) -> Parts:
    import torch

    with torch.no_grad():
        parts = _body(weights, layout, settings, batch, 1)
        words = parts["norm"][:, : batch["text_ids"].shape[1]]
        if "mlm_score.transform.dense.weight" in weights.names:
            tied = f"{layout.text}.word_embeddings.weight"
            parts["mlm"] = bert.words(weights, "mlm_score", tied, words, settings)
        if layout.tag and f"{layout.tag}.weight" in weights.names:
            parts["tag"] = linear(words, weights.pair(layout.tag))
        for head, stem in layout.linear_heads.items():
            if f"{stem}.weight" in weights.names:
                parts[head] = linear(parts["pooled"], weights.pair(stem))
        for head, stem in layout.deep_heads.items():
            if f"{stem}.0.weight" in weights.names:
                pooled = parts["pooled"]
                if head == "pair":
                    second = _body(weights, layout, settings, batch, 2, "_1")["pooled"]
                    pooled = torch.cat([pooled, second], -1)
                parts[head] = _deep_head(pooled, weights, stem)
        return arrays(parts)


def _body(
    weights: Weights,
    layout: Names,
    settings: Settings,
    batch: Batch,
    modality: int,
    suffix: str = "",
) -> dict[str, Tensor]:
    """Everything up to "pooled", which a file without pooler lacks; `modality` is the picture's row."""
    import torch

    text = bert.text(weights, layout.text, batch["text_ids"], settings.text_eps)
    image = vit.embed(layout.body, batch, suffix)
    rows = weights(layout.modality)
    x = torch.cat([text + rows[0], image + rows[modality]], 1)
    mask = torch.cat([torch.tensor(batch["text_mask"]), vit.image_mask(batch, suffix)], 1)
    parts = {"text_embed": text, "patch_embed": image} | vit.run_layers(x, mask, layout.body, settings)
    if f"{layout.pooler}.weight" in weights.names:
        parts["pooled"] = linear(parts["norm"][:, 0], weights.pair(layout.pooler)).tanh()
    return parts


def _deep_head(x: Tensor, weights: Weights, stem: str) -> Tensor:
    """`linear(gelu(LayerNorm(linear x)))`, the exact GELU whatever the blocks have."""
    from torch.nn import functional

    y = norm(linear(x, weights.pair(f"{stem}.0")), weights.pair(f"{stem}.1"), CLASSIFIER_EPS)
    return linear(functional.gelu(y), weights.pair(f"{stem}.3"))
