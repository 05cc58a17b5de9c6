# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.activation import gelu
from vlp_jax.layers.attention import Attention
from vlp_jax.layers.dropout import Dropout
from vlp_jax.layers.linear import Linear, layer_norm
from vlp_jax.types import Array

ACTIVATION = ("batch", "token", "act_embed")


class Mlp(nn.Module):
    """Two projections with GELU between; dropout after each, as timm has it."""

    width: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token width"], train: bool
    ) -> Float[Array, "batch token width"]:
        """Maps features to features through `width` hidden units."""
        hidden = gelu(Linear(self.width, ("embed", "mlp"), self.dtype, name="hidden")(x))
        hidden = nn.with_logical_constraint(hidden, ("batch", "token", "act_mlp"))
        hidden = Dropout(self.dropout, name="hidden_dropout")(hidden, train)
        out = Linear(x.shape[-1], ("mlp", "embed"), self.dtype, name="out")(hidden)
        return Dropout(self.dropout, name="out_dropout")(out, train)


class PreNormBlock(nn.Module):
    """`x + Attention(norm1(x))`, then `x + Mlp(norm2(x))` (ViT, Dosovitskiy et al. 2021, eq. 2 and 3)."""

    num_heads: int
    mlp_width: int
    eps: float
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token width"], mask: Bool[Array, "batch token"], train: bool
    ) -> Float[Array, "batch token width"]:
        """Maps features to features; masked tokens are no keys, their own outputs mean nothing."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        y = layer_norm(self.eps, self.dtype, name="norm1")(x)
        y = Attention(self.num_heads, self.dtype, name="attention")(y, y, mask)
        x = x + Dropout(self.dropout, name="attention_dropout")(y, train)
        y = layer_norm(self.eps, self.dtype, name="norm2")(x)
        x = x + Mlp(self.mlp_width, self.dropout, self.dtype, name="mlp")(y, train)
        return nn.with_logical_constraint(x, ACTIVATION)
