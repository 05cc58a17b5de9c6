# SPDX-License-Identifier: Apache-2.0
"""Pictures and boxes for detection as DETR prepares them: which boxes count, multi-scale sizes, crops, boxes carried along.

Everything is planned on the host from sizes alone, for many pictures at once, by draws that are functions of the
position. Follows `datasets/transforms.py` and `datasets/coco.py` of DETR (commit 29901c51), with its rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlp_jax.data import order
from vlp_jax.types import BOXES_LEFT_OUT

_FLIP, _CROPS, _FIRST, _SIDES, _PLACE, _LAST = range(0xB0, 0xB6)  # separate the uses of a draw
# Both for pictures whose shorter side becomes 800 at most, in proportion for others.
FIRST_SIZES = (400, 500, 600)  # pixels: shorter sides before a crop
CROP_SIDES = (384, 600)  # pixels: least and most of a crop's sides
_CROWD, _EMPTY, _UNKNOWN, _CROPPED, _TOO_MANY = range(len(BOXES_LEFT_OUT))


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

    def before_crop(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Shorter sides of the first resizing, and least and most of a crop's sides: pixels."""
        firsts, (least, most) = (
            [max(1, round(side * max(self.shorter) / 800)) for side in sides]
            for sides in (FIRST_SIZES, CROP_SIDES)
        )
        return tuple(firsts), (least, most)


@dataclasses.dataclass(frozen=True)
class Plans:
    """What happens to n pictures, in this order: mirror, resize, crop, resize.

    Attributes:
        original: int64 [n, 2], height and width in pixels.
        mirrored: bool [n], left to right.
        cropped: bool [n].
        first: int64 [n, 2], height and width of the first resizing; as `original` where there is no crop.
        box: int64 [n, 4], top, left, height and width of the crop in the resized picture.
        size: int64 [n, 2], height and width in the end.
    """

    original: np.ndarray
    mirrored: np.ndarray
    cropped: np.ndarray
    first: np.ndarray
    box: np.ndarray
    size: np.ndarray


