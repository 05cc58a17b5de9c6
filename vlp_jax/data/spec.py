# SPDX-License-Identifier: Apache-2.0
"""What a batch holds: key, shape, type and meaning, known from the config alone.

B rows, L = data.text_length, N = patch slots, p = data.patch_size, K = mask slots. Masks: True = real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.data import corrupt, image
from vlp_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """Shape and type of one array, as `jax.eval_shape` takes them, and a line of meaning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    meaning: str


def spec(config: Any, batch_size: int, slots: int = 0) -> dict[str, Entry]:
    """Returns what the pipeline gives for `config.data` and a number of rows.

    Args:
        config: reads data.
        batch_size: rows.
        slots: patch slots, one of data.buckets; 0 = the most that a batch of the run has.

    Raises:
        UserError: sizes that do not fit each other.
    """
    data = config.data
    if data.text_length < 3 or not 0 < data.mask_rate < 1:
        raise UserError(
            f"data.text_length={data.text_length} and data.mask_rate={data.mask_rate} do not fit: needed are a "
            "length of 3 and more ([CLS], a piece, [SEP]) and a rate between 0 and 1. Change them."
        )
    rule = image.layout(data)
    rows, length, slots, patch = batch_size, data.text_length, slots or rule.slots, rule.patch
    masked = corrupt.slots(data.mask_rate, length)
    table = {
        "text_ids": ((length,), np.int32, "word pieces, [CLS] first, [SEP] last, then padding"),
        "text_mask": ((length,), bool, "not padding"),
        "text_word_start": ((length,), bool, "a word begins here"),
        "patches": ((slots, 3 * patch**2), np.uint8, "pixels; row, column, channel inside a patch"),
        "patch_positions": ((slots, 2), np.int32, "row and column in the picture's own grid"),
        "patch_mask": ((slots,), bool, "not an empty slot"),
        "grid_size": ((2,), np.int32, "rows and columns of the whole picture, dropped patches included"),
        "mlm_positions": ((masked,), np.int32, "places to guess, ascending; 0 where unused"),
        "mlm_inputs": ((masked,), np.int32, "what is seen there: [MASK], a random piece or the original"),
        "mlm_labels": ((masked,), np.int32, "the original piece; -1 = unused"),
        "example_id": ((), np.int32, "pair of the source's split; -1 = padding row"),
        "image_id": ((), np.int32, "picture of the source's split; -1 = padding row"),
        "source_id": ((), np.int32, "number of the source in a mixture; -1 = padding row"),
    }
    return {key: Entry((rows, *shape), np.dtype(kind), words) for key, (shape, kind, words) in table.items()}


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
