# SPDX-License-Identifier: Apache-2.0
"""Quantiles and histograms are numpy's, and no value is no overlap."""

import numpy as np

from vlp_jax.data.inspection import duplicates, statistics


def test_no_value_is_no_overlap():
    nothing = dict.fromkeys(duplicates.KEYS, np.zeros(5, np.int64))
    assert duplicates.overlaps(nothing, {"test": nothing}) == []
    empty = dict.fromkeys(duplicates.KEYS, np.zeros(0, np.int64))
    assert (
        duplicates.overlaps(empty, {"test": nothing}) == duplicates.overlaps(nothing, {"test": empty}) == []
    )


def test_quantiles_are_numpy_s():
    draw = np.random.default_rng(0)
    for values in (draw.integers(0, 50, 999), draw.gamma(2, 3, 1000), np.array([7])):
        found = statistics.Distribution.of(values)
        for share in (0, 0.01, 0.5, 0.99, 1):
            assert found.quantile(share) == np.quantile(values, share, method="inverted_cdf")
        assert found.above(5) == np.mean(values > 5)
        bins = statistics.edges([found])
        assert len(bins) <= statistics.BINS + 1 and bins[0] == values.min()
        inside = np.histogram(np.minimum(values, np.nextafter(bins[-1], 0)), bins)[0]
        assert found.summary(bins)["counts"] == inside.tolist()
