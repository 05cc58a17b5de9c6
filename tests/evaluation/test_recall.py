# SPDX-License-Identifier: Apache-2.0
"""R@K against sorting and, with ties, against every possible order of the equal scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlp_jax.evaluation.retrieval import recall


def sorted_recall(scores: np.ndarray, gold: np.ndarray, cut: int) -> float:
    """The published way: sort, look for the best gold item (ALBEF's itm_eval; without ties the order is one)."""
    ranks = []
    for row, right in zip(scores, gold, strict=True):
        order = np.argsort(row)[::-1]
        ranks.append(min(int(np.flatnonzero(order == item)[0]) for item in np.flatnonzero(right)))
    return float(np.mean(np.array(ranks) < cut))


def mean_over_orders(row: np.ndarray, right: np.ndarray, cut: int) -> float:
    """Sorts the items in every order that their scores allow and counts the hits."""
    orders = [
        order for order in itertools.permutations(range(len(row))) if all(np.diff(row[list(order)]) <= 0)
    ]
    return float(np.mean([right[list(order[:cut])].any() for order in orders]))


def random_gold(draw: np.random.Generator, queries: int, items: int) -> np.ndarray:
    gold = draw.random((queries, items)) < 0.3
    gold[np.arange(queries), draw.integers(0, items, queries)] = True
    return gold


def test_without_ties_as_published():
    draw = np.random.default_rng(0)
    scores, gold = (
        draw.permuted(np.arange(40 * 23).reshape(40, 23), axis=1).astype(np.float32),
        np.eye(40, 23) > 0,
    )
    gold[23:] = random_gold(draw, 17, 23)
    for cut, value in recall(scores, gold).items():
        assert value == pytest.approx(sorted_recall(scores, gold, cut))


@pytest.mark.parametrize("seed", range(8))
def test_ties_count_with_their_probability(seed):
    draw = np.random.default_rng(seed)
    scores, gold = draw.integers(0, 3, (4, 6)).astype(np.float32), random_gold(draw, 4, 6)
    found = recall(scores, gold, cuts=(1, 2, 4))
    for cut, value in found.items():
        wanted = np.mean([mean_over_orders(row, right, cut) for row, right in zip(scores, gold, strict=True)])
        assert value == pytest.approx(wanted)


def test_equal_scores_give_chance_and_nan_gives_no_more():
    gold = np.eye(20, dtype=bool)
    assert recall(np.zeros((20, 20)), gold) == pytest.approx({1: 0.05, 5: 0.25, 10: 0.5})
    assert recall(np.full((20, 20), np.nan), gold) == pytest.approx({1: 0.05, 5: 0.25, 10: 0.5})
    broken = np.where(gold, np.nan, 0.0)
    assert recall(broken, gold) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_more_places_than_items():
    assert recall(np.array([[0.0, 1.0, 2.0]]), np.array([[True, False, False]])) == {1: 0.0, 5: 1.0, 10: 1.0}
