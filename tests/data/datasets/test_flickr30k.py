# SPDX-License-Identifier: Apache-2.0
"""The reader of Flickr30k: Karpathy's json, the captions as published, lists, and what is refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.data import raw
from vlp_jax.data.datasets import Dropped, flickr30k, published
from vlp_jax.types import UserError

NAMES = [f"{number}.jpg" for number in (1000092795, 36979, 10002456, 998845445)]


@pytest.fixture
def folder(tmp_path):
    raw.pictures(tmp_path / "flickr30k-images", *NAMES)
    rows = [
        {
            "filename": name,
            "split": split,
            "imgid": row,
            "sentences": [{"raw": f"{name} {i} ."} for i in range(5)],
        }
        for row, (name, split) in enumerate(zip(NAMES, ("train", "train", "val", "test"), strict=True))
    ]
    raw.write(tmp_path / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    return tmp_path


def read(folder, **options):
    flickr30k.check(folder, **options)
    found = {}
    for split, one in flickr30k.listing(folder, map, **options):
        found.setdefault(split, []).append(one)
    return found


def keys(found):
    return {split: [one["image_key"] for one in entries] for split, entries in found.items()}


def token(folder, *lines):
    (folder / "dataset_flickr30k.json").unlink()
    raw.write(folder / "results_20130124.token", "".join(line + "\n" for line in lines))


def test_karpathy(folder):
    found = read(folder)
    assert keys(found) == {"train": [36979, 1000092795], "validation": [10002456], "test": [998845445]}
    assert found["train"][0] == {
        "image": "flickr30k-images/36979.jpg",
        "image_name": "36979.jpg",
        "image_key": 36979,
        "flickr_id": 36979,
        "captions": [f"36979.jpg {i} ." for i in range(5)],
    }
    assert json.loads(json.dumps(found)) == found
    assert read(folder, captions=2, examples=1)["train"][0]["captions"] == ["36979.jpg 0 .", "36979.jpg 1 ."]
    assert flickr30k.sources(folder) == [folder / "dataset_flickr30k.json"]


def test_captions_as_published(folder):
    token(
        folder,
        "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .",
        '1000092795.jpg#1\tTwo "young" , White males are outside .',
        "36979.jpg#0\tA group of friends",
        "no tab here",
        "",
        "77.jpg#0\tNot there",
    )
    entries = [one for members in read(folder).values() for one in members]
    texts = {one["image_name"]: one["captions"] for one in entries if isinstance(one, dict)}
    assert texts == {
        "1000092795.jpg": [
            "Two young guys with shaggy hair look at their hands .",
            'Two "young" , White males are outside .',
        ],
        "36979.jpg": ["A group of friends"],
    }
    dropped = {one.file: one.reason for one in entries if isinstance(one, Dropped)}
    assert dropped == {
        "flickr30k-images/77.jpg": "not found",
        "results_20130124.token:4": "has no picture and caption with a tab between",
    }


def test_without_lists_the_names_decide(folder):
    """5 % each, by a rule that may never change, else prepared splits would mix."""
    splits = [published.split_by_hash(f"{number}.jpg") for number in range(20_000)]
    assert 900 < splits.count("validation") < 1100 and 900 < splits.count("test") < 1100
    place = int(hashlib.sha256(b"36979.jpg").hexdigest()[:16], 16) % 1000
    assert published.split_by_hash("36979.jpg") == (
        "train" if place >= 100 else "test" if place >= 50 else "validation"
    )


def test_lists(folder):
    raw.write(folder / "val.txt", "36979\n")
    raw.write(folder / "test.txt", "10002456.jpg\n5\n")
    found = read(folder, splits=["val=val.txt", "test=test.txt"])
    assert found["test"].pop() == Dropped(
        "5.jpg", "is listed for test, but has no captions in dataset_flickr30k.json"
    )
    assert keys(found) == {"train": [998845445, 1000092795], "validation": [36979], "test": [10002456]}
    assert len(flickr30k.sources(folder, splits=["val=val.txt"])) == 2


def test_a_missing_picture(folder):
    (folder / "flickr30k-images" / "36979.jpg").unlink()
    assert read(folder)["train"][0] == Dropped("flickr30k-images/36979.jpg", "not found")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"filename"', "is not JSON"),
        ({"pictures": []}, "lacks images"),
        ({"images": [{"filename": "1.jpg"}]}, "picture 1 lacks 'split'"),
        ({"images": [{"filename": "1.jpg", "split": "restval", "sentences": []}]}, "is of the split restval"),
        ({"images": [{"filename": "1.jpg", "split": "val", "sentences": ["x"]}]}, "picture 1"),
        ({"images": [{"filename": 1, "split": "val", "sentences": []}]}, "picture 1"),
        (
            {"images": [{"filename": "1", "split": split, "sentences": []} for split in ("val", "test")]},
            "another",
        ),
        ({"images": 5}, "images is no list"),
    ],
)
def test_malformed(folder, content, message):
    raw.write(folder / "dataset_flickr30k.json", content)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_nothing_there(folder, tmp_path):
    with pytest.raises(UserError, match="is not there. Give --source"):
        read(tmp_path / "none")
    (folder / "flickr30k-images").rename(folder / "photos")
    with pytest.raises(UserError, match="Looked for .*flickr30k-images, .*images"):
        read(folder)
    (folder / "dataset_flickr30k.json").unlink()
    with pytest.raises(UserError, match="it holds photos. Needed: flickr30k-images/"):
        read(folder)
