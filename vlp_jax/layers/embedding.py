# SPDX-License-Identifier: Apache-2.0
"""Rows of a table by id, with a gradient that suits the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from vlp_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "row width"], ids: Int[Array, "*batch"], ignored: int
) -> Float[Array, "*batch width"]:
    """`table[ids]`; the row `ignored` gets no gradient (-1: all do).

    On a TPU a scatter runs row after row, so there the gradient is a product with one-hot rows, in the type of the
    cotangent and summed in float32; elsewhere it is a scatter.
    """
    return table[ids]


def _forward(table: Array, ids: Array, ignored: int) -> tuple[Array, tuple]:
    return table[ids], (ids, jnp.zeros((0, *table.shape), table.dtype))


def _backward(ignored: int, residuals: tuple, cotangent: Array) -> tuple[Array, None]:
    ids, like = residuals
    shape, dtype = like.shape[1:], like.dtype
    cotangent = jnp.where((ids == ignored)[..., None], jnp.zeros((), cotangent.dtype), cotangent)
    ids, cotangent = ids.reshape(-1), cotangent.reshape(-1, shape[1])

    def scattered(ids: Array, cotangent: Array) -> Array:
        return jnp.zeros(shape, jnp.float32).at[ids].add(cotangent.astype(jnp.float32))

    def multiplied(ids: Array, cotangent: Array) -> Array:
        with jax.named_scope("select"):
            onehot = (ids[:, None] == jnp.arange(shape[0])[None]).astype(cotangent.dtype)
            return jnp.einsum("nv,nd->vd", onehot, cotangent, preferred_element_type=jnp.float32)

    gradient = jax.lax.platform_dependent(ids, cotangent, tpu=multiplied, default=scattered)
    return gradient.astype(dtype), None


lookup.defvjp(_forward, _backward)
