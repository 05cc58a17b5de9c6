# SPDX-License-Identifier: Apache-2.0
"""Pictures on canvases against PIL doing the same steps; canvases and rules that cannot be."""

import io

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vlp_jax.data import detection, grid
from vlp_jax.types import UserError


def data(**changes):
    given = dict(image_size=800, image_sizes=(), image_limit=0, size_crop=0.0, flip=0.0, canvases=())
    return ml_collections.ConfigDict(given | changes)


def by_pil(picture, made, one):
    """Mirror, resize, crop, resize as DETR does it."""
    if made.mirrored[one]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tall, wide = made.first[one].tolist()
    top, left, rows, columns = made.box[one].tolist()
    if made.cropped[one]:
        picture = picture.resize((wide, tall), Image.BILINEAR).crop((left, top, left + columns, top + rows))
    return np.asarray(picture.resize(made.size[one].tolist()[::-1], Image.BILINEAR))


def by_us(contents, made, canvas, crops=True):
    arrays = grid.plan(made, canvas, crops)
    keys = grid.keys(crops)
    assert {*arrays} | {"contents"} == {*keys}
    for one, content in enumerate(contents):
        row = {key: tf.constant(value[one]) for key, value in arrays.items()}
        for key, (kind, shape) in keys.items():
            if key != "contents":
                assert row[key].shape == shape and (kind is object or row[key].dtype == kind), key
        yield grid.apply(row | {"contents": tf.constant(content)}, crops).numpy()


def same(ours, theirs, share=1e-3, levels=1):
    """Equal but for a level in a share of the values."""
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max(initial=0) <= levels and (apart > 0).mean() < share


def test_photographs_become_what_pil_makes_of_them(realdata):
    files = sorted((realdata / "coco/train2017").glob("*.jpg"))[:8] * 2
    contents = [file.read_bytes() for file in files]
    pictures = [Image.open(file).convert("RGB") for file in files]
    sizes = np.array([picture.size[::-1] for picture in pictures])
    rule = detection.Rule((240, 304), 506, crop=0.5, flip=0.5)
    made = detection.plan(rule, np.arange(len(files)) + 2, *sizes.T)
    ways = {*zip(made.mirrored.tolist(), made.cropped.tolist(), strict=True)}
    assert len(ways) == 4
    for one, ours in enumerate(by_us(contents, made, (512, 520))):
        rows, columns = made.size[one]
        same(ours[:rows, :columns], by_pil(pictures[one], made, one))
        assert ours.shape == (512, 520, 3) and not ours[rows:].any() and not ours[:, columns:].any()


def test_a_photograph_at_full_size(realdata):
    file = sorted((realdata / "coco/train2017").glob("*.jpg"))[0]
    picture = Image.open(file).convert("RGB")
    found = grid.load(file.read_bytes(), data(canvases=((800, 1088), (1088, 800), (1344, 1344))))
    rows, columns = map(int, detection.resized_size(*picture.size[::-1], 800, 1333))
    canvas = (
        (800, 1088) if rows <= 800 and columns <= 1088 else (1088, 800) if columns <= 800 else (1344, 1344)
    )
    assert found["image"].shape == (1, *canvas, 3) and found["image"].dtype == np.uint8
    same(found["image"][0, :rows, :columns], np.asarray(picture.resize((columns, rows), Image.BILINEAR)))
    expected = np.zeros(canvas, bool)
    expected[:rows, :columns] = True
    np.testing.assert_array_equal(found["image_mask"][0], expected)
    assert not found["image"][0][~expected].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3), (64, 64)])
