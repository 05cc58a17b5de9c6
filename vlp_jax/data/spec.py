# SPDX-License-Identifier: Apache-2.0
"""What a batch holds: key, shape, type and meaning, known from the config alone.

B rows, L = data.text_length, N = patch slots, p = data.patch_size, K = mask slots. Masks: True = real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.data import corrupt, grid, image
from vlp_jax.types import BOXES_LEFT_OUT, UserError, closest


@dataclasses.dataclass(frozen=True)
class Entry:
    """Shape and type of one array, as `jax.eval_shape` takes them, and a line of meaning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    meaning: str


def spec(config: Any, batch_size: int, size: int | tuple[int, int] = 0) -> dict[str, Entry]:
    """Returns what the pipeline gives for `config.data` and a number of rows.

    Args:
        config: reads data.
        batch_size: rows.
        size: patch slots, one of data.buckets, or rows and columns, one of data.canvases; 0 = the most that a batch
            of the run has.

    Raises:
        UserError: sizes that do not fit each other.
    """
    data = config.data
    _check_together(data)
    parts = {"text": _text, "patches": _patches, "grid": _grid, "boxes": _boxes}
    table: dict[str, tuple[tuple[int, ...], Any, str]] = {}
    for name in data.inputs:
        if name not in parts:
            raise UserError(
                f"config.data.inputs holds {name!r}.{closest(name, parts)} Possible: {', '.join(parts)}. Correct it."
            )
        table |= parts[name](data, size)
    table |= {
        "example_id": ((), np.int32, "pair, without texts picture, of the source's split; -1 = padding row"),
        "image_id": ((), np.int32, "picture of the source's split; -1 = padding row"),
        "source_id": ((), np.int32, "number of the source in a mixture; -1 = padding row"),
    }
    return {
        key: Entry((batch_size, *shape), np.dtype(kind), words) for key, (shape, kind, words) in table.items()
    }


def _check_together(data: Any) -> None:
    """Refuses parts that do not go together, and values of keys that another part reads."""
    given = tuple(data.inputs)
    if len({*given} & {"patches", "grid"}) != 1 or len({*given}) < len(given):
        raise UserError(
            f"config.data.inputs={given} is no batch: it needs pictures once, as patches or as a grid. Possible: "
            "(text, patches), (grid, boxes), (text, grid), (text, grid, boxes). Choose one of them."
        )
    if "boxes" in given and "patches" in given:
        raise UserError(
            f"config.data.inputs={given}: boxes are carried along with the pictures of a grid only. Possible: (grid, "
            "boxes), (text, grid, boxes). Take boxes out, or a grid instead of patches."
        )
    others = (
        ("image_sizes", "canvases", "size_crop") if "patches" in given else ("buckets", "randaugment", "crop")
    )
    for key in others:
        if data[key]:
            raise UserError(
                f"config.data.{key}={data[key]} means nothing with config.data.inputs={given}. Possible is its default, "
                f"which is off. Set it to {'0' if key == 'size_crop' else '()'}."
            )


def _text(data: Any, size: Any) -> dict[str, tuple]:
    if data.text_length < 3 or not 0 < data.mask_rate < 1:
        raise UserError(
            f"data.text_length={data.text_length} and data.mask_rate={data.mask_rate} do not fit: needed are a "
            "length of 3 and more ([CLS], a piece, [SEP]) and a rate between 0 and 1. Change them."
        )
    length, masked = data.text_length, corrupt.slots(data.mask_rate, data.text_length)
    return {
        "text_ids": ((length,), np.int32, "word pieces, [CLS] first, [SEP] last, then padding"),
        "text_mask": ((length,), bool, "not padding"),
        "text_word_start": ((length,), bool, "a word begins here"),
        "mlm_positions": ((masked,), np.int32, "places to guess, ascending; 0 where unused"),
        "mlm_inputs": ((masked,), np.int32, "what is seen there: [MASK], a random piece or the original"),
        "mlm_labels": ((masked,), np.int32, "the original piece; -1 = unused"),
    }


def _patches(data: Any, size: Any) -> dict[str, tuple]:
    rule = image.layout(data)
    slots = size or rule.slots
    return {
        "patches": ((slots, 3 * rule.patch**2), np.uint8, "pixels; row, column, channel inside a patch"),
        "patch_positions": ((slots, 2), np.int32, "row and column in the picture's own grid"),
        "patch_mask": ((slots,), bool, "not an empty slot"),
        "grid_size": ((2,), np.int32, "rows and columns of the whole picture, dropped patches included"),
    }


def _grid(data: Any, size: Any) -> dict[str, tuple]:
    grid.rule(data)  # refuses what cannot be done before parameters are made
    rows, columns = size or grid.canvases(data)[-1]
    return {
        "image": ((rows, columns, 3), np.uint8, "the picture at the top left, then zeros"),
        "image_mask": ((rows, columns), bool, "inside the picture"),
    }


def _boxes(data: Any, size: Any) -> dict[str, tuple]:
    slots = data.max_boxes
    if slots < 1:
        raise UserError(
            f"data.max_boxes={slots} leaves no room for a box. Possible are 1 and more. Give 100, for example, or take "
            "boxes out of config.data.inputs."
        )
    return {
        "boxes": (
            (slots, 4),
            np.float32,
            "cx, cy, width, height as fractions of the picture without padding",
        ),
        "box_labels": ((slots,), np.int32, "class; -1 = unused"),
        "box_mask": ((slots,), bool, "used; the first ones"),
        "boxes_left_out": (
            (len(BOXES_LEFT_OUT),),
            np.int32,
            "boxes of the record that are no targets, by reason",
        ),
    }


def check(batch: Mapping[str, Any], expected: Mapping[str, Entry]) -> None:
    """Compares a batch with its spec.

    Raises:
        ValueError: a key too many or too few, or an array of another shape or type.
    """
    if set(batch) != set(expected):
        raise ValueError(f"the batch has the keys {sorted(batch)}, its spec {sorted(expected)}")
    for key, entry in expected.items():
        found = (tuple(batch[key].shape), np.dtype(batch[key].dtype))
        if found != (entry.shape, entry.dtype):
            raise ValueError(
                f"{key} is {found[1]}{list(found[0])}, its spec {entry.dtype}{list(entry.shape)}"
            )
