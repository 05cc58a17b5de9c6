# SPDX-License-Identifier: Apache-2.0
"""From an entry to stored bytes and back, beside what TFDS reads of them."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import raw
from vlp_jax.data import record
from vlp_jax.data.preparation import completion

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
    return completion.complete(json.loads(json.dumps(entry)), source, fields, upright=False)


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


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\n\x02\x08"])
def test_bytes_that_are_no_record(content):
    with pytest.raises(ValueError, match="without image|no tf.train.Example"):
        record.parse(content, ("image",))
