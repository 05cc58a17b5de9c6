# SPDX-License-Identifier: Apache-2.0
"""RandAugment's fourteen operations on uint8 pictures in tensorflow, each equal to PIL's bit for bit.

The list and the ranges are those of ViLT's `RandomAugment` (no Invert, no Cutout; nearest pixel, black fill).
What is random is drawn in `augment.py`; here is only arithmetic.
"""

from __future__ import annotations

import functools

import numpy as np

from vlp_jax.data import randaugment_geometry as geometry

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
LARGEST = 30  # magnitude
_RANGES = {  # value at magnitudes 0 and 30: degrees, bits, levels, factor, slope, pixels
    "Rotate": (0.0, 30.0),
    "Posterize": (0.0, 4.0),
    "Solarize": (0.0, 256.0),
    "SolarizeAdd": (0.0, 110.0),
    "Enhance": (0.1, 1.9),
    "Shear": (0.0, 0.3),
    "Translate": (0.0, 100.0),
}
_FIXED = 65536.0  # PIL's nearest affine transform counts in 2^-16 pixels
_GREY = np.array([19595, 38470, 7471]) / 65536  # PIL's L; sums of 24 bits are exact in float32
_MARGIN = 2.0**-10  # many times the rounding of a float32 below 512
_TRIPLES = 256  # of pairs in a row
_LOW, _HIGH = (0, 2, 1), (1, 0, 2)  # channels of the three kinds of pairs; each is its own inverse
_PIXELS = 16  # in a row of the matrix products
_SMOOTH = 13  # sum of the weights of PIL's SMOOTH filter: 1, and 5 in the middle


def value(operation: str, magnitude: float) -> float:
    """The strength of an operation; "Enhance" stands for four, "Shear" and "Translate" for two each."""
    least, most = _RANGES[operation]
    return magnitude / LARGEST * (most - least) + least


def affine(operations: np.ndarray, signs: np.ndarray, sizes: np.ndarray, magnitude: float) -> np.ndarray:
    """The maps of the five geometric operations, as PIL rounds them to 2^-16 pixels.

    Output pixel (x, y) takes the input pixel ((a x + b y + c) >> 16, (d x + e y + f) >> 16). Exact for sides up to
    16,384 pixels.

    Args:
        operations: int [n, number], places in OPERATIONS.
        signs: int [n, number], 1 or -1.
        sizes: int [n, 2], height and width of the pictures.

    Returns:
        int32 [n, number, 6]: a to f; zeros for the other operations.
    """
    matrix = np.zeros((*operations.shape, 6))
    height, width = (np.broadcast_to(side[:, None], operations.shape) for side in np.asarray(sizes).T)
    signs = signs.astype(np.float64)
    shear, shift = signs * value("Shear", magnitude), signs * value("Translate", magnitude)
    here = operations == OPERATIONS.index("Rotate")
    matrix[here] = _rotation(signs[here] * value("Rotate", magnitude), height[here], width[here])
    for name, place, amount in (
        ("ShearX", 1, shear),
        ("ShearY", 3, shear),
        ("TranslateX", 2, shift),
        ("TranslateY", 5, shift),
    ):
        here = operations == OPERATIONS.index(name)
        matrix[here] = [1, 0, 0, 0, 1, 0]
        matrix[here, place] = amount[here]
    matrix[..., 2] += matrix[..., 0] * 0.5 + matrix[..., 1] * 0.5  # of the middle of the pixel
    matrix[..., 5] += matrix[..., 3] * 0.5 + matrix[..., 4] * 0.5
    return np.floor(matrix * _FIXED + 0.5).astype(np.int32)


