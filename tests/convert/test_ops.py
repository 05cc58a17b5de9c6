# SPDX-License-Identifier: Apache-2.0
"""Operations on tensors: what they do by hand, and that they can be undone to the bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from vlp_jax.convert import ops

WIDTH, HEADS, HEAD, HIDDEN, PATCH, GRID = 6, 3, 2, 5, 4, 3
HUGE = 10**6
# Name -> a shape in the file, the shapes of ours, a huge shape, shapes that it must refuse.
CASES = {
    "SAME": ((2, 3, 1), [(2, 3, 1)], (HUGE, HUGE), []),
    "LINEAR": ((HIDDEN, WIDTH), [(WIDTH, HIDDEN)], (HUGE, HUGE), [(6,), (2, 3, 4), ()]),
    "FUSED_KERNEL": (
        (3 * HIDDEN, WIDTH),
        [(WIDTH, HIDDEN)] * 3,
        (3 * HUGE, HUGE),
        [(4, 6), (6,), (3, 2, 2)],
    ),
    "FUSED_BIAS": ((3 * HIDDEN,), [(HIDDEN,)] * 3, (3 * HUGE**2,), [(4,), (3, 2), ()]),
    "CONVOLUTION": (
        (WIDTH, 3, PATCH, PATCH),
        [(PATCH * PATCH * 3, WIDTH)],
        (HUGE, 3, 10**4, 10**4),
        # 12 channels of 1 x 1 have as many pixels as 3 of 2 x 2.
        [(6, 48), (6, 1, 4, 4), (6, 12, 1, 1), (6, 3, 4, 2), (6, 3, 4), (4, 4, 3, 6)],
    ),
    "FLAT_CONVOLUTION": (
        (PATCH, PATCH, 3, WIDTH),
        [(PATCH * PATCH * 3, WIDTH)],
        (10**4, 10**4, 3, HUGE),
        [(48, 6), (4, 4, 1, 6), (1, 1, 12, 6), (4, 2, 3, 6), (6, 3, 4, 4)],
    ),
    "KERNEL": (
        (WIDTH, HIDDEN, 3, 5),
        [(3, 5, HIDDEN, WIDTH)],
        (HUGE, HUGE, 10**3, 10**3),
        [(6, 5), (6, 5, 3), (1, 6, 5, 3, 3)],
    ),
    "POINT": (
        (WIDTH, HIDDEN, 1, 1),
        [(HIDDEN, WIDTH)],
        (HUGE, HUGE, 1, 1),
        [(6, 5), (6, 5, 3, 3), (6, 5, 1, 2), (6, 5, 1)],
    ),
    "HEADS_IN": (
        (WIDTH, HEADS, HEAD),
        [(WIDTH, HEADS * HEAD)],
        (HUGE, 10**3, 10**3),
        [(6, 6), (1, 6, 3, 2)],
    ),
    "HEADS_BIAS": ((HEADS, HEAD), [(HEADS * HEAD,)], (HUGE, HUGE), [(6,), (1, 3, 2)]),
    "HEADS_OUT": (
        (HEADS, HEAD, WIDTH),
        [(HEADS * HEAD, WIDTH)],
        (10**3, 10**3, HUGE),
        [(6, 6), (1, 3, 2, 6)],
    ),
    "TOKEN": ((1, 1, WIDTH), [(WIDTH,)], (1, 1, HUGE**2), [(6,), (1, 6), (2, 1, 6), (1, 2, 6), (1, 1, 1, 6)]),
    "POSITIONS": (
        (1, 1 + GRID**2, WIDTH),
        [(WIDTH,), (GRID, GRID, WIDTH)],
        (1, 1 + 10**10, HUGE),
        [(10, 6), (1, 9, 6), (1, 11, 6), (2, 10, 6), (1, 1, 6), (1, 0, 6)],
    ),
    "DISTILLED_POSITIONS": (
        (1, 2 + GRID**2, WIDTH),
        [(WIDTH,), (GRID, GRID, WIDTH)],
        (1, 2 + 10**10, HUGE),
        [(11, 6), (1, 10, 6), (2, 11, 6), (1, 2, 6), (1, 1, 6), (1, 0, 6)],
    ),
}
NAMES = sorted(CASES)


def tensor(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_every_operation_is_here():
    assert NAMES == sorted(name for name in dir(ops) if isinstance(getattr(ops, name), ops.Op))


@pytest.mark.parametrize("name", NAMES)
def test_forward_gives_the_shapes_it_states(name):
    shape, wanted, _, _ = CASES[name]
    op = getattr(ops, name)
    assert [part.shape for part in op.forward(tensor(shape))] == wanted == list(op.shapes(shape))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DISTILLED_POSITIONS"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_inverse_is_bit_equal(name, dtype):
    x = (tensor(CASES[name][0]) * 100).astype(dtype)
    op = getattr(ops, name)
    back = op.inverse(op.forward(x), x.shape)
    assert back.dtype == x.dtype and back.shape == x.shape
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_refused_where_something_is_not_known(name):
    op, x = getattr(ops, name), tensor(CASES[name][0])
    if name == "DISTILLED_POSITIONS":
        with pytest.raises(ValueError, match="left away"):
            op.inverse(op.forward(x), x.shape)
    elif name.startswith("HEADS"):
        with pytest.raises(ValueError, match="heads"):
            op.inverse(op.forward(x), None)
    else:
        np.testing.assert_array_equal(op.inverse(op.forward(x), None), x)


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in NAMES for shape in CASES[name][3]])
def test_other_axes_are_refused(name, shape):
    op = getattr(ops, name)
    with pytest.raises(ValueError):
        op.shapes(shape)
    with pytest.raises(ValueError):
        op.forward(np.zeros(shape, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_a_huge_tensor_cost_no_memory(name):
    op, shape = getattr(ops, name), CASES[name][2]
    tracemalloc.start()
    try:
        parts = op.shapes(shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    elements = sum(int(np.prod(part, dtype=object)) for part in parts)
    gone = {"POSITIONS": 0, "DISTILLED_POSITIONS": shape[-1]}.get(name, 0)
    assert elements == int(np.prod(shape, dtype=object)) - gone
    assert peak < 100_000


def test_a_shape_beyond_all_memory_is_a_value_error():
    with pytest.raises(ValueError):
        ops.LINEAR.shapes((2**40, 2**40))


def test_query_key_and_value_come_in_this_order():
    x = np.repeat(np.arange(3.0), 2)[:, None] + np.zeros((6, 5))
    assert [set(part.ravel()) for part in ops.FUSED_KERNEL.forward(x)] == [{0.0}, {1.0}, {2.0}]
    assert [set(part) for part in ops.FUSED_BIAS.forward(x[:, 0])] == [{0.0}, {1.0}, {2.0}]


@pytest.mark.parametrize("name", ["CONVOLUTION", "FLAT_CONVOLUTION"])
def test_pixels_lie_in_row_column_channel_order(name):
    picture = tensor((PATCH, PATCH, 3))
    kernel = tensor((WIDTH, 3, PATCH, PATCH))
    wanted = [sum((kernel[out, c] * picture[..., c]).sum() for c in range(3)) for out in range(WIDTH)]
    stored = kernel if name == "CONVOLUTION" else np.moveaxis(kernel, (0, 1), (3, 2))
    (ours,) = getattr(ops, name).forward(stored)
    np.testing.assert_allclose(picture.reshape(-1) @ ours, wanted, rtol=1e-5)


def test_heads_lie_side_by_side():
    x = tensor((WIDTH, HEADS, HEAD))
    (kernel,) = ops.HEADS_IN.forward(x)
    (back,) = ops.HEADS_OUT.forward(np.moveaxis(x, 0, 2))
    for head in range(HEADS):
        np.testing.assert_array_equal(kernel[:, head * HEAD : (head + 1) * HEAD], x[:, head])
        np.testing.assert_array_equal(back[head * HEAD : (head + 1) * HEAD], x[:, head].T)


@pytest.mark.parametrize(("name", "before"), [("POSITIONS", 1), ("DISTILLED_POSITIONS", 2)])
def test_positions_are_row_by_row_behind_the_tokens(name, before):
    x = np.arange(before + GRID**2, dtype=np.float32)[None, :, None].repeat(WIDTH, 2)
    first, grid = getattr(ops, name).forward(x)
    assert set(first) == {0.0}
    assert grid[1, 0, 0] == before + GRID and grid[0, 1, 0] == before + 1
