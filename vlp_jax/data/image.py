# SPDX-License-Identifier: Apache-2.0
"""Pictures to patches on the host: decode as PIL does, resize by ViLT's rule, cut, keep at most so many.

Each picture keeps its shape; patches with row, column and mask give every picture of a run one static shape.
Follows ViLT's `MinMaxResize` and `visual_embed` (commit 762fd39).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlp_jax.data import order, resample
from vlp_jax.types import UserError

_SAMPLE = 0x5A  # separates this use of a draw from others
JPEG_MAGIC = b"\xff\xd8"
_CONTEXT = 16  # pixels: the largest block that a JPEG is coded in


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a picture becomes patches.

    Attributes:
        shorter: pixels of the shorter side after resizing.
        longer: pixels that the longer side may not exceed.
        patch: side of a patch in pixels.
        slots: patches that a picture may keep; the others are dropped by lot.
    """

    shorter: int
    longer: int
    patch: int
    slots: int


def layout(data: Any) -> Layout:
    """Reads `config.data`: image_size, image_limit, patch_size, max_patches, crop.

    Raises:
        UserError: sizes that are not positive or not multiples of the patch.
    """
    size, patch = int(data.image_size), int(data.patch_size)
    if size <= 0 or patch <= 0 or size % patch:
        near = max(1, round(size / patch)) * patch if patch > 0 else size
        raise UserError(
            f"data.image_size={size} is not a multiple of data.patch_size={patch}. "
            f"Possible near it: {near}. Change one of the two."
        )
    longer = int(data.image_limit) or int(1333 / 800 * size)
    if data.crop:
        longer = size  # crops become squares
    if longer < patch or data.max_patches < 0:
        raise UserError(
            f"data.image_limit={data.image_limit} and data.max_patches={data.max_patches} leave no patch of "
            f"{patch} pixels. Give 0 (the original's rule) or a limit of {patch} and more."
        )
    return Layout(size, longer, patch, int(data.max_patches) or max_patches(size, longer, patch))


