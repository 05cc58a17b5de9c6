# SPDX-License-Identifier: Apache-2.0
"""ViLT's oracle of another house: transformers' ViltForMaskedLM, its block epsilon set to the original's."""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

import numpy as np
import torch
import transformers
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional

from tests.parity.harness import Row, first_position, grid_positions, linear, module, patch_kernel, same
from tests.parity.oracle import Oracle, randomise

EMBEDDINGS, LAYER, OURS = "vilt.embeddings", "vilt.encoder.layer.{layer}", "fusion/stack/layers"
ROWS = (
    Row(f"{EMBEDDINGS}.text_embeddings.word_embeddings.weight", "text_embed/word"),
    Row(f"{EMBEDDINGS}.text_embeddings.position_embeddings.weight", "text_embed/position"),
    Row(f"{EMBEDDINGS}.text_embeddings.token_type_embeddings.weight", "text_embed/segment"),
    *module(f"{EMBEDDINGS}.text_embeddings.LayerNorm", "text_embed/norm", same),
    *module(f"{EMBEDDINGS}.patch_embeddings.projection", "patch_embed/projection", patch_kernel),
    Row(f"{EMBEDDINGS}.cls_token", "patch_embed/class_token", lambda x: x[0, 0]),
    Row(f"{EMBEDDINGS}.position_embeddings", "patch_embed/class_position", first_position),
    Row(f"{EMBEDDINGS}.position_embeddings", "patch_embed/position", grid_positions),
    Row(f"{EMBEDDINGS}.token_type_embeddings.weight", "fusion/modality"),
    *module(f"{LAYER}.layernorm_before", f"{OURS}/norm1", same),
    *module(f"{LAYER}.attention.attention.query", f"{OURS}/attention/query"),
    *module(f"{LAYER}.attention.attention.key", f"{OURS}/attention/key"),
    *module(f"{LAYER}.attention.attention.value", f"{OURS}/attention/value"),
    *module(f"{LAYER}.attention.output.dense", f"{OURS}/attention/out"),
    *module(f"{LAYER}.layernorm_after", f"{OURS}/norm2", same),
    *module(f"{LAYER}.intermediate.dense", f"{OURS}/mlp/hidden"),
    *module(f"{LAYER}.output.dense", f"{OURS}/mlp/out"),
    *module("vilt.layernorm", "fusion/norm", same),
    *module("vilt.pooler.dense", "heads/pooler/dense"),
    *module("mlm_score.transform.dense", "heads/mlm/dense"),
    *module("mlm_score.transform.LayerNorm", "heads/mlm/norm", same),
    Row("mlm_score.decoder.weight", "heads/mlm/decoder/kernel", linear),
    Row("mlm_score.decoder.bias", "heads/mlm/decoder/bias"),
)
FRESH = dict.fromkeys(
    ("heads/itm/dense/kernel", "heads/itm/dense/bias"), "the port dropped the matching head"
)
LAYERS = (
    (f"{EMBEDDINGS}.text_embeddings", "text_embed", "text"),
    (f"{LAYER}.attention.output", f"{OURS}/attention", "tokens"),
    (LAYER, OURS, "tokens"),
    ("vilt.layernorm", "fusion/norm", "tokens"),
    ("mlm_score.transform", "heads/mlm/norm", "logits"),
)
BLOCKS = ("vilt.encoder", "vilt.layernorm")  # whose norms have 1e-6 in the original, 1e-12 in the port
# What feeds a norm: the embeddings, what the blocks add to the stream, and the head's transform.
QUIET = r"embeddings|cls_token|output\.dense|transform\.dense"


def settings(config: ConfigDict) -> transformers.ViltConfig:
    """Our sizes in the port's words; its dropout is off by default."""
    model, patch = config.model, config.model.patch_embed
    return transformers.ViltConfig(
        vocab_size=model.text_embed.vocab_size,
        max_position_embeddings=model.text_embed.length,
        hidden_size=model.width,
        num_hidden_layers=model.fusion.depth,
        num_attention_heads=model.fusion.num_heads,
        intermediate_size=model.fusion.mlp_width,
        image_size=patch.grid * patch.patch_size,
        patch_size=patch.patch_size,
        pad_token_id=model.text_embed.pad_id,
    )


def build(config: ConfigDict, quiet: bool) -> Oracle:
    """The port with our sizes and random weights; `quiet` streams show the epsilon of every norm."""
    net = transformers.ViltForMaskedLM(settings(config)).eval()
    # The port ties the decoder to the word embeddings; the original does not.
    net.mlm_score.decoder.weight = nn.Parameter(torch.zeros_like(net.mlm_score.decoder.weight))
    set_epsilon(net, BLOCKS, 1e-6)
    randomise(net, QUIET if quiet else "")
    streams = {"text": lambda x, batch: x, "tokens": aligned, "logits": slots}
    return Oracle(net, ROWS, lambda batch: forward(net, batch), FRESH, LAYERS, streams)


