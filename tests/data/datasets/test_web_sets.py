# SPDX-License-Identifier: Apache-2.0
"""The readers of SBU and Conceptual Captions: lists, naming schemes of downloaded files, and files never downloaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib

import pytest

from tests.data import raw
from vlp_jax.data.datasets import Dropped, gcc, sbu, web_files
from vlp_jax.data.preparation import writer
from vlp_jax.types import UserError

ROWS = 12
URLS = [
    f"http://static.flickr.com/27{row:02d}/43850589{row:02d}_b0f29155{row:02d}.jpg" if row % 2 else f"https://a.b/c/d{row}.PNG?w=5#x"
    for row in range(ROWS)
]  # fmt: skip
CAPTIONS = [f'<PERSON> said "{row}" , quietly' for row in range(ROWS)]
DEAD = (0, 5)  # never downloaded

SCHEMES = {
    "row number": lambda row, url: f"{row:09d}.jpg",
    "row number in shards of img2dataset": lambda row, url: f"{row // 4:05d}/{row // 4:05d}{row % 4:04d}.jpg",
    "row number as ViLT": lambda row, url: f"{row // 10:04d}/{row:07d}",
    "row number, several extensions": lambda row, url: f"{row}.{('jpg', 'png', 'webp')[row % 3]}",
    "row number and crc32": lambda row, url: f"{row}_{zlib.crc32(url.encode())}",
    "crc32": lambda row, url: f"{zlib.crc32(url.encode())}.jpg",
    "md5": lambda row, url: f"{hashlib.md5(url.encode()).hexdigest()}",
    "sha1": lambda row, url: f"x/y/{hashlib.sha1(url.encode()).hexdigest()}.jpeg",
    "sha256": lambda row, url: f"{hashlib.sha256(url.encode()).hexdigest()}.jpg",
    "last part": lambda row, url: url.rpartition("/")[2].partition("?")[0],
    "path": lambda row, url: url.partition("//")[2].partition("/")[2].partition("?")[0].replace("/", "_"),
}
SHARDS = (
    "row number in shards of img2dataset"  # of ten thousand there: here its numbers are not those of rows
)


def place(folder, scheme, dead=DEAD):
    """Writes the files of all rows but the dead ones, one picture a row; returns row -> bytes."""
    content = {row: raw.picture(row) for row in range(ROWS) if row not in dead}
    for row, picture in content.items():
        path = folder / SCHEMES[scheme](row, URLS[row])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    for name in ("00000_stats.json", "0.txt", "0.json", ".hidden", "3.parquet"):
        (folder / name).write_text("no picture")
    return content


def write_gcc(folder, header="", rows=None):
    lines = (
        [f"{caption}\t{url}" for caption, url in zip(CAPTIONS, URLS, strict=True)] if rows is None else rows
    )
    raw.write(folder / "Train_GCC-training.tsv", header + "".join(f"{line}\n" for line in lines))
    return folder


def write_sbu(folder, kind="txt"):
    if kind == "txt":
        raw.write(folder / sbu.URLS, "".join(f"{url}\n" for url in URLS))
        raw.write(folder / sbu.CAPTIONS, "".join(f"{caption} \n" for caption in CAPTIONS))
    else:
        raw.write(
            folder / "sbu-captions-all.json",
            {"image_urls": URLS, "user_ids": ["x"] * ROWS, "captions": CAPTIONS},
        )
    return folder


def read(module, folder, **options):
    module.check(folder, **options)
    return list(module.listing(folder, map, **options))


def agree(found, folder, content):
    """Every row in its place, with its own picture and caption, or as a file that was never downloaded."""
    assert len(found) == ROWS
    for row, (split, one) in enumerate(found):
        assert split == "train"
        if row in content:
            assert json.loads(json.dumps(one)) == one
            assert (folder / one["image"]).read_bytes() == content[row]
            assert (one["image_key"], [text.strip() for text in one["captions"]]) == (row, [CAPTIONS[row]])
            assert one["flickr_id"] == (int(f"43850589{row:02d}") if row % 2 else 0)
        else:
            assert one == Dropped(URLS[row], "was never downloaded", missing=True)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != SHARDS])
def test_naming_schemes(tmp_path, scheme):
    content = place(write_gcc(tmp_path) / "train", scheme)
    agree(read(gcc, tmp_path), tmp_path, content)
    content = place(write_sbu(tmp_path / "sbu") / "images", scheme)
    agree(read(sbu, tmp_path / "sbu"), tmp_path / "sbu", content)


@pytest.mark.parametrize("kind", ["txt", "json"])
@pytest.mark.parametrize("images", ["images_train", "sbu_images", ".", "dataset"])
def test_forms_of_sbu(tmp_path, kind, images):
    lists = tmp_path / "dataset" if images == "dataset" else tmp_path  # as torchvision unpacks it
    write_sbu(lists, kind)
    content = place(tmp_path / images, "last part")
    agree(read(sbu, tmp_path), tmp_path, content)


@pytest.mark.parametrize("form", ["plain", "columns", "swapped", "swapped columns", "labelled", "crlf"])
def test_forms_of_gcc(tmp_path, form):
    pairs = list(zip(CAPTIONS, URLS, strict=True))
    header, lines = "", [f"{caption}\t{url}" for caption, url in pairs]
    if form == "columns":
        header = "caption\turl\n"
    if form.startswith("swapped"):
        lines = [f"{url}\t{caption}" for caption, url in pairs]
        header = "url\tcaption\n" if form == "swapped columns" else ""
    if form == "labelled":
        lines = [f"{line}\tdog,cat\t/m/0bt9lr\t0.9" for line in lines]
    if form == "crlf":
        header, lines = "\ufeff", [f"{line}\r" for line in lines]
    content = place(write_gcc(tmp_path, header, lines) / "images_train", "row number")
    agree(read(gcc, tmp_path), tmp_path, content)


def test_two_lists_of_gcc(tmp_path):
    raw.write(write_gcc(tmp_path) / "Validation_GCC-1.1.0-Validation.tsv", f"a dog\t{URLS[3]}\nno tab\n")
    place(tmp_path / "training", "row number and crc32")
    raw.pictures(tmp_path / "validation", f"0_{zlib.crc32(URLS[3].encode())}")
    found = read(gcc, tmp_path)
    assert [one["captions"] for split, one in found if split == "validation" and isinstance(one, dict)] == [
        ["a dog"]
    ]
    bad = (
        "validation",
        Dropped("Validation_GCC-1.1.0-Validation.tsv:2", "has no caption and address with a tab between"),
    )
    assert found[-1] == bad and len(found) == ROWS + 2
    assert [path.name[:5] for path in gcc.sources(tmp_path)] == ["Train", "Valid"]
    found = read(
        gcc, tmp_path, lists=["train=Validation_GCC-1.1.0-Validation.tsv"], images=["train=validation"]
    )
    assert [split for split, one in found] == ["train"] * 2
    (tmp_path / "validation" / f"0_{zlib.crc32(URLS[3].encode())}").rename(tmp_path / "training" / "1_1.jpg")
    place(tmp_path / "numbers", "row number")
    with pytest.raises(UserError, match="by row number, of which list is not said"):
        read(gcc, tmp_path, images=["train=numbers", "validation=numbers"])


def test_lists_as_vilt_has_them(tmp_path):
    pairs = [
        [f"/old/images_train/{row // 10:04d}/{row:07d}", caption] for row, caption in enumerate(CAPTIONS)
    ]
    raw.write(tmp_path / "train_annot.json", [*pairs, [pairs[3][0], "a second one"]])
    content = place(tmp_path / "images_train", "row number as ViLT")
    for module in (gcc, sbu):
        found = [one for _, one in read(module, tmp_path)]
        assert len(found) == ROWS and found[3]["captions"] == [CAPTIONS[3], "a second one"]
        for row, one in enumerate(found):
            if row in content:
                assert (tmp_path / one["image"]).read_bytes() == content[row]
            else:
                assert one == Dropped(pairs[row][0], "was never downloaded", missing=True)


def test_first_row_and_rows(tmp_path):
    write_gcc(tmp_path)
    raw.pictures(tmp_path / "train", *(f"{row + 1:06d}.jpg" for row in range(ROWS)))
    found = [one["image"] for _, one in read(gcc, tmp_path, first_row=1, rows=3)]
    assert found == [f"train/{row:06d}.jpg" for row in (1, 2, 3)]


def test_an_address_ends_as_another_does(tmp_path):
    rows = [
        "a\thttp://a.b/1/photo.jpg",
        "b\thttp://a.b/2/photo.jpg",
        "c\thttp://a.b/3/other.jpg",
        "d\thttp://a.b/3/other.jpg",
    ]
    write_gcc(tmp_path, rows=rows)
    raw.pictures(tmp_path / "train", "photo.jpg", "other.jpg")
    first, second, *same = [one for _, one in read(gcc, tmp_path)]
    assert (
        first == Dropped("http://a.b/1/photo.jpg", "another address ends in photo, too", missing=True)
        and second.missing
    )
    assert [one["image"] for one in same] == ["train/other.jpg"] * 2


def test_strange_rows_and_names(tmp_path):
    """Addresses that urllib refuses, bytes that are not UTF-8, empty cells, files without stem."""
    rows = ["a\thttp://[bad/1.jpg", "\thttp://a.b/", "c\t", "\t\t\t", "e\tftp://é.b/" + "x" * 5000]
    (tmp_path / "Train.tsv").write_bytes("\n".join(rows).encode() + b"\nf\xff\thttp://a.b/\xff.jpg\n")
    raw.pictures(tmp_path / "train", "0.jpg", "0001", "4.gif", "5.", "..x", "a.b.c")
    found = [one for _, one in read(gcc, tmp_path)]
    assert [one["image"] if isinstance(one, dict) else one.missing for one in found] == [
        "train/0.jpg", "train/0001", False, False, "train/4.gif", "train/5.",
    ]  # fmt: skip


def test_the_order_of_the_disk_does_not_count(tmp_path, monkeypatch):
    write_gcc(tmp_path)
    raw.pictures(tmp_path / "train", *(f"{shard}/{row:0{width}d}.{kind}" for shard in "ba" for row in range(ROWS) for width in (1, 4) for kind in ("png", "jpg")))  # fmt: skip
    first = read(gcc, tmp_path)
    entries = web_files._entries
    for seed in range(5):
        monkeypatch.setattr(
            web_files,
            "_entries",
            lambda path: random.Random(seed).sample(found := list(entries(path)), len(found)),  # noqa: B023
        )
        assert read(gcc, tmp_path) == first
    assert first[3][1]["image"] == "train/a/3.jpg"


def test_no_look_at_single_files(tmp_path, monkeypatch):
    write_gcc(tmp_path)
    place(tmp_path / "train", "row number")
    calls, stat = [], os.stat
    monkeypatch.setattr("os.stat", lambda *args, **kwargs: calls.append(args) or stat(*args, **kwargs))
    read(gcc, tmp_path)
    assert len(calls) < 30


def test_share_alive_goes_into_the_manifest(tmp_path):
    place(write_sbu(tmp_path / "raw") / "images", "row number")
    manifest, _ = writer.write(sbu, tmp_path / "raw", tmp_path / "data", workers=1)
    split = manifest["splits"]["train"]
    assert (split["listed"], split["records"]) == (ROWS, ROWS - 2) and split["alive"] == pytest.approx(
        10 / 12
    )
    assert manifest["dropped"]["reasons"] == {"was never downloaded": 2}


def _no_folder(folder):
    raw.write(folder / "x.tsv", "")


def _two_lists(folder):
    write_gcc(folder)
    raw.write(folder / "train_annot.json", [])


def _no_images(folder):
    write_gcc(folder)


def _other_files(folder):
    write_gcc(folder)
    raw.pictures(folder / "train", "cat.jpg", "dog.jpg")


def _no_files(folder):
    (write_gcc(folder) / "train").mkdir()


def _bad_pairs(folder):
    raw.write(folder / "train_annot.json", [["a", "b"], ["c"]])
    raw.pictures(folder / "train", "a")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, "it holds x.tsv. Needed: Train_GCC"),
        (_two_lists, "Train_GCC-training.tsv and train_annot.json in .* are both lists of train"),
        (_no_images, "Looked for .*/train, .*/training, .*/images_train"),
        (_other_files, "It holds cat, dog; the first row may have 0_.*row number"),
        (_no_files, "It holds nothing"),
        (_bad_pairs, "pair 2 is no .path, caption"),
    ],
)
def test_what_is_wrong_with_gcc(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        read(gcc, tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Needed: SBU_captioned"),
        ({sbu.URLS: "http://a/b\n"}, "Needed: SBU_captioned"),
        ({sbu.URLS: "http://a/b\n", sbu.CAPTIONS: "a\nb\n"}, "has 2 lines, .*urls.txt has 1"),
        ({"sbu-captions-all.json": {"captions": []}}, "lacks image_urls; it holds captions"),
        ({"sbu-captions-all.json": {"captions": ["a"], "image_urls": []}}, "are not alike"),
        ({"sbu-captions-all.json": "[["}, "is not JSON"),
        ({"sbu-captions-all.json": {"captions": [], "image_urls": []}}, "the list is empty"),
    ],
)
def test_what_is_wrong_with_sbu(tmp_path, files, message):
    raw.pictures(tmp_path / "images", "0.jpg")
    for name, content in files.items():
        raw.write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(sbu, tmp_path)


def test_wrong_options(tmp_path):
    place(write_sbu(tmp_path) / "images", "row number")
    with pytest.raises(UserError, match="Looked for .*nowhere"):
        read(sbu, tmp_path, images=["train=nowhere"])
    with pytest.raises(UserError, match="SBU has no such split"):
        read(sbu, tmp_path, images=["test=images"])
    write_gcc(tmp_path)
    with pytest.raises(UserError, match="none.tsv is no file below"):
        read(gcc, tmp_path, lists=["train=none.tsv"])
