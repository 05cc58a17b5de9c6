# SPDX-License-Identifier: Apache-2.0
"""The contact sheet shows what the pipeline gives, boxes where they belong, and strangers' texts as text only."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from configs import vilt
from tests.data import prepared
from vlp_jax import cli
from vlp_jax import doctor as command
from vlp_jax.data import image, pipeline
from vlp_jax.data.inspection import browse
from vlp_jax.data.source import Source
from vlp_jax.data.text import Vocabulary
from vlp_jax.types import UserError

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "</svg></article>-->]]>&amp;&#60;",
    "שלום \u202eevil 🙂 漢字",
    "{{7*7}} javascript:alert(1)",
)


def config(directory, **data):
    made = vilt.get_config("variant=tiny")
    made.data.update(dir=str(directory), image_size=32, patch_size=16, max_patches=0, text_length=24, **data)
    return made


class Page(html.parser.HTMLParser):
    """What a browser would find: tags with attributes, and texts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def hostile(row):
    return [f"{HOSTILE[(row + place) % 5]} {row}" for place in range(2)]


def everything(split, row):
    return {
        "boxes": [4.0, 8.0, 16.0, 32.0, 0.0, 0.0, 48.0, 64.0],
        "box_names": [HOSTILE[row % 5], "all"],
        "box_attributes": ["red,small", HOSTILE[1]],
        "box_crowd": [0, 1],
        "caption_boxes": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "questions": [HOSTILE[2]],
        "answers": [HOSTILE[0]],
        "labels": [HOSTILE[3], HOSTILE[4]],
        "image_name": HOSTILE[1],
        "coco_id": 77 + row,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return prepared.write(
        folder, splits={"train": 10, "test": 0}, sizes=((64, 48),), texts=hostile, more=everything
    )


@pytest.fixture(scope="module")
def page(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("sheet") / "sheet.html"
    assert browse.write(config(directory), path, "train") == 10
    return path.read_text(encoding="utf-8")


def test_nothing_of_a_stranger_is_markup(page):
    found = Page(page)
    assert {tag for tag, _ in found.tags} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "p",
            "b",
            "mark",
            "del",
            "main",
            "article",
        ),
        *("figure", "img", "svg", "rect", "text", "small", "ul", "li", "bdi"),
    }
    assert len(found.find("img")) == len(found.find("article")) == 10
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
    assert all(one["src"].startswith("data:image/jpeg;base64,") for one in found.find("img"))
    assert any("default-src 'none'" in one.get("content", "") for one in found.find("meta"))
    text = "".join(found.texts)
    for row in range(10):
        assert all(caption in text for caption in hostile(row))
    for said in HOSTILE:
        assert text.count(said) >= 10


def test_the_picture_is_the_pipeline_s(directory, page):
    """Decoded from the page and compared with the file, resized by PIL and not by the package."""
    row = next(iter(Page(page).find("img")))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["src"].partition(",")[2]))))
    original = Image.open(io.BytesIO(Source(directory, "train").read([0])[0]["image"]))
    wanted = np.asarray(original.resize((32, 32), Image.Resampling.BICUBIC))  # 42 x 32, floored to patches
    assert shown.shape == wanted.shape == (32, 32, 3)
    assert np.abs(shown.astype(float) - wanted).mean() < 6


def test_boxes_are_scaled(page):
    """64 x 48 pixels become 32 x 32: half as high, two thirds as wide."""
    first, whole, phrase = Page(page).find("rect")[:3]
    assert [float(first[key]) for key in ("x", "y", "width", "height")] == pytest.approx([2.7, 4, 10.7, 16])
    assert [float(whole[key]) for key in ("x", "y", "width", "height")] == [0, 0, 32, 32]
    assert "stroke-dasharray" in whole and "stroke-dasharray" in phrase and "stroke-dasharray" not in first
    assert Page(page).find("svg")[0]["viewbox"] == "0 0 32 32"


def test_restore_is_the_inverse_of_cut():
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 256, (3 * 8, 5 * 8, 3)).astype(np.uint8)
    for slots in (15, 20, 9):
        rule = image.Layout(24, 40, 8, slots)
        plan = image.plan(np.array([24]), np.array([40]), np.array([5], np.uint32), rule)
        patches = image.cut(picture, plan["chosen"][0], 8).numpy()
        row = {"patches": patches} | {
            key: plan[key][0] for key in ("patch_positions", "patch_mask", "grid_size")
        }
        restored = browse.restore(row, 8)
        same = (restored == picture).all(-1)
        missing = (restored == browse.NOT_THERE).all(-1)
        assert same.sum() == min(slots, 15) * 64 and (same | missing).all()


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
def test_masked_words_are_marked(tmp_path, kind):
    vocabulary = None
    if kind == "wordpiece":
        vocabulary = tmp_path / "vocab.txt"
        words = "a red green blue yellow square number is plainly the ##th . , & &amp; < 1 2 3 4 5 6 7 8 9 0".split()
        digits = [f"##{digit}" for digit in range(10)]
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *digits]))
    folder = prepared.write(tmp_path / "data", splits={"train": 12}, vocabulary=vocabulary)
    made = config(folder)
    path = tmp_path / "sheet.html"
    browse.write(made, path, "train")
    found = Page(path.read_text(encoding="utf-8"))
    count = 0
    source = Source(folder, "train")
    loaded = Vocabulary.load(source.vocabulary_path)
    for batch in pipeline.evaluation_batches(made, split="train", batch_size=8):
        rows = [{key: values[i] for key, values in batch.items()} for i in range(8)]
        for row in rows:
            if row["image_id"] < 0:
                continue
            shown = browse.pieces(row, loaded)
            masked = row["mlm_labels"][row["mlm_labels"] >= 0].tolist()
            seen = row["mlm_inputs"][row["mlm_labels"] >= 0].tolist()
            crossed = re.findall("<del>(.*?)</del>", shown)
            assert crossed == [loaded.word(piece) for piece in masked]
            assert re.findall("<mark>(.*?)</mark>", shown) == [loaded.word(piece) for piece in seen]
            plain = re.sub("<mark>.*?</mark>|</?del>", "", shown)
            assert plain.replace(" ", "") == loaded.decode(row["text_ids"]).replace(" ", "")
            count += len(masked)
    assert count > 20 and found.find("del")


