# SPDX-License-Identifier: Apache-2.0
"""Texts are cleaned and boxes cut together with what belongs to them; what cannot be used says why."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.data import raw
from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped
from vlp_jax.data.preparation import completion

FIELDS = record.stored_fields({*record.OPTIONAL})
NAN = float("nan")


@pytest.fixture
def source(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(raw.picture(number, "PNG", (40, 30)))
    return tmp_path


def completed(source, fields=FIELDS, **entry):
    entry = {"image": "1.png", "image_1": "2.png", "image_name": "a", "image_key": 7, **entry}
    # What a listing keeps is json; NaN is what Python's json makes of it.
    return completion.complete(json.loads(json.dumps(entry)), source, fields, upright=False)


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
