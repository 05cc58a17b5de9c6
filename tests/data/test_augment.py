# SPDX-License-Identifier: Apache-2.0
"""RandAugment against PIL bit for bit, the drawing of crops and flips against plain rules, and all of it joined."""

import io
import math

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from vlp_jax.data import augment, image, order, randaugment, resample
from vlp_jax.types import UserError

LAYOUT = image.Layout(384, 639, 32, 228)


def strength(least, most, magnitude):
    return magnitude / 30 * (most - least) + least


def solarize_add(picture, addition):
    lifted = np.clip(np.asarray(picture).astype(int) + addition, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(lifted), 128)


def by_pil(picture, operation, sign, magnitude):
    """The operations in PIL's own words, with ViLT's ranges."""

    def affine(*map_):
        return picture.transform(picture.size, Image.Transform.AFFINE, map_)

    factor, slope = strength(0.1, 1.9, magnitude), sign * strength(0, 0.3, magnitude)
    shift = sign * strength(0, 100, magnitude)
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Rotate": lambda: picture.rotate(sign * strength(0, 30, magnitude)),
        "Posterize": lambda: ImageOps.posterize(picture, max(1, int(strength(0, 4, magnitude)))),
        "Solarize": lambda: ImageOps.solarize(picture, strength(0, 256, magnitude)),
        "SolarizeAdd": lambda: solarize_add(picture, int(strength(0, 110, magnitude))),
        "Color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "ShearX": lambda: affine(1, slope, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, slope, 1, 0),
        "TranslateX": lambda: affine(1, 0, shift, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, shift),
    }[operation]()


@pytest.fixture(scope="module")
def operate():
    traced = {}

    def run(picture, operation, sign, magnitude):
        if magnitude not in traced:
            shapes = ([None, None, 3], tf.uint8), ([], tf.int32), ([6], tf.int32)
            traced[magnitude] = tf.function(
                lambda *given: randaugment.apply(*given, magnitude),
                input_signature=[tf.TensorSpec(*shape) for shape in shapes],
            )
        place = np.array([[randaugment.OPERATIONS.index(operation)]], np.int32)
        size = np.array([picture.shape[:2]])
        matrix = randaugment.affine(place, np.array([[sign]]), size, magnitude)[0, 0]
        return traced[magnitude](picture, place[0, 0], matrix).numpy()

    return run


@pytest.fixture(scope="module")
def photographs(realdata):
    files = sorted((realdata / "coco/val2017").glob("*.jpg"))[:5]
    files += sorted((realdata / "cc_images").glob("*.jpg"))[:3]
    return [Image.open(file).convert("RGB") for file in files]


def odd_pictures():
    """Noise of every awkward size, few levels, one level, ranges that divide 255."""
    draws = np.random.default_rng(0)
    sizes = ((1, 1), (2, 2), (3, 3), (4, 3), (1, 50), (50, 1), (5, 7), (101, 33), (33, 101), (20, 90))
    pictures = [draws.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    pictures += [np.full((40, 30, 3), level, np.uint8) for level in (0, 7, 255)]
    spans = (2, 3, 52, 86, 171, 200)
    pictures += [(draws.integers(0, span, (77, 50, 3)) + 20).astype(np.uint8) for span in spans]
    return pictures


@pytest.mark.parametrize("operation", randaugment.OPERATIONS)
def test_operation_on_photographs(photographs, operate, operation):
    assert len(photographs) == 8
    for picture in photographs:
        for sign in (1, -1):
            ours = operate(np.asarray(picture), operation, sign, 9)
            expected = np.asarray(by_pil(picture, operation, sign, 9))
            np.testing.assert_array_equal(ours, expected, err_msg=f"{picture.size} {sign}")


@pytest.mark.parametrize("magnitude", [0, 7, 9, 17.5, 30])
def test_operations_on_odd_pictures(operate, magnitude):
    for operation in randaugment.OPERATIONS:
        for pixels in odd_pictures():
            for sign in (1, -1):
                ours = operate(pixels, operation, sign, magnitude)
                expected = np.asarray(by_pil(Image.fromarray(pixels), operation, sign, magnitude))
                np.testing.assert_array_equal(ours, expected, err_msg=f"{operation} {pixels.shape} {sign}")


def test_strengths_are_those_of_the_paper():
    assert randaugment.value("Rotate", 9) == 9 and randaugment.value("Translate", 9) == 30
    assert math.isclose(randaugment.value("Enhance", 9), 0.64) and int(randaugment.value("Posterize", 9)) == 1
    assert len(randaugment.OPERATIONS) == 14 and not {"Invert", "Cutout"} & set(randaugment.OPERATIONS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog on the left of a cat", True),
        ("RIGHT!", True),
        ("the left-hand side", True),
        ("lefthand drive", True),
        ("the leftmost one", True),
        ("rightmost", True),
        ("right most person", True),
        ("he left the room", True),  # also the verb: not to flip is never wrong
        ("the lights are bright", False),
        ("an upright piano, alright", False),
        ("copyright; a cleft rock", False),
        ("leftovers on a plate", False),
        ("righteous", False),
        ("", False),
        ("\u05e9\u05dc\u05d5\u05dd \U0001f600", False),
    ],
)
def test_mentions_side(text, expected):
    assert augment.mentions_side(text) is expected


