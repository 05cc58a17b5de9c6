# SPDX-License-Identifier: Apache-2.0
"""An entry that a data set lists becomes an example: picture read and checked, texts cleaned, boxes cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped
from vlp_jax.data.preparation import admission, tables

# Lists that lose an item together: the first one decides.
_BOX_GROUP = ("boxes", "box_names", "box_attributes", "box_crowd", "box_area")


@dataclasses.dataclass(frozen=True)
class Completed:
    """An entry with its picture.

    Attributes:
        example: field -> value, ready to be stored; or why it cannot be used.
        changes: what was changed or left out, a short phrase each time.
    """

    example: dict[str, Any] | Dropped
    changes: tuple[str, ...] = ()


def complete(entry: dict[str, Any], source: Path, fields: Collection[str], *, upright: bool) -> Completed:
    """Reads the pictures of an entry, cleans its texts and clips its boxes.

    Args:
        entry: as data sets list them (see `datasets`).
        source: folder that its paths start from.
        fields: from `stored_fields`.
        upright: turns a picture as its EXIF says.
    """
    changes: list[str] = []
    try:
        picture = admission.admit(admission.read(source / entry["image"]), upright=upright)
        example = {"image": picture.content, "height": picture.height, "width": picture.width}
        example["pixels"] = picture.pixels - (picture.pixels >> 63 << 64)  # as int64
        changes += filter(None, [picture.changed])
        if "image_1" in fields:
            if not entry.get("image_1"):
                raise ValueError("has no second picture")
            second = admission.admit(admission.read(source / entry["image_1"]), upright=upright)
            example |= {"image_1": second.content, "height_1": second.height, "width_1": second.width}
            changes += filter(None, [second.changed])
        lists = {name: list(entry.get(name, ())) for name in fields if record.KINDS[name] in record.LISTS}
        reasons = _clean(lists)
        reasons += _clip(lists, picture.height, picture.width)
        name = tables.clean_text(entry["image_name"])
    except ValueError as error:
        return Completed(Dropped(entry["image"], str(error)))
    said = any(lists.get(name) for name in ("captions", "questions", "labels"))
    if not said and "boxes" not in entry:
        texts = [reason for reason in reasons if reason.startswith("a text")]
        return Completed(Dropped(entry["image"], texts[0] if texts else "nothing is said about it"))
    example |= {"image_name": name, "image_key": int(entry["image_key"])}
    example |= {key: int(entry.get(key, 0)) for key in ("coco_id", "flickr_id")}
    example |= {key: _array(record.KINDS[key], values) for key, values in lists.items()}
    example |= {key: entry.get(key, "") for key in fields if record.KINDS[key] == record.TEXT}
    return Completed(example, (*changes, *reasons))


def _clean(lists: dict[str, list]) -> list[str]:
    """Cleans all texts in place; a caption or question that is empty or unusable goes with what belongs to it."""
    reasons: list[str] = []
    labelled = "captions" if lists.get("captions") else "questions"  # to which the labels belong
    for first, *others in (("captions", "caption_boxes"), ("questions", "answers")):
        if not lists.get(first):
            continue
        others += ["labels"] * (first == labelled)
        others = [name for name in others if len(lists.get(name, ())) == len(lists[first])]
        kept = []
        for row, text in enumerate(lists[first]):
            cleaned, reason = _cleaned(text)
            if cleaned:
                lists[first][row] = cleaned
                kept.append(row)
            else:
                reasons.append(f"a text that {reason} was left out")
        for name in (first, *others):
            lists[name] = [lists[name][row] for row in kept]
    for name in ("answers", "labels", "box_names", "box_attributes"):
        if name in lists:
            lists[name] = [_cleaned(text)[0] for text in lists[name]]
    return reasons


def _cleaned(text: str) -> tuple[str, str]:
    try:
        return (cleaned := tables.clean_text(text)), "" if cleaned else "is empty"
    except ValueError as error:
        return "", str(error)


def _clip(lists: dict[str, list], height: int, width: int) -> list[str]:
    """Cuts boxes at the picture's edges in place; one without any area inside goes with what belongs to it."""
    reasons = []
    for first, *others in (_BOX_GROUP, ("caption_boxes",)):
        if not lists.get(first):
            continue
        boxes = np.asarray(lists[first], np.float64).reshape(-1, 4)
        start = np.clip(boxes[:, :2], 0, (width, height))
        end = np.clip(boxes[:, :2] + boxes[:, 2:], 0, (width, height))
        clipped = np.concatenate([start, end - start], 1)
        reasons += ["a box was cut at the edge"] * int((np.abs(clipped - boxes).max(1) > 0.5).sum())
        if first == "caption_boxes":  # a phrase stays when its region does not
            lists[first] = np.where(np.isfinite(clipped), clipped, 0).tolist()
            continue
        inside = (clipped[:, 2:] > 0).all(1)  # False for NaN
        reasons += ["a box without area was left out"] * int((~inside).sum())
        lists[first] = clipped[inside].tolist()
        for name in others:
            if lists.get(name):
                lists[name] = [value for value, kept in zip(lists[name], inside, strict=True) if kept]
    return reasons


def _array(kind: int, values: list) -> Any:
    if kind == record.BOXES:
        return np.asarray(values, np.float32).reshape(-1, 4)
    return values
