# SPDX-License-Identifier: Apache-2.0
"""The order is a bijection an epoch, the same from any start, in exact shares, and looks random."""

import hashlib

import numpy as np
import pytest

from vlp_jax.data import order
from vlp_jax.types import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 1000, 4096, 5011, 100_003])
def test_permutation_is_a_bijection(size):
    for key in (0, 1, 2**64 - 1):
        rows = order.permute(np.arange(size), size, np.uint64(key))
        np.testing.assert_array_equal(np.sort(rows), np.arange(size))


def test_large_permutation():
    size = 3_318_333
    rows = order.permute(np.arange(size), size, order.mix(3))
    assert np.bincount(rows, minlength=size).max() == 1 and rows.max() == size - 1


@pytest.mark.parametrize("size", [3, 5, 8, 12])
def test_small_permutations_are_uniform(size):
    keys = order.mix(np.arange(4000))
    for place in (0, size - 1):
        counts = np.bincount(order.permute(np.full(4000, place), size, keys), minlength=size)
        expected = 4000 / size
        # chi squared with size - 1 degrees of freedom: mean size - 1, six standard deviations above
        assert ((counts - expected) ** 2 / expected).sum() < size - 1 + 6 * np.sqrt(2 * (size - 1))


def test_neighbours_are_independent():
    rows = order.permute(np.arange(100_000), 100_000, order.mix(5)) / 100_000
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    next_epoch = order.permute(np.arange(100_000), 100_000, order.mix(6)) / 100_000
    assert abs(np.corrcoef(rows, next_epoch)[0, 1]) < 0.02
    assert (rows == next_epoch).sum() < 10


def test_one_source_gives_every_row_once_an_epoch():
    source, epoch, row, _ = order.order(7, np.arange(3000), [1000], [1.0])
    assert not source.any()
    np.testing.assert_array_equal(epoch, np.arange(3000) // 1000)
    for number in range(3):
        np.testing.assert_array_equal(np.sort(row[epoch == number]), np.arange(1000))
    assert (row[:1000] != row[1000:2000]).mean() > 0.9


def test_any_start_gives_the_same():
    whole = order.order(1, np.arange(20_000), [900, 50, 3000], [5, 1, 2.5])
    for start in (0, 1, 4095, 4096, 9999):
        part = order.order(1, np.arange(start, start + 300), [900, 50, 3000], [5, 1, 2.5])
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_array_equal(a[start : start + 300], b)


def test_far_positions_are_quick_and_valid():
    source, epoch, row, draw = order.order(1, 10**12 + np.arange(64), [900, 50], [1, 1])
    assert row.max() < 900 and epoch.min() > 10**8 and set(source) == {0, 1}
    assert draw.dtype == np.uint32


def test_mixture_has_exact_shares_and_full_epochs():
    sizes, weights = [700, 90, 5000], [2, 1, 1]
    counts = order.quotas(weights)
    assert counts.sum() == 4096
    np.testing.assert_allclose(counts / 4096, [0.5, 0.25, 0.25], atol=1e-3)
    source, epoch, row, _ = order.order(0, np.arange(10 * 4096), sizes, weights)
    blocks = source.reshape(10, 4096)
    for number in range(3):
        np.testing.assert_array_equal((blocks == number).sum(1), counts[number])
        for once in range(epoch[source == number].max()):
            rows = row[(source == number) & (epoch == once)]
            np.testing.assert_array_equal(np.sort(rows), np.arange(sizes[number]))
    # Inside a block the sources are shuffled, differently in each.
    assert np.abs((blocks[:, :2048] == 0).sum(1) - 1024).max() < 150
    assert (blocks[0] != blocks[1]).mean() > 0.4


def test_small_weights_are_not_lost():
    counts = order.quotas([1e9, 1, 1])
    assert counts.sum() == 4096 and counts.min() == 1
    for bad in ([1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(UserError, match="above 0"):
            order.quotas(bad)


def test_seed_and_position_change_the_draw():
    draws = [order.order(seed, np.arange(1000), [10], [1])[3] for seed in (0, 1, -1)]
    assert len(np.unique(np.concatenate(draws))) > 2990
    high = (draws[0] >> 16) / 65536
    assert abs(high.mean() - 0.5) < 0.03


def test_order_is_stable():
    """Pinned: another order would change every run that is resumed."""
    parts = order.order(42, np.arange(10_000), [1234, 567], [3, 1])
    digest = hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()
    assert digest[:16] == "40be5f71bd40a38c"


def test_mix_and_uniform():
    assert int(order.mix(0)) == 0xE220A8397B1DCDAF  # splitmix64's first output for the state 0
    values = order.uniform(3, np.arange(100_000))
    assert 0 <= values.min() and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.var() - 1 / 12) < 0.002


@pytest.mark.parametrize(
    ("size", "examples"), [(10, 0), (1000, 7), (1000, 999), (5, 50), (0, 0), (25_010, 512)]
)
def test_spread(size, examples):
    rows = order.spread(size, examples)
    count = min(examples or size, size)
    assert len(rows) == len(set(rows)) == count
    if count:
        gaps = np.diff(np.sort(rows))
        assert rows.min() == 0 and rows.max() < size
        assert not gaps.size or gaps.max() <= -(-size // count)
    np.testing.assert_array_equal(rows, order.spread(size, examples))
