# SPDX-License-Identifier: Apache-2.0
"""The doctor counts right, finds what is damaged and names it, ends with the right code, and never with a traceback."""

import copy
import itertools
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from tests.data import prepared
from vlp_jax import cli
from vlp_jax import doctor as command
from vlp_jax.data import image, record
from vlp_jax.data.inspection import examination, screen
from vlp_jax.data.text import Vocabulary

RULE = image.Layout(384, 639, 32, 228)


def different():
    """Pictures that are all different, over all splits too."""
    numbers = itertools.count()
    return lambda row, height, width: prepared.picture(next(numbers), height, width)


def write(folder, *, pictures=None, **options):
    return prepared.write(folder, pictures=pictures or different(), **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write(folder, splits={"train": 30, "test": 4}, sizes=((64, 64), (48, 80)))


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def examine(folder, **options):
    """The report, after a look that it can be printed and shown."""
    report = examination.examine(folder, **{"rule": RULE} | options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    lines = screen.render(report).splitlines()
    assert len(lines) <= 40 and max(map(columns, lines), default=0) <= 100
    assert report["ok"] == (not report["problems"]) == (not report["problem_counts"])
    return report


def columns(line):
    assert all(letter.isprintable() for letter in line)
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else not unicodedata.combining(letter)
        for letter in line
    )


def messages(report):
    return [problem["message"] for problem in report["problems"]]


def kinds(report):
    return {problem["kind"] for problem in report["problems"]}


def run(*argv):
    return cli.run(
        command.main, command.define, usage=command.USAGE, arguments=("KIND", "DATA_DIR"), argv=argv
    )


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("deep", [False, True])
def test_a_healthy_directory(original, deep):
    report = examine(original, deep=deep, length=12)
    assert report["ok"] and report["dropped"]["count"] == 0 and report["overlaps"] == []
    train = report["splits"]["train"]
    assert (train["records"], train["pairs"], train["listed"], train["alive"]) == (30, 60, 30, 1.0)
    vocabulary = Vocabulary.load(original / "vocabulary.model")
    lengths = [len(ids) + 2 for row in range(30) for ids in vocabulary.tokenize(prepared.captions(row))]
    found = train["lengths"]
    assert (found["minimum"], found["maximum"]) == (min(lengths), max(lengths))
    assert found["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(lengths))
    assert sum(found["counts"]) == train["texts"]["texts"] == 60
    assert train["texts"]["cut"] == np.mean([n > 12 for n in lengths])
    assert train["pictures"]["common_sizes"] == [[48, 80, 0.5], [64, 64, 0.5]]
    assert train["pictures"]["aspect"]["maximum"] == pytest.approx(80 / 48)
    tokens = [12 * 12, 12 * 19]  # 64 x 64 becomes 384 x 384, 48 x 80 becomes 383 x 639, floored to patches
    assert {train["pictures"]["tokens"][key] for key in ("minimum", "maximum")} == {tokens[0], 11 * 19}
    assert train["captions_a_record"]["counts"] == [10, 10, 10]
    assert train["duplicates"] == {"records": 0, "share": 0.0, "examples": []}


def test_command(original, tmp_path, capsys):
    assert run("data", str(original), "--deep") == 0
    assert capsys.readouterr().out.endswith("no problem found\n")
    assert run("data", str(tmp_path / "nowhere")) == 2
    shown = capsys.readouterr()
    assert "does not exist" in shown.err and "vlp_jax.prepare" in shown.err and not shown.out.strip()
    assert run("data", str(original / "manifest.json")) == 2
    assert "is a file, not a directory" in capsys.readouterr().err
    assert run("date", str(original)) == 2
    assert "Did you mean 'data'?" in capsys.readouterr().err
    assert run("data") == 2
    assert "KIND DATA_DIR" in capsys.readouterr().err
    assert run("data", str(original), "--image_size=100") == 2
    assert "not a multiple of data.patch_size" in capsys.readouterr().err
    assert run("--help") == 0


def test_json_is_one_object(original, tmp_path, capsys):
    assert run("data", str(original), "--json", "--text_length=6") == 2
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["text_length"] == 6 and kinds(report) == {"texts"} and "Traceback" not in shown.err
    assert "longer than 6 pieces" in shown.err
    assert run("data", str(tmp_path), "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and kinds(report) == {"directory"} and "splits" not in report


def test_a_flipped_byte_in_a_record(directory, capsys):
    shard = sorted(directory.glob("*train*record*"))[1]
    content = bytearray(shard.read_bytes())
    content[9000] ^= 1
    shard.write_bytes(content)
    assert run("data", str(directory), "--deep") == 2
    message = capsys.readouterr().err
    assert f"{shard} is not what was written" in message
    place = re.search(rf"record \d+ of {shard} at byte (\d+) is damaged: ", message)
    assert place and int(place[1]) < 9000 < int(place[1]) + 4000


def test_a_flipped_byte_that_no_record_shows(directory):
    """In the padding of a shard: reading goes well, only the digest knows."""
    shard = sorted(directory.glob("*train*record*"))[0]
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    (message,) = messages(examine(directory, deep=True))
    assert str(shard) in message and "sha256" in message
    assert examine(directory)["ok"]


def test_damage_does_not_hide_the_rest(directory):
    """With one shard of two gone, the records of the other are still read and counted."""
    sorted(directory.glob("*train*record*"))[0].unlink()
    report = examine(directory, deep=True)
    assert kinds(report) == {"file"} and "is missing" in messages(report)[0]
    assert report["splits"]["train"]["texts"]["records"] == 15
    assert report["splits"]["train"]["pictures"]["shorter"]["maximum"] == 64


def test_wrong_pictures_are_counted_by_record(tmp_path):
    def pictures(row, height, width):
        if row % 2:
            return prepared.picture(row, height, width)[:200]
        return prepared.picture(row, height + 8 * (row == 4), width)

    broken = write(tmp_path / "broken", splits={"train": 30}, pictures=pictures)
    report = examine(broken, deep=True)
    assert report["problem_counts"] == {"picture": 16} and len(report["problems"]) == examination.SHOWN
    assert "picture in record 1 of " in messages(report)[0]
    assert any(
        "picture in record 4 of" in m and "72 x 64 pixels, stated are 64" in m for m in messages(report)
    )
    assert not examine(broken)["ok"]  # a few pictures are looked at in any case


def test_records_of_other_kinds(tmp_path):
    """Whole by their checksums, and not what prepare writes."""
    odd = (
        {"pixels": "text"},
        {"captions": [1, 2]},
        {"image": 7},
        {"height": [1, 2]},
        {"coco_id": 1.5},
        {"image": []},
    )
    for number, changes in enumerate(odd):
        folder = write(tmp_path / f"{number}", splits={"train": 1}, shards=1)
        shard = folder / "tiny-train.array_record-00000-of-00001"
        reader = array_record_module.ArrayRecordReader(str(shard))
        found = record.parse(reader.read([0])[0])
        writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
        writer.write(prepared.encode(**found | changes))
        writer.close()
        edit(folder, lambda m, path=shard: m["splits"]["train"]["shards"][0].update(prepared.entry(path)))
        report = examine(folder, deep=True)
        assert kinds(report) <= {"record", "picture"} and not report["ok"], changes


def test_a_picture_that_is_not_the_one_prepared(tmp_path):
    folder = write(tmp_path / "other", splits={"train": 4}, shards=1)
    path = folder / "train.index.npz"
    with np.load(path) as arrays:
        index = dict(arrays)
    index["pixels"][2] += 1
    index["coco_id"][3] = 7
    np.savez(path, **index)
    edit(folder, lambda manifest: manifest["splits"]["train"]["index"].update(prepared.entry(path)))
    found = messages(examine(folder, deep=True))
    assert len(found) == 2
    assert "record 2 of" in found[0] and "pixels" in found[0]
    assert "record 3 of" in found[1] and "coco_id 0, its index 7" in found[1]


def test_a_vocabulary_that_does_not_fit(tmp_path, directory):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "square", "number"]))
    odd = write(tmp_path / "odd", splits={"train": 8}, vocabulary=vocabulary)
    report = examine(odd)
    assert kinds(report) == {"vocabulary"} and "vocab.txt: the vocabulary does not fit" in messages(report)[0]
    texts = [
        word for row in range(8) for text in prepared.captions(row) for word in re.findall(r"\w+|[.,]", text)
    ]
    missing = [word for word in texts if word not in ("a", "square", "number")]
    assert report["splits"]["train"]["texts"]["unknown"] == pytest.approx(len(missing) / len(texts))
    found = dict(report["splits"]["train"]["texts"]["unknown_words"])
    assert found["is"] == missing.count("is") and found["red"] == missing.count("red")
    content = (directory / "vocabulary.model").read_bytes()
    (directory / "vocabulary.model").unlink()
    report = examine(directory)
    assert "vocabulary.model is missing" in messages(report)[0] and report["splits"]["train"]["texts"] is None
    (directory / "vocabulary.model").write_bytes(content[:-1] + b"x")
    assert "its sha256 differs" in messages(examine(directory))[0]


