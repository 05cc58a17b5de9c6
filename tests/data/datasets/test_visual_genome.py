# SPDX-License-Identifier: Apache-2.0
"""The reader of Visual Genome: all versions of its files give the same entries, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data import raw
from vlp_jax.data import source
from vlp_jax.data.datasets import Dropped, published, visual_genome
from vlp_jax.data.preparation import writer
from vlp_jax.types import UserError

URL = "https://cs.stanford.edu/people/rak248/{}/{}.jpg"
IMAGES = [
    {
        "image_id": 2,
        "url": URL.format("VG_100K_2", 2),
        "width": 40,
        "height": 30,
        "coco_id": 391895,
        "flickr_id": 7,
    },
    {
        "image_id": 1,
        "url": URL.format("VG_100K", 1),
        "width": 40,
        "height": 30,
        "coco_id": None,
        "flickr_id": None,
    },
]
BOX = {"x": 3, "y": -2, "w": 20, "h": 10}
REGION = {"x": 3, "y": -2, "width": 20, "height": 10}
QUESTION = {
    "qa_id": 5,
    "image_id": 1,
    "question": "What is it?",
    "answer": "A clock.",
    "a_objects": [],
    "q_objects": [],
}

# Layouts of each file, as versions 1.0, 1.2 and 1.4 and their mirrors have it; all say the same.
REGIONS = [
    [{"id": 1, "regions": [{"region_id": 9, "image_id": 1, "phrase": "the clock is green", **REGION}]}],
    [{"id": 1, "regions": [{"id": 9, "image": 1, "phrase": "the clock is green", **REGION}]}],
    [{"image_id": 1, "regions": [{"id": 9, "image": 1, "phrase": "the clock is green", **BOX}]}],
    {"1": [{"region_id": 9, "phrase": "the clock is green", **REGION}]},
    {"1": {"image_id": 1, "regions": [{"region_id": 9, "phrase": "the clock is green", **REGION}]}},
    [{"region_id": 9, "image_id": 1, "phrase": "the clock is green", **REGION}],
]
QUESTIONS = [
    [{"id": 1, "qas": [QUESTION]}],
    [{"image_id": 1, "qas": [QUESTION]}],
    [{"id": 1, "qas": [{"id": 5, "image": 1, "question": "What is it?", "answer": "A clock"}]}],
    [QUESTION],
]
OBJECTS = [
    [
        {
            "image_id": 1,
            "image_url": "",
            "objects": [
                {
                    "object_id": 5,
                    **BOX,
                    "names": ["clock"],
                    "synsets": ["clock.n.01"],
                    "merged_object_ids": [],
                }
            ],
        }
    ],
    [{"id": 1, "objects": [{"id": 5, **BOX, "names": ["clock"]}]}],
    [
        {
            "id": 1,
            "objects": [
                {"object_id": 5, **REGION, "name": "clock", "synsets": [{"synset_name": "clock.n.01"}]}
            ],
        }
    ],
    [{"id": 1, "objects": {"5": {"object_id": 5, **BOX, "names": {"0": "clock"}}}}],
    [{"image_id": 1, "objects": [{"object_id": 5, **BOX, "object_names": "clock"}]}],
]
ATTRIBUTES = [
    [{"image_id": 1, "attributes": [{"object_id": 5, **BOX, "names": ["clock"], "synsets": [], "attributes": ["green", "tall"]}]}],
    [{"id": 1, "attributes": [{"id": 5, **BOX, "object_names": ["clock"], "attributes": ["green, tall", "green"]}]}],
    [{"id": 1, "attributes": [{**BOX, "object_names": ["clock"], "attributes": ["green", "tall"]}]}],  # joined by box
    [{"image_id": 1, "attributes": [{"object_id": 5, **BOX, "attributes": {"0": "green", "1": "tall"}}, {"object_id": 5, **BOX}]}],
    [{"object_id": 5, "image_id": 1, **BOX, "names": ["clock"], "attributes": ["green", "tall"]}],
]  # fmt: skip
FILES = {
    "region_descriptions.json": REGIONS,
    "question_answers.json": QUESTIONS,
    "objects.json": OBJECTS,
    "attributes.json": ATTRIBUTES,
}


@pytest.fixture
def folder(tmp_path):
    raw.pictures(tmp_path / "raw", "VG_100K/1.jpg", "VG_100K_2/2.jpg")
    raw.write(tmp_path / "raw" / "image_data.json", IMAGES)
    for name, layouts in FILES.items():
        raw.write(tmp_path / "raw" / name, layouts[0])
    return tmp_path / "raw"


def read(folder, **options):
    """The entries and what was dropped, by id; splits are left aside."""
    visual_genome.check(folder, **options)
    found = [one for _, one in visual_genome.listing(folder, map, **options)]
    entries = {one["image_key"]: one for one in found if isinstance(one, dict)}
    assert json.loads(json.dumps(list(entries.values()))) == list(entries.values())
    return entries, [one for one in found if isinstance(one, Dropped)]


ENTRY = {
    "image": "VG_100K/1.jpg",
    "image_name": "1.jpg",
    "image_key": 1,
    "coco_id": 0,
    "flickr_id": 0,
    "captions": ["the clock is green"],
    "caption_boxes": [[3, -2, 20, 10]],
    "questions": ["What is it?"],
    "answers": ["A clock"],
    "boxes": [[3, -2, 20, 10]],
    "box_names": ["clock"],
    "box_attributes": ["green,tall"],
}


@pytest.mark.parametrize(
    ("name", "layout"), [(name, row) for name, layouts in FILES.items() for row in range(len(layouts))]
)
def test_all_layouts_say_the_same(folder, name, layout):
    raw.write(folder / name, FILES[name][layout])
    entries, dropped = read(folder)
    assert entries == {1: ENTRY}
    assert dropped == [Dropped("VG_100K_2/2.jpg", "has no annotation")]


def test_ids_of_other_sets_and_pictures_without_objects(folder):
    raw.write(folder / "objects.json", [*OBJECTS[0], {"image_id": 2, "objects": []}])
    entries, dropped = read(folder)
    assert not dropped
    assert {name: entries[2][name] for name in ("image", "coco_id", "flickr_id", "boxes")} == {
        "image": "VG_100K_2/2.jpg",
        "coco_id": 391895,
        "flickr_id": 7,
        "boxes": [],
    }
    assert "captions" not in entries[2]


def test_attributes_of_merged_and_of_lost_objects(folder, caplog):
    clock = {"object_id": 5, **BOX, "names": ["clock"], "merged_object_ids": [6, 8]}
    raw.write(folder / "objects.json", [{"image_id": 1, "objects": [clock]}])
    other = {"x": 0, "y": 0, "w": 1, "h": 1}
    rows = [
        {"object_id": 8, **other, "names": ["watch"], "attributes": ["green"]},
        {"object_id": 5, **BOX, "names": ["clock"], "attributes": ["tall"]},
        {"object_id": 9, **other, "names": ["tree"], "attributes": ["old"]},
        {"object_id": 10, **other, "names": ["tree"]},
    ]
    raw.write(folder / "attributes.json", [{"image_id": 1, "attributes": rows}])
    assert read(folder)[0][1]["box_attributes"] == ["green,tall"]
    assert "attributes.json: 1 objects are not in objects.json" in caplog.text
    (folder / "objects.json").unlink()
    entry = read(folder)[0][1]
    assert entry["box_names"] == ["watch", "clock", "tree", "tree"]
    assert entry["box_attributes"] == ["green", "tall", "old", ""]


def test_each_part_alone(folder):
    parts = {
        "regions": ("captions", "caption_boxes"),
        "questions": ("questions", "answers"),
        "objects": ("boxes", "box_names", "box_attributes"),
    }
    for wanted, fields in parts.items():
        options = {part: part == wanted for part in parts}
        entry = read(folder, **options)[0][1]
        assert {name for name in visual_genome.FIELDS if entry.get(name)} == set(fields)
    names = [path.name for path in visual_genome.sources(folder, regions=False)]
    assert names == ["attributes.json", "image_data.json", "objects.json", "question_answers.json"]
    for name in ("attributes.json", "objects.json", "question_answers.json"):
        (folder / name).unlink()
    assert "boxes" not in read(folder)[0][1]


def test_what_is_not_listed_or_not_there(folder):
    raw.write(folder / "region_descriptions.json", [*REGIONS[0], {"id": 7, "regions": []}])
    shutil.move(folder / "VG_100K" / "1.jpg", folder / "VG_100K_2" / "1.jpg")  # found all the same
    (folder / "VG_100K_2" / "2.jpg").unlink()
    entries, dropped = read(folder)
    assert entries[1]["image"] == "VG_100K_2/1.jpg"
    assert dropped == [
        Dropped("VG_100K_2/2.jpg", "not found"),
        Dropped("image 7", "is annotated in region_descriptions.json, but not in image_data.json"),
    ]


def test_addresses_without_folder(folder):
    raw.write(folder / "image_data.json", [{"id": 1, "url": None}, {"id": 2, "coco_id": "17"}])
    raw.write(folder / "objects.json", [{"image_id": 2, "objects": []}])
    entries, _ = read(folder)
    assert entries[2]["image"] == "VG_100K_2/2.jpg" and entries[2]["coco_id"] == 17


def test_splits_by_hash_and_by_lists(folder):
    count = 400
    raw.pictures(folder / "VG_100K", *(f"{key}.jpg" for key in range(1, count + 1)))
    raw.write(folder / "image_data.json", [{"image_id": key} for key in range(count, 0, -1)])
    raw.write(folder / "region_descriptions.json", [{"id": key, "regions": REGIONS[0][0]["regions"]} for key in range(1, count + 1)])  # fmt: skip
    found = [(split, one["image_key"]) for split, one in visual_genome.listing(folder, map)]
    assert found == sorted(found, key=lambda one: (published.SPLITS.index(one[0]), one[1]))
    assert all(split == published.split_by_hash(str(key)) for split, key in found) and len(found) == count
    raw.write(folder / "val.txt", "VG_100K_2/7.jpg xml/7.xml\nVG_100K/3.jpg xml/3.xml\n")
    raw.write(folder / "test.txt", "5\n999\n")
    options = {"splits": ["validation=val.txt", "test=test.txt"], "examples": 2}
    found = list(visual_genome.listing(folder, map, **options))
    assert found.pop() == ("test", Dropped("image 999", "is listed for test, but not in image_data.json"))
    ids = [(split, one["image_key"]) for split, one in found]
    assert ids == [("train", 1), ("train", 2), ("validation", 3), ("validation", 7), ("test", 5)]


def test_records(folder, tmp_path):
    """Through the writer: boxes end at the edge of the 40 x 30 picture, phrases keep theirs."""
    manifest, _ = writer.write(visual_genome, folder, tmp_path / "data", workers=1, max_bad=1)
    split = next(name for name, one in manifest["splits"].items() if one["records"])
    record = source.Source(tmp_path / "data", split).read([0])[0]
    assert record["boxes"].tolist() == record["caption_boxes"].tolist() == [[3, 0, 20, 8]]
    assert (record["box_attributes"], record["answers"]) == (["green,tall"], ["A clock"])


def test_real_questions(realdata, folder):
    shutil.copy(realdata / "vg" / "question_answers.json", folder)
    raw.pictures(folder / "VG_100K", "4.jpg", "5.jpg")
    raw.write(folder / "image_data.json", [{"image_id": 4}, {"image_id": 5}])
    entries, _ = read(folder, regions=False, objects=False)
    assert [len(entries[key]["questions"]) for key in (4, 5)] == [5, 3]
    assert dict(zip(entries[4]["questions"], entries[4]["answers"], strict=True)) == {
        "What is on the curtains?": "Sailboats",
        "Where was the photo taken?": "In a room",
        "What color is the couch?": "Purple",
        "What is the table made out of?": "Glass",
        "What is on the couch?": "A teddy bear",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("objects.json", "[{", "objects.json is not JSON"),
        ("objects.json", 5, "is no list of pictures"),
        ("objects.json", [{"objects": []}], "picture 1 has no id"),
        ("objects.json", [{"image_id": 1, "objects": "x"}], "picture 1 has no list of objects"),
        ("objects.json", [{"image_id": 1, "objects": [{"names": ["a"]}]}], "lacks 'x'"),
        ("objects.json", [{"image_id": 1, "objects": [{"x": 1, "y": 2, "w": "wide", "h": 1}]}], "has no box"),
        ("objects.json", [{"image_id": "one", "objects": [dict(BOX)]}], "published: image one"),
        ("region_descriptions.json", [{"id": 1, "regions": [dict(REGION)]}], "lacks 'phrase'"),
        (
            "question_answers.json",
            [{"id": 1, "qas": [{"question": "?", "answer": None}]}],
            "published: image 1",
        ),
        ("question_answers.json", [7], "picture 1 has no id"),
        ("image_data.json", {"1": {}}, "is no list of pictures"),
        ("image_data.json", [{"url": ""}], "picture 1 lacks 'id'"),
        ("image_data.json", [{"image_id": 1}, {"image_id": 1, "coco_id": 5}], "has the id 1 of another"),
    ],
)
def test_malformed(folder, name, content, message):
    raw.write(folder / name, content)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_nothing_there(folder, tmp_path):
    with pytest.raises(UserError, match="is not there. Give --source"):
        read(tmp_path / "none")
    for name in ("VG_100K", "VG_100K_2"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(UserError, match=r"Looked for \*.jpg in .*VG_100K, .*VG_100K_2"):
        read(folder)
    (folder / "image_data.json").unlink()
    with pytest.raises(UserError, match="it holds attributes.json, .*Needed: image_data.json"):
        read(folder)
