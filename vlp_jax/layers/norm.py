# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation with float32 statistics and its gradient in closed form."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vlp_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float, dtype: DTypeLike) -> Array:
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis, in float32, cast once to `dtype`.

    The backward pass keeps `x` and two numbers a row. For a bfloat16 result mean and variance come from one pass,
    E[x^2] - E[x]^2: its error is far below the rounding of the result. Float32 takes the second pass, which parity
    with PyTorch needs.
    """
    return _forward(x, scale, bias, eps, dtype)[0]


def _forward(x: Array, scale: Array, bias: Array, eps: float, dtype: DTypeLike) -> tuple[Array, tuple]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    if dtype == jnp.float32:
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    else:
        variance = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean, 0.0)
    inverse = jax.lax.rsqrt(variance + eps)
    row = (1,) * (x.ndim - 1) + (-1,)
    y = (wide - mean) * inverse * scale.reshape(row) + bias.reshape(row)
    return y.astype(dtype), (x, mean, inverse, scale)


def _backward(eps: float, dtype: DTypeLike, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = residuals
    wide = cotangent.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    leading = tuple(range(x.ndim - 1))
    d_scale, d_bias = jnp.sum(wide * normal, axis=leading), jnp.sum(wide, axis=leading)
    wide = wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    along = jnp.mean(wide * normal, axis=-1, keepdims=True)
    d_x = inverse * (wide - jnp.mean(wide, axis=-1, keepdims=True) - normal * along)
    return d_x.astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """Layer normalisation; `eps` differs per component, so it has no default."""

    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., width]` to `[..., width]`."""
        shape = (x.shape[-1],)
        one, zero = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", nn.with_logical_partitioning(one, ("norm",)), shape)
        bias = self.param("bias", nn.with_logical_partitioning(zero, ("norm",)), shape)
        return layer_norm(x, scale, bias, self.eps, self.dtype)
