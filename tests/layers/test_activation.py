# SPDX-License-Identifier: Apache-2.0
"""GELU and its derivative against double precision, in float32 and at every bfloat16 value; with dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.layers.activation import dropped_gelu, gelu

erf = np.vectorize(math.erf)
X = np.linspace(-9, 9, 40001).astype(np.float32)
# kind -> largest error of the value and of the derivative, in float32
BOUNDS = {"exact": (1e-6, 1e-6), "sigmoid": (2.9e-5, 5.1e-5), "tanh": (4.8e-4, 9e-4)}


def exact(x):
    x = np.asarray(x, np.float64)
    below = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * below, below + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def slope(x, kind="exact"):
    return jax.grad(lambda x: jnp.sum(gelu(x, kind).astype(jnp.float32)))(x)


@pytest.mark.parametrize("kind", BOUNDS)
def test_value_and_derivative_are_within_what_the_kind_promises(kind):
    for ours, true, bound in zip((gelu(X, kind), slope(X, kind)), exact(X), BOUNDS[kind], strict=True):
        error = np.abs(ours - true).max()
        assert error <= bound
        assert kind == "exact" or error > bound / 3  # the promise is no larger than the truth


def test_bfloat16_is_the_exact_value_rounded_once():
    x = jnp.arange(2**16, dtype=jnp.uint16).view(jnp.bfloat16)
    x = x[jnp.isfinite(x) & (jnp.abs(x.astype(jnp.float32)) < 9)]
    for ours, true in zip((gelu(x), slope(x)), exact(x.astype(jnp.float32)), strict=True):
        rounding = np.abs(np.asarray(true.astype(jnp.bfloat16), np.float64) - true)
        assert (np.abs(np.asarray(ours, np.float64) - true) <= 1.02 * rounding + 1e-6).all()


@pytest.mark.parametrize("materialize", [True, False])
def test_dropout_acts_on_value_and_derivative(materialize):
    x = jnp.asarray(X[::100])
    keep = jnp.arange(len(x)) % 3 > 0
    run = lambda x: dropped_gelu(x, keep, 0.2, "exact", materialize)  # noqa: E731
    np.testing.assert_allclose(run(x), np.where(keep, gelu(x) / 0.8, 0), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: run(x).sum())(x), np.where(keep, slope(x) / 0.8, 0), rtol=1e-6
    )
