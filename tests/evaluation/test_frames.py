# SPDX-License-Identifier: Apache-2.0
"""Frames in pictures: where they lie, which colors they have, what is cut off."""

from __future__ import annotations

import numpy as np
import pytest

from vlp_jax.evaluation import frames
from vlp_jax.evaluation.detection import Detections, Objects, judge
from vlp_jax.evaluation.frames import Box, draw_boxes

RED = (255, 0, 0)


def drawn_pixels(picture, color=RED):
    """Rows and columns that have exactly a color."""
    return np.argwhere((picture == color).all(-1))


def test_a_frame_lies_on_the_edges_of_its_box():
    picture = draw_boxes(np.zeros((600, 800, 3), np.uint8), [Box((100, 50, 300, 200), RED)])
    assert picture.shape == (600, 800, 3)
    places = drawn_pixels(picture)
    assert places.min(0).tolist() == [50, 100] and places.max(0).tolist() == [249, 399]
    assert not picture[60:240, 110:390].any()


def test_a_small_picture_is_enlarged_pixel_by_pixel():
    small = np.random.default_rng(0).integers(0, 200, (40, 64, 3)).astype(np.uint8)
    same = draw_boxes(small, [])
    factor = same.shape[0] // 40
    assert max(same.shape) >= frames.LEGIBLE * 0.9
    np.testing.assert_array_equal(same, small.repeat(factor, 0).repeat(factor, 1))
    places = drawn_pixels(draw_boxes(small, [Box((10, 5, 20, 30), RED)]))
    assert places.min(0).tolist() == [5 * factor, 10 * factor]
    assert places.max(0).tolist() == [35 * factor - 1, 30 * factor - 1]
    assert not small.flags.writeable or same is not small


@pytest.mark.parametrize(
    "box", [(-50, -50, 5000, 5000), (790, 590, 50, 50), (400, 300, 0, 0), (900, 700, 5, 5)]
)
@pytest.mark.parametrize("dashed", [False, True])
def test_what_lies_outside_is_cut_off(box, dashed):
    picture = draw_boxes(np.zeros((600, 800, 3), np.uint8), [Box(box, RED, "a name", dashed)])
    assert picture.shape == (600, 800, 3) and len(drawn_pixels(picture))


@pytest.mark.parametrize("shape", [(1, 1), (10, 4000), (4000, 10)])
def test_pictures_of_any_shape(shape):
    names = ["\x00\n", "a name that is much longer than the picture is wide " * 9, "人"]
    said = Detections(np.full(3, 0.5), np.arange(3), np.array([[0.0, 0, *shape[::-1]]] * 3))
    assert draw_boxes(np.zeros((*shape, 3), np.uint8), frames.of_classes(said, names)).any()


def test_labels_do_not_hide_each_other():
    ground = np.zeros((600, 800, 3), np.uint8)
    one = draw_boxes(ground, [Box((100, 100, 300, 200), RED, "cat")])
    other = draw_boxes(
        ground, [Box((100, 100, 300, 200), RED, "cat"), Box((100, 100, 300, 200), (0, 0, 255), "dog")]
    )
    above = drawn_pixels(one)[:, 0] < 100
    assert above.any()  # the label stands above the frame and is still there with another
    np.testing.assert_array_equal(drawn_pixels(one[:100]), drawn_pixels(other[:100]))
    assert len(drawn_pixels(other[105:280, 110:390], (0, 0, 255)))


def test_surest_last_and_names_cut_before_the_score():
    said = Detections(np.array([0.9, 0.3, 0.9]), np.array([1, 0, 7]), np.zeros((3, 4)))
    boxes = frames.of_classes(said, ["x" * 99, "cat"])
    assert [box.text for box in boxes] == ["x" * 31 + "… 0.30", "cat 0.90", "class 7 0.90"]
    assert len({frames.color_of(number) for number in range(100)}) > 90


def test_verdicts_stay_with_their_boxes():
    boxes = np.array([[0, 0, 10, 10], [50, 50, 10, 10], [80, 0, 10, 10]], float)
    objects = Objects(100, 100, boxes[[0, 2]], np.array([0, 1]), np.zeros(2, int), np.full(2, 100.0))
    # Equal scores: an order that is not just turned round.
    judged = judge(objects, Detections(np.array([0.9, 0.9]), np.array([0, 1]), boxes[:2]))
    shown = frames.of_verdicts(judged, ["cat", "dog"])
    assert [(tuple(box.box)[:2], box.color, box.text, box.dashed) for box in shown] == [
        ((0, 0), frames.TRUTH, "", True),
        ((80, 0), frames.TRUTH, "dog", True),
        ((0, 0), frames.RIGHT, "cat 0.90", False),
        ((50, 50), frames.WRONG, "dog 0.90", False),
    ]
