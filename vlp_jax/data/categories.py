# SPDX-License-Identifier: Apache-2.0
"""Which classes boxes have: COCO's, by raw id or without gaps, or the names that the data holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlp_jax.types import UserError, closest

KINDS = ("data", "coco91", "coco80")
_SHOWN = 8  # names of a list in a message

COCO = {
    **{1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck"},
    **{9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    **{16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear"},
    **{24: "zebra", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    **{34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
    **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle"},
    **{46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana"},
    **{53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza"},
    **{60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table"},
    **{70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    **{78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book", 85: "clock"},
    **{86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush"},
}  # raw id -> name, as instances_*.json has them


def names(kind: str, manifest_names: Iterable[str]) -> tuple[str, ...]:
    """Returns the name of each class.

    Args:
        kind: "data", the names of the data in their order; "coco91", COCO's by raw id, 0 to 90, "" where none is;
            "coco80", the same without gaps.
        manifest_names: the names that the boxes of the data have, () = not known. Those that are no class are left out
            of training.

    Raises:
        UserError: an unknown kind, or data none of whose names is a class.
    """
    if kind not in KINDS:
        raise UserError(
            f"config.data.categories='{kind}' is unknown.{closest(kind, KINDS)} Possible: {', '.join(KINDS)}. Choose "
            "one of them."
        )
    given = sorted({name for name in manifest_names if name})
    classes = {
        "data": tuple(given),
        "coco91": tuple(COCO.get(number, "") for number in range(91)),
        "coco80": tuple(COCO.values()),
    }[kind]
    if given and not {*given} & {*classes}:
        raise UserError(
            f"config.data.categories={kind} has none of the names that the boxes of the data have. The data has "
            f"{_shortened(given)}; the classes are {_shortened(list(COCO.values()))}. Give "
            "--config.data.categories=data."
        )
    return classes


def of_data(kind: str, sources: Iterable[tuple[str | Path, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Returns the name of each class of a run.

    Args:
        kind: see `names`.
        sources: directory and manifest of each.

    Raises:
        UserError: as `names`; or a source without boxes or whose manifest does not list their names, or no name at all.
    """
    found: set[str] = set()
    for directory, manifest in sources:
        fields = manifest.get("fields", ())
        if missing := [field for field in ("boxes", "box_names") if field not in fields and fields]:
            raise UserError(
                f"The records of {directory} have no {' and no '.join(missing)}; they hold {', '.join(fields)}. A run "
                "with boxes in config.data.inputs needs both. Choose other data, or prepare it with its annotations of "
                "objects."
            )
        if "box_names" not in manifest:
            raise UserError(
                f"The manifest of {directory} does not list the names of its boxes: it was written by an older "
                "version. Possible are manifests with box_names. Prepare it again, with --overwrite."
            )
        names(kind, manifest["box_names"])  # each source must have some of the classes
        found.update(manifest["box_names"])
    if not found - {""}:
        raise UserError(
            "No box of the data has a name, so there are no classes to learn. Needed are boxes with names. Prepare "
            "other data, or take boxes out of config.data.inputs."
        )
    return names(kind, found)


def _shortened(all_names: list[str]) -> str:
    more = len(all_names) - _SHOWN
    return ", ".join(all_names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
