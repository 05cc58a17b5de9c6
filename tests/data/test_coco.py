# SPDX-License-Identifier: Apache-2.0
"""The reader of published captions: which pictures, which captions, which splits, and what is refused."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image

from tests.data import raw
from vlp_jax.data import datasets, source, writer
from vlp_jax.data.datasets import coco
from vlp_jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    return raw.coco(tmp_path / "raw", {"train2017": 7, "val2017": 6})


def read(folder, split, **options):
    return list(coco.examples(folder, split, **options))


def test_examples_are_the_files_in_the_order_of_ids(folder):
    examples = read(folder, "train")
    assert [one["image_key"] for one in examples] == list(range(1, 8))
    for key, one in enumerate(examples, 1):
        assert one["image"] == (folder / "train2017" / f"{key:012d}.jpg").read_bytes()
        assert one["captions"] == [f"Picture {key}, words 0.", f"Picture {key}, words 1."]
        assert (one["height"], one["width"], one["image_name"]) == (30, 40, f"{key:012d}.jpg")


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 9])
def test_parts_are_disjoint_and_complete(folder, parts):
    keys = [one["image_key"] for part in range(parts) for one in coco.examples(folder, "train", part, parts)]
    assert keys == list(range(1, 8))


def test_val_is_halved_for_want_of_test_captions(folder):
    assert coco.splits(folder) == ["train", "validation", "test"]
    assert [one["image_key"] for one in read(folder, "validation")] == [8, 10, 12]
    assert [one["image_key"] for one in read(folder, "test")] == [9, 11, 13]


def test_splits_examples_and_captions_are_chosen(folder, caplog):
    options = {"splits": ["train=val2017", "test=val2017:1/3"], "examples": 2, "captions": 1}
    assert coco.splits(folder, **options) == ["train", "test"]
    assert [(one["image_key"], one["captions"]) for one in read(folder, "test", **options)] == [
        (9, ["Picture 9, words 0."]),
        (12, ["Picture 12, words 0."]),
    ]
    assert coco.count(folder, "train", **options) == 2
    assert "test holds pictures of train" in caplog.text


def test_same_splits(folder, caplog):
    options = {"same_splits": True, "examples": 3}
    assert coco.splits(folder, **options) == ["train", "validation", "test"]
    keys = [
        [one["image_key"] for one in read(folder, split, **options)]
        for split in ("train", "validation", "test")
    ]
    assert keys == [[1, 2, 3]] * 3 and not caplog.text


def test_only_line_breaks_and_outer_blanks_go():
    assert coco._clean("  Ein  Käse\nund “Brot” .\r\n") == "Ein  Käse und “Brot” ."


def test_karpathy_splits_with_the_pictures_of_2017(folder):
    rows = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{key:012d}.jpg",
            "imgid": key - 1,
            "cocoid": key,
            "split": split,
            "sentences": [{"raw": f"Karpathy {key}. ", "sentid": key, "tokens": []}],
        }
        for key, split in ((1, "train"), (9, "restval"), (10, "val"), (11, "test"))
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    found = {
        split: [(one["image_key"], one["captions"]) for one in read(folder, split)]
        for split in coco.splits(folder)
    }
    assert found == {
        "train": [(1, ["Karpathy 1."]), (9, ["Karpathy 9."])],
        "validation": [(10, ["Karpathy 10."])],
        "test": [(11, ["Karpathy 11."])],
    }
    assert coco.sources(folder) == [folder / "dataset_coco.json"]


def _broken():
    good = raw.picture(1, size=(200, 200))
    noisy = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noisy, "JPEG")
    sixteen = io.BytesIO()
    Image.new("I;16", (9, 9)).save(sixteen, "PNG")
    return {
        b"": "empty file",
        b"<html>404</html>": "does not decode",
        noisy.getvalue()[:900]: "does not decode",
        raw.picture(1, "GIF"): "is GIF",
        raw.picture(1, "WEBP"): "is WEBP",
        sixteen.getvalue(): "16 bits",
        good[:200]: "does not decode",
    }


def test_unusable_pictures_say_why():
    for content, reason in _broken().items():
        with pytest.raises(ValueError, match=reason):
            datasets.picture_size(content)
    assert datasets.picture_size(raw.picture(1, "PNG", (17, 5))) == (5, 17)


def test_unusable_pictures_are_dropped_and_counted(folder, tmp_path):
    (folder / "train2017" / "000000000003.jpg").write_bytes(b"<html>404</html>")
    (folder / "train2017" / "000000000005.jpg").unlink()
    options = {"splits": ["train=train2017"]}
    with pytest.raises(
        UserError, match=r"2 of 7 pictures of the split train .*28.57%; allowed are 1.00%"
    ) as error:
        writer.write(coco, folder, tmp_path / "data", options=options, workers=1)
    assert "000000000005.jpg not found" in str(error.value)
    assert not (tmp_path / "data" / "manifest.json").exists()
    manifest, _ = writer.write(coco, folder, tmp_path / "data", options=options, workers=1, max_bad=0.3)
    assert [one["file"] for one in manifest["dropped"]] == [
        "train2017/000000000003.jpg",
        "train2017/000000000005.jpg",
    ]
    opened = source.Source(tmp_path / "data", "train")
    assert [one["image_key"] for one in opened.read(range(5))] == [1, 2, 4, 6, 7]


def test_repaired_pictures_are_taken_on_the_next_run(folder, tmp_path):
    path = folder / "train2017" / "000000000003.jpg"
    good = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        writer.write(coco, folder, tmp_path / "data", workers=1)
    path.write_bytes(good)
    manifest, _ = writer.write(coco, folder, tmp_path / "data", workers=1)
    assert not manifest["dropped"] and manifest["splits"]["train"]["records"] == 7


def _no_folder(folder):
    shutil.rmtree(folder)


def _no_pictures(folder):
    shutil.rmtree(folder / "val2017")


def _no_annotations(folder):
    shutil.rmtree(folder / "annotations")


def _no_json(folder):
    (folder / "annotations" / "captions_val2017.json").write_bytes(b'{"images": [')


def _no_list(folder):
    (folder / "annotations" / "captions_val2017.json").write_text('{"images": [], "pictures": []}')


def _other_layout(folder):
    (folder / "annotations" / "captions_val2017.json").write_text(
        '{"images": [{"name": 1}], "annotations": []}'
    )


def _nothing(folder):
    (folder / "annotations" / "captions_val2017.json").write_text('{"images": [], "annotations": []}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, "is not there. Give --source=FOLDER that holds captions_train2017.json"),
        (_no_pictures, "No picture folder for the split validation. Looked for .*val2017"),
        (_no_annotations, "has no annotation file; it holds train2017, val2017. Needed"),
        (_no_json, "captions_val2017.json is not JSON"),
        (_no_list, "lacks annotations; it holds images, pictures"),
        (_other_layout, "not laid out as published .KeyError: 'id'"),
        (_nothing, "The split validation of .* has no pictures"),
    ],
)
def test_what_is_missing_is_one_message_and_leaves_no_trace(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        writer.write(coco, folder, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=val2016", "Did you mean 'val2017'"),
        ("val2017", "does not take"),
        ("test=val2017:2/2", "does not take"),
    ],
)
def test_wrong_splits_option(folder, text, message):
    with pytest.raises(UserError, match=message):
        coco.splits(folder, splits=[text])


def test_real_photographs(realdata, tmp_path):
    options = {"examples": 8, "captions": 1, "same_splits": True}
    words = realdata / "bert-base-uncased-vocab.txt"
    manifest, _ = writer.write(
        coco, realdata / "coco", tmp_path, options=options, vocabulary=words, workers=1
    )
    assert manifest["vocabulary"]["file"] == "vocab.txt" and manifest["vocabulary"]["size"] == 30522
    published = json.loads((realdata / "coco" / "annotations" / "captions_train2017.json").read_text())
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in published["images"]}
    for split in ("train", "validation", "test"):
        opened = source.Source(tmp_path, split)
        assert (len(opened), opened.pairs) == (8, 8)
        for row, record in enumerate(opened.read(range(8))):
            name = record["image_name"]
            assert record["image"] == (realdata / "coco" / "train2017" / name).read_bytes()
            assert (
                sizes[name]
                == (opened.heights[row], opened.widths[row])
                == (record["height"], record["width"])
            )
            own = [
                a["caption"].strip() for a in published["annotations"] if a["image_id"] == record["image_key"]
            ]
            assert record["captions"] == own[:1]


def test_all_real_captions(realdata):
    total = {
        split: [one for one in coco.examples(realdata / "coco", split)]
        for split in coco.splits(realdata / "coco")
    }
    assert {split: len(found) for split, found in total.items()} == {"train": 20, "validation": 6, "test": 6}
    assert all(
        isinstance(one, dict) and len(one["captions"]) == 5 for found in total.values() for one in found
    )
