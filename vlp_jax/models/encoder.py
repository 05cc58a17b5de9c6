# SPDX-License-Identifier: Apache-2.0
"""The transformer encoder over grid (and text) tokens, positions re-added at each layer."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.post_norm import PostNormEncoderLayer, stacked
from vlp_jax.types import Array


class _Layer(PostNormEncoderLayer):
    """A layer in the shape that `stacked` wants."""

    train: bool = False

    def __call__(self, x: Array, positions: Array | None, mask: Array) -> tuple[Array, None]:
        return super().__call__(x, positions, mask, train=self.train), None


class Encoder(nn.Module):
    """`depth` post-norm layers without a final norm, as DETR's (`unroll` and `remat` as in `stack.Stack`)."""

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch token width"],
        positions: Float[Array, "#batch token width"] | None,
        mask: Bool[Array, "batch token"],
        *,
        train: bool,
    ) -> Float[Array, "batch token width"]:
        """Encodes tokens; `mask` is True = real, and what comes out at padding means nothing."""
        layers = stacked(_Layer, self.depth, self.unroll, self.remat)(
            self.num_heads, self.mlp_width, self.dropout, self.eps, self.unroll < self.depth, self.dtype,
            train=train, name="layers",
        )  # fmt: skip
        return layers(x.astype(self.dtype), positions, mask)[0]
