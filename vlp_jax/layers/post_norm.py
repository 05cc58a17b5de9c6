# SPDX-License-Identifier: Apache-2.0
"""Post-norm transformer layers with positions added to queries and keys at each layer (DETR, Carion et al. 2020).

Masks are True = real, so that DETR's padding masks are their negation.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.block import ACTIVATION
from vlp_jax.layers.dropout import Dropout
from vlp_jax.layers.linear import Linear, fan_in_uniform
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.layers.placed_attention import PlacedAttention
from vlp_jax.types import Array


def placed(
    x: Float[Array, "batch token width"], positions: Float[Array, "#batch token width"] | None
) -> Float[Array, "batch token width"]:
    """`x` with positions, in the type of `x`; None where the content already holds them."""
    return x if positions is None else x + positions.astype(x.dtype)


class ReluMlp(nn.Module):
    """Two projections with ReLU and dropout between; what follows the second is the layer's business."""

    width: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token width"], train: bool
    ) -> Float[Array, "batch token width"]:
        """Maps features to features; kernels start Xavier uniform, biases as in PyTorch."""
        kernel_init = nn.initializers.xavier_uniform()
        width = x.shape[-1]
        hidden = Linear(
            self.width, ("embed", "mlp"), self.dtype, kernel_init, fan_in_uniform(width), name="hidden"
        )
        hidden = Dropout(self.dropout, name="hidden_dropout")(jax.nn.relu(hidden(x)), train)
        hidden = nn.with_logical_constraint(hidden, ("batch", "token", "act_mlp"))
        return Linear(
            width, ("mlp", "embed"), self.dtype, kernel_init, fan_in_uniform(self.width), name="out"
        )(hidden)


class PostNormEncoderLayer(nn.Module):
    """`norm1(x + attention)`, then `norm2(x + mlp)`; queries and keys are `x + positions`, values `x`.

    Dropout is on attention probabilities, within the MLP and on both sub-layers' outputs, one rate for all.
    `looped` as in `PreNormBlock`.
    """

    num_heads: int
    mlp_width: int
    dropout: float
    eps: float = 1e-5
    looped: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch token width"],
        positions: Float[Array, "#batch token width"] | None,
        mask: Bool[Array, "batch token"],
        *,
        train: bool,
    ) -> Float[Array, "batch token width"]:
        """Maps features to features; masked tokens are no keys, their own outputs mean nothing."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        here = placed(x, positions)
        attention = PlacedAttention(
            self.num_heads, self.dropout, not self.looped, self.dtype, name="attention"
        )
        y = attention(here, here, x, mask, train=train)
        x = x + Dropout(self.dropout, name="attention_dropout")(y, train)
        x = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        y = ReluMlp(self.mlp_width, self.dropout, self.dtype, name="mlp")(x, train)
        x = x + Dropout(self.dropout, name="mlp_dropout")(y, train)
        return nn.with_logical_constraint(LayerNorm(self.eps, self.dtype, name="norm2")(x), ACTIVATION)


class PostNormDecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each added and then normalised.

    Positions join the queries and keys of the self-attention and the queries of the cross-attention. Content that
    starts as zeros makes the first self-attention's values equal its bias: the same for every query, but not zero.
    """

    num_heads: int
    mlp_width: int
    dropout: float
    eps: float = 1e-5
    looped: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query width"],
        positions: Float[Array, "#batch query width"] | None,
        self_mask: Bool[Array, "#batch query query"] | None,
        memory_keys: Float[Array, "batch token width"],
        memory: Float[Array, "batch token width"],
        memory_mask: Bool[Array, "batch token"],
        *,
        train: bool,
    ) -> Float[Array, "batch query width"]:
        """Maps content to content, attending to `memory` by `memory_keys`, which is memory with its positions."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        here, everyone = placed(x, positions), jnp.ones(x.shape[:2], bool)
        y = self._attention("self")(here, here, x, everyone, self_mask, train=train)
        x = x + Dropout(self.dropout, name="self_attention_dropout")(y, train)
        x = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        y = self._attention("cross")(placed(x, positions), memory_keys, memory, memory_mask, train=train)
        x = x + Dropout(self.dropout, name="cross_attention_dropout")(y, train)
        x = LayerNorm(self.eps, self.dtype, name="norm2")(x)
        y = ReluMlp(self.mlp_width, self.dropout, self.dtype, name="mlp")(x, train)
        x = x + Dropout(self.dropout, name="mlp_dropout")(y, train)
        return nn.with_logical_constraint(LayerNorm(self.eps, self.dtype, name="norm3")(x), ACTIVATION)

    def _attention(self, kind: str) -> PlacedAttention:
        return PlacedAttention(
            self.num_heads, self.dropout, not self.looped, self.dtype, name=f"{kind}_attention"
        )


def stacked(layer: type[nn.Module], depth: int, unroll: int, remat: bool) -> Any:
    """A class that runs `depth` layers with parameters stacked `[depth, ...]`, as `stack.Stack` does.

    `layer` maps (carry, *inputs) to (carry, output); inputs are the same for all layers, outputs are stacked along
    axis 1, behind the batch. `remat` keeps only each layer's carry for the backward pass.
    """
    if remat:
        layer = nn.remat(layer, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        out_axes=1,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