def _rotation(degrees: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """`PIL.Image.rotate`'s matrix, [n, 6]: about the middle, cosine and sine rounded to 15 digits."""
    angle = -np.radians(degrees % 360.0)
    cosine, sine = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2.0, height / 2.0
    across, down = cosine * -x + sine * -y + x, -sine * -x + cosine * -y + y
    return np.stack([cosine, sine, across, -sine, cosine, down], -1)


def apply(picture, operation, matrix, magnitude: float):
    """Applies one operation.

    Args:
        picture: uint8 [height, width, 3].
        operation: int32 [], a place in OPERATIONS.
        matrix: int32 [6], of `affine`.
        magnitude: 0 to 30.

    Returns:
        uint8 of the same shape.
    """
    import tensorflow as tf

    factor = value("Enhance", magnitude)
    bits = max(1, int(value("Posterize", magnitude)))
    branches = {
        "AutoContrast": lambda: auto_contrast(picture),
        "Equalize": lambda: equalize(picture),
        "Rotate": lambda: geometry.rotate(picture, matrix),
        "Posterize": lambda: posterize(picture, bits),
        "Solarize": lambda: solarize(picture, value("Solarize", magnitude)),
        "SolarizeAdd": lambda: solarize_add(picture, int(value("SolarizeAdd", magnitude))),
        "Color": lambda: color(picture, factor),
        "Contrast": lambda: contrast(picture, factor),
        "Brightness": lambda: brightness(picture, factor),
        "Sharpness": lambda: sharpness(picture, factor),
        "ShearX": lambda: geometry.shear_rows(picture, matrix),
        "ShearY": lambda: geometry.shear_columns(picture, matrix, value("Shear", magnitude)),
        "TranslateX": lambda: geometry.translate_rows(picture, matrix),
        "TranslateY": lambda: geometry.translate_columns(picture, matrix),
    }
    assert tuple(branches) == OPERATIONS
    return tf.ensure_shape(tf.switch_case(operation, list(branches.values())), [None, None, 3])


def _words(picture):
    """The levels, eight to an int64 [n], zeros behind: bits are worked on at a fifth of uint8's time."""
    import tensorflow as tf

    return tf.bitcast(tf.reshape(_lined_up(picture, 8), [-1, 8]), tf.int64)


def _lined_up(picture, multiple: int):
    """uint8 [n], n a multiple of `multiple`: the levels, and zeros behind."""
    import tensorflow as tf

    level = tf.reshape(picture, [-1])
    return tf.concat([level, tf.zeros([-tf.size(level) % multiple], tf.uint8)], 0)


def _picture(level, shape):
    """Undoes `_lined_up` and `_words`."""
    import tensorflow as tf

    if level.dtype != tf.uint8:
        level = tf.bitcast(level, tf.uint8)
    return tf.reshape(tf.reshape(level, [-1])[: tf.reduce_prod(shape)], shape)


def _eight(level: int):
    """int64 []: a level eight times side by side."""
    import tensorflow as tf

    return tf.bitcast(tf.constant([level] * 8, tf.uint8), tf.int64)


def _inverted(words, high):
    """Inverts the levels where `high` has the bit of 128."""
    import tensorflow as tf

    bit = tf.bitwise.right_shift(tf.bitwise.bitwise_and(high, _eight(128)), 7)
    return tf.bitwise.bitwise_xor(words, tf.bitwise.bitwise_and(bit, _eight(1)) * 255)


def posterize(picture, bits: int):
    """Keeps the highest bits."""
    import tensorflow as tf

    return _picture(tf.bitwise.bitwise_and(_words(picture), _eight(256 - 2 ** (8 - bits))), tf.shape(picture))


def solarize(picture, threshold: float):
    """Inverts the levels at and above the threshold."""
    import tensorflow as tf

    if threshold > 255:
        return picture
    words, least = _words(picture), int(np.ceil(threshold))
    # The lower seven bits plus this reach 128 where they reach the lower seven bits of the threshold.
    reached = tf.bitwise.bitwise_and(words, _eight(127)) + _eight(128 - least % 128)
    join = tf.bitwise.bitwise_and if least >= 128 else tf.bitwise.bitwise_or
    return _picture(_inverted(words, join(words, reached)), tf.shape(picture))


def solarize_add(picture, addition: int):
    """Adds, cuts at 255, then inverts from 128 on."""
    import tensorflow as tf

    lifted = tf.minimum(picture, tf.constant(255 - addition, tf.uint8)) + tf.constant(addition, tf.uint8)
    words = _words(lifted)
    return _picture(_inverted(words, words), tf.shape(picture))


def _blend(degenerate, level, factor: float):
    """PIL's blend of float32 levels: degenerate + factor (level - degenerate), cut off, to uint8."""
    import tensorflow as tf

    mixed = (level - degenerate) * np.float32(factor) + degenerate
    return tf.cast(mixed if factor <= 1 else tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def _levels(picture):
    """float32 [n, 48], the levels of 16 pixels a row, and their L [n, 16]; zeros behind."""
    import tensorflow as tf

    level = tf.cast(tf.reshape(_lined_up(picture, 3 * _PIXELS), [-1, 3 * _PIXELS]), tf.float32)
    weights = np.kron(np.eye(_PIXELS), _GREY[:, None])
    return level, tf.floor(tf.matmul(level, tf.constant(weights, tf.float32)) + 0.5)


def color(picture, factor: float):
    """Blends with the grey picture."""
    import tensorflow as tf

    level, grey = _levels(picture)
    three = tf.constant(np.kron(np.eye(_PIXELS), np.ones((1, 3))), tf.float32)
    return _picture(_blend(tf.matmul(grey, three), level, factor), tf.shape(picture))


def contrast(picture, factor: float):
    """Blends with the mean of the grey picture."""
    import tensorflow as tf

    shape = tf.shape(picture)
    level, grey = _levels(picture)
    rows = tf.reduce_sum(grey, 1)  # below 2^24: exact
    total = tf.reduce_sum(tf.cast(rows, tf.float64))
    mean = tf.floor(total / tf.cast(shape[0] * shape[1], tf.float64) + 0.5)
    return _picture(_mixed(level, factor, tf.cast(mean, tf.int32)), shape)


def brightness(picture, factor: float):
    """Blends with black."""
    import tensorflow as tf

    return _mixed(tf.cast(picture, tf.float32), factor, 0)


def _mixed(level, factor: float, grey):
    """Blends float32 levels with one grey level, an int or int32 []; to uint8."""
    import tensorflow as tf

    table = offsets(factor)
    if table is None:
        return _blend(tf.cast(grey, tf.float32), level, factor)
    mixed = level * np.float32(factor) + tf.gather(table, grey)
    return tf.cast(mixed if factor <= 1 else tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


@functools.cache
def offsets(factor: float) -> np.ndarray | None:
    """For each grey level g: what, added to factor x level, is PIL's blend of level and g when cut to whole numbers.

    An interval of offsets gives all 256 results; this is its middle. PIL rounds to float32 twice, so results that
    would be whole may fall below; for some factors (0.52, 1.18) they do so for some levels only.

    Returns:
        float32 [256], or None where there is no such offset.
    """
    level = np.arange(256, dtype=np.float32)
    grey, strength = level[:, None], np.float32(factor)
    wanted = np.clip((level - grey) * strength + grey, 0, 255).astype(np.uint8)
    scaled = (level * strength).astype(np.float64)
    least = np.where(wanted > 0, wanted - scaled, -np.inf).max(1)
    most = np.where(wanted < 255, wanted + 1 - scaled, np.inf).min(1)
    if (most - least).min() < _MARGIN:
        return None
    return ((least + most) / 2).astype(np.float32)


def sharpness(picture, factor: float):
    """Blends with the smoothed picture; the outermost pixels stay as they are."""
    import tensorflow as tf

    shape = tf.shape(picture)
    weights = np.ones((3, 3, 3, 1)) / _SMOOTH
    weights[1, 1] *= 5
    level = tf.cast(picture, tf.float32)[None]
    # A thirteenth is never half-way between two levels, so what float32 rounds off does not count.
    mean = tf.round(tf.nn.depthwise_conv2d(level, weights.astype(np.float32), [1, 1, 1, 1], "SAME"))
    flat, mixed = (
        tf.reshape(each, [shape[0], shape[1] * 3]) for each in (picture, _blend(mean, level, factor))
    )
    middle = tf.concat([flat[1:-1, :3], mixed[1:-1, 3:-3], flat[1:-1, 3:][:, -3:]], 1)
    return tf.reshape(tf.concat([flat[:1], middle, flat[1:][-1:]], 0), shape)


def auto_contrast(picture):
    """Stretches each channel to 0 ... 255; one that has both ends already, or one level only, stays."""
    import tensorflow as tf

    level = tf.reshape(picture, [-1, 3])
    least, most = tf.reduce_min(level, 0), tf.reduce_max(level, 0)
    stays = ((least == 0) & (most == 255)) | (least >= most)

    def stretched():
        low, high = tf.cast(least, tf.float64), tf.cast(most, tf.float64)
        scale = tf.where(
            stays, tf.ones_like(low), 255.0 / tf.where(stays, 255 * tf.ones_like(low), high - low)
        )
        offset = tf.where(stays, tf.zeros_like(low), -low * scale)
        table = tf.range(256, dtype=tf.float64) * scale[:, None] + offset[:, None]
        table = tf.cast(tf.clip_by_value(table, 0.0, 255.0), tf.uint8)
        return _looked_up(_pairs(picture), table, tf.shape(picture))

    return tf.cond(tf.reduce_all(stays), lambda: picture, stretched)


def equalize(picture):
    """Gives each channel a flat histogram, by `PIL.ImageOps.equalize`'s table."""
    import tensorflow as tf

    pair, empty = _pairs(picture), tf.zeros([0], tf.int32)
    count = tf.raw_ops.DenseBincount(input=tf.reshape(pair, [-1]), size=3 << 16, weights=empty)
    count = tf.reshape(count, [3, 256, 256])
    low, high = tf.reduce_sum(count, 1), tf.reduce_sum(count, 2)
    count = tf.gather(low, _LOW) + tf.gather(high, _HIGH)
    behind = (2 * tf.size(pair) - tf.size(picture)) // 3
    count -= tf.pad(tf.fill([3, 1], behind), [[0, 0], [0, 255]])
    last = 255 - tf.argmax(tf.reverse(count > 0, [1]), 1, output_type=tf.int32)
    step = (tf.reduce_sum(count, 1) - tf.gather(count, last, batch_dims=1)) // 255
    before = tf.cumsum(count, 1, exclusive=True) + (step // 2)[:, None]
    table = tf.minimum(before // tf.maximum(step, 1)[:, None], 255)
    table = tf.where((step > 0)[:, None], table, tf.range(256)[None])
    return _looked_up(pair, tf.cast(table, tf.uint8), tf.shape(picture))


def _pairs(picture):
    """int32 [n, 768]: each two neighbouring levels as a place in a table of 3 x 65,536, black pixels behind.

    To count and to look up pairs takes half the time of single levels. By turns they are red and green, blue and
    red, green and blue, the first one in the low byte.
    """
    import tensorflow as tf

    level = tf.reshape(_lined_up(picture, 6 * _TRIPLES), [-1, 3 * _TRIPLES, 2])
    pair = tf.cast(tf.bitcast(level, tf.uint16), tf.int32)
    return pair + np.tile(np.arange(3, dtype=np.int32) << 16, _TRIPLES)


def _looked_up(pair, table, shape):
    """Replaces levels by a table, uint8 [3, 256]. (gather_nd takes two thirds of gather's time.)"""
    import tensorflow as tf

    low, high = (tf.cast(tf.gather(table, channels), tf.uint16) for channels in (_LOW, _HIGH))
    both = tf.reshape(high[:, :, None] * tf.constant(256, tf.uint16) + low[:, None], [-1])
    return _picture(tf.gather_nd(both, pair[..., None]), shape)