def forward(net: nn.Module, batch: Mapping) -> dict[str, torch.Tensor]:
    """Text, image and pooled features, vocabulary logits at the masked slots, and their mean cross entropy."""
    pixels, mask = pictures(batch)
    ids = torch.tensor(batch["text_ids"]).long()
    for slot in range(batch["mlm_labels"].shape[1]):
        for row in np.flatnonzero(batch["mlm_labels"][:, slot] >= 0):
            ids[row, batch["mlm_positions"][row, slot]] = int(batch["mlm_inputs"][row, slot])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.tensor(batch["text_mask"]).long(),
        token_type_ids=torch.zeros_like(ids),
        pixel_values=pixels,
        pixel_mask=mask,
    )
    # The port shuffles the patches of the largest pictures; in raster order each can be found again.
    with mock.patch("torch.multinomial", lambda p, count, **_: torch.arange(int(count)) % len(p)):
        body = net.vilt(**inputs)
    tokens = aligned(body.last_hidden_state, batch)
    text, image = tokens[:, : ids.shape[1]], tokens[:, ids.shape[1] :]
    logits = slots(net.mlm_score(text), batch)
    labels = torch.tensor(batch["mlm_labels"]).long()
    mlm = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
    return {"text": text, "image": image, "pooled": body.pooler_output, "logits": logits, "mlm": mlm}


def slots(x: torch.Tensor, batch: Mapping) -> torch.Tensor:
    """`[batch, text, ...]` at the slots of masked pieces."""
    return x[torch.arange(len(x))[:, None], torch.tensor(batch["mlm_positions"]).long()]


def aligned(x: torch.Tensor, batch: Mapping) -> torch.Tensor:
    """`[text, class token, patches in raster order]` in the order of our slots; anything at padding."""
    before = batch["text_ids"].shape[1] + 1
    raster = batch["patch_positions"][..., 0] * batch["grid_size"][:, 1:] + batch["patch_positions"][..., 1]
    image = np.where(batch["patch_mask"], before + raster, 0)
    text = np.broadcast_to(np.arange(before), (len(image), before))
    index = torch.tensor(np.concatenate([text, image], 1)).long()
    return x[torch.arange(len(x))[:, None], index]


def pictures(batch: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded pictures `[batch, 3, height, width]` in [-1, 1] put together from patches, and their pixel mask."""
    patch = int((batch["patches"].shape[-1] // 3) ** 0.5)
    height, width = batch["grid_size"].max(0) * patch
    image = np.zeros((len(batch["patches"]), height, width, 3), np.float32)
    mask = np.zeros(image.shape[:3], np.int64)
    for row, slot in zip(*np.nonzero(batch["patch_mask"]), strict=True):
        top, left = batch["patch_positions"][row, slot] * patch
        place = (row, slice(top, top + patch), slice(left, left + patch))
        image[place] = batch["patches"][row, slot].reshape(patch, patch, 3) / 127.5 - 1
        mask[place] = 1
    return torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(mask)


# Ways to be wrong, each of which some comparison must see.


def port_epsilon(oracle: Oracle) -> None:
    """1e-12 in the blocks, as the port has it."""
    set_epsilon(oracle.net, "vilt.encoder", 1e-12)


def second_layer_epsilon(oracle: Oracle) -> None:
    """1e-12 in one norm of the second block."""
    set_epsilon(oracle.net, "vilt.encoder.layer.1.layernorm_after", 1e-12)


def final_epsilon(oracle: Oracle) -> None:
    """1e-12 in the last norm."""
    set_epsilon(oracle.net, "vilt.layernorm", 1e-12)


def text_epsilon(oracle: Oracle) -> None:
    """1e-6 in the norm of the text embedding, which has 1e-12."""
    set_epsilon(oracle.net, "vilt.embeddings", 1e-6)


def head_epsilon(oracle: Oracle) -> None:
    """1e-6 in the norm of the prediction head, which has 1e-12."""
    set_epsilon(oracle.net, "mlm_score", 1e-6)


def tanh_gelu(oracle: Oracle) -> None:
    """The approximation by tanh in the blocks."""
    for layer in oracle.net.vilt.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU("tanh")


def head_tanh_gelu(oracle: Oracle) -> None:
    """The approximation by tanh in the prediction head."""
    oracle.net.mlm_score.transform.transform_act_fn = nn.GELU("tanh")


def padding_learns(oracle: Oracle) -> None:
    """The padding word gets a gradient."""
    oracle.net.vilt.embeddings.text_embeddings.word_embeddings.padding_idx = None


def set_epsilon(net: nn.Module, prefix: str | tuple[str, ...], eps: float) -> None:
    """Changes the epsilon of every norm whose name starts with `prefix` or one of several."""
    for name, part in net.named_modules():
        if name.startswith(prefix) and isinstance(part, nn.LayerNorm):
            part.eps = eps
