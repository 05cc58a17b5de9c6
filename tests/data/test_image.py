# SPDX-License-Identifier: Apache-2.0
"""Decoding against PIL, the resize rule against the original's lines, patches against numpy."""

import csv
import io
import math

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vlp_jax.data import image
from vlp_jax.types import UserError

RULE = image.Layout(384, 639, 32, 228)


def data(**changes):
    given = dict(image_size=384, image_limit=0, patch_size=32, max_patches=0)
    return ml_collections.ConfigDict(given | changes)


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def original_rule(height, width, shorter=384, longer=639, multiple=32):
    """The lines of ViLT's MinMaxResize, in plain Python."""
    scale = shorter / min(width, height)
    if height < width:
        new_height, new_width = shorter, scale * width
    else:
        new_height, new_width = scale * height, shorter
    if max(new_height, new_width) > longer:
        scale = longer / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    new_height, new_width = int(new_height + 0.5), int(new_width + 0.5)
    return new_height // multiple * multiple, new_width // multiple * multiple


@pytest.fixture(scope="module")
def photograph(realdata):
    return Image.open(realdata / "coco/val2017/000000062554.jpg").convert("RGB")


def test_photographs_decode_as_in_pil(realdata):
    files = (
        sorted((realdata / "coco/val2017").glob("*.jpg"))[:12]
        + sorted((realdata / "cc_images").glob("*.jpg"))[:6]
    )
    assert len(files) == 18
    for file in files:
        ours = image.decode(file.read_bytes()).numpy()
        np.testing.assert_array_equal(ours, np.asarray(Image.open(file).convert("RGB")), err_msg=file.name)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "GIF", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "BMP", {}),
    ],
)
def test_formats_decode_as_in_pil(photograph, mode, kind, options):
    contents = encode(photograph.convert(mode), kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))
    np.testing.assert_array_equal(image.decode(contents).numpy(), expected)


def test_moving_gif_gives_its_first_frame(photograph):
    contents = encode(
        photograph, "GIF", save_all=True, append_images=[photograph.transpose(Image.FLIP_LEFT_RIGHT)]
    )
    expected = np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))
    np.testing.assert_array_equal(image.decode(contents).numpy(), expected)


@pytest.mark.parametrize("contents", [b"", b"<html>", b"\xff\xd8\xff\xe0 cut short"])
def test_no_picture(contents):
    with pytest.raises(UserError, match=r"a\.jpg .*cannot be decoded"):
        image.load(contents, RULE, name="a.jpg")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (384, 512)),
        ((375, 500), (384, 512)),
        ((427, 640), (384, 576)),
        ((360, 640), (352, 608)),
        ((1080, 1920), (352, 608)),
        ((200, 1000), (128, 608)),
        ((640, 480), (512, 384)),
        ((384, 384), (384, 384)),
        ((1, 1), (384, 384)),
        ((10, 1000), (32, 608)),  # zero pixels in the original
        ((1000, 10), (608, 32)),
    ],
)
def test_resized_size(size, expected):
    assert tuple(int(side) for side in image.resized_size(*size, 384, 639, 32)) == expected


