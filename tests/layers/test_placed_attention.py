# SPDX-License-Identifier: Apache-2.0
"""Attention with dropped probabilities and a mask of pairs: the plain formula, its mean, rows without keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.layers.attention import attend
from vlp_jax.layers.dropout import keep_mask
from vlp_jax.layers.placed_attention import PlacedAttention, attend_dropped

RATE = 0.3


def inputs(queries=6, keys=9, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    q = draw.normal(size=(2, 3, queries, 4))
    k, v = draw.normal(size=(2, 2, 3, keys, 4))
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def masks(queries=6, keys=9):
    draw = np.random.default_rng(1)
    pairs = draw.random((2, queries, keys)) < 0.7
    pairs[0, 2] = False  # a query without any key
    pairs[:, 0] = True
    return pairs, draw.random((2, 3, queries, keys)) >= RATE


def plain(q, k, v, pairs, keep, rate):
    scores = jnp.where(pairs[:, None], jnp.einsum("bhqd,bhkd->bhqk", q, k) / 2, -1e30)
    weights = jnp.where(pairs[:, None], jax.nn.softmax(scores), 0.0)
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - rate), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("per_query", [True, False])
def test_value_and_gradient_equal_those_of_the_plain_formula(drops, per_query):
    arguments, (pairs, keep) = inputs(), masks()
    pairs = pairs if per_query else pairs[:, 1:2]
    keep, rate = (keep, RATE) if drops else (None, 0.0)
    weight = np.random.default_rng(2).normal(size=arguments[0].shape).astype(np.float32)

    def both(function):
        value = function(*arguments, pairs, keep, rate)
        gradient = jax.grad(lambda *x: jnp.sum(function(*x, pairs, keep, rate) * weight), (0, 1, 2))
        return value, *gradient(*arguments)

    for ours, theirs in zip(both(attend_dropped), both(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)
    if per_query:
        np.testing.assert_array_equal(attend_dropped(*arguments, pairs, keep, rate)[0, :, 2], 0)


def test_the_mean_over_draws_is_attention_without_dropout():
    q, k, v = inputs()
    mask = np.ones((2, 9), bool)
    mask[0, 5:] = False

    def one(key):
        return attend_dropped(q, k, v, mask[:, None], keep_mask(key, RATE, (2, 3, 6, 9)), RATE)

    draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    error = np.asarray(draws).std(0) / 4000**0.5
    far = (np.asarray(draws).mean(0) - np.asarray(attend(q, k, v, mask))) / error
    assert np.abs(far).max() < 4.5 and abs(np.mean(far**2) - 1) < 0.5


def test_bfloat16_is_as_near_as_its_rounding():
    pairs, keep = masks()

    def gradient(*x):
        def total(*x):
            return jnp.sum(jnp.sin(attend_dropped(*x, pairs, keep, RATE).astype(jnp.float32)))

        return jax.grad(total, (0, 1, 2))(*x)

    narrow = inputs(dtype=jnp.bfloat16)
    for a, b in zip(gradient(*narrow), gradient(*(x.astype(jnp.float32) for x in narrow)), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.sqrt(jnp.mean((a - b) ** 2)) <= 2e-2 * jnp.sqrt(jnp.mean(b**2))


def test_huge_scores_and_inputs_of_masked_keys_stay_out():
    (q, k, v), (pairs, keep) = inputs(), masks()
    pairs = np.broadcast_to(pairs[:, :1] & (np.arange(9) < 6), pairs.shape)
    base = attend_dropped(q, k, v, pairs, keep, RATE)
    k, v = k.at[:, :, 6:].set(1e9), v.at[:, :, 6:].set(1e9)
    np.testing.assert_array_equal(attend_dropped(q, k, v, pairs, keep, RATE), base)
    gradients = jax.grad(lambda *x: attend_dropped(*x, pairs, keep, RATE).sum(), (0, 1, 2))(q * 1e4, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


def test_the_two_paths_of_the_module_agree():
    draw = np.random.default_rng(0)
    query, key, value = (draw.normal(size=(2, n, 12)).astype(np.float32) for n in (5, 7, 7))
    key_mask = np.arange(7)[None] < np.array([[7], [4]])
    module = PlacedAttention(3, RATE)
    params = module.init(jax.random.key(0), query, key, value, key_mask, train=False)
    base = module.apply(params, query, key, value, key_mask, train=False)
    pairs = np.ones((1, 5, 7), bool)
    masked = module.apply(params, query, key, value, key_mask, pairs, train=False)
    np.testing.assert_allclose(masked, base, atol=1e-6)
    rngs = {"dropout": jax.random.key(1)}
    dropped = module.apply(params, query, key, value, key_mask, train=True, rngs=rngs)
    assert np.abs(dropped - base).max() > 1e-2
    swapped = module.apply(params, query, key, value + 1.0, key_mask, train=False)
    assert np.abs(swapped - base).max() > 1e-2
