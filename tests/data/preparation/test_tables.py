# SPDX-License-Identifier: Apache-2.0
"""Tables, json and texts: what a good file gives, and which place a bad one names."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import time

import pytest

from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

ARABIC, FAMILY, FLAG = "رجل يركب حصانا", "👩‍👩‍👧", "🇩🇪"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(folder, name, content):
    """[(line, record or the reason it is bad)]"""
    found = tables.read_rows(write(folder, name, content))
    return [(line, str(one) if isinstance(one, ValueError) else one) for line, one in found]


def records(folder, name, content):
    return [one for _, one in rows(folder, name, content)]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A man.\r\n", "A man."),
        ("two\r\nlines,\tthree\u2028four", "two lines, three four"),
        ("in  side", "in  side"),
        ("nul\x00, bell\x07, escape\x1b[31m, delete\x7f, c1\x9b", "nul, bell, escape[31m, delete, c1"),
        ("\ufeffwith a mark", "with a mark"),
        (ARABIC + "\u200f.", ARABIC + "\u200f."),
        (f"{FAMILY} {FLAG} ❤️", f"{FAMILY} {FLAG} ❤️"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # a joiner is part of the word
        ("".join(map(chr, range(32))), ""),
        (" \u00a0\u200b\u200e\ufeff ", ""),  # nothing to be seen
        ("x" * 10_000 + "\n", "x" * 10_000),
    ],
)
def test_clean_text(text, clean):
    assert tables.clean_text(text) == clean


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 10_485_760, "has 10485760 characters, more than 10000"),
        ("half an emoji \ud83d", "is not UTF-8"),
        (b"caf\xe9".decode(errors="surrogateescape"), "is not UTF-8"),
        (7, "is a number, not text"),
        (None, "is null, not text"),
        (["a"], "is a list, not text"),
    ],
)
def test_unusable_texts_say_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        tables.clean_text(text)


def test_csv_as_spreadsheets_write_it(tmp_path):
    content = (
        '\ufeffimage, caption ,\r\na.jpg,"A ""red"" car, parked\r\non grass",\r\n\r\nb c.jpg,'
        f"{ARABIC} {FAMILY},\r\n,,\r\n"
    )
    assert rows(tmp_path, "a.csv", content) == [
        (2, {"image": "a.jpg", "caption": 'A "red" car, parked\r\non grass'}),
        (5, {"image": "b c.jpg", "caption": f"{ARABIC} {FAMILY}"}),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_the_csv_module_writes_is_read_back(tmp_path, delimiter, end):
    letters = "ab \"',;|é\n"
    chance = random.Random(7)
    cells = [
        ["." + "".join(chance.choices(letters, k=chance.randrange(1, 8))) for _ in "12"] for _ in range(400)
    ]
    file = io.StringIO()
    written = csv.writer(file, delimiter=delimiter, lineterminator=end)
    written.writerows([["image", "caption"], *cells])
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    assert records(tmp_path, name, file.getvalue()) == [{"image": a, "caption": b} for a, b in cells]


def test_a_row_number_column_without_name_is_left_out(tmp_path):
    assert records(tmp_path, "a.csv", ",image,caption\n0,a.jpg,x\n") == [{"image": "a.jpg", "caption": "x"}]


def test_blanks_behind_separators(tmp_path):
    content = 'image, caption\na.jpg, "a dog, a cat"\nb.jpg,  two\n'
    assert [one["caption"] for one in records(tmp_path, "a.csv", content)] == ["a dog, a cat", "two"]


def test_unicode_text_of_spreadsheets(tmp_path):
    content = f"image\tcaption\r\na.jpg\t{ARABIC}\r\n".encode("utf-16")
    assert records(tmp_path, "a.tsv", content) == [{"image": "a.jpg", "caption": ARABIC}]


def test_ten_megabytes_in_a_cell(tmp_path):
    long = "long " * 2_097_152
    content = f'image,caption\na.jpg,"{long}"\nb.jpg,short\n'
    assert [len(one["caption"]) for one in records(tmp_path, "a.csv", content)] == [10_485_760, 5]


def test_cells_that_do_not_fit_the_header(tmp_path):
    content = "image,caption\na.jpg\nb.jpg,a dog, a cat\nc.jpg,fine\nd.jpg,trailing,,\n"
    found = rows(tmp_path, "a.csv", content)
    assert found[0] == (2, "has 1 cells, the header has 2")
    assert (
        found[1][0] == 3 and "has 3 cells, the header has 2" in found[1][1] and "needs quotes" in found[1][1]
    )
    assert [one for _, one in found[2:]] == [
        {"image": "c.jpg", "caption": "fine"},
        {"image": "d.jpg", "caption": "trailing"},
    ]


def test_a_quote_that_is_not_closed_costs_one_record(tmp_path):
    good = "".join(f"{i}.jpg,number {i}\n" for i in range(50))
    found = rows(tmp_path, "a.csv", 'image,caption\na.jpg,"open\n' + good)
    assert found[0][0] == 2 and "quote that is not closed" in found[0][1]
    assert found[1:] == [(i + 3, {"image": f"{i}.jpg", "caption": f"number {i}"}) for i in range(50)]
    found = rows(tmp_path, "b.csv", 'image,caption\n"a.jpg" x,one\nb.jpg,12" pizza\n')
    assert "quote" in found[0][1] and found[1] == (3, {"image": "b.jpg", "caption": '12" pizza'})


def test_a_quote_that_is_open_to_the_end_of_a_long_file(tmp_path):
    good = "".join(f"{i}.jpg,number {i}\n" for i in range(300_000))
    start = time.process_time()
    found = rows(tmp_path, "a.csv", 'image,caption\na.jpg,"open\n' + good)
    assert time.process_time() - start < 15
    assert len(found) == 300_001 and "quote" in found[0][1] and found[-1][1]["image"] == "299999.jpg"


def test_tsv_without_quoting(tmp_path):
    content = 'image\tcaption\na.jpg\t"Hello" he said\nb.jpg\t"open\nc.jpg\tclosed"\nd.jpg\t"whole"\n'
    captions = [one["caption"] for one in records(tmp_path, "a.tsv", content)]
    assert captions == ['"Hello" he said', '"open', 'closed"', "whole"]


def test_latin_1_and_bad_bytes_lose_their_texts_only(tmp_path):
    for name, content in (
        ("a.csv", b"image,caption\na.jpg,caf\xe9\nb.jpg,tea\n"),
        ("a.jsonl", b'{"image": "a.jpg", "caption": "caf\xe9"}\n{"image": "b.jpg", "caption": "tea"}\n'),
        ("a.json", b'[{"image": "a.jpg", "caption": "caf\xe9"}, {"image": "b.jpg", "caption": "tea"}]'),
    ):
        first, second = records(tmp_path, name, content)
        assert os.fsencode(first["caption"]) == b"caf\xe9" and second == {"image": "b.jpg", "caption": "tea"}
        with pytest.raises(ValueError, match="not UTF-8"):
            tables.clean_text(first["caption"])


def test_nul_bytes(tmp_path):
    first, second = records(tmp_path, "a.csv", b"image,caption\na.jpg,a\x00b\nb.jpg,tea\n" + b"\x00" * 512)[
        :2
    ]
    assert tables.clean_text(first["caption"]) == "ab" and second["caption"] == "tea"


def test_jsonl(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    content = (
        '\ufeff{"image": "a.jpg", "caption": ["one", "two"]}\r\n\r\nnot json\n[1]\n{"a": 1, "a": 2}\n{"a": NaN}\n'
        f'{deep}\n{{"a": {"9" * 5000}}}\n{{"image": "b.jpg"}} x\n{{"image": "c.jpg"}}'
    )
    found = rows(tmp_path, "a.jsonl", content)
    assert found[0] == (1, {"image": "a.jpg", "caption": ["one", "two"]})
    assert found[-1] == (10, {"image": "c.jpg"})
    reasons = [
        (3, "is not JSON: Expecting value at line 1, column 1"),
        (4, "is a list, not an object: [1]"),
        (5, "an object has the key 'a' twice at line 1, column 10"),
        (6, "NaN is no number of JSON at line 1, column 7"),
        (7, "is nested too deep"),
        (8, "is not JSON"),
        (9, "Extra data"),
    ]
    for (line, reason), (number, given) in zip(reasons, found[1:-1], strict=True):
        assert line == number and reason in given


def test_an_endless_line_is_read_over_in_bounded_memory_and_time(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"image": "a.jpg"}\n')
        file.seek(300_000_000, os.SEEK_CUR)  # a hole of NUL bytes, as a crash leaves one
        file.write(b'\n{"image": "b.jpg"}\n')
    start = time.process_time()
    found = list(tables.read_rows(path))
    assert time.process_time() - start < 10
    assert [line for line, _ in found] == [1, 2, 3] and found[2][1] == {"image": "b.jpg"}
    assert "more than 16777216 characters" in str(found[1][1])
    path.rename(path.with_suffix(".csv"))
    found = list(tables.read_rows(path.with_suffix(".csv")))
    assert [line for line, one in found if isinstance(one, ValueError)] == [2]


def test_quotes_that_swallow_all_do_not_take_for_ever(tmp_path):
    start = time.process_time()
    for cell in ('"open', '"', '"""', '"a"b', 'x"', '"a""', ',"'):
        found = rows(tmp_path, "a.csv", "image,caption\n" + f"a.jpg,{cell}\n" * 3000)
        assert found
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty. It needs a line of column names"),
        ("a.tsv", b"\xef\xbb\xbf\r\n \r\n", "a.tsv is empty"),
        ("a.csv", "image,caption,image\n", "columns 1 and 3 are both named 'image'.*image_1"),
        ("a.csv", 'image,"caption\na.jpg,x\n', "line 1: the column names cannot be read"),
        ("a.xlsx", b"PK\x03\x04", r"no table that can be read. Possible: \.csv, \.tsv, \.jsonl"),
        ("a.json", '{"images": []}', "holds an object, not a list of objects"),
        ("a.json", "", "not JSON: it is empty"),
    ],
)
def test_unusable_tables_name_the_file(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        rows(tmp_path, name, content)
    assert str(tmp_path / name) in str(error.value)


def test_a_header_only_has_no_rows(tmp_path):
    assert rows(tmp_path, "a.csv", "image,caption") == []
    assert rows(tmp_path, "a.jsonl", "\n \n") == []


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "loop.csv", "folder.csv", "absent.csv", "nul\0.csv"):
        for read in (tables.read_rows, tables.read_lines):
            with pytest.raises(UserError, match=name.split("\0")[0]):
                list(read(tmp_path / name))
        with pytest.raises(UserError):
            tables.read_json(tmp_path / name)