def test_rule_equals_the_original_on_real_sizes(realdata):
    rows = list(csv.DictReader((realdata / "coco/coco_val2017_sizes.csv").open()))
    sizes = np.array([[int(row["height"]), int(row["width"])] for row in rows])
    assert len(sizes) == 5000
    ours = np.stack(image.resized_size(sizes[:, 0], sizes[:, 1], 384, 639, 32), -1)
    np.testing.assert_array_equal(ours, [original_rule(*size) for size in sizes.tolist()])
    patches = (ours // 32).prod(1)
    assert patches.max() == 228 == image.max_patches(384, 639, 32)
    assert abs(patches.mean() - 198.2) < 0.05


@pytest.mark.parametrize(
    ("shorter", "longer", "patch"), [(384, 639, 32), (64, 106, 16), (64, 64, 16), (96, 60, 8)]
)
def test_max_patches_is_reached_and_never_passed(shorter, longer, patch):
    sides = np.arange(1, 400)
    tall, wide = image.resized_size(sides[:, None], sides[None], shorter, longer, patch)
    assert (tall * wide // patch**2).max() == image.max_patches(shorter, longer, patch)


def test_layout():
    assert image.layout(data()) == RULE
    assert image.layout(data(max_patches=200)).slots == 200
    assert image.layout(data(image_size=64, patch_size=16, image_limit=64)) == image.Layout(64, 64, 16, 16)
    for bad in (
        dict(patch_size=30),
        dict(image_size=0),
        dict(patch_size=0),
        dict(image_limit=16),
        dict(max_patches=-1),
    ):
        with pytest.raises(UserError):
            image.layout(data(**bad))
    with pytest.raises(UserError, match="image_size=384 .*patch_size=50.* 400"):
        image.layout(data(patch_size=50))


def test_resize_is_close_to_pil(photograph):
    ours = image.resize(tf.constant(np.asarray(photograph)), [384, 544]).numpy().astype(int)
    expected = np.asarray(photograph.resize((544, 384), Image.BICUBIC)).astype(int)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).mean() < 0.3 and np.abs(ours - expected).max() <= 20


def test_resize_of_the_same_size_changes_nothing(photograph):
    pixels = np.asarray(photograph)
    np.testing.assert_array_equal(image.resize(tf.constant(pixels), list(pixels.shape[:2])), pixels)


def test_cut_against_slices():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    chosen = np.array([0, 4, 5, 6, 6], np.int32)
    ours = image.cut(tf.constant(pixels), chosen, 32).numpy()
    np.testing.assert_array_equal(ours[0], pixels[:32, :32].reshape(-1))
    np.testing.assert_array_equal(ours[1], pixels[32:, 32:64].reshape(-1))
    np.testing.assert_array_equal(ours[2], pixels[32:, 64:].reshape(-1))
    assert not ours[3:].any()


def test_plan_keeps_all_that_fit():
    planned = image.plan(np.array([480, 640]), np.array([640, 480]), np.array([1, 2]), RULE)
    np.testing.assert_array_equal(planned["size"], [[384, 512], [512, 384]])
    np.testing.assert_array_equal(planned["grid_size"], [[12, 16], [16, 12]])
    np.testing.assert_array_equal(planned["patch_mask"].sum(1), [192, 192])
    np.testing.assert_array_equal(planned["patch_positions"][0, 17], [1, 1])
    np.testing.assert_array_equal(planned["patch_positions"][1, 17], [1, 5])
    assert (planned["chosen"][:, 192:] == 192).all() and not planned["patch_positions"][:, 192:].any()


def test_sampling_is_fair_without_replacement_and_stateless():
    rule = image.Layout(384, 639, 32, 200)
    count = 2000
    sizes = np.full(count, 427), np.full(count, 640)  # 12 x 18 patches
    planned = image.plan(*sizes, np.arange(count), rule)
    chosen = planned["chosen"]
    assert planned["patch_mask"].all() and (np.diff(chosen, axis=1) > 0).all() and chosen.max() == 215
    np.testing.assert_array_equal(planned["patch_positions"], np.stack(np.divmod(chosen, 18), -1))
    np.testing.assert_array_equal(planned["grid_size"], np.full((count, 2), [12, 18]))
    kept = np.bincount(chosen.ravel(), minlength=216) / count
    assert np.abs(kept - 200 / 216).max() < 5 * math.sqrt(200 * 16 / 216**2 / count)
    again = image.plan(*(side[:7] for side in sizes), np.arange(7), rule)
    np.testing.assert_array_equal(again["chosen"], chosen[:7])
    mixed = image.plan(np.array([427, 480]), np.array([640, 640]), np.arange(2), rule)
    np.testing.assert_array_equal(mixed["patch_mask"].sum(1), [200, 192])
    np.testing.assert_array_equal(mixed["chosen"][1, :192], np.arange(192))


def test_load_rebuilds_the_picture(photograph):
    batch = image.load(encode(photograph, "PNG"), RULE)
    rows, columns = batch["grid_size"][0]
    pixels = np.zeros((rows * 32, columns * 32, 3), np.uint8)
    for (row, column), patch, real in zip(
        batch["patch_positions"][0], batch["patches"][0], batch["patch_mask"][0], strict=True
    ):
        if real:
            pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = patch.reshape(32, 32, 3)
        else:
            assert not patch.any()
    expected = image.resize(tf.constant(np.asarray(photograph)), list(pixels.shape[:2]))
    np.testing.assert_array_equal(pixels, expected)
