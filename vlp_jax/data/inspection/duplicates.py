# SPDX-License-Identifier: Apache-2.0
"""Which pictures are there twice, and which of an evaluation set a run would train on; from index columns alone."""

from __future__ import annotations

from typing import Any

import numpy as np

TRAIN = "train"
EXAMPLES = 3
# Column -> what equal values mean.
KEYS = {"pixels": "the same pixels", "coco_id": "the same COCO id", "flickr_id": "the same Flickr id"}


def within(pixels: np.ndarray) -> dict[str, Any]:
    """Counts the pictures of a split that are there more than once.

    Args:
        pixels: uint64 [records], a digest of each picture.

    Returns:
        records (how many could be left out), share of all, examples [[row, row], ...] of equal pictures.
    """
    order = np.argsort(pixels, kind="stable")
    again = np.flatnonzero(pixels[order[1:]] == pixels[order[:-1]])
    examples = np.stack([order[again[:EXAMPLES]], order[again[:EXAMPLES] + 1]], -1)
    return {"records": len(again), "share": len(again) / max(1, len(pixels)), "examples": examples.tolist()}


def overlaps(train: dict[str, np.ndarray], others: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Looks for pictures of evaluation splits that the training split has too, by pixels, COCO and Flickr ids.

    Args:
        train: column -> integers [records], of the training split's index; 0 = no value.
        others: name -> the same of an evaluation split.

    Returns:
        One object for each split and column with something in common: by (the column), evaluation (the name),
        pictures (of the evaluation split), share (of all of it), examples [{value, train_row, row}, ...].
    """
    found = []
    for key in KEYS:
        known = np.sort(train[key])  # not np.unique, which takes ten times as long
        for name, columns in others.items():
            values = columns[key]
            if not len(known) or not len(values):
                continue
            spot = np.minimum(np.searchsorted(known, values), len(known) - 1)
            rows = np.flatnonzero((known[spot] == values) & (values != 0))
            examples = [
                {
                    "value": int(values[row]),
                    "train_row": int(np.argmax(train[key] == values[row])),
                    "row": int(row),
                }
                for row in rows[:EXAMPLES]
            ]
            if examples:
                common = {"pictures": len(rows), "share": len(rows) / len(values), "examples": examples}
                found.append({"by": key, "evaluation": name} | common)
    return found