def test_flips_are_fair_and_spare_texts_with_sides():
    draw = np.arange(4000)
    assert abs(augment.flips(draw, ["a cat"] * 4000, 0.5).mean() - 0.5) < 0.03
    assert not augment.flips(draw, ["cat to the left"] * 4000, 1.0).any()
    assert (
        augment.flips(draw, ["a cat"] * 4000, 1.0).all() and not augment.flips(draw, [""] * 4000, 0.0).any()
    )
    np.testing.assert_array_equal(
        augment.flips(draw, [""] * 4000, 0.5)[7:9], augment.flips(draw[7:9], [""] * 2, 0.5)
    )


def crop_by_torchvision(lots, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """The lines of RandomResizedCrop.get_params with given lots: areas, ratios, place."""
    areas, ratios, place = lots
    for share, bend in zip(areas, ratios, strict=True):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * bend)
        w, h = int(round(math.sqrt(target * aspect))), int(round(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = int(round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = int(round(h * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.2, 1.0), (1.0, 1.0), (0.01, 0.02)])
def test_crops_follow_torchvision(scale):
    draws = np.random.default_rng(1)
    height, width = draws.integers(1, 700, (2, 300))
    height[:20], width[:20] = 20, 900  # never fits: the middle
    draw = np.arange(300) + 5
    ours = augment.crops(draw, height, width, scale)
    for row in range(300):
        lots = [order.uniform(draw[row], use, np.arange(10)) for use in (augment._AREA, augment._RATIO)]
        lots.append(order.uniform(draw[row], augment._PLACE, np.arange(2)))
        expected = crop_by_torchvision(lots, int(height[row]), int(width[row]), scale)
        assert tuple(ours[row].tolist()) == tuple(
            max(1, side) if k > 1 else side for k, side in enumerate(expected)
        )
    top, left, rows, columns = ours.T
    assert (rows > 0).all() and (columns > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + rows <= height).all() and (left + columns <= width).all()


def test_crops_cover_the_picture_evenly():
    top, left, rows, columns = augment.crops(
        np.arange(5000), np.full(5000, 480), np.full(5000, 640), (0.5, 1.0)
    ).T
    shares = rows * columns / (480 * 640)  # larger ones fit less often
    assert shares.min() > 0.49 and shares.max() > 0.98 and 0.6 < shares.mean() < 0.75
    for first, room in ((top, 480 - rows), (left, 640 - columns)):
        assert abs(((first + 0.5) / (room + 1)).mean() - 0.5) < 0.02


def test_operations_are_drawn_evenly_and_independently():
    operations, signs = augment.operations(np.arange(14000), 2)
    for column in operations.T:
        assert np.abs(np.bincount(column, minlength=14) - 1000).max() < 150
    assert abs((operations[:, 0] == operations[:, 1]).mean() - 1 / 14) < 0.01
    assert set(np.unique(signs)) == {-1, 1} and np.abs(signs.mean(0)).max() < 0.03


def data(**changes):
    return ml_collections.ConfigDict(dict(randaugment=(), crop=(), flip=0.0) | changes)


def test_rule():
    assert augment.rule(data()) == augment.Rule()
    given = data(randaugment=(2, 9), crop=(0.5, 1.0), flip=0.5)
    assert augment.rule(given) == augment.Rule(2, 9.0, (0.5, 1.0), 0.5)
    for bad in (
        dict(randaugment=(2,)),
        dict(randaugment=(0, 9)),
        dict(randaugment=(2, 31)),
        dict(randaugment=(1.5, 9)),
        dict(crop=(1.0, 0.5)),
        dict(crop=(0.0, 1.0)),
        dict(crop=(0.5, 1.5)),
        dict(flip=1.5),
        dict(flip=float("nan")),
    ):
        with pytest.raises(UserError, match=f"data.{next(iter(bad))}="):
            augment.rule(data(**bad))


def make(contents, given, draw, sizes, texts):
    planned = augment.plan(given, LAYOUT, draw, sizes[:, 0], sizes[:, 1], texts)
    rows = {key: list(contents) if key == "contents" else list(planned[key]) for key in augment.keys(given)}
    kinds = {
        key: tf.as_dtype(kind) if kind is not object else tf.string
        for key, (kind, _) in augment.keys(given).items()
    }
    dataset = tf.data.Dataset.from_tensor_slices({key: tf.constant(rows[key], kinds[key]) for key in rows})
    return planned, list(dataset.map(lambda row: augment.apply(row, given)).as_numpy_iterator())


def resized(picture, tall, wide, mirrored):
    """Ours, which may differ from PIL's by one level; what comes after would enlarge that."""
    before, after = np.array([picture.size[::-1]]), np.array([[tall, wide]])
    steps = (step[0] for step in resample.plan(before, after, np.array([mirrored])).values())
    ours = resample.resize(tf.constant(np.asarray(picture)), *steps).numpy()
    expected = picture.resize((wide, tall), Image.BICUBIC)
    if mirrored:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(ours.astype(int) - np.asarray(expected)).max() <= 1
    return Image.fromarray(ours)


RULES = {
    "nothing": augment.Rule(),
    "vilt": augment.Rule(2, 9.0),
    "flip": augment.Rule(flip=1.0),
    "albef": augment.Rule(2, 9.0, (0.5, 1.0), 0.5),
    "crop": augment.Rule(crop=(0.2, 1.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_whole_way_against_pil(realdata, name):
    given = RULES[name]
    files = sorted((realdata / "coco/val2017").glob("*.jpg"))[5:9]
    contents = [file.read_bytes() for file in files]
    png = io.BytesIO()
    Image.open(files[0]).convert("RGB").crop((0, 0, 301, 211)).save(png, "PNG")
    contents.append(png.getvalue())
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    sizes, draw = np.array([picture.size[::-1] for picture in pictures]), np.arange(5) + 40
    planned, ours = make(contents, given, draw, sizes, ["a cat"] * 4 + ["left"])
    mirrored = augment.flips(draw, ["a cat"] * 4 + ["left"], given.flip)
    signs = augment.operations(draw, given.number)[1]

    def augmented(picture, row):
        for operation, sign in (
            zip(planned["operations"][row], signs[row], strict=True) if given.number else ()
        ):
            picture = by_pil(picture, randaugment.OPERATIONS[operation], int(sign), 9)
        return picture

    for row, picture in enumerate(pictures):
        if given.crop:
            top, left, rows, columns = planned["box"][row].tolist()
            picture = picture.crop((left, top, left + columns, top + rows))
        else:
            picture = augmented(picture, row)
        tall, wide = planned["size"][row].tolist()
        picture = resized(picture, tall, wide, mirrored[row])
        if given.crop:
            assert (tall, wide) == (384, 384)
            picture = augmented(picture, row)
        np.testing.assert_array_equal(ours[row], np.asarray(picture))


def test_plan_does_not_depend_on_the_batch():
    draw, height, width = np.arange(20), np.arange(20) + 300, np.full(20, 500)
    given = RULES["albef"]
    whole = augment.plan(given, LAYOUT, draw, height, width, ["a"] * 20)
    part = augment.plan(given, LAYOUT, draw[5:8], height[5:8], width[5:8], ["a"] * 3)
    assert set(augment.keys(given)) - {"contents"} <= set(part)
    for key, value in part.items():
        np.testing.assert_array_equal(whole[key][5:8], value, err_msg=key)
        if key in augment.keys(given) and value.dtype != object:
            kind, shape = augment.keys(given)[key]
            assert value.dtype == kind and value.shape[1:] == shape
