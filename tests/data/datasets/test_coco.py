# SPDX-License-Identifier: Apache-2.0
"""The reader of COCO's captions and instances: which pictures, what is said of them, which splits, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data import raw
from vlp_jax.data import source
from vlp_jax.data.datasets import Dropped, coco
from vlp_jax.data.preparation import writer
from vlp_jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    return raw.coco(tmp_path / "raw", {"train2017": 7, "val2017": 6})


def read(folder, **options):
    """split -> entries; every entry must survive json."""
    found = {}
    for split, one in coco.listing(folder, map, **options):
        assert isinstance(one, Dropped) or json.loads(json.dumps(one)) == one
        found.setdefault(split, []).append(one)
    return found


def keys(entries):
    return [one["image_key"] for one in entries]


def test_entries_are_the_files_in_the_order_of_ids(folder):
    coco.check(folder)
    entries = read(folder)["train"]
    assert keys(entries) == list(range(1, 8))
    for key, one in enumerate(entries, 1):
        assert one == {
            "image": f"train2017/{key:012d}.jpg",
            "image_name": f"{key:012d}.jpg",
            "image_key": key,
            "coco_id": key,
            "flickr_id": 0,
            "captions": [f"Picture {key}, words 0. \n", f"Picture {key}, words 1. \n"],
        }


def test_val_is_halved_for_want_of_test_captions(folder):
    found = read(folder)
    assert list(found) == ["train", "validation", "test"]
    assert (keys(found["validation"]), keys(found["test"])) == ([8, 10, 12], [9, 11, 13])


def test_splits_examples_and_captions_are_chosen(folder, caplog):
    options = {"splits": ["train=val2017", "test=val2017:1/3"], "examples": 2, "captions": 1}
    coco.check(folder, **options)
    found = read(folder, **options)
    assert {split: keys(entries) for split, entries in found.items()} == {"train": [8, 9], "test": [9, 12]}
    assert found["test"][1]["captions"] == ["Picture 12, words 0. \n"]
    assert "test holds pictures of train" in caplog.text


def test_same_splits(folder, caplog):
    options = {"same_splits": True, "examples": 3}
    coco.check(folder, **options)
    assert {split: keys(entries) for split, entries in read(folder, **options).items()} == dict.fromkeys(
        ("train", "validation", "test"), [1, 2, 3]
    )
    assert not caplog.text


def test_captions_and_instances_are_one_entry(folder):
    url = "http://farm6.staticflickr.com/5021/5560942229_40538af5b5_z.jpg"
    images = [raw.coco_image(2, flickr_url=url), raw.coco_image(1), raw.coco_image(3)]
    images.append(raw.coco_image(99))  # without captions
    (folder / "train2017" / f"{99:012d}.jpg").write_bytes(raw.picture(99))
    rows = [
        {"image_id": 2, "bbox": [1, 2, 3.5, 4], "category_id": 18},
        {
            "image_id": 2,
            "bbox": [-5, 20, 100, 100],
            "iscrowd": 1,
            "area": 0.25,
            "segmentation": {"counts": [9]},
        },
        {"image_id": 99, "bbox": [0, 0, 0, 3]},  # without area: the writer takes it out and counts it
        {"image_id": 2, "bbox": [1, 2, 3.5, 4], "category_id": 18, "id": 900},  # the first one again
        {"image_id": 77, "bbox": [0, 0, 1, 1]},
    ]
    path = raw.coco_instances(folder, "train2017", images, rows)
    *entries, stranger = read(folder)["train"]
    assert keys(entries) == [1, 2, 3, 4, 5, 6, 7, 99]
    assert stranger == Dropped("image 77", "is annotated in train2017, but not listed there")
    by_key = {one["image_key"]: one for one in entries}
    fields = ("flickr_id", "boxes", "box_names", "box_crowd", "box_area")
    assert [by_key[2][name] for name in fields] == [
        5560942229,
        [[1.0, 2.0, 3.5, 4.0], [-5.0, 20.0, 100.0, 100.0]],
        ["dog", "person"],
        [0, 1],
        [6.5, 0.25],
    ]
    assert by_key[2]["captions"] and by_key[1]["boxes"] == [] and "boxes" not in by_key[4]
    assert "captions" not in by_key[99] and by_key[99]["boxes"] == [[0.0, 0.0, 0.0, 3.0]]
    assert path in coco.sources(folder) and path not in coco.sources(folder, boxes=False)
    assert all("boxes" not in one for one in read(folder, boxes=False)["train"])


def test_instances_without_captions(folder):
    shutil.move(folder / "annotations" / "captions_train2017.json", folder / "annotations" / "old.json")
    raw.coco_instances(folder, "train2017", [raw.coco_image(5)], [{"image_id": 5, "bbox": [0, 0, 9, 9]}])
    coco.check(folder)
    assert keys(read(folder)["train"]) == [5]


def test_what_the_writer_makes_of_boxes(folder, tmp_path):
    rows = [[-5, 20, 100, 100], [1, 2, 3, 4], [0, 0, 0, 3], [50, 0, 9, 9]]  # cut, kept, no area, outside
    rows = [{"image_id": 1, "bbox": box} for box in rows]
    raw.coco_instances(folder, "train2017", [raw.coco_image(1)], rows)
    manifest, _ = writer.write(coco, folder, tmp_path / "data", workers=1)
    record = source.Source(tmp_path / "data", "train").read([0])[0]
    assert (
        record["boxes"].tolist() == [[0, 20, 40, 10], [1, 2, 3, 4]] and record["box_names"] == ["person"] * 2
    )
    assert manifest["changed"]["a box without area was left out"] == 2


def test_pictures_without_caption_and_captions_without_picture(folder):
    path = folder / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 8]
    content["annotations"] += [{"id": 1, "image_id": 500, "caption": "of nothing"}] * 2
    content["annotations"] += [{"id": 90, "image_id": 10, "caption": "Picture 10, words 0. \n"}] * 2
    raw.write(path, content)
    (folder / "val2017" / f"{12:012d}.jpg").unlink()
    bare, ten, gone, stranger = read(folder)["validation"]
    assert bare == Dropped(f"val2017/{8:012d}.jpg", "has no caption")
    assert gone == Dropped(f"val2017/{12:012d}.jpg", "not found")
    assert stranger == Dropped("image 500", "is annotated in val2017, but not listed there")
    assert len(ten["captions"]) == 3, "the annotation that stands there twice counts once"


def test_karpathy_splits_with_the_pictures_of_2017(folder):
    rows = [
        raw.karpathy(key, split) for key, split in ((9, "restval"), (1, "train"), (10, "val"), (11, "test"))
    ]
    path = raw.write(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    boxes = [{"image_id": 10, "bbox": [1, 1, 2, 2]}]
    raw.coco_instances(folder, "val2017", [raw.coco_image(key) for key in (9, 10)], boxes)
    coco.check(folder)
    found = read(folder)
    assert {split: keys(entries) for split, entries in found.items()} == {
        "train": [1, 9],
        "validation": [10],
        "test": [11],
    }
    assert found["train"][0]["image"] == f"train2017/{1:012d}.jpg"
    assert found["validation"][0]["captions"] == ["Karpathy 10. "]
    assert found["validation"][0]["boxes"] == [[1, 1, 2, 2]] and found["train"][1]["boxes"] == []
    assert "boxes" not in found["test"][0]
    assert coco.sources(folder) == [folder / "annotations" / "instances_val2017.json", path]


def test_captions_of_2017_with_the_pictures_of_2014(folder):
    for key, place in ((8, "val2014"), (10, "train2014"), (12, "images/val2014")):
        (folder / place).mkdir(parents=True)
        year = place.rpartition("/")[2]
        shutil.move(folder / "val2017" / f"{key:012d}.jpg", folder / place / f"COCO_{year}_{key:012d}.jpg")
    found = read(folder)["validation"]
    assert [one["image"] for one in found] == [
        f"val2014/COCO_val2014_{8:012d}.jpg",
        f"train2014/COCO_train2014_{10:012d}.jpg",
        f"images/val2014/COCO_val2014_{12:012d}.jpg",
    ]
    assert found[0]["image_name"] == f"{8:012d}.jpg"


@pytest.mark.parametrize("form", ["{}", "COCO_val2014_{:012d}.jpg", "val2014/COCO_val2014_{:012d}.jpg {}"])
def test_karpathy_by_lists(folder, form):
    for name, ids in (("val.txt", [12, 2]), ("test.txt", [13])):
        raw.write(folder / "lists" / name, "\r\n".join(form.format(key, key) for key in ids) + "\r\n\r\n")
    options = {"karpathy": ["val=lists/val.txt", "test=lists/test.txt"]}
    coco.check(folder, **options)
    found = {split: keys(entries) for split, entries in read(folder, **options).items()}
    assert found == {"train": [1, 3, 4, 5, 6, 7, 8, 9, 10, 11], "validation": [2, 12], "test": [13]}
    raw.write(folder / "few.txt", "3\n4\n321\n")
    found = read(folder, karpathy=["train=few.txt"])
    assert list(found) == ["train"] and keys(found["train"][:2]) == [3, 4]
    reason = "is in the list of train, but not in train2017 or val2017"
    assert found["train"][2] == Dropped("image 321", reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4\nno number\n", "line 2: no id in 'no number'"),
        ("3\n", "list of validation, too"),
        ("", "no picture"),
    ],
)
def test_wrong_lists(folder, text, message):
    raw.write(folder / "val.txt", "3\n")
    raw.write(folder / "test.txt", text)
    with pytest.raises(UserError, match=message):
        coco.check(folder, karpathy=["validation=val.txt", "test=test.txt"])


def test_unusable_pictures_are_dropped_and_counted(folder, tmp_path):
    (folder / "train2017" / "000000000003.jpg").write_bytes(b"<html>404</html>")
    (folder / "train2017" / "000000000005.jpg").unlink()
    options = {"splits": ["train=train2017"]}
    with pytest.raises(UserError, match="28.57%") as error:
        writer.write(coco, folder, tmp_path / "data", options=options, workers=1)
    assert "000000000005.jpg not found" in str(error.value)
    assert not (tmp_path / "data" / "manifest.json").exists()
    manifest, _ = writer.write(coco, folder, tmp_path / "data", options=options, workers=1, max_bad=0.3)
    assert manifest["dropped"]["count"] == 2
    opened = source.Source(tmp_path / "data", "train")
    assert [one["image_key"] for one in opened.read(range(5))] == [1, 2, 4, 6, 7]


def test_repaired_pictures_are_taken_on_the_next_run(folder, tmp_path):
    path = folder / "train2017" / "000000000003.jpg"
    good = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        writer.write(coco, folder, tmp_path / "data", workers=1)
    path.write_bytes(good)
    manifest, _ = writer.write(coco, folder, tmp_path / "data", workers=1)
    assert not manifest["dropped"]["count"] and manifest["splits"]["train"]["records"] == 7


def _no_folder(folder):
    shutil.rmtree(folder)


def _no_pictures(folder):
    shutil.rmtree(folder / "val2017")


def _no_annotations(folder):
    shutil.rmtree(folder / "annotations")


def _captions(text):
    return lambda folder: raw.write(folder / "annotations" / "captions_val2017.json", text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, "is not there. Give --source=FOLDER that holds captions_train2017.json"),
        (_no_pictures, "No picture folder for the split validation. Looked for .*images/val2017"),
        (_no_annotations, "it holds train2017, val2017. Needed"),
        (_captions('{"images": ['), "captions_val2017.json is not JSON"),
        (_captions({"images": [], "pictures": []}), "lacks annotations; it holds images, pictures"),
        (_captions({"images": [{"name": 1}], "annotations": []}), "published: picture 1 lacks 'id'"),
        (_captions({"images": [7], "annotations": []}), "published: picture 1"),
        (_captions({"images": {}, "annotations": []}), "published: images is no list"),
        (_captions({"images": [], "annotations": []}), "The split validation of .* has no pictures"),
        (_captions({"images": [], "annotations": [{"image_id": [1]}]}), "published: caption 1"),
        (_captions({"images": [{"id": 2**70, "file_name": "a"}], "annotations": []}), "is no id"),
        (
            _captions({"images": [{"id": 1, "file_name": name} for name in "ab"], "annotations": []}),
            "picture 2 has the id 1 of a",
        ),
    ],
)
def test_what_is_missing_is_one_message_and_leaves_no_trace(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        writer.write(coco, folder, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category_id": 7}, "instance 1 is of category 7, which categories does not list"),
        ({"category_id": []}, "published: instance 1"),
        ({"bbox": [1, 2, 3]}, "published: instance 1"),
        ({"bbox": None}, "published: instance 1"),
        ({"bbox": [1, 2, "x", 3]}, "published: instance 1"),
    ],
)
def test_malformed_instances(folder, row, message):
    raw.coco_instances(
        folder, "train2017", [raw.coco_image(1)], [{"image_id": 1, "bbox": [1, 1, 1, 1], **row}]
    )
    with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "is of the split dev"),
        ({"sentences": None}, "published: picture 2"),
        ({"cocoid": 1}, "has the cocoid 1 of another picture"),
        ({"filename": 5}, "published: picture 2"),
    ],
)
def test_malformed_karpathy(folder, change, message):
    raw.write(
        folder / "dataset_coco.json", {"images": [raw.karpathy(1, "val"), raw.karpathy(2, "val", **change)]}
    )
    with pytest.raises(UserError, match=message):
        coco.check(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=val2016", "Did you mean 'val2017'"),
        ("val2017", "does not take"),
        ("test=val2017:2/2", "does not take"),
        ("tset=val2017", "Did you mean 'test'"),
    ],
)
def test_wrong_splits_option(folder, text, message):
    with pytest.raises(UserError, match=message):
        coco.check(folder, splits=[text])


def test_real_photographs(realdata, tmp_path):
    options = {"examples": 8, "captions": 1, "same_splits": True}
    words = realdata / "bert-base-uncased-vocab.txt"
    manifest, _ = writer.write(coco, realdata / "coco", tmp_path, options=options, vocab=words, workers=1)
    assert manifest["vocabulary"]["file"] == "vocab.txt" and manifest["vocabulary"]["size"] == 30522
    published = json.loads((realdata / "coco" / "annotations" / "captions_train2017.json").read_text())
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in published["images"]}
    for split in ("train", "validation", "test"):
        opened = source.Source(tmp_path, split)
        assert (len(opened), opened.pairs) == (8, 8)
        for row, record in enumerate(opened.read(range(8))):
            name = record["image_name"]
            assert record["image"] == (realdata / "coco" / "train2017" / name).read_bytes()
            assert sizes[name] == (opened.heights[row], opened.widths[row])
            own = [
                a["caption"].strip() for a in published["annotations"] if a["image_id"] == record["image_key"]
            ]
            assert record["captions"] == own[:1]


def test_all_real_annotations(realdata):
    """Against the files read by hand: every caption, every box, every category, seven crowds."""
    found = read(realdata / "coco", splits=["train=train2017", "validation=val2017"])
    crowds = 0
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        kinds = ("captions", "instances")
        texts, objects = (
            json.loads((realdata / "coco" / "annotations" / f"{kind}_{name}.json").read_text())
            for kind in kinds
        )
        names = {one["id"]: one["name"] for one in objects["categories"]}
        urls = {one["id"]: one["flickr_url"] for one in objects["images"]}
        for one in found[split]:
            key = one["image_key"]
            own = [row for row in objects["annotations"] if row["image_id"] == key]
            assert one["captions"] == [
                row["caption"] for row in texts["annotations"] if row["image_id"] == key
            ]
            assert one["boxes"] == [row["bbox"] for row in own]
            assert one["box_names"] == [names[row["category_id"]] for row in own]
            assert one["box_crowd"] == [row["iscrowd"] for row in own]
            assert one["box_area"] == [row["area"] for row in own]
            assert f"/{one['flickr_id']}_" in urls[key]
            crowds += sum(one["box_crowd"])
    assert {split: len(entries) for split, entries in found.items()} == {"train": 20, "validation": 12}
    assert crowds > 0


def test_real_instances_of_2014_and_real_lists(realdata, tmp_path):
    """The real lists against the real ids of 100 pictures of val2014, which Karpathy has in restval, val and test."""
    objects = json.loads((realdata / "coco_eval" / "instances_val2014_100.json").read_text())
    ids = sorted({one["image_id"] for one in objects["annotations"]})
    names = [f"COCO_val2014_{key:012d}.jpg" for key in ids]
    raw.pictures(tmp_path / "val2014", *names)
    images = [{"id": key, "file_name": name} for key, name in zip(ids, names, strict=True)]
    texts = [{"id": key, "image_id": key, "caption": "x"} for key in ids]
    raw.write(tmp_path / "captions_val2014.json", {"images": images, "annotations": texts})
    raw.write(tmp_path / "instances_val2014.json", {**objects, "images": images})
    lists = {}
    for split in ("val", "test"):
        text = (realdata / "coco" / "karpathy" / f"karpathy_{split}_ids.txt").read_text()
        lists[split] = set(map(int, text.split()))
        raw.write(tmp_path / f"{split}.txt", text)
    found = read(tmp_path, karpathy=["val=val.txt", "test=test.txt"])
    found = {split: [one for one in entries if isinstance(one, dict)] for split, entries in found.items()}
    assert keys(found["train"]) == [key for key in ids if key not in lists["val"] | lists["test"]]
    assert keys(found["validation"]) == [key for key in ids if key in lists["val"]]
    assert keys(found["test"]) == [key for key in ids if key in lists["test"]]
    boxes = sum(len(one["boxes"]) for entries in found.values() for one in entries)
    assert boxes == len(objects["annotations"]) == 839
