# SPDX-License-Identifier: Apache-2.0
"""What a record may hold, from the entry that a data set lists to the stored bytes and back.

A record is one picture (two for pair tasks) with all that is said about it. The picture keeps its original bytes
unless `admission` had to change them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import numpy as np

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
LISTS = (TEXTS, INTEGERS, NUMBERS, BOXES)


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
        if kind in LISTS:
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
