# SPDX-License-Identifier: Apache-2.0
"""From an entry to stored bytes and back: texts cleaned and boxes cut together with what belongs to them."""

import json
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import raw
from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped

FIELDS = record.stored_fields({*record.OPTIONAL})
NAN = float("nan")
TEXTS = {name for name, kind in record.KINDS.items() if kind == record.TEXTS}
SKIP = tfds.decode.SkipDecoding()


@pytest.fixture
def source(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(raw.picture(number, "PNG", (40, 30)))
    return tmp_path


def completed(source, fields=FIELDS, **entry):
    entry = {"image": "1.png", "image_1": "2.png", "image_name": "a", "image_key": 7, **entry}
    # What a listing keeps is json; NaN is what Python's json makes of it.
    return record.complete(json.loads(json.dumps(entry)), source, fields, upright=False)


def test_every_field_comes_back(source):
    said = {
        "captions": ["ein Bär 🐻", "עברית"], "caption_boxes": [[0, 0, 5, 6], [1.5, 2, 3, 4]], "labels": ["yes", ""],
        "questions": ["how many?", "what?"], "answers": ["2|two", "a bear"],
        "boxes": [[1, 2, 3.25, 4], [0, 0, 40, 30]], "box_names": ["bear", "tree"], "box_attributes": ["red,big", ""],
        "box_crowd": [0, 1], "box_area": [11.5, 7.0], "scene": "[]", "coco_id": 2**40, "flickr_id": 3,
    }  # fmt: skip
    made = completed(source, **said)
    assert not made.changes
    assert set(made.example) == {*record.ALWAYS, *FIELDS}
    features = record.features(FIELDS)
    content = record.encode(made.example)
    assert content == record.encode(dict(reversed(made.example.items())))
    assert record.parse(features.serialize_example(made.example)).keys() == made.example.keys()
    theirs = features.deserialize_example(content, decoders={"image": SKIP, "image_1": SKIP})
    back = record.parse(content)
    for name, value in back.items():
        read = theirs[name].numpy()
        read = read.decode() if isinstance(value, str) else read
        read = [one.decode() for one in read] if name in TEXTS else read
        np.testing.assert_array_equal(read, value, err_msg=name)
    for name, value in said.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert back["boxes"].dtype == np.float32 and back["boxes"].shape == (2, 4)
    assert back["image"] == (source / "1.png").read_bytes() and (back["height"], back["width"]) == (30, 40)
    assert back["image_1"] == (source / "2.png").read_bytes() and back["width_1"] == 40
    assert record.parse(content, ("image_key",)) == {"image_key": 7}


def test_what_cannot_be_said_goes_with_its_box_or_label(source):
    made = completed(
        source, captions=["", "a\x00 dog\r\nruns ", "x" * 10_001, "\udcff"], labels=["a", "b", "c", "d"],
        caption_boxes=[[0, 0, 1, 1]] * 4, questions=["\n", "why"], answers=["no", "so"],
    )  # fmt: skip
    assert made.example["captions"] == ["a dog runs"] and made.example["labels"] == ["b"]
    assert len(made.example["caption_boxes"]) == 1
    assert (made.example["questions"], made.example["answers"]) == (["why"], ["so"])
    assert sorted(made.changes) == [
        "a text that has 10001 characters, more than 10000 was left out",
        "a text that is empty was left out",
        "a text that is empty was left out",
        "a text that is not UTF-8 was left out",
    ]


def test_boxes_are_cut_at_the_edge(source):
    boxes = [[-5, 20, 10, 20], [39, 0, 0, 5], [50, 1, 2, 2], [NAN, 1, 2, 2], [1, 1, 2, 2], [0, 0, 40.3, 30]]
    made = completed(source, boxes=boxes, box_names=[*"abcdef"], box_crowd=[1] * 6)
    np.testing.assert_array_equal(made.example["boxes"], [[0, 20, 5, 10], [1, 1, 2, 2], [0, 0, 40, 30]])
    assert made.example["box_names"] == ["a", "e", "f"] and made.example["box_crowd"] == [1] * 3
    assert made.changes.count("a box without area was left out") == 3
    made = completed(source, captions=["outside"], caption_boxes=[[90, 90, 5, 5]])
    assert made.example["captions"] == ["outside"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "nothing is said about it"),
        ({"captions": [" "]}, "a text that is empty"),
        ({"captions": ["a"], "image": "no.png"}, "not there|not found|does not exist|No such"),
        ({"captions": ["a"], "image_1": ""}, "has no second picture"),
        ({"captions": ["a"], "image_name": "\udcff"}, "is not UTF-8"),
    ],
)
def test_what_cannot_be_used_says_why(source, entry, reason):
    dropped = completed(source, **entry).example
    assert isinstance(dropped, Dropped) and not dropped.missing
    assert re.search(reason, dropped.reason), dropped.reason


def test_a_picture_without_objects_is_kept_where_boxes_are_asked_for(source):
    assert len(completed(source, boxes=[]).example["boxes"]) == 0


def test_the_same_pixels_have_the_same_digest(source):
    shutil.copy(source / "1.png", source / "2.png")
    first, second = (completed(source, captions=["a"], image=f"{n}.png").example["pixels"] for n in (1, 2))
    assert first == second and -(2**63) <= first < 2**63


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\n\x02\x08"])
def test_bytes_that_are_no_record(content):
    with pytest.raises(ValueError, match="without image|no tf.train.Example"):
        record.parse(content, ("image",))
