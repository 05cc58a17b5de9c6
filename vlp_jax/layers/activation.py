# SPDX-License-Identifier: Apache-2.0
"""GELU with its derivative kept from the forward pass, and with the dropout that follows it in one rule."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vlp_jax.types import Array

GELUS = ("exact", "sigmoid", "tanh")


def gelu(x: Array, kind: str = "exact") -> Array:
    """GELU, evaluated in float32 and cast once: no bfloat16 product in between.

    Args:
        x: any shape and float type.
        kind: "exact" is the erf form; "sigmoid" is x sigmoid(odd polynomial), within 2.9e-5 of it, with the
            derivative of the erf form within 5.1e-5; "tanh" is the usual approximation, within 4.8e-4.
    """
    return dropped_gelu(x, None, 0.0, kind, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dropped_gelu(x: Array, keep: Array | None, rate: float | Array, kind: str, materialize: bool) -> Array:
    """`where(keep, gelu(x) / (1 - rate), 0)`, rounded once to the type of `x`; `keep` None keeps all.

    The backward pass multiplies by the derivative that the forward pass has made from the same terms, rounded to
    the type of `x`. Left to differentiation it would evaluate erf and exp again from a saved input. `materialize`
    forbids the compiler to undo that: quicker on a TPU, except in a loop over layers, where it parts the value from
    the product that writes it. The rate gets no gradient.
    """
    return _forward(x, keep, rate, kind, materialize)[0]


def _forward(
    x: Array, keep: Array | None, rate: float | Array, kind: str, materialize: bool
) -> tuple[Array, tuple]:
    both = _FORMS[kind](x.astype(jnp.float32))
    if keep is not None:
        # One division of numbers and a product of arrays: a division of arrays costs a TPU several passes.
        scale = 1.0 / (1.0 - rate)
        both = tuple(jnp.where(keep, y * scale, 0.0) for y in both)
    both = tuple(y.astype(x.dtype) for y in both)
    value, slope = jax.lax.optimization_barrier(both) if materialize else both
    return value, (slope, rate)


def _backward(kind: str, materialize: bool, residuals: tuple, cotangent: Array) -> tuple[Array, None, Array]:
    slope, rate = residuals
    return cotangent * slope, None, jnp.zeros_like(rate)


dropped_gelu.defvjp(_forward, _backward)


def _density(x: Array) -> Array:
    return 0.3989422804014327 * jnp.exp(-0.5 * x * x)


def _exact(x: Array) -> tuple[Array, Array]:
    below = 0.5 + 0.5 * jax.lax.erf(x * 0.7071067811865476)
    return x * below, below + x * _density(x)


def _sigmoid(x: Array) -> tuple[Array, Array]:
    # Beyond x = 6 the polynomial would turn round; there the sigmoid is 0 or 1 in float32 already.
    square = jnp.minimum(x * x, 36.0)
    below = jax.nn.sigmoid(x * (1.59502 + square * (0.0740 - 7.03e-4 * square)))
    return x * below, below + x * _density(x)


def _tanh(x: Array) -> tuple[Array, Array]:
    square = x * x
    tanh = jnp.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * square))
    inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * square)
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner


_FORMS = dict(zip(GELUS, (_exact, _sigmoid, _tanh), strict=True))