def test_captions_that_are_cut_empty_or_all_equal(tmp_path):
    empty = write(
        tmp_path / "empty", splits={"train": 3}, texts=lambda row: ["a red square", " "][: 1 + row % 2]
    )
    (message,) = messages(examine(empty))
    assert "record 0 of" in message and "without a word" in message
    equal = write(tmp_path / "equal", splits={"train": 4}, texts=lambda row: ["always the same"])
    report = examine(equal)
    assert "All 4 texts read of split train are 'always the same'" in messages(report)[0]
    assert report["splits"]["train"]["texts"]["duplicates"] == 0.75 and report["remarks"]
    long = write(tmp_path / "long", splits={"train": 4}, texts=lambda row: [f"{row} " * (50 if row else 3)])
    (message,) = messages(examine(long, length=40))
    assert "75.0% of the texts of split train are longer than 40 pieces" in message


def test_twins_and_ids(tmp_path):
    """Pictures 0 to 19 in train with 3 and 5 equal; test repeats the pixels of 7, and the ids of 1 and 2."""
    numbers = [*range(5), 3, *range(6, 20), 100, 7, 101, 102]
    order = iter(numbers)

    def more(split, row):
        return {"coco_id": 1 + row if split == "train" or row < 2 else 0, "flickr_id": 5 * (split == "test")}

    folder = write(
        tmp_path / "twins",
        splits={"train": 20, "test": 4},
        pictures=lambda row, height, width: prepared.picture(next(order), height, width),
        more=more,
    )
    report = examine(folder)
    assert report["splits"]["train"]["duplicates"] == {"records": 1, "share": 0.05, "examples": [[3, 5]]}
    assert report["splits"]["test"]["duplicates"]["records"] == 0
    pixels, coco = report["overlaps"]
    assert (pixels["by"], pixels["evaluation"], pixels["pictures"], pixels["share"]) == (
        "pixels",
        "test",
        1,
        0.25,
    )
    assert [pixels["examples"][0][key] for key in ("train_row", "row")] == [7, 1]
    assert (coco["by"], coco["pictures"]) == ("coco_id", 2)
    assert coco["examples"][0] == {"value": 1, "train_row": 0, "row": 0}
    assert kinds(report) == {"overlap"} and len(report["problems"]) == 2
    assert "record 7 of" in messages(report)[0]
    assert examine(folder, max_overlap=0.5)["ok"]

    def ids(split, row):
        return {"flickr_id": 5, "coco_id": 20 + row}

    other = write(tmp_path / "elsewhere", splits={"train": 3, "validation": 2}, more=ids)
    found = examine(folder, against=[other])["overlaps"][-1]
    assert found["evaluation"] == f"{other}:validation" and found["by"] == "coco_id" and found["share"] == 0.5
    report = examine(folder, against=[tmp_path / "nowhere"])
    assert any("nowhere cannot be compared with" in message for message in messages(report))


