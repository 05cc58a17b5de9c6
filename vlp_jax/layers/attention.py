# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention over masked keys; the only place where a mask becomes minus infinity."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.linear import HeadLinear, Initializer, gathered, normal
from vlp_jax.layers.product import product
from vlp_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    query: Float[Array, "batch head query width"],
    key: Float[Array, "batch head key width"],
    value: Float[Array, "batch head key width"],
    key_mask: Bool[Array, "batch key"],
    keep_weights: bool = True,
) -> Float[Array, "batch head query width"]:
    """Scaled dot-product attention, scores and softmax in float32, with its gradient in closed form.

    A masked key gets exactly no weight, whatever stands there; a query with no key at all gets zeros. The backward
    pass reads the weights that the forward pass leaves in the compute type; without `keep_weights` it makes them
    again from queries and keys, which is quicker where every residual is copied (layers in a loop).
    """
    return _attend(query, key, value, key_mask, keep_weights)[0]


def _weights(query: Array, key: Array, key_mask: Array) -> tuple[Array, Array, Array]:
    """Unnormalised weights `exp(score - highest)` in float32, their highest score and their sum, at least tiny."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(key_mask[:, None, None, :], scores * query.shape[-1] ** -0.5, -jnp.inf)
    # Of a row without a key the maximum is -inf: 0 in its place keeps NaN out of the forward and the backward.
    highest = jnp.max(scores, axis=-1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, highest, jnp.where(total > 0, total, 1.0)


def _attend(
    query: Array, key: Array, value: Array, key_mask: Array, keep_weights: bool
) -> tuple[Array, tuple]:
    weights, highest, total = _weights(query, key, key_mask)
    weights = weights.astype(value.dtype)
    # Dividing the product instead of the weights saves a pass over [query, key] and rounds once less.
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    mixed = (mixed / total).astype(value.dtype)
    kept = (weights, total) if keep_weights else highest + jnp.log(total)
    return mixed, (query, key, value, key_mask, mixed, kept)


def _attend_backward(keep_weights: bool, residuals: tuple, cotangent: Array) -> tuple:
    query, key, value, key_mask, mixed, kept = residuals
    dtype, scale = value.dtype, query.shape[-1] ** -0.5
    wide = cotangent.astype(jnp.float32)
    # d score = weight (d weight - sum over keys of weight x d weight), and that sum is output x d output.
    shared = jnp.sum(wide * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    if keep_weights:
        weights, total = kept
        cotangent, shared = (wide / total).astype(dtype), shared / total
    else:
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(key_mask[:, None, None, :], scores * scale, -jnp.inf)
        weights = jnp.exp(scores - kept).astype(dtype)
    d_value = jnp.einsum("bhqk,bhqd->bhkd", weights, cotangent, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", cotangent, value, preferred_element_type=jnp.float32)
    d_scores = (weights.astype(jnp.float32) * (d_weights - shared)).astype(dtype)
    d_query = jnp.einsum("bhqk,bhkd->bhqd", d_scores, key, preferred_element_type=jnp.float32) * scale
    d_key = jnp.einsum("bhqk,bhqd->bhkd", d_scores, query, preferred_element_type=jnp.float32) * scale
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(dtype), None


attend.defvjp(_attend, _attend_backward)


class Attention(nn.Module):
    """Self- or cross-attention with separate query, key and value projections and an output projection."""

    num_heads: int
    keep_weights: bool = True
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
        mixed = attend(heads["query"], heads["key"], heads["value"], key_mask, self.keep_weights)
        return HeadMerge(width, self.dtype, name="out")(mixed)


class HeadMerge(nn.Module):
    """The output projection: `[batch, heads, token, head]` back to `[batch, token, width]`, kernel `[width, width]`."""

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = normal

    @nn.compact
    def __call__(self, x: Float[Array, "batch head token head_width"]) -> Float[Array, "batch token width"]:
        """Contracts heads and head width in one product."""
        axes = ("heads", "embed")
        rows = x.shape[1] * x.shape[3]
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, axes), (rows, self.features)
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)), (self.features,)
        )
        kernel = gathered(kernel, axes, self.dtype).reshape(x.shape[1], x.shape[3], self.features)
        return product(x, kernel, bias.astype(self.dtype), "bhtk,hkd->btd")
