# SPDX-License-Identifier: Apache-2.0
"""Pictures and boxes for detection as DETR prepares them: which boxes count, multi-scale sizes, crops, boxes carried along.

Everything is planned on the host from sizes alone, by draws that are functions of the position. Follows
`datasets/transforms.py` and `datasets/coco.py` of DETR (commit 29901c51), with its rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.data import order

_FLIP, _CROPS, _FIRST, _SIDES, _PLACE, _LAST = range(0xB0, 0xB6)  # separate the uses of a draw
FIRST_SIZES = (400, 500, 600)  # shorter sides before a crop
CROP_SIDES = (384, 600)  # pixels: least and most of a crop's sides


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a picture is made ready.

    Attributes:
        shorter: sides in pixels, one of which is drawn; evaluation has one.
        longest: what the longer side should not exceed. As coded in DETR it may by a few pixels: the shorter side is
            rounded, the longer one computed from it (1,335 for 500 x 100).
        crop: probability of a crop before the last resizing.
        flip: probability of a mirror image.
    """

    shorter: tuple[int, ...] = (800,)
    longest: int = 1333
    crop: float = 0.0
    flip: float = 0.0


TRAIN = Rule(tuple(range(480, 801, 32)), crop=0.5, flip=0.5)
EVALUATION = Rule()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to one picture, in this order: mirror, resize, crop, resize.

    Attributes:
        original: height and width in pixels.
        mirrored: left to right.
        first: height and width of the first resizing; as `original` where there is no crop.
        box: top, left, height and width of the crop in the resized picture.
        size: height and width in the end.
    """

    original: tuple[int, int]
    mirrored: bool
    first: tuple[int, int]
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def resized_size(height: int, width: int, shorter: int, longest: int = 0) -> tuple[int, int]:
    """DETR's rule: the shorter side to `shorter`, less where the longer one would pass `longest` (0 = no limit).

    Returns:
        height and width in pixels; the longer one is cut down to whole pixels, never below 1.
    """
    low, high = min(height, width), max(height, width)
    if longest and high / low * shorter > longest:
        shorter = int(round(longest * low / high))
    if (width <= height and width == shorter) or (height <= width and height == shorter):
        return height, width
    shorter = max(shorter, 1)
    if width < height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def plan(rule: Rule, draw: int, height: int, width: int) -> Plan:
    """Draws what happens to a picture of `height` x `width` pixels; a function of `draw` and the sizes alone."""

    def lot(salt: int, number: int = 0) -> float:
        return float(order.uniform(np.uint64(draw), salt, number))

    def choice(salt: int, among: Sequence[int]) -> int:
        return among[min(int(lot(salt) * len(among)), len(among) - 1)]

    first, box = (height, width), (0, 0, height, width)
    if lot(_CROPS) < rule.crop:
        first = resized_size(height, width, choice(_FIRST, FIRST_SIZES))
        least, most = CROP_SIDES
        # A side that is smaller than the least is taken whole (the original would fail there).
        sides = [
            side if side <= least else least + int(lot(_SIDES, axis) * (min(side, most) - least + 1))
            for axis, side in enumerate(first)
        ]
        corner = [int(lot(_PLACE, axis) * (first[axis] - sides[axis] + 1)) for axis in range(2)]
        box = (corner[0], corner[1], sides[0], sides[1])
    size = resized_size(box[2], box[3], choice(_LAST, rule.shorter), rule.longest)
    return Plan((height, width), lot(_FLIP) < rule.flip, first, box, size)


def counted(
    record: Mapping[str, Any], height: int, width: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which boxes of a record are objects to be found.

    Args:
        record: with `boxes` [n, 4] as x, y, width, height in pixels, and `box_crowd` if it has them.
        height, width: of the picture.

    Returns:
        boxes float64 [m, 4] as x0, y0, x1, y1 inside the picture, their rows in the record int [m], and how many
        were left out: {"crowd": ..., "empty": ...}.
    """
    boxes = np.asarray(record["boxes"], np.float64).reshape(-1, 4)
    crowd = np.asarray(record.get("box_crowd") or np.zeros(len(boxes)), bool)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    corners = np.clip(corners, 0, [width, height, width, height])
    empty = ~((corners[:, 2:] > corners[:, :2]).all(1)) & ~crowd
    rows = np.flatnonzero(~crowd & ~empty)
    return corners[rows], rows, {"crowd": int(crowd.sum()), "empty": int(empty.sum())}


def moved(boxes: np.ndarray, made: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Carries boxes along with a picture.

    Args:
        boxes: [n, 4], x0, y0, x1, y1 in the original picture.
        made: what happens to the picture.

    Returns:
        float32 [m, 4] as centre x, centre y, width, height in [0, 1] of the final picture, and the rows int [m] of
        those of which something is left after the crop.
    """
    (height, width), (tall, wide), (top, left, rows, columns) = made.original, made.first, made.box
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if made.mirrored:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    boxes = boxes * np.array([wide / width, tall / height] * 2) - np.array([left, top] * 2)
    boxes = np.clip(boxes, 0, [columns, rows, columns, rows])
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    low, high = boxes[kept, :2], boxes[kept, 2:]
    # The last resizing changes nothing relative to the picture.
    scaled = np.concatenate([(low + high) / 2, high - low], 1) / np.array([columns, rows] * 2)
    return scaled.astype(np.float32), kept


def bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """The number of the smallest bucket (height, width) that holds a picture; -1 if none does."""
    fitting = [
        (tall * wide, number)
        for number, (tall, wide) in enumerate(buckets)
        if size[0] <= tall and size[1] <= wide
    ]
    return min(fitting)[1] if fitting else -1
