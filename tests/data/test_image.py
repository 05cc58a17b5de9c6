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

from vlp_jax.data import image, resample
from vlp_jax.types import UserError

RULE = image.Layout(384, 639, 32, 228)


def data(**changes):
    given = dict(image_size=384, image_limit=0, patch_size=32, max_patches=0, crop=())
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


def resized(pixels, size, mirrored=False, kind="bicubic"):
    planned = resample.plan(np.array([pixels.shape[:2]]), np.array([size]), np.array([mirrored]), kind)
    return RESIZE(pixels, *(step[0] for step in planned.values())).numpy()


def assert_alike(ours, theirs, words="", share=2e-3):
    """Sums in float32: of a photograph one value of 7,500 is another, by one level.

    Many more are of noise in 0 and 255 that is enlarged by a ratio such as 8:11, where exact halves abound.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    off = np.abs(ours.astype(int) - theirs)
    assert off.max(initial=0) <= 1 and np.count_nonzero(off) <= 2 + share * off.size, words


def by_pil(pixels, size, kind=Image.BICUBIC):
    """PIL's two passes, one by one: some releases start with the columns where that is less work."""
    across = Image.fromarray(pixels).resize((size[1], len(pixels)), kind)
    return np.asarray(across.resize(size[::-1], kind))


RESIZE = tf.function(
    resample.resize,
    input_signature=[
        tf.TensorSpec([None, None, 3], tf.uint8),
        *[tf.TensorSpec([2], tf.int32)] * 2,
        *[tf.TensorSpec([], tf.string)] * 2,
    ],
)


def test_photographs_are_resized_as_in_pil(realdata):
    files = sorted((realdata / "coco/val2017").glob("*.jpg"))[:6]
    assert len(files) == 6
    for file in files:
        picture = Image.open(file).convert("RGB")
        pixels = np.asarray(picture)
        size = tuple(int(side) for side in image.resized_size(*pixels.shape[:2], 384, 639, 32))
        expected = np.asarray(picture.resize(size[::-1], Image.BICUBIC))
        assert_alike(resized(pixels, size), expected, file.name)
        assert_alike(resized(pixels, size, True), expected[:, ::-1], file.name)
        for size in ((900, 1100), (224, 224), (50, 1000), (1, 1), (len(pixels), 99), (99, pixels.shape[1])):
            assert_alike(resized(pixels, size), by_pil(pixels, size), f"{size}", 5e-3)


def test_noise_of_any_size_is_resized_as_in_pil():
    draws = np.random.default_rng(0)
    for number in range(150):
        size, after = draws.integers(1, 90, 2), tuple(draws.integers(1, 130, 2).tolist())
        pixels = draws.integers(0, 256, (*size, 3), np.uint8)
        if number % 2:
            pixels = (pixels > 127).astype(np.uint8) * np.uint8(255)  # overshoots both ends
        assert_alike(resized(pixels, after), by_pil(pixels, after), f"{size} {after}", 0.03)


def test_bilinear_resizing_is_that_of_pil(photograph):
    pixels = np.asarray(photograph)
    for size in ((800, 1066), (480, 640), (33, 57), (1100, 90)):
        expected = by_pil(pixels, size, Image.BILINEAR)
        assert_alike(resized(pixels, size, kind="bilinear"), expected, f"{size}", 5e-3)
        assert_alike(resized(pixels, size, True, "bilinear"), expected[:, ::-1], f"{size}", 5e-3)
    draws = np.random.default_rng(2)
    for _ in range(60):
        size, after = draws.integers(1, 90, 2), tuple(draws.integers(1, 130, 2).tolist())
        pixels = draws.integers(0, 256, (*size, 3), np.uint8)
        assert_alike(
            resized(pixels, after, kind="bilinear"), by_pil(pixels, after, Image.BILINEAR), f"{size}", 0.03
        )


def test_long_lines_are_resized_as_in_pil():
    draws = np.random.default_rng(1)
    for before, after in draws.integers(1, (6000, 700), (60, 2)).tolist():
        pixels = draws.integers(0, 256, (2, before, 3), np.uint8)
        assert_alike(resized(pixels, (2, after)), by_pil(pixels, (2, after)))
        pixels = np.ascontiguousarray(pixels.transpose(1, 0, 2))
        assert_alike(resized(pixels, (after, 2)), by_pil(pixels, (after, 2)))


def test_resize_refuses_another_size_than_planned(photograph):
    pixels = np.asarray(photograph)
    planned = resample.plan(np.array([[len(pixels) - 1, pixels.shape[1]]]), np.array([[384, 544]]))
    with pytest.raises(tf.errors.InvalidArgumentError):
        RESIZE(pixels, *(step[0] for step in planned.values()))


def test_resize_of_the_same_size_changes_nothing(photograph):
    pixels = np.asarray(photograph)
    assert resample.packed(640, 640) == b""
    np.testing.assert_array_equal(resized(pixels, pixels.shape[:2]), pixels)
    np.testing.assert_array_equal(resized(pixels, pixels.shape[:2], True), pixels[:, ::-1])


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_part_decodes_to_the_pixels_of_the_whole(photograph, kind, options):
    contents = encode(photograph, kind, **(options if kind == "JPEG" else {}))
    whole = image.decode(contents).numpy()
    draws = np.random.default_rng(2)
    for _ in range(40):
        rows, columns = (int(draws.integers(1, side + 1)) for side in whole.shape[:2])
        top, left = (
            int(draws.integers(0, side + 1)) for side in (len(whole) - rows, whole.shape[1] - columns)
        )
        part = image.decode(contents, tf.constant([top, left, rows, columns])).numpy()
        np.testing.assert_array_equal(part, whole[top : top + rows, left : left + columns])


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
    expected = photograph.resize(pixels.shape[1::-1], Image.BICUBIC)
    assert_alike(pixels, np.asarray(expected))
