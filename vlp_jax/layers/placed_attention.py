# SPDX-License-Identifier: Apache-2.0
"""Attention whose queries, keys and values come from three inputs: positions on queries and keys, none on values.

It drops attention probabilities and takes a mask of pairs, neither of which `attention.attend` knows.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.attention import HeadMerge, attend
from vlp_jax.layers.dropout import keep_mask
from vlp_jax.layers.linear import HeadLinear
from vlp_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_dropped(
    query: Float[Array, "batch head query width"],
    key: Float[Array, "batch head key width"],
    value: Float[Array, "batch head key width"],
    mask: Bool[Array, "batch query_or_1 key"],
    keep: Bool[Array, "batch head query key"] | None,
    rate: float,
) -> Float[Array, "batch head query width"]:
    """`attention.attend` with a mask of pairs and dropped probabilities, its gradient in closed form.

    Args:
        query, key, value: projected inputs of one type; scores and softmax are float32.
        mask: False = that query does not see that key. A query without any key gets zeros.
        keep: False = this probability is dropped, the others are divided by `1 - rate`; None drops nothing.
        rate: what `keep` was drawn with.
    """
    return _forward(query, key, value, mask, keep, rate)[0]


def _forward(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None, rate: float
) -> tuple[Array, tuple]:
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    weights = weights.astype(value.dtype)
    if keep is not None:
        # The sign says what is dropped, so that the backward pass reads one array and draws nothing again.
        weights = jnp.where(keep, weights, -weights)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", jnp.maximum(weights, 0), value, preferred_element_type=jnp.float32)
    mixed = (mixed / (total * (1.0 - rate))).astype(value.dtype)
    return mixed, (query, key, value, mixed, weights, total)


def _backward(rate: float, residuals: tuple, cotangent: Array) -> tuple:
    query, key, value, mixed, weights, total = residuals
    dtype, scale = value.dtype, query.shape[-1] ** -0.5
    wide = cotangent.astype(jnp.float32)
    # d score = weight (kept d weight - sum over keys of kept weight x d weight): the sum is output x d output.
    shared = jnp.sum(wide * mixed.astype(jnp.float32), axis=-1, keepdims=True) / total
    cotangent = (wide / (total * (1.0 - rate))).astype(dtype)
    kept = jnp.maximum(weights, 0)
    d_value = jnp.einsum("bhqk,bhqd->bhkd", kept, cotangent, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", cotangent, value, preferred_element_type=jnp.float32)
    d_scores = kept.astype(jnp.float32) * d_weights - jnp.abs(weights).astype(jnp.float32) * shared
    d_scores = d_scores.astype(dtype)
    d_query = jnp.einsum("bhqk,bhkd->bhqd", d_scores, key, preferred_element_type=jnp.float32) * scale
    d_key = jnp.einsum("bhqk,bhqd->bhkd", d_scores, query, preferred_element_type=jnp.float32) * scale
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(dtype), None, None


attend_dropped.defvjp(_forward, _backward)


def packed_xavier(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Xavier uniform of a query, key or value kernel `[in, out]` as a third of PyTorch's packed `[3 out, in]`.

    Bound sqrt(6 / (in + 3 out)): 0.0765 at width 256, where a kernel of its own would get 0.1083.
    """
    bound = (6.0 / (shape[0] + 3 * shape[1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class PlacedAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with DETR's initial values: query, key and value inputs apart.

    Source: `models/transformer.py` of facebookresearch/detr. With nothing to drop and no mask of pairs it runs
    `attention.attend`; `keep_weights` is explained there.
    """

    num_heads: int
    dropout: float
    keep_weights: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch query width"],
        key: Float[Array, "batch key width"],
        value: Float[Array, "batch key width"],
        key_mask: Bool[Array, "batch key"],
        pair_mask: Bool[Array, "#batch query key"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "batch query width"]:
        """Attends where `key_mask` and `pair_mask` are both True; drops probabilities when `train`."""
        width = query.shape[-1]
        inputs = {"query": query, "key": key, "value": value}
        q, k, v = (
            HeadLinear(self.num_heads, width, self.dtype, packed_xavier, name=name)(x)
            for name, x in inputs.items()
        )
        drops = train and self.dropout > 0
        if drops or pair_mask is not None:
            mask = key_mask[:, None] if pair_mask is None else key_mask[:, None] & pair_mask
            shape = (*q.shape[:3], k.shape[2])
            keep = keep_mask(self.make_rng("dropout"), self.dropout, shape) if drops else None
            mixed = attend_dropped(q, k, v, mask, keep, self.dropout if drops else 0.0)
        else:
            mixed = attend(q, k, v, key_mask, self.keep_weights)
        return HeadMerge(width, self.dtype, nn.initializers.xavier_uniform(), name="out")(mixed)