def test_every_real_picture_is_shown(realdata, tmp_path):
    """All of COCO's photographs with their boxes; each box lies inside the picture that is shown."""
    rows, names = [], {}
    for split in ("val2017", "train2017"):
        folder = realdata / "coco" / "annotations"
        instances = json.loads((folder / f"instances_{split}.json").read_text())
        captions = json.loads((folder / f"captions_{split}.json").read_text())["annotations"]
        names |= {one["id"]: one["name"] for one in instances["categories"]}
        for one in instances["images"]:
            boxes = [box for box in instances["annotations"] if box["image_id"] == one["id"]]
            texts = [text["caption"] for text in captions if text["image_id"] == one["id"]]
            rows.append((realdata / "coco" / split / one["file_name"], one, boxes, texts))

    def more(split, row):
        _, one, boxes, _ = rows[row]
        return {
            "coco_id": one["id"],
            "boxes": [float(side) for box in boxes for side in box["bbox"]],
            "box_names": [names[box["category_id"]] for box in boxes],
            "box_crowd": [box["iscrowd"] for box in boxes],
        }

    folder = prepared.write(
        tmp_path / "coco",
        splits={"train": len(rows)},
        sizes=[(one["height"], one["width"]) for _, one, _, _ in rows],
        pictures=lambda row, height, width: rows[row][0].read_bytes(),
        texts=lambda row: rows[row][3],
        more=more,
        vocabulary=realdata / "bert-base-uncased-vocab.txt",
    )
    path = tmp_path / "sheet.html"
    argv = ("data", str(folder), "--deep", f"--browse={path}", "--browse_records=0")
    arguments = {"usage": command.USAGE, "arguments": ("KIND", "DATA_DIR"), "argv": argv}
    assert cli.run(command.main, command.define, **arguments) == 0
    found = Page(path.read_text(encoding="utf-8"))
    assert len(found.find("figure")) == len(rows) > 30
    assert len(found.find("rect")) == sum(min(len(boxes), browse.MOST_BOXES) for _, _, boxes, _ in rows)
    sizes = iter(found.find("svg"))
    for tag, attributes in found.tags:
        if tag == "svg":
            _, _, width, height = map(float, next(sizes)["viewbox"].split())
        if tag == "rect":
            x, y, wide, tall = (float(attributes[key]) for key in ("x", "y", "width", "height"))
            assert -1 < x and x + wide < width + 1 and -1 < y and y + tall < height + 1
    text = "".join(found.texts)
    assert all(caption.strip() in text for _, _, _, texts in rows for caption in texts)


def test_what_is_in_the_way(directory, tmp_path):
    made = config(directory)
    path = tmp_path / "sheet.html"
    for _ in range(2):  # a sheet may be made anew
        assert browse.write(made, path, "train", 3) == 3
    assert path.read_text(encoding="utf-8").count("<article>") == 3
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.html"]
    note = tmp_path / "note.html"
    note.write_text("<!doctype html>mine")
    for target, words in (
        (note, "is not replaced"),
        (tmp_path, "is not replaced"),
        (tmp_path / "no" / "x", "no folder"),
    ):
        with pytest.raises(UserError, match=words):
            browse.write(made, target, "train")
    assert note.read_text() == "<!doctype html>mine"
    with pytest.raises(UserError, match="Did you mean 'train'"):
        browse.write(made, path, "trian")
    with pytest.raises(UserError, match="is empty"):
        browse.write(made, path, "test")


def test_a_damaged_picture_leaves_no_sheet(tmp_path, capsys):
    folder = prepared.write(
        tmp_path / "data", splits={"train": 6}, pictures=lambda row, h, w: b"<html>not found"
    )
    path = tmp_path / "sheet.html"
    argv = ("data", str(folder), f"--browse={path}")
    arguments = {"usage": command.USAGE, "arguments": ("KIND", "DATA_DIR"), "argv": argv}
    assert cli.run(command.main, command.define, **arguments) == 2
    message = capsys.readouterr().err
    assert "No contact sheet: " in message and "Traceback" not in message and not path.exists()
