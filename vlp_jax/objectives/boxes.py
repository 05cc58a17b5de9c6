# SPDX-License-Identifier: Apache-2.0
"""Boxes as centre and size or as corners, their overlap (IoU) and its generalisation to boxes apart (GIoU).

No epsilon is added. A box without area, or turned inside out, is empty, and 0 / 0 counts as 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from vlp_jax.types import Array

# Areas up to this count as none. Its square is still a normal float32 number, so that the gradient of a quotient is
# finite; in a picture of side 1 it is a square of 1e-9, a millionth of a pixel.
NO_AREA = 1e-18


def to_corners(boxes: Float[Array, "*box 4"]) -> Float[Array, "*box 4"]:
    """`cx cy w h` -> `x0 y0 x1 y1`, float32."""
    boxes = boxes.astype(jnp.float32)
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return jnp.concatenate([center - half, center + half], axis=-1)


def to_centers(boxes: Float[Array, "*box 4"]) -> Float[Array, "*box 4"]:
    """`x0 y0 x1 y1` -> `cx cy w h`, float32."""
    boxes = boxes.astype(jnp.float32)
    start, end = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * (start + end), end - start], axis=-1)


def pairwise_iou(
    first: Float[Array, "*batch first 4"], second: Float[Array, "*batch second 4"]
) -> Float[Array, "*batch first second"]:
    """Intersection over union of each of `first` with each of `second`, corners in any one unit; 0 of empty boxes."""
    return _overlap(first[..., :, None, :], second[..., None, :, :])[0]


def pairwise_giou(
    first: Float[Array, "*batch first 4"], second: Float[Array, "*batch second 4"]
) -> Float[Array, "*batch first second"]:
    """`giou` of each of `first` with each of `second`."""
    return giou(first[..., :, None, :], second[..., None, :, :])


def giou(first: Float[Array, "*#box 4"], second: Float[Array, "*#box 4"]) -> Float[Array, "*box"]:
    """IoU minus the share of the enclosing box that the union leaves free, in [-1, 1] (Rezatofighi et al., CVPR 2019).

    Corners in, as the original DETR's `generalized_box_iou`, which gives NaN where a union or an enclosing box has
    no area. Here two empty boxes have an IoU of 0, and what encloses nothing has nothing free: two equal points have
    a GIoU of 0, two points apart -1. Value and gradient are finite for all sides below 1e18; NaN stays NaN.
    """
    iou, union = _overlap(first, second)
    start = jnp.minimum(first[..., :2], second[..., :2]).astype(jnp.float32)
    end = jnp.maximum(first[..., 2:], second[..., 2:]).astype(jnp.float32)
    around = _area(start, end)
    return iou - _ratio(around - union, around)


def _overlap(first: Array, second: Array) -> tuple[Array, Array]:
    """IoU and the area of the union."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    start = jnp.maximum(first[..., :2], second[..., :2])
    end = jnp.minimum(first[..., 2:], second[..., 2:])
    both = _area(start, end)
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - both
    return _ratio(both, union), union


def _area(start: Array, end: Array) -> Array:
    size = jnp.maximum(end - start, 0.0)
    return size[..., 0] * size[..., 1]


def _ratio(part: Array, whole: Array) -> Array:
    nothing = whole <= NO_AREA  # False for NaN, which must show
    # The inner choice keeps the gradient of the branch that is not taken finite.
    return jnp.where(nothing, 0.0, part / jnp.where(nothing, 1.0, whole))
