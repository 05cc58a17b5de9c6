# SPDX-License-Identifier: Apache-2.0
"""Boxes against naive loops in float64 and torch's gradients; empty, inverted and tiny ones stay finite."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.objectives import boxes


def naive(a, b):
    """IoU and GIoU of two boxes given by corners, both with area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = width * height / union
    return iou, iou - (around - union) / around


def drawn(draw, *shape):
    start = draw.uniform(0, 0.7, (*shape, 2))
    return np.concatenate([start, start + draw.uniform(0.01, 0.6, (*shape, 2))], -1).astype(np.float32)


def test_against_naive_loops():
    draw = np.random.default_rng(0)
    first, second = drawn(draw, 2, 3, 5), drawn(draw, 2, 3, 4)
    iou, giou = boxes.pairwise_iou(first, second), boxes.pairwise_giou(first, second)
    assert iou.shape == giou.shape == (2, 3, 5, 4)
    for i, j, q, t in np.ndindex(2, 3, 5, 4):
        expected = naive(first[i, j, q].astype(float), second[i, j, t].astype(float))
        np.testing.assert_allclose([iou[i, j, q, t], giou[i, j, q, t]], expected, rtol=1e-5, atol=1e-6)
    paired = boxes.giou(first[:, :, :4], second)
    np.testing.assert_array_equal(paired, np.diagonal(giou[:, :, :4], axis1=2, axis2=3))


def test_known_values_and_units():
    unit, half = np.array([0, 0, 1, 1.0]), np.array([0, 0, 1, 0.5])
    apart = np.array([3, 0, 4, 1.0])
    np.testing.assert_allclose(boxes.giou(unit, unit), 1)
    np.testing.assert_allclose(boxes.giou(unit, half), 0.5)
    np.testing.assert_allclose(boxes.giou(unit, apart), -0.5)
    np.testing.assert_allclose(boxes.giou(480 * unit, 480 * apart), -0.5)
    assert boxes.pairwise_iou(unit[None], apart[None]) == 0


def test_there_and_back():
    draw = np.random.default_rng(1)
    corners = drawn(draw, 7)
    centers = boxes.to_centers(corners)
    np.testing.assert_allclose(
        centers[:, 2:], corners[:, 2:].astype(float) - corners[:, :2], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(boxes.to_corners(centers), corners, atol=1e-6)
    np.testing.assert_allclose(boxes.to_corners(np.array([0.5, 0.25, 0.5, 0.25])), [0.25, 0.125, 0.75, 0.375])
    assert boxes.to_corners(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
    assert boxes.giou(jnp.ones((2, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32


POINT = [0.5, 0.5, 0.5, 0.5]
DEGENERATE = {
    "point": POINT,
    "another point": [0.2, 0.3, 0.2, 0.3],
    "nothing at the origin": [0.0, 0.0, 0.0, 0.0],
    "line across": [0.1, 0.5, 0.9, 0.5],
    "line down": [0.5, 0.1, 0.5, 0.9],
    "inverted": [0.8, 0.8, 0.2, 0.2],
    "inverted in x": [0.8, 0.2, 0.2, 0.8],
    "box": [0.25, 0.25, 0.75, 0.75],
    "whole": [0.0, 0.0, 1.0, 1.0],
    "wide line": [0.0, 0.0, 1.0, 2e-18],
    **{f"side {side}": [0.0, 0.0, side, side] for side in (1e-6, 1.1e-9, 9e-10, 1e-12, 1e-19, 1e-22, 1e-40)},
    "huge": [-1e17, -1e17, 1e17, 1e17],
}


@pytest.mark.parametrize("jit", [False, True])
def test_degenerate_boxes_have_finite_values_and_gradients(jit):
    pairs = np.array(list(itertools.product(DEGENERATE.values(), repeat=2)), np.float32)
    gradient = jax.vmap(jax.value_and_grad(boxes.giou, (0, 1)))
    value, grads = (jax.jit(gradient) if jit else gradient)(pairs[:, 0], pairs[:, 1])
    for name, found in (("value", value), ("first", grads[0]), ("second", grads[1])):
        wrong = ~np.isfinite(found).reshape(len(pairs), -1).all(1)
        assert not wrong.any(), (name, pairs[wrong])
    assert np.all(np.abs(value) <= 1 + 1e-6)
    iou = jax.vmap(boxes.pairwise_iou)(pairs[:, :1], pairs[:, 1:])
    assert np.all((iou >= 0) & (iou <= 1 + 1e-6))


def test_what_empty_boxes_give():
    point, other, inverted = (
        np.array(DEGENERATE[k], np.float32) for k in ("point", "another point", "inverted")
    )
    box = np.array(DEGENERATE["box"], np.float32)
    assert boxes.giou(point, point) == 0
    assert boxes.giou(point, other) == -1
    np.testing.assert_allclose(boxes.giou(point, box), 0)  # encloses nothing that the box does not
    np.testing.assert_allclose(boxes.giou(inverted, box), 0, atol=1e-7)  # empty, its corners within
    assert np.isnan(boxes.giou(np.array([np.nan, 0, 1, 1], np.float32), box))


def test_gradients_of_degenerate_sigmoid_boxes_are_moderate():
    """A collapsed query must not drown the others in the norm that gradients are clipped by."""
    raw = jnp.array([[0.0, 0.0, z, z2] for z in (-60.0, -40.0, -20.0, 0.0) for z2 in (-60.0, -20.0, 2.0)])
    target = boxes.to_corners(jnp.array([0.5, 0.5, 0.2, 0.2]))
    grads = jax.vmap(jax.grad(lambda x: boxes.giou(boxes.to_corners(jax.nn.sigmoid(x)), target)))(raw)
    assert np.isfinite(grads).all() and np.abs(grads).max() < 10


@pytest.mark.slow
def test_gradient_against_torch():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(2)
    first, second = drawn(draw, 6), drawn(draw, 5)
    weight = draw.normal(size=(6, 5)).astype(np.float32)

    a, b = torch.tensor(first, requires_grad=True), torch.tensor(second, requires_grad=True)
    start, end = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    low, high = torch.minimum(a[:, None, :2], b[:, :2]), torch.maximum(a[:, None, 2:], b[:, 2:])
    both = (end - start).clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1) - both
    around = (high - low).prod(-1)
    expected = both / union - (around - union) / around
    (expected * torch.tensor(weight)).sum().backward()

    def total(x, y):
        return jnp.sum(boxes.pairwise_giou(x, y) * weight)

    np.testing.assert_allclose(boxes.pairwise_giou(first, second), expected.detach(), atol=1e-6)
    for found, tensor in zip(jax.grad(total, (0, 1))(first, second), (a, b), strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-4, atol=1e-5)
