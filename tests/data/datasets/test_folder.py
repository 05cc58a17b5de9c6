# SPDX-License-Identifier: Apache-2.0
"""Anyone's pictures and tables: what is understood, how splits are made, and that nothing bad passes unnamed."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import random
import signal
import unicodedata

import pytest
from PIL import Image

from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped, folder
from vlp_jax.data.datasets.folder_columns import COLUMNS
from vlp_jax.data.preparation import completion
from vlp_jax.data.preparation.workers import processes
from vlp_jax.types import UserError


def picture(number: int, kind: str = "PNG") -> bytes:
    """Small; another number is another picture, another kind the same pixels."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, number // 256, 77)).save(file, kind, lossless=True)
    return file.getvalue()


def make(place, files: dict[str, str | bytes]):
    """Writes files; returns their folder."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


def pictures(count: int) -> dict[str, bytes]:
    return {f"{i}.png": picture(i) for i in range(count)}


def table(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, {key: None for row in rows for key in row})
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def listed(place, each=map, **options):
    """(image -> (split, entry), dropped)"""
    entries, dropped = {}, []
    for split, entry in folder.listing(place, each, **options):
        if isinstance(entry, Dropped):
            dropped.append((split, entry.file, entry.reason))
        else:
            json.dumps(entry)
            entries[entry["image"]] = (split, entry)
    return entries, dropped


def said(place, image="0.png", **options):
    """What is said of one picture, without where it lies."""
    entries, dropped = listed(place, **options)
    assert not dropped
    return {key: value for key, value in entries[image][1].items() if not key.startswith("image")}


ROWS = [{"image": f"{i}.png", "caption": f"Picture {i}."} for i in range(6)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "name", ["captions.csv", "captions.tsv", "my pictures.jsonl", "DATA.CSV", "data.json"]
)
def test_one_table_of_any_name(tmp_path, name):
    content = table(ROWS)
    content = content.replace(",", "\t") if name.endswith("tsv") else content
    content = JSONL if name.endswith("jsonl") else json.dumps(ROWS) if name.endswith("json") else content
    entries, dropped = listed(make(tmp_path, {**pictures(6), name: content}))
    assert not dropped and list(entries) == [row["image"] for row in ROWS]
    assert entries["3.png"][1] == {
        "image": "3.png",
        "image_name": "3.png",
        "image_key": 4,
        "captions": ["Picture 3."],
    }
    assert folder.sources(tmp_path) == [tmp_path / name]


def test_texts_beside_pictures(tmp_path):
    texts = {f"in/{i}.txt": f"\ufeffPicture {i}.\r\n\r\nAgain {i}." for i in range(4)}
    files = {f"in/{name}": content for name, content in pictures(4).items()}
    make(tmp_path, {**files, **texts, "readme.txt": "mine", "b.JPG": picture(9, "JPEG"), "b.JPG.txt": "B."})
    (tmp_path / "in" / "again").symlink_to(tmp_path)  # a loop
    (tmp_path / "in").rename(tmp_path / ".kept")
    (tmp_path / "in").symlink_to(".kept")
    entries, dropped = listed(tmp_path)
    assert not dropped and list(entries) == ["b.JPG", "in/0.png", "in/1.png", "in/2.png", "in/3.png"]
    assert entries["in/2.png"][1]["captions"] == ["Picture 2.", "Again 2."]
    assert len(folder.sources(tmp_path)) == 5


def test_tables_of_others(tmp_path):
    make(tmp_path, pictures(6))
    bar = "image_name| comment_number| comment\n" + "".join(f"{i}.png| 0| Two, three .\n" for i in range(6))
    for name, content in {
        "a.csv": bar,
        "b.csv": "filepath\ttitle\n" + "".join(f"{i}.png\tTwo, three .\n" for i in range(6)),
        "c.csv": "caption,image_file\n" + "".join(f'"Two, three .",{i}.png\n' for i in range(6)),
        "d.csv": "image;prompt\r\n" + "".join(f"{i}.png;Two, three .\r\n" for i in range(6)),
        "e.jsonl": "".join(
            json.dumps({"file_name": f"{i}.png", "text": "Two, three ."}) + "\n" for i in range(6)
        ),
    }.items():
        assert said(make(tmp_path, {name: content}), table=name) == {"captions": ["Two, three ."]}


def test_a_table_may_be_chosen(tmp_path):
    make(
        tmp_path,
        {**pictures(6), "a.csv": table(ROWS), "b.csv": table(ROWS[:4]), "deep/c.csv": table(ROWS[:3])},
    )
    with pytest.raises(UserError, match=r"2 tables: a.csv, b.csv. Choose one with --table=NAME"):
        listed(tmp_path)
    for name, count in (("b.csv", 4), ("deep/c.csv", 3), (str(tmp_path / "a.csv"), 6)):
        assert len(listed(tmp_path, table=name)[0]) == count
        assert folder.sources(tmp_path, table=name) == [tmp_path / name]


def test_several_captions(tmp_path):
    rows = [
        {"Image ": "0.png", "Caption 1": "one", "caption_2": "two", "CAPTION.3": ""},
        {"Image ": "1.png", "Caption 1": "other", "caption_2": "", "CAPTION.3": "third"},
        {"Image ": "./0.png", "Caption 1": "three", "caption_2": "one", "CAPTION.3": "four"},
        {"Image ": "2.png", "Caption 1": "x", "caption_2": "", "CAPTION.3": ""},
    ]
    assert said(make(tmp_path, {**pictures(3), "a.csv": table(rows)})) == {
        "captions": ["one", "two", "three", "four"]
    }
    lists = [{"file_name": f"{i}.png", "text": ["one", "two", None, 3]} for i in range(3)]
    make(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in lists)})
    assert said(tmp_path, table="a.jsonl") == {"captions": ["one", "two", "3"]}


def test_questions_and_answers(tmp_path):
    rows = [
        {"image": "0.png", "question": "What?", "answer": "cat|dog"},
        {"image": "0.png", "question": "Who?", "answer": ""},
        {"image": "0.png", "question": "What?", "answer": "bird"},
        {"image": "1.png", "question": "Where?", "answer": "here"},
        {"image": "2.png", "question": "Where?", "answer": "there"},
    ]
    wanted = {"questions": ["What?", "Who?"], "answers": ["cat|dog|bird", ""]}
    assert said(make(tmp_path, {**pictures(3), "a.csv": table(rows)})) == wanted
    lines = [{"image": f"{i}.png", "question": "What?", "answer": ["cat", "dog"]} for i in range(3)]
    lines += [{"image": "0.png", "question": ["Who?", "", "How many?"], "answer": [["he", "she"], "", 3]}]
    make(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in lines)})
    assert said(tmp_path, table="a.jsonl") == {
        "questions": ["What?", "Who?", "", "How many?"],
        "answers": ["cat|dog", "he|she", "", "3"],
    }


def test_labels_are_parallel_to_captions_or_one_for_the_picture(tmp_path):
    make(tmp_path, pictures(3))
    others = "1.png,b,no\n2.png,c,no\n"
    for content, wanted in (
        (
            f"image,caption,label\n0.png,a,yes\n0.png,b,\n{others}",
            {"captions": ["a", "b"], "labels": ["yes", ""]},
        ),
        (f"image,caption,label\n0.png,,cat\n{others}", {"labels": ["cat"]}),
        (f"image,caption,label\n0.png,,cat\n0.png,a,\n{others}", {"captions": ["a"], "labels": ["cat"]}),
        (f"image,caption,label\n0.png,,cat\n0.png,,dog\n{others}", {"labels": ["cat|dog"]}),
        (
            f"image,question,label\n0.png,a?,yes\n{others}",
            {"questions": ["a?"], "answers": [""], "labels": ["yes"]},
        ),
    ):
        assert said(make(tmp_path, {"a.csv": content})) == wanted


@pytest.mark.parametrize(
    "cell",
    [
        '[[1, 2, 3.5, 4, "a cat"], [0, 0, 1, 1, "dog"]]',
        "[[1, 2, 3.5, 4, 'a cat'], [0, 0, 1, 1, 'dog']]",
        "[(1, 2, 3.5, 4, 'a cat'), (0, 0, 1, 1, 'dog')]",
    ],
)
def test_boxes(tmp_path, cell):
    rows = [{"image": f"{i}.png", "boxes": box} for i, box in enumerate((cell, "[]", "[3, 1, 2, 2]", cell))]
    rows += [{"image": "0.png", "boxes": cell}, {"image": "0.png", "boxes": ""}]
    make(tmp_path, {**pictures(4), "a.csv": table(rows)})
    assert said(tmp_path) == {"boxes": [[1, 2, 3.5, 4], [0, 0, 1, 1]], "box_names": ["a cat", "dog"]}
    assert said(tmp_path, "1.png") == {"boxes": [], "box_names": []}
    assert said(tmp_path, "2.png") == {"boxes": [[3, 1, 2, 2]], "box_names": [""]}


def test_pairs_go_together(tmp_path):
    rows = [
        {"image_0": f"{i}.png", "image_1": f"{i + 1}.png", "caption": "same", "label": "no"}
        for i in (0, 1, 3, 5)
    ]
    rows += [{"image_0": "8.png", "image_1": "", "caption": "alone", "label": ""}]
    entries, dropped = listed(make(tmp_path, {**pictures(9), "a.csv": table(rows)}))
    assert {image: entry["image_1"] for image, (_, entry) in entries.items()} == {
        f"{i}.png": f"{i + 1}.png" for i in (0, 1, 3, 5)
    }
    assert entries["0.png"][0] == entries["1.png"][0]  # both show 1.png
    assert {split for split, _ in entries.values()} == {"train", "validation", "test"}
    assert dropped == [("train", "8.png (a.csv, line 6)", "has no image_1, as others have")]
    lines = [{"images": [f"{i}.png", f"{i + 1}.png"], "sentence": "same"} for i in (0, 2, 4)]
    make(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in lines)})
    assert listed(tmp_path, table="a.jsonl")[0]["2.png"][1]["image_1"] == "3.png"


@pytest.mark.parametrize("name", sorted({other for others in COLUMNS.values() for other in others.split()}))
def test_other_names_of_columns(tmp_path, name):
    meaning = next(meaning for meaning, others in COLUMNS.items() if name in others.split())
    value = {"boxes": "[[1, 1, 2, 2, 'a']]", "split": "train"}.get(meaning, "x")
    rows = [{"image": f"{i}.png", "question": "What?"} for i in range(3)]
    for row in rows:
        row[name.upper().replace("_", " ")] = row.pop("image") if meaning == "image" else value
        if meaning == "question":
            del row["question"]
    wanted = {"caption": "captions", "question": "questions", "answer": "answers", "label": "labels"}
    entries, dropped = listed(make(tmp_path, {**pictures(3), "a.csv": table(rows)}))
    assert len(entries) == 3 and not dropped
    assert wanted.get(meaning, meaning if meaning in ("boxes", "image") else "image") in entries["0.png"][1]
    assert meaning != "split" or {split for split, _ in entries.values()} == {"train"}


def test_a_column_that_is_not_used_is_named_once(tmp_path, caplog):
    rows = [row | {"captoin": "x", "id": 1} for row in ROWS]
    with caplog.at_level(logging.WARNING, "vlp_jax"):
        listed(make(tmp_path, {**pictures(6), "a.csv": table(rows)}))
    texts = [one.getMessage() for one in caplog.records]
    assert sum("the column 'captoin' is not used. Did you mean 'caption'?" in text for text in texts) == 1
    assert sum("the column 'id' is not used" in text for text in texts) == 1 and len(texts) == 2


def test_pictures_without_a_row_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "vlp_jax"):
        listed(make(tmp_path, {**pictures(6), "more/x.jpg": b"", "a.csv": table(ROWS[:4])}))
    assert "3 pictures of" in caplog.text and "a.csv does not name them, e.g. 4.png" in caplog.text


def test_names_as_people_and_systems_write_them(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Käse/ü.png") for form in ("NFC", "NFD"))
    names = {
        "sub/folder/a b.png": "sub/folder/a b.png",
        "line\nbreak.png": "line\nbreak.png",
        "صورة/кот 猫.png": "./صورة//кот 猫.png",
        "windows/deep/a.png": "windows\\deep\\a.png",
        nfd: nfc,
        " blank.png": " blank.png",
        "plain.png": "  plain.png ",
        "no_suffix": "no_suffix",
        "up.png": "sub/../up.png",
        "a,b;\"c'.png": "a,b;\"c'.png",
        "👩‍👩‍👧.png": "👩‍👩‍👧.png",
        "absolute.png": str(tmp_path / "absolute.png"),
    }
    make(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    rows = [{"image": written, "caption": name} for name, written in names.items()]
    rows += [{"image": name, "caption": "again"} for name in ("absolute.png", "windows/deep/a.png")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    entries, dropped = listed(make(tmp_path, {"a.jsonl": lines}))
    assert not dropped and list(entries) == list(names)
    assert [entries[name][1]["captions"] for name in ("up.png", "absolute.png")] == [
        ["up.png"],
        ["absolute.png", "again"],
    ]
    for name, (_, entry) in entries.items():
        assert (tmp_path / entry["image"]).is_file(), name


def test_pictures_outside_and_in_a_folder_of_their_own(tmp_path):
    make(tmp_path, {f"elsewhere/{name}": content for name, content in pictures(3).items()})
    rows = [{"image": str(tmp_path / f"elsewhere/{i}.png"), "caption": "x"} for i in range(3)]
    make(tmp_path, {"here/a.csv": table(rows), "other/a.csv": table(ROWS[:3])})
    make(tmp_path, {f"other/images/{name}": content for name, content in pictures(3).items()})
    entries, _ = listed(tmp_path / "here")
    assert list(entries) == [row["image"] for row in rows]
    with pytest.raises(UserError, match=r"images/0.png is there: is it --pictures=images\?"):
        listed(tmp_path / "other")
    assert list(listed(tmp_path / "other", pictures="images")[0]) == [f"images/{i}.png" for i in range(3)]


def test_bytes_that_are_not_utf_8_in_names_and_texts(tmp_path):
    for i in range(3):
        (tmp_path / os.fsdecode(b"caf\xe9%d.png" % i)).write_bytes(picture(i))
    make(tmp_path, {"a.csv": b"image,caption\n" + b"".join(b"caf\xe9%d.png,t\xe9\n" % i for i in range(3))})
    make(tmp_path, {"good.png": picture(7), "b.csv": b"image,caption\ngood.png,t\xe9\ngood.png,tea\n"})
    entries, _ = listed(tmp_path, table="a.csv")
    fields = record.stored_fields({"captions"})
    for _, entry in entries.values():
        kept = completion.complete(json.loads(json.dumps(entry)), tmp_path, fields, upright=True)
        assert isinstance(kept.example, Dropped) and "UTF-8" in kept.example.reason
    row = {
        "image": "good.png",
        "image_name": "good.png",
        "image_key": 1,
        "captions": [b"t\xe9".decode(errors="surrogateescape"), "tea"],
    }
    assert completion.complete(row, tmp_path, fields, upright=True).example["captions"] == ["tea"]


def splits(place, **options):
    """Caption -> split."""
    return {entry["captions"][0]: split for split, entry in listed(place, **options)[0].values()}


def test_named_splits(tmp_path):
    words = ["train", "Training", " VAL", "validation", "dev", "Valid", "test", "TESTING"]
    rows = [{"image": f"{i}.png", "caption": word.strip(), "split": word} for i, word in enumerate(words)]
    rows += [{"image": "0.png", "caption": "more", "split": ""}]
    assert splits(make(tmp_path, {**pictures(8), "a.csv": table(rows)})) == dict(
        zip(map(str.strip, words), ["train"] * 2 + ["validation"] * 4 + ["test"] * 2, strict=True)
    )


def test_a_picture_of_two_splits_is_dropped(tmp_path):
    rows = [row | {"split": split} for row, split in zip(ROWS, ("train", "test") * 3, strict=True)]
    rows += [{"image": "./1.png", "caption": "again", "split": "train"}]
    entries, dropped = listed(make(tmp_path, {**pictures(6), "a.csv": table(rows)}))
    assert dropped == [("test", "1.png (a.csv, line 3)", "is in train and test")]
    assert list(entries) == ["0.png", "2.png", "3.png", "4.png", "5.png"]


def test_a_table_for_testing_only_has_no_other_split(tmp_path):
    rows = [row | {"split": "test"} for row in ROWS]
    content = table(rows) + "gone.png,x,test\n5.png\n"
    entries, dropped = listed(make(tmp_path, {**pictures(6), "a.csv": content}))
    assert {split for split, _ in entries.values()} == {split for split, *_ in dropped} == {"test"}
    assert [file for _, file, _ in dropped] == ["gone.png (a.csv, line 8)", "a.csv, line 9"]


def test_made_splits_follow_the_pixels(tmp_path):
    numbers = list(range(0, 4000, 67))
    rows = [{"image": f"{i}.png", "caption": str(i)} for i in numbers]
    one = splits(make(tmp_path / "one", {f"{i}.png": picture(i) for i in numbers} | {"a.csv": table(rows)}))
    random.Random(3).shuffle(rows)
    kinds = {0: "PNG", 1: "WEBP", 2: "GIF"}
    files, other = {}, []
    for row in rows:  # other names, places, formats and order; and each a second time
        number = int(row["caption"])
        kind = kinds[number % 2]
        files |= {
            f"x/{number % 7}/n{number}.{kind}": picture(number, kind),
            f"y/{number}.jpg": picture(number),
        }
        other += [{"image": f"x/{number % 7}/n{number}.{kind}", "caption": row["caption"]}]
    twins = [{"image": f"y/{row['caption']}.jpg", "caption": "twin " + row["caption"]} for row in rows]
    two = splits(
        make(tmp_path / "two", {**files, "b.jsonl": "".join(json.dumps(row) + "\n" for row in other + twins)})
    )
    assert two == one | {f"twin {name}": split for name, split in one.items()}
    counts = [list(one.values()).count(split) for split in ("train", "validation", "test")]
    assert sum(counts) == len(numbers) and counts[0] > 2 * (counts[1] + counts[2]) and min(counts) > 0


@pytest.mark.slow
def test_made_splits_do_not_depend_on_the_workers(tmp_path):
    make(tmp_path, {**pictures(40), "a.csv": table([{"image": f"{i}.png", "caption": i} for i in range(40)])})
    alone = list(folder.listing(tmp_path, map))
    with processes(2) as each:
        assert list(folder.listing(tmp_path, each)) == alone


@pytest.mark.parametrize("count", range(3, 26))
def test_each_split_has_a_picture(tmp_path, count):
    make(
        tmp_path,
        {**pictures(count), "a.csv": table([{"image": f"{i}.png", "caption": i} for i in range(count)])},
    )
    found = list(splits(tmp_path).values())
    counts = {split: found.count(split) for split in ("train", "validation", "test")}
    assert min(counts.values()) >= 1 and counts["train"] >= max(1, count // 2)


def test_shares_of_many_and_a_larger_copy_moves_nothing(tmp_path):
    keys = sorted(map(random.Random(1).getrandbits, [64] * 20_000))
    chosen = folder._shares(tmp_path, keys, [])
    share = {
        split: list(chosen.values()).count(split) / len(keys) for split in ("train", "validation", "test")
    }
    assert abs(share["train"] - 0.8) < 0.01 and abs(share["test"] - 0.1) < 0.01
    fewer = folder._shares(tmp_path, keys[::40], [])
    assert all(chosen[key] == split for key, split in fewer.items())
    low = folder._shares(tmp_path, [1, 2, 3, 4], [])
    assert list(low.values()) == ["validation", "validation", "train", "test"]


def test_too_few_pictures_to_split(tmp_path):
    files = {"a.png": picture(1), "b.gif": picture(1, "GIF"), "c.png": picture(2), "d.png": b"<html>"}
    rows = [{"image": name, "caption": name} for name in files]
    make(tmp_path, {**files, "a.csv": table(rows)})
    with pytest.raises(
        UserError, match=r"has 2 distinct pictures .*1 could not be used, the first: d.png .a.csv, line 5"
    ):
        listed(tmp_path)
    rows = [row | {"split": "train"} for row in rows]
    assert len(listed(make(tmp_path, {"a.csv": table(rows)}))[0]) == 4


def test_what_is_not_there_is_dropped_with_its_line(tmp_path):
    rows = [*ROWS, {"image": "gone.png", "caption": "x"}, {"image": "https://x.org/a.png", "caption": "x"}]
    entries, dropped = listed(make(tmp_path, {**pictures(6), "5.png": b"GIF89a", "a.csv": table(rows)}))
    assert len(entries) == 5
    assert dropped[:2] == [
        ("train", "gone.png (a.csv, line 8)", "not found"),
        ("train", "https://x.org/a.png (a.csv, line 9)", "is a web address: download it first"),
    ]
    assert dropped[2][:2] == ("train", "5.png (a.csv, line 7)")


GOOD = table(ROWS)
HEAD = "image,caption\n"


def good_line(**changes):
    return json.dumps({"image": "0.png", "caption": "x"} | changes)


def csv_row(**changes):
    """A good table with one more row, of other columns too."""
    return table([*ROWS, {"image": "0.png", "caption": "x"} | changes])


def box_row(cell):
    return csv_row(boxes=cell)


# What the whole file is -> what must be named. In all of them the table lies beside six good pictures.
BAD_TABLES: dict[str, str | bytes] = {
    "empty": "",
    "a mark only": b"\xef\xbb\xbf",
    "blank lines": "\r\n \n\n",
    "nul bytes": bytes(4096),
    "a picture": picture(1),
    "a zip": b"PK\x03\x04" + bytes(range(256)),
    "a gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "utf-16 without mark": GOOD.encode("utf-16-le"),
    "html": "<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "json in csv": json.dumps(ROWS),
    "header only": HEAD,
    "header and blanks": HEAD + ",\n,,\n",
    "no header": GOOD.split("\n", 1)[1],
    "doubled column": "image,image,caption\n0.png,1.png,x\n",
    "doubled column by case": "Image,IMAGE ,caption\n0.png,1.png,x\n",
    "doubled split": "image,caption,split,Split\n0.png,x,train,test\n",
    "no image": "id,caption\n1,x\n",
    "misspelt image": "imge,caption\n0.png,x\n",
    "nothing said": "image,split\n0.png,train\n",
    "misspelt caption": "image,captoin\n0.png,x\n",
    "two images": "path,filename,caption\n0.png,0.png,x\n",
    "two captions": "image,title,description\n0.png,x,y\n",
    "open quote in header": 'image,"caption\n0.png,x\n',
    "endless header": "image" * 4_000_000,
    "endless header after a good name": "image,caption" + " " * 17_000_000 + "\n0.png,x\n",
    "one column": "image\n0.png\n",
    "blanks between": "image caption\n0.png x\n",
    "all rows short": HEAD + "0.png\n" * 5,
    "all rows long": HEAD + "0.png,a, b\n" * 5,
    "all gone": HEAD + "gone.png,x\n" * 5,
    "all on the web": HEAD + "https://x.org/0.png,x\n" * 5,
    "all without a name": HEAD + ",x\n" * 5,
    "only one picture": HEAD + "0.png,x\n" * 5,
    "some without split": table([row | {"split": "train" if row["image"] < "3" else ""} for row in ROWS]),
    **{
        f"split {word!r}": csv_row(split=word)
        for word in ("trian", "all", "1", "train test", "restval", "\x00", "é")
    },
    **{f"random bytes {seed}": random.Random(seed).randbytes(3000) for seed in range(10)},
    **{
        f"random text {seed}": "".join(random.Random(seed).choices(',"\n\t;a ', k=3000)) for seed in range(10)
    },
}
BAD_ROWS: dict[str, str | bytes] = {
    "short": GOOD + "0.png\n",
    "long": GOOD + "0.png,a dog, a cat\n",
    "open quote": GOOD + '0.png,"open\n',
    "open quote in the middle": HEAD + '0.png,"open\n' + GOOD.split("\n", 1)[1],
    "text behind a quote": GOOD + '0.png,"a" dog\n',
    "endless line": GOOD + "0.png," + "x" * 17_000_000 + "\n",
    "endless quoted cell": GOOD + '0.png,"' + "x\n" * 9_000_000 + '"\n',
    "no name": csv_row(image=""),
    "blank name": csv_row(image="   "),
    "gone": csv_row(image="gone.png"),
    "gone in a folder": csv_row(image="a/b/../c/gone.png"),
    "file as a folder": csv_row(image="0.png/1.png"),
    "a long name": csv_row(image="n" * 5000),
    "a name of a megabyte": csv_row(image="n" * 1_000_000),
    "a name with nul": csv_row(image="0.png\x00"),
    "the web": csv_row(image="HTTP://x.org/0.png"),
    "another machine": csv_row(image="C:\\Users\\me\\0.png"),
    "the folder": csv_row(image="."),
    "the folder above": csv_row(image=".."),
    "the root": csv_row(image="/"),
    "a device": csv_row(image="/dev/zero"),
    "the table": csv_row(image="captions.csv"),
    "answer without question": csv_row(question="", answer="yes"),
    "a pair among pictures": csv_row(image_1="1.png"),
    **{
        f"boxes {number}": box_row(cell)
        for number, cell in enumerate(
            (
                "x",
                "[[1, 2, 3]]",
                "[[1, 2, 3, 4, 5]]",
                "[[1, 2, 3, 4, 'a', 'b']]",
                "[1, 2, 3]",
                '[["1", "2", "3", "4"]]',
                "[[1, 2, 3, NaN]]",
                "[[1, 2, 3, 1e999]]",
                "[[1, 2, 3, 4]",
                '{"x": 1}',
                "7",
                "[null]",
                "[[true, 1, 1, 1]]",
                "[" * 100_000,
                "-" * 200_000 + "1",
                "__import__('os')",
                "[[1, 2, 3, 4, 'a\\d]]",
            )
        )
    },
}
BAD_LINES: dict[str, str | bytes] = {
    "a list": "[1]",
    "a number": "7",
    "a text": '"0.png"',
    "null": "null",
    "a word": "nope",
    "a comment": "# more",
    "cut": good_line()[:-5],
    "garbage behind": good_line() + "]",
    "two objects": good_line() * 2,
    "NaN": good_line(caption=float("nan")),
    "infinity": good_line(label=float("-inf")),
    "a key twice": '{"image": "0.png", "image": "1.png", "caption": "x"}',
    "deep": good_line()[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a long number": good_line()[:-1] + f', "n": {"9" * 5000}}}',
    "Python": str({"image": "0.png", "caption": "x"}),
    "a tab in a text": '{"image": "0.png", "caption": "a\tb"}',
    "no image": '{"caption": "x"}',
    "nothing": "{}",
    "image null": good_line(image=None),
    "image a number": good_line(image=7),
    "image an object": good_line(image={"path": "0.png", "bytes": None}),
    "three images": good_line(image=["0.png", "1.png", "2.png"]),
    "image a list of a list": good_line(image=[[["0.png", "1.png"]]]),
    "caption an object": good_line(caption={"en": "x"}),
    "captions in lists": good_line(caption=[["a", "b"], ["c", "d"]]),
    "boxes an object": good_line(boxes={"bbox": [[1, 2, 3, 4]], "categories": [0]}),
    "boxes a number": good_line(boxes=7),
    "boxes texts": good_line(boxes=["1 2 3 4"]),
    "more questions than answers": good_line(question=["a?", "b?", "c?"], answer=["a", "b"]),
    "answers alone": good_line(answer=["a", "b"]),
    "label a list": good_line(label=["a", "b"]),
    "endless": good_line(caption="x" * 17_000_000),
    "surrogate in the name": good_line(image="\ud83d.png"),
}
BAD_JSON: dict[str, str | bytes] = {
    **{f"cut {end}": json.dumps(ROWS)[:end] for end in range(0, 200, 13)},
    "garbage behind": json.dumps(ROWS) + ",",
    "an object": json.dumps({"images": ROWS}),
    "texts": '["0.png", "1.png"]',
    "NaN": json.dumps([*ROWS, {"image": "0.png", "caption": float("nan")}]),
    "a key twice": '[{"image": "0.png", "caption": "x", "caption": "y"}]',
    "deep": "[" * 100_000,
    "empty list": "[]",
    "null": "null",
}


def fourth_line(line: str) -> str:
    first = JSONL.splitlines(keepends=True)
    return "".join([*first[:3], line + "\n", *first[3:]])


# File, what must be named, content.
CORPUS = {
    **{f"table: {name}": ("captions.csv", "captions.csv", content) for name, content in BAD_TABLES.items()},
    **{f"row: {name}": ("captions.csv", "captions.csv, line", content) for name, content in BAD_ROWS.items()},
    **{
        f"line: {name}": ("c.jsonl", "c.jsonl, line 4", fourth_line(line)) for name, line in BAD_LINES.items()
    },
    **{f"json: {name}": ("captions.json", "captions.json", content) for name, content in BAD_JSON.items()},
}


@pytest.fixture
def in_time():
    """Ends a test that hangs, also one that waits for a pipe."""

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def named(place, culprit, **options):
    """What is reported of a bad folder; every report must name the culprit and be printable in a few lines."""
    try:
        entries, dropped = listed(place, **options)
    except UserError as error:
        assert culprit.removesuffix(", line") in str(error), error
        assert len(str(error)) < 1500
        str(error).encode()
        return str(error)
    assert dropped, f"nothing is reported; {entries}"
    for _, file, reason in dropped:
        assert culprit in file and reason and len(file) + len(reason) < 600
    return dropped


@pytest.mark.parametrize("case", CORPUS)
def test_no_bad_table_passes_unnamed(tmp_path, case, in_time):
    name, culprit, content = CORPUS[case]
    named(make(tmp_path, {**pictures(6), name: content}), culprit)


def test_good_rows_around_bad_ones_stay(tmp_path, in_time):
    for case in BAD_ROWS.keys() - {"endless quoted cell", "a pair among pictures"}:
        name, _, content = CORPUS[f"row: {case}"]
        entries, dropped = listed(make(tmp_path, {**pictures(6), name: content}))
        assert len(entries) == 6 and len(dropped) == 1, case


def test_a_table_of_mostly_bad_rows_is_given_up(tmp_path, in_time):
    make(tmp_path, {**pictures(6), "a.csv": HEAD + "0.png,a\n" * 1000 + "0.png,a, b\n" * 20_000})
    with pytest.raises(
        UserError,
        match=r"a.csv: 10001 of its first 11001 records cannot be read, the first: a.csv, line 1002 has 3 cells",
    ):
        listed(tmp_path)
    make(tmp_path, {"a.csv": GOOD + "gone.png,x\n" * 20_000})
    assert len(listed(tmp_path)[1]) == 20_000


def test_every_cut_of_a_table_is_named_or_good(tmp_path, in_time):
    whole = table([row | {"boxes": '[[1, 1, 2, 2, "a"]]', "split": "train"} for row in ROWS])
    make(tmp_path, pictures(6))
    for end in range(len(whole)):
        make(tmp_path, {"captions.csv": whole[:end]})
        try:
            entries, dropped = listed(tmp_path)
        except UserError as error:
            assert "captions.csv" in str(error)
            continue
        lines = whole[:end].count("\n") + (whole[:end][-1] != "\n") - 1
        assert len(entries) + len(dropped) == lines
        assert len(dropped) <= 1


def _no_folder(place):
    return place / "nowhere", "nowhere is not there"


def _a_file(place):
    return make(place, {"a.csv": GOOD}) / "a.csv", "a.csv is not there"


def _nothing(place):
    return place, "it holds nothing. Needed"


def _pictures_only(place):
    return make(place, pictures(3)), "no table and no .txt beside a picture; it holds 0.png, 1.png"


def _texts_only(place):
    return make(place, {"a.txt": "x", "b.txt": "y"}), "it holds a.txt, b.txt"


def _three_tables(place):
    return make(place, {"a.csv": GOOD, "b.tsv": "", "c.jsonl": ""}), "3 tables: a.csv, b.tsv, c.jsonl"


def _two_json(place):
    return make(place, {"a.json": "", "b.json": ""}), "2 tables: a.json, b.json"


def _other_tables(place):
    return make(place, {**pictures(3), "a.xlsx": b"PK", "a.parquet": b"PAR1"}), "it holds 0.png, 1.png"


def _table_is_a_pipe(place):
    os.mkfifo(place / "a.csv")
    return place, "a.csv is no file"


def _table_is_a_loop(place):
    (place / "a.csv").symlink_to(place / "a.csv")
    return place, "a.csv cannot be read: Too many levels"


def _table_is_a_dead_link(place):
    (place / "a.csv").symlink_to(place / "b")
    return place, "a.csv cannot be read: No such file"


def _table_is_a_folder(place):
    (place / "a.csv").mkdir()
    return place, "it holds a.csv"


def _equal_pictures(place):
    return make(
        place, {**{name: picture(1) for name in pictures(6)}, "a.csv": GOOD}
    ), "has 1 distinct pictures"


def _broken_pictures(place):
    return make(
        place, {**dict.fromkeys(pictures(6), b"<html>"), "a.csv": GOOD}
    ), "the first: 0.png (a.csv, line 2)"


def _empty_pictures(place):
    return make(place, {**dict.fromkeys(pictures(6), b""), "a.csv": GOOD}), "0 distinct pictures"


LAYOUTS = [
    *(_no_folder, _a_file, _nothing, _pictures_only, _texts_only, _three_tables, _two_json, _other_tables),
    *(_table_is_a_pipe, _table_is_a_loop, _table_is_a_dead_link, _table_is_a_folder),
    *(_equal_pictures, _broken_pictures, _empty_pictures),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_that_are_no_data_set(tmp_path, layout, in_time):
    place, culprit = layout(tmp_path)
    with pytest.raises(UserError) as error:
        listed(place)
    assert culprit in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "b.csv"}, r"no table 'b.csv' in .*Did you mean 'a.csv'\? Possible: a.csv"),
        ({"table": "../a.csv"}, "no table '../a.csv'"),
        ({"table": "/etc/hostname"}, "no table '/etc/hostname'"),
        ({"table": "0.png"}, "0.png is no table that can be read. Possible: .csv"),
        ({"table": "."}, "no table that can be read"),
        ({"pictures": "imges"}, r"no folder 'imges' in .*Did you mean 'images'\? Possible: images"),
    ],
)
def test_options_that_name_nothing(tmp_path, options, message):
    make(tmp_path, {**pictures(6), "a.csv": GOOD, "images/x.png": picture(1)})
    with pytest.raises(UserError, match=message):
        listed(tmp_path, **options)


def test_bad_texts_beside_pictures_are_named(tmp_path, in_time):
    texts = {f"{i}.txt": f"Picture {i}." for i in range(6)}
    make(tmp_path, {**pictures(6), **texts, "5.jpg": picture(8), "gone.txt": "x", "sub/4.txt": "elsewhere"})
    for number, spoil in ((0, os.mkfifo), (1, os.mkdir), (2, lambda path: os.symlink(path, path))):
        (tmp_path / f"{number}.txt").unlink()
        spoil(tmp_path / f"{number}.txt")
    make(
        tmp_path,
        {name: picture(9 + i) for i, name in enumerate(("x.png", "y.png"))} | {"x.txt": "x", "y.txt": ""},
    )
    entries, dropped = listed(tmp_path)
    assert (
        list(entries) == ["3.png", "4.png", "x.png", "y.png"]
        and entries["y.png"][1].get("captions", []) == []
    )
    assert dropped == [
        ("train", "0.txt", "is no file that can be read"),
        ("train", "2.txt", "is no file that can be read"),
        ("train", "5.txt", "has several pictures: 5.jpg, 5.png"),
        ("train", "gone.txt", "has no picture beside it"),
        ("train", "sub/4.txt", "has no picture beside it"),
    ]
    assert all(path.is_file() for path in folder.sources(tmp_path))


def test_pictures_that_are_no_files_are_named(tmp_path, in_time):
    make(tmp_path, {**pictures(6), "a.csv": GOOD})
    for number, spoil in ((0, os.mkfifo), (1, os.mkdir), (2, lambda path: os.symlink(path, path))):
        (tmp_path / f"{number}.png").unlink()
        spoil(tmp_path / f"{number}.png")
    entries, dropped = listed(tmp_path)
    assert len(entries) == 3
    assert [file for _, file, _ in dropped] == [f"{i}.png (a.csv, line {i + 2})" for i in range(3)]
