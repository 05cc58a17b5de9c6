# SPDX-License-Identifier: Apache-2.0
"""Whole pictures for grid models: padded to a canvas, one of a few sizes, each of which is a program.

Mirrored, resized, cropped and resized as `detection.plan` says, with PIL's bilinear filter as DETR has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlp_jax.data import augment, detection, image, resample
from vlp_jax.types import UserError

_STEP = ("before", "after", "across", "down")  # of `resample.plan`
KIND = "bilinear"


def rule(data: Any) -> detection.Rule:
    """Reads `config.data`: image_size, image_sizes, image_limit, size_crop, flip.

    Raises:
        UserError: values outside what is possible.
    """
    sizes = tuple(data.image_sizes) or (data.image_size,)
    if not all(_whole(side) for side in (*sizes, data.image_size)):
        raise UserError(
            f"data.image_sizes={tuple(data.image_sizes)} and data.image_size={data.image_size} are no sides of pictures. "
            "Possible are whole numbers of pixels above 0. Give, for example, (480, 512, 544), or () for image_size alone."
        )
    if data.image_limit < 0 or data.image_limit != int(data.image_limit):
        raise UserError(
            f"data.image_limit={data.image_limit} is no side of a picture. Possible are whole numbers of pixels above 0, "
            "or 0 for int(1333 / 800 * image_size). Correct it."
        )
    shares = (augment.probability(data, key) for key in ("size_crop", "flip"))
    return detection.Rule(tuple(int(side) for side in sizes), longest(data), *shares)


def evaluation_rule(data: Any) -> detection.Rule:
    """One size, nothing drawn."""
    return dataclasses.replace(rule(data), shorter=(int(data.image_size),), crop=0.0, flip=0.0)


def longest(data: Any) -> int:
    """What the longer side should not exceed, in pixels."""
    return int(data.image_limit) or int(1333 / 800 * data.image_size)


def canvases(data: Any) -> tuple[tuple[int, int], ...]:
    """Reads `config.data.canvases`: rows and columns in pixels; the last one holds every picture of the run.

    Raises:
        UserError: they are no pairs of whole numbers above 0, or their areas do not ascend.
    """
    given = tuple(tuple(one) if hasattr(one, "__len__") else (one,) for one in data.canvases)
    whole = all(len(one) == 2 and all(map(_whole, one)) for one in given)
    areas = [one[0] * one[1] for one in given] if whole else []
    if not whole or areas != sorted(areas) or len({*given}) < len(given):
        raise UserError(
            f"data.canvases={tuple(data.canvases)} are no canvases. Possible are pairs of rows and columns in pixels, "
            "each once, by rising area, the last of which holds every picture; () = one square. Give, for example, "
            "((800, 1088), (1088, 800), (1344, 1344))."
        )
    return tuple((int(rows), int(columns)) for rows, columns in given) or ((longest(data),) * 2,)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0


def check(data: Any, height: np.ndarray, width: np.ndarray, name: str) -> None:
    """Looks whether the last canvas holds whatever the rule can make of pictures of these sizes, int [n] in pixels.

    Raises:
        UserError: it does not; `name` is what the message calls the pictures.
    """
    sides = np.unique(np.stack([height, width], -1), axis=0).astype(np.int64)
    most, last = detection.largest(rule(data), *sides.T), canvases(data)[-1]
    if (most > last).any():
        worst = int(np.argmax((most / last).max(1)))
        needed = [int(-(-side // 32) * 32) for side in most.max(0)]
        raise UserError(
            f"A picture of {name} has {sides[worst, 0]} x {sides[worst, 1]} pixels (height x width) and becomes as large "
            f"as {most[worst, 0]} x {most[worst, 1]} by data.image_size, data.image_sizes and data.image_limit; the last "
            f"of data.canvases={tuple(data.canvases)} has {last[0]} x {last[1]}. Let data.canvases end with "
            f"({needed[0]}, {needed[1]}), or leave such pictures out of the data."
        )


def plan(made: detection.Plans, canvas: tuple[int, int], crops: bool) -> dict[str, np.ndarray]:
    """Says how the pixels of n pictures are made: the arrays of `keys` but the contents.

    Args:
        made: what happens to them.
        canvas: rows and columns.
        crops: whether any picture of the run may be cropped.
    """
    arrays = resample.plan(made.box[:, 2:], made.size, kind=KIND)
    if crops:
        first = resample.plan(made.original, made.first, kind=KIND)
        arrays |= {f"first_{key}": value for key, value in first.items()}
        arrays["box"] = made.box.astype(np.int32)
    return arrays | {"canvas": np.tile(np.int32(canvas), (len(made.size), 1)), "mirrored": made.mirrored}


def keys(crops: bool) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The arrays that `apply` takes: name -> type (`object` for bytes) and shape of one row."""
    step = dict(zip(_STEP, ((np.int32, (2,)), (np.int32, (2,)), (object, ()), (object, ())), strict=True))
    needed = {"contents": (object, ()), "canvas": (np.int32, (2,)), "mirrored": (bool, ()), **step}
    if crops:
        needed |= {f"first_{key}": value for key, value in step.items()} | {"box": (np.int32, (4,))}
    return needed


def apply(row: dict[str, Any], crops: bool):
    """Decodes a picture, does what `plan` has said and puts it on its canvas; a tensorflow function, eager or not.

    Returns:
        uint8 [rows, columns, 3], the picture at the top left, then zeros.
    """
    import tensorflow as tf

    picture = image.decode(row["contents"])
    # Before the resizing, as DETR does: values half-way between two levels would be rounded the other way after it.
    picture = tf.cond(row["mirrored"], lambda: tf.reverse(picture, [1]), lambda: picture)
    if crops:
        picture = resample.resize(picture, *(row[f"first_{key}"] for key in _STEP))
        top, left, rows, columns = tf.unstack(row["box"])
        picture = picture[top : top + rows, left : left + columns]
    picture = resample.resize(picture, *(row[key] for key in _STEP))
    below, right = tf.unstack(row["canvas"] - row["after"])
    return tf.pad(picture, [[0, below], [0, right], [0, 0]])


def mask(size, canvas):
    """Where pictures lie on their canvas; a tensorflow function.

    Args:
        size: int32 [n, 2], rows and columns of the pictures.
        canvas: int32 [2].

    Returns:
        bool [n, rows, columns].
    """
    import tensorflow as tf

    rows, columns = (tf.sequence_mask(size[:, axis], canvas[axis]) for axis in range(2))
    return rows[:, :, None] & columns[:, None, :]


def load(contents: bytes, data: Any, name: str = "the picture") -> dict[str, np.ndarray]:
    """Makes the picture part of a batch of one for evaluation: image and image_mask.

    The canvas is the smallest of the run's that holds the picture; for one that none of them holds, as large as it.

    Raises:
        UserError: bytes that are no picture; `name` is what the message calls it.
    """
    picture = image.decoded(contents, name)
    made = detection.plan(evaluation_rule(data), np.zeros(1, np.uint64), *np.array([picture.shape[:2]]).T)
    size = tuple(made.size[0].tolist())
    holding = [one for one in canvases(data) if size[0] <= one[0] and size[1] <= one[1]]
    row = {key: value[0] for key, value in plan(made, (holding or [size])[0], False).items()}
    resized = apply(row | {"contents": contents}, False)
    return {
        "image": resized.numpy()[None],
        "image_mask": mask(made.size.astype(np.int32), row["canvas"]).numpy(),
    }
