# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the matching at toy size: its costs are DETR's, optax answers in our form, the table is told."""

import os

import jax
import numpy as np
import pytest

from benchmarks import matching as benchmark
from benchmarks import measure, results
from vlp_jax import cli
from vlp_jax.objectives import matching


def test_boxes_overlap_as_by_hand():
    square, beside = (
        np.array([[[0.2, 0.2, 0.2, 0.2]]]),
        np.array([[[0.4, 0.2, 0.2, 0.2], [0.2, 0.2, 0.4, 0.4]]]),
    )
    # Side by side: no overlap, no gap. Inside: a quarter of the union.
    np.testing.assert_allclose(benchmark.giou(square, beside), [[[0.0, 0.25]]], atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_optax_finds_the_same_in_our_form(spread):
    cost, valid = benchmark.draw(benchmark.Case(4, 12, 7, 5, spread), 0)
    assert cost.shape == (4, 12, 7) and 1 <= valid.min() and valid.max() <= 5
    assert cost.max() < benchmark.PADDING
    found = jax.jit(benchmark.by_optax)(cost, valid)
    np.testing.assert_array_equal(found, jax.jit(matching.match)(cost, valid))


def test_a_table_comes_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(measure, "others_clock", lambda: None)
    monkeypatch.setattr(benchmark, "CASES", (benchmark.Case(8, 9, 6, 4, 1.0),))
    (tmp_path / "RESULTS.md").write_text("# Results\n", encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    argv = ["--repeats=1", "--solves=2", "--batch=2", "--record"]
    assert cli.run(benchmark.main, benchmark.define, usage=benchmark.__doc__, argv=argv) == 0
    assert "2x9x6, 4 real" in capsys.readouterr().out
    recorded = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert recorded.count("| 2x9x6, 4 real | ") == 2 and "x by median" in recorded
