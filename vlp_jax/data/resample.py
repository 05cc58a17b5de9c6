# SPDX-License-Identifier: Apache-2.0
"""Resizing of uint8 pictures as PIL does it, bicubic or bilinear, in tensorflow's fast operations.

PIL filters the rows first, rounds to uint8, then filters the columns, with weights of 22 fractional bits
(libImaging Resample.c). Here each pass is a batch of small matrix products over tiles of output lines. Sums in
float32 instead of PIL's integers make one value of 7,500 differ, by one level; sums that are exact (each weight split
in two) were measured at 1.4 times the time of decoding and resizing.
"""

from __future__ import annotations

import functools

import numpy as np

TILE = 16  # output lines that share one window of input lines
STRIPS = 8  # parts of a pass: intermediate results stay in the cache, and memory is bounded
_FRACTION = 22  # bits of PIL's fixed-point weights; such a weight is exact in float32


def _bicubic(x: np.ndarray) -> np.ndarray:
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5  # a = -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - x, 0.0)


FILTERS = {"bicubic": (_bicubic, 2.0), "bilinear": (_bilinear, 1.0)}  # of |x|, and where they end


def weights(before: int, after: int, kind: str = "bicubic") -> tuple[np.ndarray, np.ndarray]:
    """PIL's weights for a line of `before` pixels that becomes one of `after`; `kind` is one of FILTERS.

    Returns:
        first int64 [after], the first pixel that counts, and weight int64 [after, taps] in units of 2^-22.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    shape, support = FILTERS[kind]
    first = np.maximum((centre - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(np.int64), before)
    tap = np.arange((last - first).max())
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    weight = shape(x) * (tap < (last - first)[:, None])
    total = np.cumsum(weight, 1)[:, -1:]  # from left to right, as PIL sums
    fixed = weight * (1.0 / total) * 2.0**_FRACTION
    return first, np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64)


@functools.lru_cache(maxsize=256)  # some 100 kB each for photographs
def packed(before: int, after: int, mirrored: bool = False, kind: str = "bicubic") -> bytes:
    """The plan of one pass as bytes, so that pictures of any size fit one batch; b"" = nothing to do.

    For each of the ceil(after / 16) tiles the numbers of its input lines (int32), and for each line of the tile
    its weights (float32).

    Args:
        before, after: pixels of the line.
        mirrored: whether the output lines come in reverse order.
        kind: one of FILTERS.
    """
    if before == after and not mirrored:
        return b""
    first, weight = weights(before, after, kind)
    if mirrored:
        first, weight = first[::-1], weight[::-1]
    tiles = -(-after // TILE)
    rest = tiles * TILE - after
    first, weight = np.pad(first, (0, rest), mode="edge"), np.pad(weight, ((0, rest), (0, 0)))
    start = first.reshape(tiles, TILE).min(1)
    offset = first - np.repeat(start, TILE)
    window = int(offset.max()) + weight.shape[1]
    dense = np.zeros((tiles * TILE, window), np.float32)
    dense[np.arange(len(dense))[:, None], offset[:, None] + np.arange(weight.shape[1])] = (
        weight * 2.0**-_FRACTION
    )
    lines = np.minimum(start[:, None] + np.arange(window), before - 1).astype(np.int32)
    return lines.tobytes() + dense.tobytes()


def plan(
    before: np.ndarray, after: np.ndarray, mirrored: np.ndarray | None = None, kind: str = "bicubic"
) -> dict[str, np.ndarray]:
    """Plans the resizing of n pictures, on the host.

    Args:
        before, after: int [n, 2], height and width in pixels.
        mirrored: bool [n], pictures to be mirrored left to right after the resizing; None = none.
        kind: one of FILTERS.

    Returns:
        before, after int32 [n, 2]; across, down: bytes, object [n], for the two passes of `resize`.
    """
    before, after = np.asarray(before, np.int32), np.asarray(after, np.int32)
    across, down = np.empty(len(before), object), np.empty(len(before), object)
    flags = np.zeros(len(before), bool) if mirrored is None else mirrored
    for row, ((tall, wide), (rows, columns), flag) in enumerate(
        zip(before.tolist(), after.tolist(), flags.tolist(), strict=True)
    ):
        across[row], down[row] = packed(wide, columns, flag, kind), packed(tall, rows, kind=kind)
    return {"before": before, "after": after, "across": across, "down": down}


def resize(picture, before, after, across, down):
    """Resizes as `PIL.Image.resize` does with the filter of the plan; then mirrors where the plan says so.

    A tensorflow function, eager or not; the arguments after `picture` are one row of `plan`.

    Args:
        picture: uint8 [height, width, 3] of the height and width `before`; an error of tensorflow if not.

    Returns:
        uint8 [after[0], after[1], 3].
    """
    import tensorflow as tf

    tall, wide, rows, columns = before[0], before[1], after[0], after[1]
    flat = tf.reshape(picture, [tall, wide * 3])  # the two-dimensional transposition is the fast one

    def crosswise():
        lines = tf.reshape(tf.transpose(flat), [wide, 3 * tall])
        return tf.transpose(tf.reshape(_along(lines, across, columns), [columns * 3, tall]))

    flat = tf.cond(tf.equal(across, b""), lambda: flat, crosswise)
    flat = tf.cond(tf.equal(down, b""), lambda: flat, lambda: _along(flat, down, rows))
    return tf.reshape(flat, [rows, columns, 3])


def _along(lines, plan_bytes, after):
    """One pass: uint8 [before, n] -> uint8 [after, n]."""
    import tensorflow as tf

    length = tf.shape(lines)[1]
    tiles = (after + TILE - 1) // TILE
    table = tf.reshape(tf.io.decode_raw(plan_bytes, tf.int32), [1 + TILE, tiles, -1])
    used, weight = table[0], tf.bitcast(tf.reshape(table[1:], [tiles, TILE, -1]), tf.float32)
    parts = []
    for strip in range(STRIPS):
        here = slice(tiles * strip // STRIPS, tiles * (strip + 1) // STRIPS)
        value = tf.matmul(weight[here], tf.cast(tf.gather(lines, used[here]), tf.float32))
        parts.append(tf.cast(tf.clip_by_value(value + 0.5, 0.0, 255.5), tf.uint8))  # the cast rounds down
    return tf.reshape(tf.concat(parts, 0), [tiles * TILE, length])[:after]