def test_small_and_thin_pictures(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    rule = detection.Rule((48, 64), 106, crop=0.5, flip=0.5)
    made = detection.plan(rule, np.arange(24), np.full(24, size[0]), np.full(24, size[1]))
    canvas = tuple(detection.largest(rule, np.array([size[0]]), np.array([size[1]]))[0].tolist())
    for one, ours in enumerate(by_us([file.getvalue()] * 24, made, canvas)):
        rows, columns = made.size[one]
        # Ratios like 4:3 make many values lie half-way between two levels, where float32 decides by its last bit.
        same(ours[:rows, :columns], by_pil(Image.fromarray(noise), made, one), 0.05)


def test_without_crops_the_graph_has_one_resizing_and_the_same_pixels():
    noise = np.random.default_rng(1).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    made = detection.plan(
        detection.Rule((40, 48), 90, flip=0.5), np.arange(12), np.full(12, 40), np.full(12, 64)
    )
    contents = [file.getvalue()] * 12
    for one, two in zip(by_us(contents, made, (64, 90)), by_us(contents, made, (64, 90), False), strict=True):
        np.testing.assert_array_equal(one, two)
    assert {len(grid.keys(False)), len(grid.keys(True))} == {7, 12}


def test_masks_of_a_batch():
    found = grid.mask(np.array([[2, 3], [4, 1], [0, 0]], np.int32), np.array([4, 5], np.int32)).numpy()
    expected = np.zeros((3, 4, 5), bool)
    expected[0, :2, :3] = expected[1, :4, :1] = True
    np.testing.assert_array_equal(found, expected)


def test_a_panorama_gets_a_canvas_of_its_own_in_prediction():
    file = io.BytesIO()
    Image.new("RGB", (2000, 1), (9, 8, 7)).save(file, "PNG")
    found = grid.load(file.getvalue(), data())
    assert found["image"].shape == (1, 1, 2000, 3) and found["image_mask"].all()
    assert (found["image"] == [9, 8, 7]).all()
    with pytest.raises(UserError, match="this file .* cannot be decoded"):
        grid.load(b"no picture", data(), "this file")


def test_rules():
    assert grid.rule(data()) == detection.Rule()
    full = data(image_sizes=tuple(range(480, 801, 32)), size_crop=0.5, flip=0.5)
    assert (
        grid.rule(full) == detection.Rule(tuple(range(480, 801, 32)), crop=0.5, flip=0.5)
        and grid.evaluation_rule(full) == detection.Rule()
    )
    assert grid.rule(data(image_limit=1000)).longest == 1000
    assert grid.canvases(data(image_size=64)) == ((106, 106),)
    assert grid.canvases(data(canvases=[[3, 4], (5, 6)])) == ((3, 4), (5, 6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_sizes=(0, 3)), "image_sizes=(0, 3)"),
        (dict(image_sizes=(480.5,)), "whole numbers of pixels"),
        (dict(image_sizes=("480",)), "whole numbers of pixels"),
        (dict(image_size=0), "image_size=0"),
        (dict(image_limit=-1), "image_limit=-1"),
        (dict(size_crop=1.5), "size_crop=1.5 is not a probability"),
        (dict(flip=-0.1), "flip=-0.1 is not a probability"),
        (dict(flip=float("nan")), "flip=nan is not a probability"),
        (dict(canvases=((800, 1088), (640, 640))), "rising area"),
        (dict(canvases=((800, 800), (800, 800))), "each once"),
        (dict(canvases=((800,),)), "pairs of rows and columns"),
        (dict(canvases=(800, 1088)), "pairs of rows and columns"),
        (dict(canvases=((0, 5),)), "pairs of rows and columns"),
        (dict(canvases=((True, 5),)), "pairs of rows and columns"),
        (dict(canvases=("ab",)), "pairs of rows and columns"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        grid.rule(data(**changes)), grid.canvases(data(**changes))
    assert words in str(error.value)


def test_the_last_canvas_holds_every_picture_that_can_come():
    full = dict(image_sizes=tuple(range(480, 801, 32)), size_crop=0.5, flip=0.5)
    sizes = np.array([[480, 640], [640, 480], [100, 500]]).T
    grid.check(data(canvases=((800, 1088), (1344, 1344)), **full), *sizes, "these")
    with pytest.raises(
        UserError, match=r"these has 100 x 500 .* as 267 x 1335 by .* 1333 x 1333.* \(1088, 1344\)"
    ):
        grid.check(data(), *sizes, "these")
    # No picture is upright, but a crop may be.
    grid.check(data(canvases=((800, 1088),)), np.array([480]), np.array([640]), "these")
    with pytest.raises(UserError, match=r"1250 x 1250"):
        grid.check(data(canvases=((800, 1088),), **full), np.array([480]), np.array([640]), "these")
    with pytest.raises(UserError, match=r"1 x 2000 pixels .* \(32, 2016\), or leave"):
        grid.check(data(canvases=((1344, 1344),)), np.array([1]), np.array([2000]), "these")
