# SPDX-License-Identifier: Apache-2.0
"""Attention, positions, dropout and the stack: masks, golden values, rates, one layout for every unrolling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlp_jax.layers.attention import attend
from vlp_jax.layers.dropout import dropout
from vlp_jax.layers.position import grid_positions
from vlp_jax.layers.stack import Stack


def test_attention_ignores_masked_keys_and_survives_a_row_without_keys():
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, 3, 5, 4)).astype(np.float32) for _ in range(3))
    mask = np.ones((2, 5), bool)
    mask[0, 2:] = False
    out = attend(q, k, v, mask)
    score = np.einsum("hqd,hkd->hqk", q[0], k[0, :, :2]) / 2
    weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    np.testing.assert_allclose(out[0], weight @ v[0, :, :2], rtol=1e-5, atol=1e-6)
    k[0, :, 2:], v[0, :, 2:] = 1e9, 1e9
    np.testing.assert_array_equal(attend(q, k, v, mask), out)
    nothing = np.zeros((2, 5), bool)
    np.testing.assert_array_equal(attend(q, k, v, nothing), 0)
    assert np.isfinite(jax.grad(lambda q: attend(q, q, q, nothing).sum())(jnp.asarray(q))).all()


def test_positions_equal_the_golden_values_of_the_original():
    table = np.sin(0.1 * np.arange(144)).astype(np.float32).reshape(12, 12, 1)
    place = np.stack(np.divmod(np.arange(11 * 19), 19), -1)[None]
    grid = grid_positions(table, place.astype(np.int32), np.array([[11, 19]], np.int32)).reshape(11, 19)
    np.testing.assert_allclose(grid[0, :4], [0, 0.06100931, 0.12179695, 0.18219666], atol=1e-6)
    np.testing.assert_allclose(grid[-1, -4:], [0.99909556, 0.99831170, 0.99364984, 0.98677194], atol=1e-6)
    np.testing.assert_allclose(grid.sum(), 19.89764786, rtol=1e-6)


def test_a_single_row_or_column_takes_the_first_one():
    table = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    place = np.array([[[0, 0], [0, 1]]], np.int32)
    np.testing.assert_allclose(grid_positions(table, place, np.array([[1, 2]], np.int32))[0, :, 0], [0, 2])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_rate_and_mean(rate):
    x = jax.jit(dropout)(jnp.ones((1000, 1000)), rate, jax.random.key(0))
    np.testing.assert_allclose((x == 0).mean(), rate, atol=2e-3)
    np.testing.assert_allclose(x.mean(), 1.0, atol=3e-3)
    assert len(np.unique(x)) == 2


def test_unrolling_and_rematerialisation_change_neither_tree_nor_result():
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    mask = jnp.ones((2, 5), bool).at[0, 3:].set(False)
    results = []
    for unroll, remat in ((1, False), (3, False), (1, True)):
        stack = Stack(3, 2, 32, 1e-6, 0.2, unroll=unroll, remat=remat)
        params = nn.unbox(stack.init(jax.random.key(0), x, mask, False))

        def loss(params, stack=stack):
            return stack.apply(params, x, mask, True, rngs={"dropout": jax.random.key(2)}).sum()

        results.append((params, jax.value_and_grad(loss)(params)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0], other)
