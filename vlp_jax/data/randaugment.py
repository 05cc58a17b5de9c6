# SPDX-License-Identifier: Apache-2.0
"""RandAugment's fourteen operations on uint8 pictures in tensorflow, each equal to PIL's bit for bit.

The list and the ranges are those of ViLT's `RandomAugment` (no Invert, no Cutout; nearest pixel, black fill).
What is random is drawn in `augment.py`; here is only arithmetic.
"""

from __future__ import annotations

import functools

import numpy as np

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
        "Rotate": lambda: rotate(picture, matrix),
        "Posterize": lambda: posterize(picture, bits),
        "Solarize": lambda: solarize(picture, value("Solarize", magnitude)),
        "SolarizeAdd": lambda: solarize_add(picture, int(value("SolarizeAdd", magnitude))),
        "Color": lambda: color(picture, factor),
        "Contrast": lambda: contrast(picture, factor),
        "Brightness": lambda: brightness(picture, factor),
        "Sharpness": lambda: sharpness(picture, factor),
        "ShearX": lambda: shear_rows(picture, matrix),
        "ShearY": lambda: shear_columns(picture, matrix),
        "TranslateX": lambda: translate_rows(picture, matrix),
        "TranslateY": lambda: translate_columns(picture, matrix),
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
    rows = tf.reduce_sum(_levels(picture)[1], 1)  # below 2^24: exact
    total = tf.reduce_sum(tf.cast(rows, tf.float64))
    mean = tf.floor(total / tf.cast(shape[0] * shape[1], tf.float64) + 0.5)
    return _mixed(picture, factor, tf.cast(mean, tf.int32))


def brightness(picture, factor: float):
    """Blends with black."""
    return _mixed(picture, factor, 0)


def _mixed(picture, factor: float, grey):
    """Blends with one grey level, an int or int32 []."""
    import tensorflow as tf

    level, table = tf.cast(picture, tf.float32), offsets(factor)
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
    flat = tf.reshape(picture, [shape[0], shape[1] * 3])

    def smoothed():
        level = tf.cast(flat, tf.uint16)
        three = level[:-2] + level[1:-1] + level[2:]
        total = three[:, :-6] + three[:, 3:-3] + three[:, 6:] + level[1:-1, 3:-3] * tf.constant(4, tf.uint16)
        mean = tf.floor(tf.cast(total, tf.float32) * np.float32(1 / _SMOOTH) + 0.5)
        inner = _blend(mean, tf.cast(flat[1:-1, 3:-3], tf.float32), factor)
        middle = tf.concat([flat[1:-1, :3], inner, flat[1:-1, -3:]], 1)
        return tf.concat([flat[:1], middle, flat[-1:]], 0)

    large = tf.reduce_min(shape[:2]) > 2
    return tf.reshape(tf.cond(large, smoothed, lambda: flat), shape)


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
        return _looked_up(_places(picture), tf.clip_by_value(table, 0.0, 255.0), tf.shape(picture))

    return tf.cond(tf.reduce_all(stays), lambda: picture, stretched)


