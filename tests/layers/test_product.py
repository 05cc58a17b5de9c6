# SPDX-License-Identifier: Apache-2.0
"""Projections: both arrangements against the formula in double precision, in both types, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.layers import product as products

# The spec, and the shapes of its three arguments.
CASES = [
    ("ad,df->af", (5, 6), (6, 4), (4,)),
    ("abd,df->abf", (2, 3, 6), (6, 4), (4,)),
    ("btd,dhk->bhtk", (2, 3, 6), (6, 2, 5), (2, 5)),
    ("bhtk,hkd->btd", (2, 3, 4, 5), (3, 5, 7), (7,)),
]


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec, shapes", [(spec, shapes) for spec, *shapes in CASES])
def test_value_and_gradient_equal_the_formula(spec, shapes, dtype, platform, monkeypatch):
    # The branch is chosen here, so that the one for other platforms is computed too.
    monkeypatch.setattr(products.jax.lax, "platform_dependent", lambda *a, **branches: branches[platform](*a))
    draw = np.random.default_rng(0)
    arguments = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    wide = [np.asarray(x, np.float64) for x in arguments]
    value, pull = jax.vjp(lambda *a: products.product(*a, spec), *arguments)
    cotangent = jnp.asarray(draw.normal(size=value.shape), dtype)
    left, right, out = spec.replace("->", ",").split(",")
    new = "".join(c for c in right if c not in left)
    bias = np.einsum(f"{new},{out}->{out}", wide[2], np.ones(value.shape))
    upstream = np.asarray(cotangent, np.float64)
    expected = [
        np.einsum(spec, *wide[:2]) + bias,
        np.einsum(f"{out},{right}->{left}", upstream, wide[1]),
        np.einsum(f"{left},{out}->{right}", wide[0], upstream),
        np.einsum(f"{out}->{new}", upstream),
    ]
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for ours, true in zip((value, *pull(cotangent)), expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        assert np.abs(np.asarray(ours, np.float64) - true).max() <= tolerance * max(1, np.abs(true).max())