def _coco(count):
    return json.dumps({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)]}, indent=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_coco(9)[:-30], r"(?s)line 3\d, column \d+; the last good record before it is \{.*\"id\": 7"),
        (_coco(3) + "]", r"Extra data at line 16, column 2; the last good record before it is"),
        (_coco(3).replace('"1.jpg"', "NaN"), r"NaN is no number of JSON at line 9.*last good record.*0\.jpg"),
        (_coco(3).replace('"id": 1', '"id": 1, "id": 7'), r"key 'id' twice at line 8, column 13.*0\.jpg"),
        ('{"a": "NaN {", "b": {"a": 1}, "a": 2}', r"key 'a' twice at line 1, column 31"),
        ('{"a": 1 "b": 2}', r"line 1, column 9; before it stands '\{\"a\": 1 '"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not JSON: Expecting value at line 1, column 1"),
        (f"[{'9' * 5000}]", "is not JSON"),
        ("  \n", "it is empty"),
        ('["a"]', "holds a list, not an object with images"),
        ('{"pictures": [], "info": 1}', "lacks images; it holds pictures, info"),
        ("{}", "lacks images; it holds nothing"),
    ],
)
def test_json_faults_have_a_place(tmp_path, content, message):
    path = write(tmp_path, "a.json", content)
    with pytest.raises(UserError, match=message) as error:
        tables.read_json(path, "images")
    assert str(path) in str(error.value) and len(str(error.value)) < 700
    str(error.value).encode()  # can be printed


def test_json_as_published(tmp_path):
    path = write(tmp_path, "a.json", b"\xef\xbb\xbf" + _coco(4).encode())
    assert len(tables.read_json(path, "images")["images"]) == 4
    assert tables.read_json(write(tmp_path, "b.json", "[1, 2.5]")) == [1, 2.5]


def test_every_cut_of_a_json_file_is_a_user_error(tmp_path):
    content = _coco(3)
    for end in range(len(content)):
        with pytest.raises(UserError, match="is not JSON"):
            tables.read_json(write(tmp_path, "a.json", content[:end]), "images")


def test_lines(tmp_path):
    content = b"\xef\xbb\xbfone\r\ntwo\n\n\xff\nlast\x0bline"
    assert list(tables.read_lines(write(tmp_path, "a.txt", content))) == [
        (1, "one"),
        (2, "two"),
        (3, ""),
        (4, "\udcff"),
        (5, "last\x0bline"),
    ]
    assert list(tables.read_lines(write(tmp_path, "b.txt", b""))) == []