def test_against_by_the_command(original, tmp_path, capsys):
    assert run("data", str(original), f"--against={original},{tmp_path}/no") == 2
    message = capsys.readouterr().err
    assert f"--against={tmp_path}/no cannot be compared with" in message and "does not exist" in message


def test_empty_splits(tmp_path):
    folder = write(tmp_path / "empty", splits={"train": 2, "test": 0})
    report = examine(folder)
    assert messages(report) == ["The split test is empty. Prepare the data again with other splits."]
    edit(folder, lambda manifest: manifest.update(splits={}))
    assert "has no split" in messages(examine(folder))[0]


def test_a_screen_that_strangers_fill(tmp_path):
    """Five splits with long names, reasons with control codes, unknown words in wide letters."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    splits = {f"{'split' * 9}{number}": 3 for number in range(5)}
    folder = write(
        tmp_path / "odd",
        splits=splits,
        vocabulary=vocabulary,
        texts=lambda row: ["漢字かな " * 5 + "é\u202e🙂", "a"],
    )
    reasons = {f"\x1b[2J\x07 reason {number} \ud800" + "x" * 200: number for number in range(9)}

    def change(manifest):
        manifest["dropped"].update(reasons=reasons, count=36)
        manifest.update(changed=reasons, licence="line\nbreak", builder_version=7)

    edit(folder, change)
    report = examine(folder)  # which looks at lines and letters
    text = screen.render(report)
    assert "reason 8" in text and "and 6 more reasons" not in text.splitlines()[0] and "1 more splits" in text


def test_older_directories(directory):
    wanted = "was prepared by an older version"
    for change in (
        lambda m: m["splits"]["test"].pop("listed"),
        lambda m: m["splits"]["train"].pop("alive"),
        lambda m: m.pop("changed"),
        lambda m: m.update(dropped=[]),
    ):
        before = (directory / "manifest.json").read_text()
        edit(directory, change)
        assert wanted in messages(examine(directory))[0]
        (directory / "manifest.json").write_text(before)
    path = directory / "train.index.npz"
    with np.load(path) as arrays:
        index = {name: arrays[name] for name in ("captions", "height", "width")}
    np.savez(path, **index)
    edit(directory, lambda manifest: manifest["splits"]["train"]["index"].update(prepared.entry(path)))
    (message,) = messages(examine(directory))
    assert wanted in message and "lacks pixels" in message


def test_no_permission(directory, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert "Permission denied" in messages(examine(directory))[0]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", refuse)
        assert "Permission denied" in messages(examine(directory))[0]


def places(node, path=()):
    """All paths into nested json."""
    yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


def test_any_wrong_manifest_is_said(original, tmp_path):
    """Each value of a manifest gone, or of another kind: never an exception."""
    folder = write(tmp_path / "small", splits={"train": 2, "test": 1}, shards=1)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"splits": {"a": 1}}',
    ):
        path.write_bytes(content)
        assert kinds(examine(folder)) == {"directory"}, content
    watched = [
        where
        for where in places(manifest)
        if where and where[0] in ("dataset", "licence", "dropped", "changed")
    ]
    watched += [
        where
        for where in places(manifest)
        if where[:1] == ("vocabulary",) or (where[:2] == ("splits", "train") and len(where) > 2)
    ]
    for where in watched:
        for wrong in (None, "../manifest.json", "a\0b", -1, 10**30, 2.5, float("nan"), True, [], {}, [[]]):
            changed = copy.deepcopy(manifest)
            node = changed
            for key in where[:-1]:
                node = node[key]
            if wrong is None:
                del node[where[-1]]
            else:
                node[where[-1]] = wrong
            path.write_text(json.dumps(changed))
            report = examine(folder)
            harmless = where[0] in ("dataset", "licence") or where[-1] in ("origin", "bytes", "size")
            harmless |= where[0] in ("dropped", "changed") or where[-1] in ("listed", "alive")
            assert harmless or not report["ok"] or wrong == {}, (where, wrong)


@pytest.mark.parametrize("deep", [False, True])
def test_any_damaged_file_is_said(tmp_path, deep):
    """Each file of a directory gone, empty, cut, with flipped bytes, or a folder: never an exception."""
    folder = write(tmp_path / "small", splits={"train": 3, "test": 2}, shards=1)
    draw = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        damaged = {
            "empty": b"",
            "half": content[: len(content) // 2],
            "cut": content[:-1],
            "long": content + b"x",
        }
        for place in draw.integers(0, max(1, len(content)), 6 if content else 0).tolist():
            damaged[f"flipped at {place}"] = (
                content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
            )
        for what, other in damaged.items():
            if other == content:
                continue
            path.write_bytes(other)
            report = examine(folder, deep=deep)
            if deep or "flipped" not in what:
                assert not report["ok"] or path.name == "manifest.json", (path.name, what)
        path.unlink()
        assert not examine(folder, deep=deep)["ok"], path.name
        path.mkdir()
        assert not examine(folder, deep=deep)["ok"], path.name
        path.rmdir()
        path.write_bytes(content)
    assert examine(folder, deep=deep)["ok"]
