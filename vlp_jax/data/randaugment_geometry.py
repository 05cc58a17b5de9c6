# SPDX-License-Identifier: Apache-2.0
"""RandAugment's five geometric operations: nearest pixel, black fill, equal to PIL's affine transform bit for bit.

Each takes uint8 [height, width, 3] and the map, int32 [6], that `randaugment.affine` makes; it reads of it only
what its own operation changes.
"""

from __future__ import annotations

import numpy as np


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


def shear_columns(picture, matrix, steepest: float):
    """Moves each column by its own number of pixels; `steepest` is the greatest slope that a map may have."""
    import tensorflow as tf

    # Eight neighbouring columns move by few different numbers: for each of these, all blocks of eight are fetched
    # from there at once, and what belongs to other columns is blanked out.
    height, width = tf.unstack(tf.shape(picture)[:2])
    blocks = (width + 7) // 8
    shift = tf.bitwise.right_shift(matrix[3] * tf.range(blocks * 8) + matrix[5], 16)
    shift = tf.reshape(tf.clip_by_value(shift, -height, height), [blocks, 8])
    margin, least = tf.reduce_max(tf.abs(shift)), tf.reduce_min(shift, 1)
    more = int(np.ceil(7 * steepest + 0.01))
    padding = [[margin, margin + more], [0, (blocks * 8 - width) * 3]]
    framed = tf.pad(tf.reshape(picture, [height, width * 3]), padding)
    words = tf.bitcast(tf.reshape(framed, [-1, 3, 8]), tf.int64)
    place = (tf.range(height) * blocks)[:, None] + ((least + margin) * blocks + tf.range(blocks))[None]
    moved = None
    for number in range(more + 1):
        here = tf.cast(tf.equal(shift - least[:, None], number), tf.uint8) * tf.constant(255, tf.uint8)
        here = tf.bitcast(tf.reshape(tf.repeat(here, 3), [1, -1, 8]), tf.int64)
        part = tf.gather_nd(words, (place + number * blocks)[..., None])
        part = tf.bitwise.bitwise_and(tf.reshape(part, [height, -1]), here)
        moved = part if moved is None else tf.bitwise.bitwise_or(moved, part)
    wide = tf.reshape(tf.bitcast(moved, tf.uint8), [height, blocks * 24])
    return tf.reshape(wide[:, : width * 3], [height, width, 3])


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