def equalize(picture):
    """Gives each channel a flat histogram, by `PIL.ImageOps.equalize`'s table."""
    import tensorflow as tf

    place, empty = _places(picture), tf.zeros([0], tf.int32)
    count = tf.raw_ops.DenseBincount(input=tf.reshape(place, [-1]), size=768, weights=empty)
    count = tf.reshape(count, [3, 256])
    last = 255 - tf.argmax(tf.reverse(count > 0, [1]), 1, output_type=tf.int32)
    step = (tf.reduce_sum(count, 1) - tf.gather(count, last, batch_dims=1)) // 255
    before = tf.cumsum(count, 1, exclusive=True) + (step // 2)[:, None]
    table = tf.minimum(before // tf.maximum(step, 1)[:, None], 255)
    table = tf.where((step > 0)[:, None], table, tf.range(256)[None])
    return _looked_up(place, table, tf.shape(picture))


def _places(picture):
    """int32 [height, 3 width]: each level's place in a table of 3 x 256."""
    import tensorflow as tf

    shape = tf.shape(picture)
    channel = tf.tile(tf.constant([0, 256, 512]), shape[1:2])
    return tf.cast(tf.reshape(picture, [shape[0], shape[1] * 3]), tf.int32) + channel


def _looked_up(place, table, shape):
    """Replaces levels by a table [3, 256]. (gather_nd takes two thirds of gather's time.)"""
    import tensorflow as tf

    table = tf.reshape(tf.cast(table, tf.uint8), [-1])
    return tf.reshape(tf.gather_nd(table, place[..., None]), shape)


def rotate(picture, matrix):
    """Takes for each pixel the nearest one under the map; outside is black."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    x, y = tf.range(width)[None], tf.range(height)[:, None]
    across = tf.bitwise.right_shift((matrix[1] * y + matrix[2]) + matrix[0] * x, 16)
    down = tf.bitwise.right_shift((matrix[4] * y + matrix[5]) + matrix[3] * x, 16)

    def margin(place, side):  # a map that is linear is farthest out in a corner
        corners = tf.stack([place[0, 0], place[0, -1], place[-1, 0], place[-1, -1]])
        return tf.maximum(-tf.reduce_min(corners), tf.reduce_max(corners) - side + 1)

    aside, above = tf.maximum(margin(across, width), 0), tf.maximum(margin(down, height), 0)
    framed, row = _framed(picture, aside, above)
    return tf.gather_nd(framed, (down * row + across + (above * row + aside))[..., None])


def _framed(picture, aside, above):
    """The picture in a black frame, as a list of pixels [n, 3], and how many make a row."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    row = width + 2 * aside
    column, rows = tf.zeros([height, aside * 3], tf.uint8), tf.zeros([above, row * 3], tf.uint8)
    wide = tf.concat([column, tf.reshape(picture, [height, width * 3]), column], 1)
    return tf.reshape(tf.concat([rows, wide, rows], 0), [-1, 3]), row


def shear_rows(picture, matrix):
    """Moves each row by its own number of pixels."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    shift = tf.bitwise.right_shift(matrix[1] * tf.range(height) + matrix[2], 16)
    shift = tf.clip_by_value(shift, -width, width)
    margin = tf.reduce_max(tf.abs(shift))
    framed, row = _framed(picture, margin, 0)
    # Parts of a string are copied in one piece, a seventh of the time of a gather. The levels stand at the end of
    # what serialize_tensor writes.
    text = tf.io.serialize_tensor(framed)
    first = tf.strings.length(text) + ((tf.range(height) - height) * row + shift + margin) * 3
    rows = tf.strings.substr(text, first, tf.fill([height], width * 3))
    return tf.reshape(tf.io.decode_raw(rows, tf.uint8), [height, width, 3])


def shear_columns(picture, matrix):
    """Moves each column by its own number of pixels."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    shift = tf.bitwise.right_shift(matrix[3] * tf.range(width) + matrix[5], 16)
    shift = tf.clip_by_value(shift, -height, height)
    margin = tf.reduce_max(tf.abs(shift))
    framed, row = _framed(picture, 0, margin)
    place = (tf.range(height) * row)[:, None] + ((shift + margin) * row + tf.range(width))[None]
    return tf.gather_nd(framed, place[..., None])


def translate_rows(picture, matrix):
    """Moves the picture sideways."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    shift = tf.clip_by_value(tf.bitwise.right_shift(matrix[2], 16), -width, width) * 3
    left, right = tf.maximum(-shift, 0), tf.maximum(shift, 0)
    kept = tf.reshape(picture, [height, width * 3])[:, right : width * 3 - left]
    moved = tf.concat([tf.zeros([height, left], tf.uint8), kept, tf.zeros([height, right], tf.uint8)], 1)
    return tf.reshape(moved, [height, width, 3])


def translate_columns(picture, matrix):
    """Moves the picture up or down."""
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(picture)[:2])
    shift = tf.clip_by_value(tf.bitwise.right_shift(matrix[5], 16), -height, height)
    above, below = tf.maximum(-shift, 0), tf.maximum(shift, 0)
    black = [tf.zeros([count, width, 3], tf.uint8) for count in (above, below)]
    return tf.concat([black[0], picture[below : height - above], black[1]], 0)
