# SPDX-License-Identifier: Apache-2.0
"""Matching against scipy's float64 optimum: thousands of costs made to be awkward, and inputs that are no costs."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from vlp_jax.objectives import matching

match = jax.jit(matching.match)
SHAPES = [(64, 12, 4), (32, 9, 9), (16, 100, 20), (32, 8, 21), (16, 1, 6), (16, 6, 1)]  # batch, query, target
EPSILON = 2.0**-23  # one ulp of 1


def uniform(draw, *shape):
    return draw.random(shape)


# Every function of this table makes costs of [batch, query, target].
COSTS = {
    "uniform": uniform,
    "normal": lambda draw, *shape: draw.normal(size=shape),
    "a few integers": lambda draw, *shape: draw.integers(0, 4, shape),
    "large integers of both signs": lambda draw, *shape: draw.integers(-(10**6), 10**6, shape),
    "all equal": lambda draw, *shape: np.full(shape, draw.normal()),
    "one ulp apart": lambda draw, *shape: 1 + draw.integers(0, 3, shape) * EPSILON,
    "ulps of a million": lambda draw, *shape: 1e6 + draw.integers(0, 40, shape) / 16,
    "twelve decades": lambda draw, *shape: 10 ** draw.uniform(-6, 6, shape),
    "both signs, sixty decades": lambda draw, *shape: (
        10 ** draw.uniform(-29, 29, shape) * draw.choice([-1, 1], shape)
    ),
    "negative": lambda draw, *shape: -(10 ** draw.uniform(-15, 15, shape)),
    "sorted": lambda draw, b, q, t: np.sort(draw.normal(size=(b, q * t)), -1).reshape(b, q, t),
    "product": lambda draw, b, q, t: draw.random((b, q, 1)) * draw.random((b, 1, t)),
    "negative product": lambda draw, b, q, t: -np.sort(draw.random((b, q, 1)), 1) * draw.random((b, 1, t)),
    # All assignments cost the same but for rounding.
    "sum": lambda draw, b, q, t: draw.normal(size=(b, q, 1)) + draw.normal(size=(b, 1, t)),
    # Machol and Wien's, the longest searches known.
    "multiplication table": lambda draw, b, q, t: (
        np.ones((b, 1, 1)) * np.arange(1, q + 1)[:, None] * np.arange(1, t + 1)
    ),
    "blocks": lambda draw, b, q, t: (
        np.where(np.arange(q)[:, None] // 3 == np.arange(t) // 3, 1.0, 100.0) + 1e-3 * draw.random((b, q, t))
    ),
    "nearly equal": lambda draw, *shape: 5 + 1e-5 * draw.random(shape),
    "one query many times": lambda draw, b, q, t: np.repeat(draw.normal(size=(b, 1, t)), q, 1),
    "one target many times": lambda draw, b, q, t: np.repeat(draw.normal(size=(b, q, 1)), t, 2),
    "mostly forbidden": lambda draw, *shape: np.where(draw.random(shape) < 0.2, draw.random(shape), 1e8),
    "tiny": lambda draw, *shape: 1e-30 * draw.random(shape),
}
EXACT = {"a few integers", "large integers of both signs", "all equal", "one ulp apart", "ulps of a million"}


def check_assignment(found, queries, valid):
    """One row: as many pairs as there can be, no query twice, padding left out."""
    assert found.dtype == np.int32
    pairs = np.flatnonzero(found != -1)
    assert len(pairs) == min(queries, max(valid, 0)) == len(set(found[pairs]))
    assert (pairs < valid).all() and (found[pairs] >= 0).all() and (found[pairs] < queries).all()
    return pairs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimum_is_scipys(shape):
    draw = np.random.default_rng(shape)
    for name, make in COSTS.items():
        cost = np.asarray(make(draw, *shape), np.float32)
        valid = draw.integers(0, shape[2] + 1, shape[0]).astype(np.int32)
        valid[0] = shape[2]
        for row, count, found in zip(
            cost.astype(np.float64), valid, np.asarray(match(cost, valid)), strict=True
        ):
            pairs = check_assignment(found, shape[1], count)
            wanted = row[linear_sum_assignment(row[:, :count])]
            taken = row[found[pairs], pairs]
            if name in EXACT:
                assert taken.sum() == wanted.sum(), name
            # Relative to the sum of sizes: a total may cancel to nothing.
            assert taken.sum() - wanted.sum() <= 1e-6 * max(abs(taken).sum(), abs(wanted).sum()), name


@pytest.mark.parametrize(("queries", "targets"), [(12, 5), (6, 6), (5, 8)])
def test_assignment_is_scipys_where_the_optimum_is_clear(queries, targets):
    cost = np.random.default_rng(0).normal(size=(150, queries, targets)).astype(np.float32)
    clear = 0
    for row, found in zip(cost, np.asarray(match(cost, np.full(150, targets, np.int32))), strict=True):
        chosen = linear_sum_assignment(row)
        best, second = row[chosen].sum(), np.inf
        for pair in zip(*chosen, strict=True):
            without = row.astype(np.float64)
            without[pair] = 1e3
            second = min(second, without[linear_sum_assignment(without)].sum())
        if second - best > 1e-4:
            clear += 1
            wanted = np.full(targets, -1)
            wanted[chosen[1]] = chosen[0]
            np.testing.assert_array_equal(found, wanted)
    assert clear > 140


def test_padding_does_not_matter():
    draw = np.random.default_rng(1)
    cost = draw.normal(size=(6, 10, 7)).astype(np.float32)
    valid = np.array([0, 1, 3, 5, 6, 7], np.int32)
    found = np.asarray(match(cost, valid))
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0):
        padded = np.where(np.arange(7) < valid[:, None, None], cost, np.float32(value))
        np.testing.assert_array_equal(match(padded, valid), found)
    assert (found[0] == -1).all()
    np.testing.assert_array_equal(match(cost[3:4, :, :5], valid[3:4])[0], found[3, :5])


def test_counts_outside_the_targets_are_clipped():
    cost = np.random.default_rng(2).normal(size=(2, 5, 3)).astype(np.float32)
    extreme = np.array([2**31 - 1, -(2**31)], np.int32)
    np.testing.assert_array_equal(match(cost, extreme), match(cost, np.array([3, 0], np.int32)))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_to_match(shape):
    found = match(np.zeros(shape, np.float32), np.ones(shape[0], np.int32))
    assert found.shape == (shape[0], shape[2]) and (found == -1).all()


@pytest.mark.parametrize(("queries", "targets"), [(9, 5), (6, 6), (5, 8)])
def test_costs_that_are_not_numbers_are_avoided(queries, targets):
    draw = np.random.default_rng(3)
    valid = np.full(200, targets, np.int32)
    share = draw.uniform(0, 1, (200, 1, 1))
    bad = draw.random((200, queries, targets)) < share
    cost = draw.normal(size=bad.shape).astype(np.float32)
    given = np.where(bad, draw.choice([np.nan, np.inf], bad.shape), cost).astype(np.float32)
    given = np.pad(
        given, ((0, 0), (0, 0), (0, 2)), constant_values=3e38
    )  # padding has no say in what is large
    for row, no, found in zip(cost.astype(np.float64), bad, np.asarray(match(given, valid)), strict=True):
        pairs = check_assignment(found, queries, targets)
        dear = np.where(no, 1e6, row)
        wanted = linear_sum_assignment(dear)
        assert no[found[pairs], pairs].sum() == no[wanted].sum()
        assert dear[found[pairs], pairs].sum() == pytest.approx(dear[wanted].sum(), rel=0, abs=1e-4)


def test_minus_infinity_is_taken():
    cost = np.random.default_rng(4).normal(size=(1, 6, 4)).astype(np.float32)
    cost[0, [2, 2, 5], [0, 1, 1]] = -np.inf
    found = match(cost, np.array([4], np.int32))[0]
    assert found[0] == 2 and found[1] == 5


@pytest.mark.parametrize("shape", [(64, 10, 6), (64, 6, 10)], ids=str)
def test_any_bits_give_an_assignment(shape):
    draw = np.random.default_rng(5)
    cost = draw.integers(0, 2**32, shape, np.uint32).view(np.float32)
    cost[:8], cost[8:16], cost[16:24] = np.nan, np.inf, -np.inf
    cost[24:32] = draw.choice([3.4e38, -3.4e38, 1e-45, 0.0], (8, *shape[1:]))
    valid = draw.integers(-2, shape[2] + 3, shape[0]).astype(np.int32)
    for count, found in zip(valid, np.asarray(match(cost, valid)), strict=True):
        check_assignment(found, shape[1], min(count, shape[2]))


def test_half_precision_is_matched_as_it_is():
    cost = jnp.asarray(np.random.default_rng(6).normal(size=(4, 10, 5)), jnp.bfloat16)
    valid = np.full(4, 5, np.int32)
    np.testing.assert_array_equal(match(cost, valid), match(cost.astype(jnp.float32), valid))


def test_no_gradient_flows_and_none_is_in_the_way():
    cost = jnp.asarray(np.random.default_rng(7).normal(size=(2, 6, 4)), jnp.float32)
    valid = jnp.array([4, 2])

    def total(cost):
        found = matching.match(cost, valid)
        taken = jnp.take_along_axis(cost, jnp.maximum(found, 0)[:, None], 1)[:, 0]
        return jnp.sum(jnp.where(found >= 0, taken, 0.0))

    gradient = np.asarray(jax.jit(jax.grad(total))(cost))
    wanted = np.zeros((2, 6, 4))
    for row, targets in enumerate(np.asarray(match(cost, valid))):
        for target, query in enumerate(targets):
            wanted[row, query, target] = query >= 0
    np.testing.assert_array_equal(gradient, wanted)


def test_a_sharded_batch_exchanges_one_flag():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    draw = np.random.default_rng(8)
    for shape in ((24, 30, 7), (24, 5, 7)):
        cost, valid = draw.random(shape, np.float32), draw.integers(0, 8, 24).astype(np.int32)
        placed = jax.device_put(cost, sharding), jax.device_put(valid, sharding)
        program = match.lower(*placed).compile()
        found = program(*placed)
        assert found.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(found, match(cost, valid))
        moves = re.findall(r"= (\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text())
        assert moves == [("pred[]", "all-reduce")]


def test_a_step_reads_one_line_of_costs():
    """So padded targets cost nothing: no array of the loop's body is as large as the costs."""
    batch, queries, targets = 4, 50, 40
    jaxpr = jax.make_jaxpr(matching.match)(
        np.zeros((batch, queries, targets), np.float32), np.zeros(batch, np.int32)
    )
    loops = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "while"]
    assert len(loops) == 1

    def sizes(inner):
        for equation in inner.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for part in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(part)

    assert 0 < max(sizes(loops[0].params["body_jaxpr"].jaxpr)) <= batch * 2 * queries
