# SPDX-License-Identifier: Apache-2.0
"""Boxes and sizes as DETR prepares them: its rounding, its crops, boxes that stay on their objects."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import detection


@pytest.mark.parametrize(
    ("height", "width", "shorter", "longest", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),
        (100, 500, 800, 1333, (267, 1335)),  # the limit is passed by two pixels, as coded
        (500, 100, 800, 1333, (1335, 267)),
        (427, 640, 800, 1333, (800, 1199)),
        (640, 427, 480, 1333, (719, 480)),
        (800, 1200, 800, 1333, (800, 1200)),
        (600, 600, 400, 0, (400, 400)),
        (1, 5000, 800, 1333, (1, 5000)),
    ],
)
def test_sizes_are_rounded_as_in_detr(height, width, shorter, longest, expected):
    assert detection.resized_size(height, width, shorter, longest) == expected


def test_the_longer_side_passes_the_limit_by_half_the_ratio_at_most():
    draw = np.random.default_rng(0)
    for height, width in draw.integers(50, 2000, (3000, 2)):
        tall, wide = detection.resized_size(int(height), int(width), 800, 1333)
        ratio = max(height, width) / min(height, width)
        assert max(tall, wide) <= 1333 + ratio / 2 + 1 and min(tall, wide) <= 800


def test_plans_are_functions_of_the_draw_and_take_every_way():
    plans = [detection.plan(detection.TRAIN, draw, 480, 640) for draw in range(800)]
    assert plans == [detection.plan(detection.TRAIN, draw, 480, 640) for draw in range(800)]
    flipped = np.mean([plan.mirrored for plan in plans])
    cropped = np.mean([plan.first != plan.original or plan.box[2:] != plan.original for plan in plans])
    assert 0.44 < flipped < 0.56 and 0.44 < cropped < 0.56
    whole = {min(plan.size) for plan in plans if plan.first == plan.original}
    assert whole == set(range(480, 801, 32))
    for plan in plans:
        top, left, rows, columns = plan.box
        assert 0 <= top <= plan.first[0] - rows and 0 <= left <= plan.first[1] - columns
        if plan.first != plan.original:
            assert min(plan.first) in detection.FIRST_SIZES
            assert all(
                384 <= side <= 600 or side == full
                for side, full in zip((rows, columns), plan.first, strict=True)
            )
    sides = [plan.box[3] for plan in plans if plan.first != plan.original]
    assert min(sides) < 400 and max(sides) > 590
    assert detection.plan(detection.EVALUATION, 5, 480, 640) == detection.Plan(
        (480, 640), False, (480, 640), (0, 0, 480, 640), (800, 1066)
    )


def test_a_picture_smaller_than_a_crop_is_taken_whole():
    for draw in range(60):
        plan = detection.plan(detection.TRAIN, draw, 20, 900)
        assert all(1 <= side <= full for side, full in zip(plan.box[2:], plan.first, strict=True))


def painted(height: int, width: int, box: tuple[int, int, int, int]) -> Image.Image:
    picture = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    picture[y0:y1, x0:x1] = 255
    return Image.fromarray(picture)


def test_boxes_stay_on_what_they_show():
    """The same steps by PIL on a painted rectangle: what is bright in the end is where the box says."""
    box, seen = (200, 120, 430, 300), 0
    for draw in range(60):
        made = detection.plan(detection.TRAIN, draw, 480, 640)
        picture = painted(480, 640, box)
        if made.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left, rows, columns = made.box
        picture = picture.resize(made.first[::-1], Image.BILINEAR).crop(
            (left, top, left + columns, top + rows)
        )
        bright = np.asarray(picture.resize(made.size[::-1], Image.BILINEAR))[..., 0] > 127
        found, kept = detection.moved(np.array([box]), made)
        assert len(kept) == int(bright.any()) or bright.sum() < 50
        if bright.sum() < 50:
            continue
        ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        tall, wide = made.size
        expected = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]) / np.array([wide, tall, wide, tall])
        x, y, width, height = found[0]
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        np.testing.assert_allclose(corners, expected, atol=2.5 / min(tall, wide))
        seen += 1
    assert seen > 40


def test_crowds_and_empty_boxes_are_no_objects_and_are_counted():
    record = {
        "boxes": [
            [10, 10, 20, 20],
            [5, 5, 0, 9],
            [-10, -10, 30, 40],
            [90, 10, 50, 20],
            [200, 10, 5, 5],
            [0, 0, 100, 80],
        ],
        "box_crowd": [0, 0, 0, 0, 0, 1],
    }
    boxes, rows, left = detection.counted(record, height=80, width=100)
    assert rows.tolist() == [0, 2, 3] and left == {"crowd": 1, "empty": 2}
    np.testing.assert_array_equal(boxes, [[10, 10, 30, 30], [0, 0, 20, 30], [90, 10, 100, 30]])


def test_a_picture_without_objects():
    boxes, rows, left = detection.counted({"boxes": []}, 10, 10)
    assert boxes.shape == (0, 4) and not len(rows) and left == {"crowd": 0, "empty": 0}
    found, kept = detection.moved(boxes, detection.plan(detection.TRAIN, 1, 480, 640))
    assert found.shape == (0, 4) and found.dtype == np.float32 and not len(kept)


def test_the_smallest_bucket_that_holds_a_picture():
    buckets = [(800, 1344), (1344, 800), (1088, 1088)]
    assert [
        detection.bucket(size, buckets) for size in ((800, 1066), (1066, 800), (900, 1000), (1400, 100))
    ] == [0, 1, 2, -1]