def max_patches(shorter: int, longer: int, patch: int) -> int:
    """Returns the most patches that `resized_size` can give: 228 for 384, 639, 32."""
    return max(1, min(shorter, longer) // patch) * max(1, longer // patch)


def resized_size(
    height: np.ndarray | int, width: np.ndarray | int, shorter: int, longer: int, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """ViLT's rule as coded: shorter side to `shorter`, longer side at most `longer`, floored to patches.

    Rounds half up before flooring. Unlike the original a side is never below one patch: very long pictures
    would get a side of zero pixels.

    Returns:
        int64 height and width, of the shape of the arguments.
    """
    height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
    scale = shorter / np.minimum(height, width)
    tall = np.where(height < width, shorter, scale * height)
    wide = np.where(height < width, scale * width, shorter)
    most = np.maximum(tall, wide)
    shrink = np.where(most > longer, longer / most, 1.0)
    sides = (np.floor(side * shrink + 0.5).astype(np.int64) // multiple * multiple for side in (tall, wide))
    tall, wide = (np.maximum(side, multiple) for side in sides)
    return tall, wide


def plan(height: np.ndarray, width: np.ndarray, draw: np.ndarray, rule: Layout) -> dict[str, np.ndarray]:
    """Says for n pictures how large they become and which patches they keep, from their sizes alone.

    A picture with more patches than slots keeps a subset drawn without replacement by `draw`; the kept ones
    stand in raster order (the original shuffles them, to no effect on the model but float noise).

    Args:
        height, width: int [n], original pixels.
        draw: uint [n], a number for the choices of each picture.

    Returns:
        size int32 [n, 2] (pixels after resizing), chosen int32 [n, slots] (patch in raster order; the number
        of patches where the slot is empty), patch_positions int32 [n, slots, 2], patch_mask bool [n, slots],
        grid_size int32 [n, 2] (rows and columns of the whole picture).
    """
    tall, wide = resized_size(height, width, rule.shorter, rule.longer, rule.patch)
    rows, columns = tall // rule.patch, wide // rule.patch
    count = (rows * columns)[:, None]
    raster = np.arange(max(rule.slots, int(count.max(initial=0))))
    if len(raster) == rule.slots:
        chosen = np.broadcast_to(raster, (len(count), rule.slots))
    else:
        lots = np.where(raster < count, order.uniform(np.asarray(draw)[:, None], _SAMPLE, raster), 2.0)
        chosen = np.sort(np.argpartition(lots, rule.slots - 1, axis=1)[:, : rule.slots], axis=1)
    mask = chosen < count
    row, column = np.divmod(chosen, columns[:, None])
    return {
        "size": np.stack([tall, wide], -1).astype(np.int32),
        "chosen": np.where(mask, chosen, count).astype(np.int32),
        "patch_positions": (np.stack([row, column], -1) * mask[..., None]).astype(np.int32),
        "patch_mask": mask,
        "grid_size": np.stack([rows, columns], -1).astype(np.int32),
    }


def decode(contents, box=None):
    """Decodes JPEG, PNG, GIF (first frame), WebP or BMP to uint8 [height, width, 3], equal to PIL's RGB.

    A tensorflow function, eager or not. The accurate DCT is what PIL and OpenCV use; tensorflow's
    default differs by up to 21 levels. The EXIF orientation is ignored, as by PIL.

    Args:
        contents: bytes.
        box: int32 [4], top, left, height and width of the part wanted; None = all. The rest of a JPEG is skipped
            where possible, to the same pixels.
    """
    import tensorflow as tf

    options = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}

    def jpeg():
        if box is None:
            return tf.io.decode_jpeg(contents, **options)
        # The colours of a pixel depend on its neighbours', so some of them are decoded with it.
        whole = tf.io.extract_jpeg_shape(contents)[:2]
        first = tf.maximum(box[:2] - _CONTEXT, 0)
        size = tf.minimum(box[:2] + box[2:] + _CONTEXT, whole) - first
        larger = tf.io.decode_and_crop_jpeg(contents, tf.concat([first, size], 0), **options)
        top, left = tf.unstack(box[:2] - first)
        return larger[top : top + box[2], left : left + box[3]]

    def other():
        picture = tf.io.decode_image(contents, channels=3, expand_animations=False)
        if box is None:
            return picture
        return picture[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

    picture = tf.cond(tf.strings.substr(contents, 0, 2) == JPEG_MAGIC, jpeg, other)
    return tf.ensure_shape(picture, [None, None, 3])


def cut(picture, chosen, patch: int):
    """Cuts a picture and takes the patches `chosen`; an empty slot (index = number of patches) is zeros.

    Args:
        picture: uint8 [height, width, 3], sides multiples of `patch`.
        chosen: int32 [slots].

    Returns:
        uint8 [slots, 3 patch^2], inside a patch in order row, column, channel.
    """
    import tensorflow as tf

    # Lines of patches lie in one piece in the picture, so a gather of whole lines is the quickest way.
    height, width = tf.shape(picture)[0], tf.shape(picture)[1]
    columns = width // patch
    lines = tf.reshape(picture, [height * columns, 3 * patch])
    row, column = chosen // columns, chosen % columns
    first = row * (patch * columns) + column
    place = first[:, None] + tf.range(patch) * columns
    empty = chosen >= height // patch * columns
    lines = tf.concat([lines, tf.zeros([1, 3 * patch], tf.uint8)], 0)
    place = tf.where(empty[:, None], height * columns, place)
    return tf.reshape(tf.gather(lines, place), [-1, 3 * patch * patch])


def load(contents: bytes, rule: Layout, draw: int = 0, name: str = "the picture") -> dict[str, np.ndarray]:
    """Makes the picture part of a batch of one: patches, patch_positions, patch_mask, grid_size.

    Raises:
        UserError: bytes that are no picture; `name` is what the message calls it.
    """
    import tensorflow as tf

    picture = decoded(contents, name)
    before = np.array([picture.shape[:2]])
    planned = plan(*before.T, np.array([draw], np.uint32), rule)
    steps = (step[0] for step in resample.plan(before, planned.pop("size")).values())
    resized = resample.resize(tf.constant(picture), *steps)
    return planned | {"patches": cut(resized, planned.pop("chosen")[0], rule.patch).numpy()[None]}


def decoded(contents: bytes, name: str) -> np.ndarray:
    """Decodes to uint8 [height, width, 3].

    Raises:
        UserError: bytes that are no picture; `name` is what the message calls it.
    """
    import tensorflow as tf

    try:
        return decode(tf.constant(contents)).numpy()
    except tf.errors.InvalidArgumentError as error:
        reason = error.message.rpartition("}} ")[2].splitlines()[0][:120]
        raise UserError(
            f"{name} ({len(contents)} bytes) cannot be decoded: {reason} Possible are JPEG, PNG, GIF, WebP "
            "and BMP. Replace or leave out the file."
        ) from error
