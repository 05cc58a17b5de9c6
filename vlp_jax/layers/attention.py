# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention over masked keys; the only place where a mask becomes minus infinity."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.linear import HeadLinear, gathered, normal
from vlp_jax.types import Array


def attend(
    query: Float[Array, "batch head query width"],
    key: Float[Array, "batch head key width"],
    value: Float[Array, "batch head key width"],
    key_mask: Bool[Array, "batch key"],
) -> Float[Array, "batch head query width"]:
    """Scaled dot-product attention, scores and softmax in float32.

    A masked key gets exactly no weight, whatever stands there; a query with no key at all gets zeros.
    """
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    mask = key_mask[:, None, None, :]
    scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, -jnp.inf)
    # Of a row without a key the maximum is -inf: 0 in its place keeps NaN out of the forward and the backward.
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Dividing the product instead of the weights saves a pass over [query, key] and rounds once less.
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(value.dtype)


class Attention(nn.Module):
    """Self- or cross-attention with separate query, key and value projections and an output projection."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query width"],
        memory: Float[Array, "batch key memory_width"],
        key_mask: Bool[Array, "batch key"],
    ) -> Float[Array, "batch query width"]:
        """Attends from `x` to `memory` (the same array for self-attention)."""
        width = x.shape[-1]
        heads = {
            name: HeadLinear(self.num_heads, width, self.dtype, name=name)(x if name == "query" else memory)
            for name in ("query", "key", "value")
        }
        mixed = attend(heads["query"], heads["key"], heads["value"], key_mask)
        return HeadMerge(width, self.dtype, name="out")(mixed)


class HeadMerge(nn.Module):
    """The output projection: `[batch, heads, token, head]` back to `[batch, token, width]`, kernel `[width, width]`."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch head token head_width"]) -> Float[Array, "batch token width"]:
        """Contracts heads and head width in one product."""
        axes = ("heads", "embed")
        rows = x.shape[1] * x.shape[3]
        kernel = self.param("kernel", nn.with_logical_partitioning(normal, axes), (rows, self.features))
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)), (self.features,)
        )
        kernel = gathered(kernel, axes, self.dtype).reshape(x.shape[1], x.shape[3], self.features)
        y = jnp.einsum("bhtk,hkd->btd", x, kernel)
        return y + bias.astype(self.dtype).reshape(1, 1, -1)
