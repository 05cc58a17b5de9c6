# SPDX-License-Identifier: Apache-2.0
"""Records to stored bytes and back, beside what TFDS writes and reads."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import raw
from vlp_jax.data import record

FIELDS = record.stored_fields({*record.OPTIONAL})
TEXTS = {name for name, kind in record.KINDS.items() if kind == record.TEXTS}
SKIP = tfds.decode.SkipDecoding()
EXAMPLE = {
    "image": raw.picture(1), "image_name": "é.jpg", "image_key": 7, "height": 30, "width": 40, "pixels": -5,
    "coco_id": 2**40, "flickr_id": 3, "captions": ["ein Bär 🐻", "עברית"],
    "caption_boxes": [[0, 0, 5, 6], [1.5, 2, 3, 4]], "labels": ["yes", ""], "questions": ["how many?", "what?"],
    "answers": ["2|two", "a bear"], "boxes": [[1, 2, 3.25, 4], [0, 0, 40, 30]], "box_names": ["bear", "tree"],
    "box_attributes": ["red,big", ""], "box_crowd": [0, 1], "box_area": [11.5, 7.0],
    "image_1": raw.picture(2, "PNG"), "height_1": 30, "width_1": 40, "scene": "[]",
}  # fmt: skip


def test_every_field_comes_back():
    assert set(EXAMPLE) == {*record.ALWAYS, *FIELDS}
    content = record.encode(EXAMPLE)
    assert content == record.encode(dict(reversed(EXAMPLE.items())))
    back = record.parse(content)
    assert back.keys() == EXAMPLE.keys()
    for name, value in EXAMPLE.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert back["boxes"].dtype == np.float32 and back["boxes"].shape == (2, 4)
    assert record.parse(content, ("image_key", "captions")) == {
        "image_key": 7, "captions": EXAMPLE["captions"],
    }  # fmt: skip


def test_tfds_reads_what_we_write_and_the_other_way_round():
    features = record.features(FIELDS)
    theirs = features.deserialize_example(record.encode(EXAMPLE), decoders={"image": SKIP, "image_1": SKIP})
    for name, value in EXAMPLE.items():
        read = theirs[name].numpy()
        read = read.decode() if isinstance(value, str) else read
        read = [one.decode() for one in read] if name in TEXTS else read
        np.testing.assert_array_equal(read, value, err_msg=name)
    ours = record.parse(features.serialize_example({**EXAMPLE, "boxes": np.float32(EXAMPLE["boxes"])}))
    for name, value in EXAMPLE.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"\n\x02\x08"])
def test_bytes_that_are_no_record(content):
    with pytest.raises(ValueError, match="without image|no tf.train.Example"):
        record.parse(content, ("image",))