def resized_size(
    height: np.ndarray | int, width: np.ndarray | int, shorter: np.ndarray | int, longest: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """DETR's rule: the shorter side to `shorter`, less where the longer one would pass `longest` (0 = no limit).

    Returns:
        height and width in pixels, int64 of the arguments' shape; the longer one is cut down to whole pixels. Never
        below 1, where DETR fails: a line of 1 x 5,000 pixels stays as it is.
    """
    height, width, shorter = (np.asarray(side, np.int64) for side in (height, width, shorter))
    low, high = np.minimum(height, width), np.maximum(height, width)
    if longest:
        shorter = np.where(high / low * shorter > longest, np.rint(longest * low / high), shorter)
        shorter = np.maximum(shorter.astype(np.int64), 1)
    longer = (shorter * high / low).astype(np.int64)
    return np.where(width < height, longer, shorter), np.where(width < height, shorter, longer)


def plan(rule: Rule, draw: np.ndarray, height: np.ndarray, width: np.ndarray) -> Plans:
    """Draws what happens to pictures; a function of the draws and the sizes alone.

    Unlike in DETR the first resizing obeys `longest` too, and a side that is smaller than a crop is taken whole.

    Args:
        draw: uint [n].
        height, width: int [n], original pixels.
    """
    draw = np.asarray(draw).astype(np.uint64)
    original = np.stack([height, width], -1).astype(np.int64)
    cropped = order.uniform(draw, _CROPS, 0) < rule.crop
    first, box = original.copy(), np.concatenate([np.zeros_like(original), original], 1)
    here = np.flatnonzero(cropped)
    if here.size:
        firsts, (least, most) = rule.before_crop()
        some = draw[here]
        sides = resized_size(*original[here].T, _choice(some, _FIRST, firsts), rule.longest)
        first[here] = np.stack(sides, -1)
        for axis, side in enumerate(sides):
            spare = np.minimum(side, most) - least + 1
            taken = least + (order.uniform(some, _SIDES, axis) * spare).astype(np.int64)
            taken = np.where(side <= least, side, taken)
            box[here, axis] = (order.uniform(some, _PLACE, axis) * (side - taken + 1)).astype(np.int64)
            box[here, 2 + axis] = taken
    size = resized_size(box[:, 2], box[:, 3], _choice(draw, _LAST, rule.shorter), rule.longest)
    mirrored = order.uniform(draw, _FLIP, 0) < rule.flip
    return Plans(original, mirrored, cropped, first, box, np.stack(size, -1))


def _choice(draw: np.ndarray, salt: int, among: Sequence[int]) -> np.ndarray:
    return np.array(among)[(order.uniform(draw, salt, 0) * len(among)).astype(np.int64)]


def largest(rule: Rule, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The most rows and columns that pictures of these sizes (int [n]) can get: int64 [n, 2], a few too many with crops.

    A longer side beyond the limit is round(limit / ratio) x ratio, at most the limit + ratio / 2.
    """
    most = np.max([np.stack(resized_size(height, width, one, rule.longest), -1) for one in rule.shorter], 0)
    if not rule.crop:
        return most
    firsts, limits = rule.before_crop()
    for first in firsts:
        tall, wide = resized_size(height, width, first, rule.longest)
        (low_tall, high_tall), (low_wide, high_wide) = (
            [np.minimum(side, limit) for limit in limits] for side in (tall, wide)
        )
        ratio = np.maximum(np.stack([high_tall / low_wide, high_wide / low_tall], -1), 1.0)
        side = max(rule.shorter) * ratio
        side = np.where(side > rule.longest, np.maximum(rule.longest + ratio / 2, ratio), side)
        most = np.maximum(most, side.astype(np.int64))
    return most


def corners(boxes: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts boxes at the edges of their pictures.

    Args:
        boxes: [n, 4], x, y, width, height in pixels.
        size: int [n, 2], height and width of each box's picture.

    Returns:
        float64 [n, 4], x0, y0, x1, y1; and whether anything of them lies in the picture (not so for NaN), bool [n].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):  # -inf + inf
        end = boxes[:, :2] + boxes[:, 2:]
    found = np.clip(np.concatenate([boxes[:, :2], end], 1), 0, size[:, [1, 0, 1, 0]])
    return found, (found[:, 2:] > found[:, :2]).all(1)


def moved(boxes: np.ndarray, plans: Plans, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Carries boxes along with their pictures.

    Args:
        boxes: [n, 4], x0, y0, x1, y1 in the original picture.
        plans: what happens to the pictures.
        picture: int [n], the row in `plans` of each box's picture.

    Returns:
        float32 [n, 4] as centre x, centre y, width, height in [0, 1] of the final picture, and of which of them
        something is left after the crop, bool [n].
    """
    boxes, flipped = np.array(boxes, np.float64), plans.mirrored[picture]
    wide = plans.original[picture, 1][:, None]
    boxes[:, ::2] = np.where(flipped[:, None], wide - boxes[:, 2::-2], boxes[:, ::2])
    scale = (plans.first / plans.original)[picture][:, [1, 0, 1, 0]]
    top_left, extent = plans.box[picture][:, [1, 0, 1, 0]], plans.box[picture][:, [3, 2, 3, 2]]
    boxes = np.clip(boxes * scale - top_left, 0, extent)
    low, high = boxes[:, :2], boxes[:, 2:]
    # The last resizing changes nothing relative to the picture.
    scaled = np.concatenate([(low + high) / 2, high - low], 1) / extent
    return scaled.astype(np.float32), (high > low).all(1)


def targets(
    boxes: np.ndarray, picture: np.ndarray, crowd: np.ndarray, labels: np.ndarray, plans: Plans, slots: int
) -> dict[str, np.ndarray]:
    """The boxes of a batch that are to be found, and why the others are not.

    Args:
        boxes: [n, 4], x, y, width, height in pixels, of all pictures.
        picture: int [n], the row of each box's picture, ascending.
        crowd: bool [n].
        labels: int [n], classes; -1 = none of them.
        plans: what happens to the pictures.
        slots: most boxes of a picture; its first ones are kept.

    Returns:
        boxes float32 [pictures, slots, 4], box_labels int32 and box_mask bool [pictures, slots], boxes_left_out int32
        [pictures, reasons], see `types.BOXES_LEFT_OUT`; of several reasons the first counts.
    """
    count = len(plans.original)
    found, inside = corners(boxes, plans.original[picture])
    found, left = moved(np.nan_to_num(found), plans, picture)
    why = np.select([crowd, ~inside, labels < 0, ~left], [_CROWD, _EMPTY, _UNKNOWN, _CROPPED], -1)
    kept = np.flatnonzero(why < 0)
    slot = np.arange(len(kept)) - np.searchsorted(picture[kept], picture[kept])
    why[kept[slot >= slots]] = _TOO_MANY
    kept, slot = kept[slot < slots], slot[slot < slots]
    made = {
        "boxes": np.zeros((count, slots, 4), np.float32),
        "box_labels": np.full((count, slots), -1, np.int32),
        "box_mask": np.zeros((count, slots), bool),
    }
    for key, values in (("boxes", found[kept]), ("box_labels", labels[kept]), ("box_mask", True)):
        made[key][picture[kept], slot] = values
    lost = np.bincount((picture * len(BOXES_LEFT_OUT) + why)[why >= 0], minlength=count * len(BOXES_LEFT_OUT))
    return made | {"boxes_left_out": lost.reshape(count, -1).astype(np.int32)}
