# SPDX-License-Identifier: Apache-2.0
"""What a record may hold, from the entry that a data set lists to the stored bytes and back.

A record is one picture (two for pair tasks) with all that is said about it. The picture keeps its original bytes
unless `admission` had to change them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import admission, tables
from vlp_jax.data.datasets import Dropped

IMAGE, TEXT, INTEGER, TEXTS, INTEGERS, NUMBERS, BOXES = range(7)  # kinds of fields
ALWAYS = {
    "image": IMAGE,  # bytes of the file
    "image_name": TEXT,  # as the source names it
    "image_key": INTEGER,  # its number there
    "height": INTEGER,  # pixels
    "width": INTEGER,
    "pixels": INTEGER,  # digest of the decoded picture, the bits of a uint64
    "coco_id": INTEGER,  # 0 = none
    "flickr_id": INTEGER,
}
OPTIONAL = {
    "captions": TEXTS,
    "caption_boxes": BOXES,  # parallel to captions: the region that each describes
    "questions": TEXTS,
    "answers": TEXTS,  # parallel to questions, several joined by |
    "labels": TEXTS,  # parallel to captions, else to questions, else one for the picture
    "boxes": BOXES,  # x, y, width, height in pixels, inside the picture
    "box_names": TEXTS,  # this and the next three: parallel to boxes
    "box_attributes": TEXTS,  # several joined by commas
    "box_crowd": INTEGERS,  # 1 = a group as COCO marks it
    "box_area": NUMBERS,  # of the mask, pixels
    "image_1": IMAGE,  # the second picture of a pair
    "height_1": INTEGER,
    "width_1": INTEGER,
    "scene": TEXT,  # drawn worlds: their objects as json
}
KINDS = ALWAYS | OPTIONAL
_LISTS = (TEXTS, INTEGERS, NUMBERS, BOXES)
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


def features(fields: Collection[str]):
    """The fields of a data set as TFDS describes them.

    Args:
        fields: optional ones that its records have.
    """
    import tensorflow_datasets as tfds

    def feature(kind: int):
        if kind == IMAGE:
            return tfds.features.Image(shape=(None, None, 3))
        if kind == BOXES:
            return tfds.features.Sequence(tfds.features.Tensor(shape=(4,), dtype=np.float32))
        one = {
            TEXT: tfds.features.Text(),
            INTEGER: tfds.features.Scalar(np.int64),
            NUMBERS: tfds.features.Scalar(np.float32),
        }
        single = {TEXTS: TEXT, INTEGERS: INTEGER, NUMBERS: NUMBERS}
        return tfds.features.Sequence(one[single[kind]]) if kind in single else one[kind]

    names = [*ALWAYS, *(name for name in OPTIONAL if name in fields)]
    return tfds.features.FeaturesDict({name: feature(KINDS[name]) for name in names})


def stored_fields(fields: Collection[str]) -> list[str]:
    """The optional fields that records have: those of the data set, and the sides of a second picture."""
    return [
        name
        for name in OPTIONAL
        if name in fields or ("image_1" in fields and name in ("height_1", "width_1"))
    ]


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
        lists = {name: list(entry.get(name, ())) for name in fields if KINDS[name] in _LISTS}
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
    example |= {key: _array(KINDS[key], values) for key, values in lists.items()}
    example |= {key: entry.get(key, "") for key in fields if KINDS[key] == TEXT}
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
    if kind == BOXES:
        return np.asarray(values, np.float32).reshape(-1, 4)
    return values


def encode(example: dict[str, Any]) -> bytes:
    """Returns a record as TFDS stores it, a tf.train.Example; the same bytes for the same values.

    Args:
        example: field -> value, as `complete` makes it.
    """
    message = _message()()
    features = message.features.feature
    for name, value in example.items():
        feature, kind = features[name], KINDS[name]
        if kind in (IMAGE, TEXT, TEXTS):
            values = value if kind == TEXTS else [value]
            feature.bytes_list.value.extend(one if kind == IMAGE else one.encode() for one in values)
        elif kind in (INTEGER, INTEGERS):
            feature.int64_list.value.extend([value] if kind == INTEGER else value)
        else:
            feature.float_list.value.extend(np.asarray(value, np.float32).ravel().tolist())
    return message.SerializeToString(deterministic=True)


def parse(content: bytes, names: Collection[str] = ()) -> dict[str, Any]:
    """Reads a stored record; by hand, because TFDS's decoder costs 30 times as much.

    Args:
        content: from `encode`, or as TFDS writes it.
        names: the fields wanted; () = all.

    Returns:
        field -> bytes, str, int, a list of them, or for boxes float32 [n, 4].

    Raises:
        ValueError: no such record.
    """
    from google.protobuf.message import DecodeError

    try:
        found = _message().FromString(content).features.feature
    except DecodeError as error:
        raise ValueError(f"no tf.train.Example ({error})") from error
    record = {}
    for name in names or found:
        if name not in found:
            raise ValueError(f"without {name}")
        feature, kind = found[name], KINDS.get(name, TEXT)
        filled = feature.WhichOneof("kind")
        values = list(getattr(feature, filled).value) if filled else []
        if kind == BOXES:
            record[name] = np.asarray(values, np.float32).reshape(-1, 4)
            continue
        if kind in (TEXT, TEXTS):
            values = [value.decode("utf-8", "replace") for value in values]
        if kind in _LISTS:
            record[name] = values
        elif len(values) == 1:
            record[name] = values[0]
        else:
            raise ValueError(f"with {len(values)} values of {name}")
    return record


@functools.cache
def _message():
    """tf.train.Example by protobuf alone: with tensorflow each worker would take 3 s and 400 MB more to start."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="record", syntax="proto3")

    def add(message, name: str, number: int, kind: int, of: str = "", repeated: bool = False):
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        of = f".record.{of}" if of else None
        return message.field.add(name=name, number=number, type=kind, label=label, type_name=of)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    lists = (("Bytes", field.TYPE_BYTES), ("Float", field.TYPE_FLOAT), ("Int64", field.TYPE_INT64))
    for number, (name, kind) in enumerate(lists, 1):
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, repeated=True)
        add(feature, f"{name.lower()}_list", number, field.TYPE_MESSAGE, f"{name}List").oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, "Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("record.Example"))
