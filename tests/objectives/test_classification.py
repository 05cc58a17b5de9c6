# SPDX-License-Identifier: Apache-2.0
"""Cross entropy and accuracy against naive numpy, with ignored rows and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.objectives.classification import accuracy, cross_entropy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_naive_numpy(dtype):
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(0, 5, (3, 4, 7)), dtype)
    labels = draw.integers(-1, 7, (3, 4))
    exact = np.asarray(logits.astype(jnp.float32), np.float64)
    losses = (
        np.log(np.exp(exact).sum(-1))
        - np.take_along_axis(exact, np.maximum(labels, 0)[..., None], -1)[..., 0]
    )
    term = cross_entropy(logits, jnp.asarray(labels))
    np.testing.assert_allclose(term.sum, losses[labels >= 0].sum(), rtol=1e-5)
    assert term.count == (labels >= 0).sum()
    right = accuracy(logits, jnp.asarray(labels))
    assert right.sum == ((exact.argmax(-1) == labels) & (labels >= 0)).sum()
    assert right.count == term.count


def test_huge_logits_and_nothing_to_count():
    term = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert term.sum == 2e4
    term = cross_entropy(jnp.ones((2, 3)), jnp.array([-1, -1]))
    assert term.sum == 0 and term.count == 0 and term.mean() == 0


def test_ignored_rows_get_no_gradient():
    grads = jax.grad(lambda x: cross_entropy(x, jnp.array([-1, 1])).sum)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_allclose(grads[1], [1 / 3, -2 / 3, 1 / 3], rtol=1e-6)
