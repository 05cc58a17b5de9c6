# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.activation import dropped_gelu
from vlp_jax.layers.attention import Attention
from vlp_jax.layers.dropout import Dropout, keep_mask
from vlp_jax.layers.linear import Linear
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.types import Array

ACTIVATION = ("batch", "token", "act_embed")


class Mlp(nn.Module):
    """Two projections with GELU between; dropout after each, as timm has it."""

    width: int
    dropout: float
    gelu: str = "exact"
    looped: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token width"], train: bool
    ) -> Float[Array, "batch token width"]:
        """Maps features to features through `width` hidden units."""
        hidden = Linear(self.width, ("embed", "mlp"), self.dtype, name="hidden")(x)
        keep = None
        if train and self.dropout:
            keep = keep_mask(self.make_rng("dropout"), self.dropout, hidden.shape)
        hidden = dropped_gelu(hidden, keep, self.dropout, self.gelu, not self.looped)
        hidden = nn.with_logical_constraint(hidden, ("batch", "token", "act_mlp"))
        out = Linear(x.shape[-1], ("mlp", "embed"), self.dtype, name="out")(hidden)
        return Dropout(self.dropout, name="out_dropout")(out, train)


class PreNormBlock(nn.Module):
    """`x + Attention(norm1(x))`, then `x + Mlp(norm2(x))` (ViT, Dosovitskiy et al. 2021, eq. 2 and 3).

    `looped` says that the block is the body of a loop, where residuals cost more than to make them again.
    """

    num_heads: int
    mlp_width: int
    eps: float
    dropout: float
    gelu: str = "exact"
    looped: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token width"], mask: Bool[Array, "batch token"], train: bool
    ) -> Float[Array, "batch token width"]:
        """Maps features to features; masked tokens are no keys, their own outputs mean nothing."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        y = Attention(self.num_heads, not self.looped, self.dtype, name="attention")(y, y, mask)
        x = x + Dropout(self.dropout, name="attention_dropout")(y, train)
        y = LayerNorm(self.eps, self.dtype, name="norm2")(x)
        mlp = Mlp(self.mlp_width, self.dropout, self.gelu, self.looped, self.dtype, name="mlp")
        return nn.with_logical_constraint(x + mlp(y, train), ACTIVATION)
