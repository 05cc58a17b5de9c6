# SPDX-License-Identifier: Apache-2.0
"""What all references share: tensors read when they are needed, and one pre-norm transformer block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from vlp_jax.convert.proof.settings import GELUS, Settings

Tensor = Any  # torch.Tensor; torch is imported only where something runs
Pair = tuple[Tensor, Tensor]  # weight [out, in] and bias of a linear map; scale and shift of a norm
Get = Callable[[str], np.ndarray]  # a tensor by its name in the file
Batch = Mapping[str, np.ndarray]  # as vlp_jax.data.spec has it
Parts = dict[str, np.ndarray]
Reference = Callable[[Get, Collection[str], Settings, Batch], Parts]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a source by their names in the file, in float32; none is kept."""

    get: Get
    names: Collection[str]

    def __call__(self, name: str) -> Tensor:
        """Reads one tensor."""
        import torch

        return torch.from_numpy(np.require(self.get(name), np.float32, ["C", "W"]))

    def pair(self, stem: str) -> Pair:
        """Reads `stem.weight` and `stem.bias`; BERT's first files call them gamma and beta in norms."""
        ends = ("gamma", "beta") if f"{stem}.gamma" in self.names else ("weight", "bias")
        weight, bias = (self(f"{stem}.{end}") for end in ends)
        return weight, bias

    def prefix(self, known: str, *prefixes: str) -> str:
        """The first of `prefixes` (a wrapper of task models) before which `known` is there; else none."""
        return next((prefix for prefix in prefixes if prefix + known in self.names), "")


@dataclasses.dataclass(frozen=True)
class Block:
    """The tensors of one block; linear weights are `[out, in]`, the heads of query, key and value side by side."""

    norm1: Pair
    query: Pair
    key: Pair
    value: Pair
    out: Pair
    norm2: Pair
    hidden: Pair
    last: Pair


def norm(x: Tensor, pair: Pair, eps: float) -> Tensor:
    """LayerNorm over the last axis."""
    from torch.nn import functional

    return functional.layer_norm(x, x.shape[-1:], *pair, eps)


def linear(x: Tensor, pair: Pair) -> Tensor:
    """`x W^T + b`."""
    from torch.nn import functional

    return functional.linear(x, *pair)


def gelu(x: Tensor, settings: Settings) -> Tensor:
    """The activation of blocks and of the vocabulary head."""
    from torch.nn import functional

    return functional.gelu(x, approximate=GELUS[settings.gelu])


def run_block(x: Tensor, mask: Tensor, block: Block, settings: Settings) -> Tensor:
    """`x += out(attention(norm1 x)); x += last(gelu(hidden(norm2 x)))` of ViT, without dropout.

    Args:
        x: `[batch, token, width]`.
        mask: `[batch, token]`, True = may be looked at; one at least in each row.
    """
    y = norm(x, block.norm1, settings.eps)
    query, key, value = (
        linear(y, pair).unflatten(-1, (settings.num_heads, -1)).transpose(1, 2)
        for pair in (block.query, block.key, block.value)
    )
    scores = query @ key.mT / query.shape[-1] ** 0.5
    chances = scores.masked_fill(~mask[:, None, None], -float("inf")).softmax(-1)
    x = x + linear((chances @ value).transpose(1, 2).flatten(2), block.out)
    y = norm(x, block.norm2, settings.eps)
    return x + linear(gelu(linear(y, block.hidden), settings), block.last)


def arrays(parts: Mapping[str, Tensor]) -> Parts:
    """The parts as numpy."""
    return {name: part.numpy() for name, part in parts.items()}
