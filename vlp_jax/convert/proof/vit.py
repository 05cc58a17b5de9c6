# SPDX-License-Identifier: Apache-2.0
"""Vision transformers by the names of four houses: timm (and DeiT), transformers before and since 5, Google's npz."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Protocol

import numpy as np

from vlp_jax.convert.proof.blocks import (
    Batch,
    Block,
    Get,
    Pair,
    Parts,
    Tensor,
    Weights,
    arrays,
    norm,
    run_block,
)
from vlp_jax.convert.proof.settings import Settings


@dataclasses.dataclass(frozen=True)
class Patches:
    """The embedding of a picture.

    `projection` is a convolution's weight `[width, 3, patch, patch]` and bias, `class_token` `[width]`, `positions`
    `[special + grid^2, width]`: that of the class token, of a distillation token if there is one, then the grid.
    """

    projection: Pair
    class_token: Tensor
    positions: Tensor
    special: int = 1


class Layout(Protocol):
    """How a house names a vision transformer."""

    weights: Weights
    prefix: str
    counted: str  # a name that block {i} has

    def patches(self) -> Patches: ...
    def block(self, index: int) -> Block: ...
    def norm(self) -> Pair: ...


@dataclasses.dataclass(frozen=True)
class Timm:
    """timm, DeiT's release and ViLT's body: query, key and value are one map, in this order."""

    weights: Weights
    prefix: str = ""
    counted = "blocks.{i}.norm1.weight"

    def patches(self) -> Patches:
        """A distillation token is left out, its position skipped."""
        return Patches(
            self.weights.pair(f"{self.prefix}patch_embed.proj"),
            self.weights(f"{self.prefix}cls_token")[0, 0],
            self.weights(f"{self.prefix}pos_embed")[0],
            2 if f"{self.prefix}dist_token" in self.weights.names else 1,
        )

    def block(self, index: int) -> Block:
        read, stem = self.weights.pair, f"{self.prefix}blocks.{index}"
        thirds = zip(*(part.chunk(3) for part in read(f"{stem}.attn.qkv")), strict=True)
        out, hidden, last = (read(f"{stem}.{name}") for name in ("attn.proj", "mlp.fc1", "mlp.fc2"))
        return Block(read(f"{stem}.norm1"), *thirds, out, read(f"{stem}.norm2"), hidden, last)

    def norm(self) -> Pair:
        return self.weights.pair(f"{self.prefix}norm")


@dataclasses.dataclass(frozen=True)
class Transformers:
    """ViTModel, DeiTModel and ViltModel: the names on disk, which 5.x still writes."""

    weights: Weights
    prefix: str = ""
    counted = "encoder.layer.{i}.layernorm_before.weight"
    parts = (
        "layernorm_before",
        *(f"attention.attention.{name}" for name in ("query", "key", "value")),
        "attention.output.dense",
        "layernorm_after",
        "intermediate.dense",
        "output.dense",
    )

    def patches(self) -> Patches:
        """A distillation token is left out, its position skipped."""
        stem = f"{self.prefix}embeddings"
        return Patches(
            self.weights.pair(f"{stem}.patch_embeddings.projection"),
            self.weights(f"{stem}.cls_token")[0, 0],
            self.weights(f"{stem}.position_embeddings")[0],
            2 if f"{stem}.distillation_token" in self.weights.names else 1,
        )

    def block(self, index: int) -> Block:
        stem = self.prefix + self.counted.format(i=index).removesuffix("layernorm_before.weight")
        return Block(*(self.weights.pair(stem + part) for part in self.parts))

    def norm(self) -> Pair:
        return self.weights.pair(f"{self.prefix}layernorm")


@dataclasses.dataclass(frozen=True)
class Transformers5(Transformers):
    """The names that ViTModel and DeiTModel of transformers 5 have in memory, so those of a bare `state_dict`."""

    counted = "layers.{i}.layernorm_before.weight"
    parts = (
        "layernorm_before",
        *(f"attention.{name}_proj" for name in "qkvo"),
        "layernorm_after",
        "mlp.fc1",
        "mlp.fc2",
    )


@dataclasses.dataclass(frozen=True)
class Google:
    """google-research/vision_transformer's npz: flax kernels `[in, out]`, attention with an axis of heads.

    Released files count all parts of a block together (flax before Linen); files that today's code of that
    repository writes count each kind apart.
    """

    weights: Weights
    prefix: str = ""
    counted = "Transformer/encoderblock_{i}/LayerNorm_0/scale"

    def patches(self) -> Patches:
        return Patches(
            (self.weights("embedding/kernel").permute(3, 2, 0, 1), self.weights("embedding/bias")),
            self.weights("cls")[0, 0],
            self.weights("Transformer/posembed_input/pos_embedding")[0],
        )

    def block(self, index: int) -> Block:
        stem = f"Transformer/encoderblock_{index}"
        together = f"{stem}/MlpBlock_3/Dense_0/kernel" in self.weights.names
        attention, after, mlp = (1, 2, 3) if together else (0, 1, 0)
        attention = f"{stem}/MultiHeadDotProductAttention_{attention}"
        mlp = f"{stem}/MlpBlock_{mlp}"
        qkv = (self._pair(f"{attention}/{name}", "kernel") for name in ("query", "key", "value"))
        query, key, value = ((kernel.flatten(1).T, bias.flatten()) for kernel, bias in qkv)
        rest = (
            self._pair(name, "kernel") for name in (f"{attention}/out", f"{mlp}/Dense_0", f"{mlp}/Dense_1")
        )
        out, hidden, last = ((kernel.flatten(0, -2).T, bias) for kernel, bias in rest)
        norm1, norm2 = (self._pair(f"{stem}/LayerNorm_{number}", "scale") for number in (0, after))
        return Block(norm1, query, key, value, out, norm2, hidden, last)

    def norm(self) -> Pair:
        return self._pair("Transformer/encoder_norm", "scale")

    def _pair(self, stem: str, weight: str) -> Pair:
        return self.weights(f"{stem}/{weight}"), self.weights(f"{stem}/bias")


def transformers(weights: Weights) -> Layout:
    """The layout of a file of transformers, whatever its wrapper and its age."""
    prefix = weights.prefix("embeddings.cls_token", "vilt.", "vit.", "deit.")
    new = prefix + Transformers5.counted.format(i=0) in weights.names
    return (Transformers5 if new else Transformers)(weights, prefix)


def embed(layout: Layout, batch: Batch, suffix: str = "") -> Tensor:
    """`[class; projected patches] + positions`, `[batch, 1 + slot, width]`; an empty slot holds anything.

    Pixels are scaled to [-1, 1]. The positions of each picture are the learned grid resized to the picture's own,
    bilinearly with aligned corners (ViLT's `visual_embed`). `suffix` is that of the batch's keys.
    """
    import torch
    from torch.nn import functional

    parts = layout.patches()
    size = parts.projection[0].shape[-1]
    pixels = torch.tensor(batch[f"patches{suffix}"]).float() / 127.5 - 1
    pictures = pixels.reshape(-1, size, size, 3).permute(0, 3, 1, 2)
    patches = functional.conv2d(pictures, *parts.projection).reshape(*pixels.shape[:2], -1)
    side = round((len(parts.positions) - parts.special) ** 0.5)
    grid = parts.positions[parts.special :].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    keys = (f"{key}{suffix}" for key in ("patch_positions", "patch_mask", "grid_size"))
    rows = []
    for places, mask, shape in zip(*(batch[key] for key in keys), strict=True):
        resized = functional.interpolate(grid, tuple(map(int, shape)), mode="bilinear", align_corners=True)[0]
        # An empty slot may name a place outside the picture.
        row, column = torch.tensor(np.where(mask[:, None], places, 0)).long().unbind(-1)
        rows.append(resized[:, row, column].T)
    first = (parts.class_token + parts.positions[0]).expand(len(patches), 1, -1)
    return torch.cat([first, patches + torch.stack(rows)], 1)


def image_mask(batch: Batch, suffix: str = "") -> Tensor:
    """`[batch, 1 + slot]`: the class token and the slots that are not empty."""
    import torch

    return torch.tensor(np.pad(batch[f"patch_mask{suffix}"], ((0, 0), (1, 0)), constant_values=True))


def run_layers(x: Tensor, mask: Tensor, layout: Layout, settings: Settings) -> dict[str, Tensor]:
    """Runs all blocks and the norm behind them: "layer 0" ... and "norm", each `[batch, token, width]`."""
    parts = {}
    for index in itertools.count():
        if layout.prefix + layout.counted.format(i=index) not in layout.weights.names:
            break
        x = parts[f"layer {index}"] = run_block(x, mask, layout.block(index), settings)
    return parts | {"norm": norm(x, layout.norm(), settings.eps)}


def vit_timm(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """A ViT or DeiT of timm (a `blocks.Reference`, as all below); a distillation token does not take part."""
    return _run(Timm(Weights(get, names)), settings, batch)


def vit_transformers(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """A ViT or DeiT of transformers, by the names on disk or those of 5.x in memory, under any of its wrappers."""
    return _run(transformers(Weights(get, names)), settings, batch)


def vit_google(get: Get, names: Collection[str], settings: Settings, batch: Batch) -> Parts:
    """Google's npz, of ImageNet-21k, fine-tuned or AugReg."""
    return _run(Google(Weights(get, names)), settings, batch)


def _run(layout: Layout, settings: Settings, batch: Batch) -> Parts:
    import torch

    with torch.no_grad():
        x = embed(layout, batch)
        return arrays({"patch_embed": x} | run_layers(x, image_mask(batch), layout, settings))
