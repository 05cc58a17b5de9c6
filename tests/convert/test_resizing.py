# SPDX-License-Identifier: Apache-2.0
"""Resizing against PyTorch and golden values; rows, modalities and answers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vlp_jax.convert import resizing
from vlp_jax.types import UserError

TORCH = {
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "aligned": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
}
OLD = [(7, 7), (12, 12), (3, 8), (1, 1), (1, 5), (5, 1), (2, 3)]
NEW = [(7, 7), (24, 24), (4, 4), (1, 1), (1, 9), (10, 3), (13, 19)]


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("method", resizing.METHODS)
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("new", NEW)
def test_grid_is_that_of_pytorch(method, old, new):
    torch = pytest.importorskip("torch")
    table = tensor(*old, 6)
    # In float64, so that PyTorch's own rounding does not count.
    theirs = torch.from_numpy(table.transpose(2, 0, 1)[None].astype(np.float64))
    theirs = torch.nn.functional.interpolate(theirs, size=new, **TORCH[method])[0].permute(1, 2, 0).numpy()
    ours = resizing.grid(table, new, method)
    assert ours.dtype == np.float32 and ours.shape == (*new, 6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


# Of the original code: sin(0.1 k) row by row, first four values of the first row, last four of the last row, sum.
GOLDEN = {
    ("bicubic", 14, (16, 16)): (
        (-0.04486129, 0.03637104, 0.12961416, 0.22143392),
        (0.43638429, 0.51894152, 0.59738135, 0.66197616),
        3.10533023,
    ),
    ("bicubic", 16, (24, 24)): (
        (-0.09624653, -0.04239073, 0.04566458, 0.10829249),
        (0.28945318, 0.34949318, 0.43153808, 0.48086488),
        1.71149015,
    ),
    ("aligned", 12, (11, 19)): (
        (0.0, 0.06100931, 0.12179695, 0.18219666),
        (0.99909556, 0.99831170, 0.99364984, 0.98677194),
        19.89764786,
    ),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_grid_gives_the_golden_values(case):
    method, side, size = case
    first, last, total = GOLDEN[case]
    table = np.sin(0.1 * np.arange(side * side)).astype(np.float32).reshape(side, side, 1)
    out = resizing.grid(table, size, method)[..., 0]
    np.testing.assert_allclose(out[0, :4], first, rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[-1, -4:], last, rtol=0, atol=1e-6)
    # PyTorch was run in float32; what it rounds is far below 1e-6 a value and adds up to 2.2e-5 here.
    assert abs(out.sum(dtype=np.float64) - total) < 4e-5


@pytest.mark.parametrize("method", resizing.METHODS)
def test_grid_of_its_own_size_is_bit_equal(method):
    table = tensor(5, 7, 3)
    np.testing.assert_array_equal(resizing.grid(table, (5, 7), method), table)


@pytest.mark.parametrize("method", resizing.METHODS)
def test_grid_keeps_a_constant_and_its_input(method):
    table = np.full((3, 4, 2), 1.5, np.float32)
    np.testing.assert_allclose(resizing.grid(table, (8, 5), method), 1.5, rtol=1e-7)
    assert (table == 1.5).all()


def test_grid_takes_half_precision_and_names_wrong_input():
    half = tensor(3, 3, 2).astype(np.float16)
    assert resizing.grid(half, (2, 2), "bicubic").dtype == np.float32
    with pytest.raises(UserError, match="Did you mean 'bicubic'"):
        resizing.grid(half, (2, 2), "bicubc")
    for table, size in ((half[0], (2, 2)), (half, (0, 2)), (half[:0], (2, 2))):
        with pytest.raises(ValueError):
            resizing.grid(table, size, "bilinear")


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 3), (4, 4), (0, 2)])
def test_rows_beyond_the_file_are_drawn(old, new):
    table, drawn = tensor(old, 4), tensor(new, 4, seed=1)
    before = drawn.copy()
    out = resizing.rows(table, drawn)
    kept = min(old, new)
    assert out.dtype == np.float32 and out.shape == drawn.shape
    np.testing.assert_array_equal(out[:kept], table[:kept])
    np.testing.assert_array_equal(out[kept:], drawn[kept:])
    np.testing.assert_array_equal(drawn, before)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError):
        resizing.rows(tensor(5, 4), tensor(3, 6))
    with pytest.raises(ValueError):
        resizing.rows(tensor(5, 1), tensor(3, 6))  # numpy alone would repeat it


def test_the_third_modality_is_a_copy_of_the_second():
    table = tensor(2, 4)
    np.testing.assert_array_equal(resizing.repeated_rows(table, 3), table[[0, 1, 1]])
    np.testing.assert_array_equal(resizing.repeated_rows(table, 2), table)
    np.testing.assert_array_equal(resizing.repeated_rows(resizing.repeated_rows(table, 3), 2), table)
    for wrong, count in ((table[:0], 2), (table, 0), (table[0], 2)):
        with pytest.raises(ValueError):
            resizing.repeated_rows(wrong, count)


OLD_ANSWERS, NEW_ANSWERS = ["no", "red", "yes", "2"], ["yes", "blue", "no"]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_answers_are_carried_over_by_label(axis):
    table = np.moveaxis(tensor(4, 5), 0, axis)
    drawn = np.moveaxis(tensor(3, 5, seed=1), 0, axis)
    out, kept = resizing.answers(table, drawn, OLD_ANSWERS, NEW_ANSWERS, axis)
    assert kept == 2 and out.shape == drawn.shape and out.dtype == np.float32
    old, new = np.moveaxis(table, axis, 0), np.moveaxis(out, axis, 0)
    np.testing.assert_array_equal(new, [old[2], np.moveaxis(drawn, axis, 0)[1], old[0]])


def test_answers_of_a_bias_and_without_a_common_one():
    table, drawn = tensor(4), tensor(3, seed=1)
    out, kept = resizing.answers(table, drawn, OLD_ANSWERS, NEW_ANSWERS, 0)
    np.testing.assert_array_equal(out, [table[2], drawn[1], table[0]])
    out, kept = resizing.answers(table, drawn, OLD_ANSWERS, ["a", "b", "c"], 0)
    assert kept == 0 and np.array_equal(out, drawn)
    out, kept = resizing.answers(table, table, OLD_ANSWERS, OLD_ANSWERS, 0)
    assert kept == 4 and np.array_equal(out, table)


def test_answers_name_what_does_not_fit():
    table, drawn = tensor(5, 4), tensor(5, 3)
    with pytest.raises(UserError, match="'red' twice.*Remove or rename"):
        resizing.answers(table, drawn, ["no", "red", "yes", "red"], NEW_ANSWERS, 1)
    with pytest.raises(UserError, match="new answers has 2 labels, but the head has 3 classes"):
        resizing.answers(table, drawn, OLD_ANSWERS, NEW_ANSWERS[:2], 1)
    with pytest.raises(UserError, match="old answers has 3 labels, but the head has 4 classes"):
        resizing.answers(table, drawn, OLD_ANSWERS[:3], NEW_ANSWERS, 1)
    with pytest.raises(ValueError):
        resizing.answers(table[:1], drawn, OLD_ANSWERS, NEW_ANSWERS, 1)
