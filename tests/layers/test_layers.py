# SPDX-License-Identifier: Apache-2.0
"""Attention, positions, embedding and the stack: masks, golden values, one layout for every unrolling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlp_jax.layers.attention import attend
from vlp_jax.layers.embedding import lookup
from vlp_jax.layers.norm import layer_norm
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


def test_a_looked_up_row_has_one_gradient_on_every_platform():
    draw = np.random.default_rng(0)
    table = draw.normal(size=(7, 3)).astype(np.float32)
    ids, weight = draw.integers(0, 7, (4, 5)), draw.normal(size=(4, 5, 3)).astype(np.float32)
    ids[0] = 2

    def gradient(table):
        return jax.grad(lambda t: jnp.sum(lookup(t, jnp.asarray(ids, jnp.int32), 2) * weight))(table)

    expected = np.zeros((7, 3), np.float64)
    np.add.at(expected, ids.reshape(-1), weight.reshape(-1, 3))
    expected[2] = 0
    np.testing.assert_allclose(gradient(table), expected, atol=1e-5)
    # What a TPU takes instead, run here: the branches are the jaxpr's own.
    branches = [eqn for eqn in jax.make_jaxpr(gradient)(table).eqns if eqn.primitive.name == "cond"]
    assert len(branches) == 1 and "dot_general" in str(branches[0].params["branches"])
    products = [b for b in branches[0].params["branches"] if "dot_general" in str(b)]
    onehot = jax.core.eval_jaxpr(products[0].jaxpr, products[0].consts, *_operands(ids, weight, 2))
    np.testing.assert_allclose(onehot[0], expected, atol=1e-5)


def _operands(ids, weight, ignored):
    weight = np.where((ids == ignored)[..., None], 0, weight)
    return jnp.asarray(ids.reshape(-1), jnp.int32), jnp.asarray(weight.reshape(-1, 3))


@pytest.mark.slow
def test_unrolling_and_rematerialisation_change_neither_tree_nor_result():
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    mask = jnp.ones((2, 5), bool).at[0, 3:].set(False)
    results = []
    for options in ({}, {"unroll": 3}, {"remat": True}, {"unroll": 2}):
        stack = Stack(3, 2, 32, 1e-6, 0.2, **options)
        params = nn.unbox(stack.init(jax.random.key(0), x, mask, False))

        def loss(params, stack=stack):
            return stack.apply(params, x, mask, True, rngs={"dropout": jax.random.key(2)}).sum()

        results.append((params, jax.value_and_grad(loss)(params)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0], other)


@pytest.mark.slow
def test_padded_tokens_change_nothing():
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    mask = jnp.ones((2, 5), bool).at[0, 3:].set(False)
    results = []
    for multiple in (1, 4):
        stack = Stack(2, 2, 32, 1e-6, 0.0, token_multiple=multiple)
        params = nn.unbox(stack.init(jax.random.key(0), x, mask, False))
        run = jax.value_and_grad(lambda p, stack=stack: jnp.sum(jnp.sin(stack.apply(p, x, mask, True))))
        results.append(run(params))
    assert stack.apply(params, x, mask, False).shape == x.shape
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize("keep_weights", [True, False])
def test_the_gradient_of_attention_equals_that_of_the_plain_formula(keep_weights):
    draw = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(draw.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(4))
    mask = np.ones((2, 5), bool)
    mask[0, 2:] = False

    def plain(q, k, v):
        scores = jnp.where(mask[:, None, None], jnp.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1e30)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v)

    ours = jax.grad(lambda *x: jnp.sum(attend(*x, mask, keep_weights) * weight), (0, 1, 2))(q, k, v)
    theirs = jax.grad(lambda *x: jnp.sum(plain(*x) * weight), (0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("keep_weights", [True, False])
def test_attention_in_bfloat16_is_as_near_as_its_rounding(keep_weights):
    draw = np.random.default_rng(0)
    args = [jnp.asarray(draw.normal(size=(2, 3, 33, 16)), jnp.bfloat16) for _ in range(3)]
    mask = np.ones((2, 33), bool)

    def run(*args):
        return jax.grad(
            lambda *x: jnp.sum(jnp.sin(attend(*x, mask, keep_weights).astype(jnp.float32))), (0, 1, 2)
        )(*args)

    for a, b in zip(run(*args), run(*(x.astype(jnp.float32) for x in args)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.sqrt(jnp.mean((a - b) ** 2)) <= 1e-2 * jnp.sqrt(jnp.mean(b**2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_equals_the_formula_in_double_precision(dtype):
    draw = np.random.default_rng(0)
    x = jnp.asarray(3 + draw.normal(size=(4, 6, 32)), dtype)
    scale, bias = draw.normal(size=(2, 32)).astype(np.float32)
    weight = jnp.asarray(draw.normal(size=x.shape), dtype)  # a cotangent in the type of the result

    def total(x, scale, bias):
        return jnp.sum((layer_norm(x, scale, bias, 1e-6, dtype) * weight).astype(jnp.float32))

    grads = jax.grad(total, (0, 1, 2))(x, scale, bias)
    wide, g = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    normal = (wide - wide.mean(-1, keepdims=True)) * inverse
    along = g * scale
    d_x = inverse * (
        along - along.mean(-1, keepdims=True) - normal * (along * normal).mean(-1, keepdims=True)
    )
    tolerance = 2e-6 if dtype == jnp.float32 else 8e-3
    pairs = [(layer_norm(x, scale, bias, 1e-6, dtype), normal * scale + bias), (grads[0], d_x)]
    pairs += [(grads[1], (g * normal).sum((0, 1))), (grads[2], g.sum((0, 1)))]
    for ours, exact in pairs:
        error = np.abs(np.asarray(ours, np.float64) - exact).max()
        assert error <= tolerance * max(1, np.abs(exact).max())
