# SPDX-License-Identifier: Apache-2.0
"""Tables, json and texts that people wrote: read as they come, each fault named with its place in the file.

One bad caption must not lose a file: bytes that are not UTF-8 become lone surrogates (PEP 383), which `clean_text`
refuses text by text; a bad record is an error among the records, with its line.
"""

from __future__ import annotations

import codecs
import collections
import csv
import json
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vlp_jax.types import UserError

LONGEST_TEXT = 10_000  # characters
LONGEST_RECORD = 2**24  # characters of a line, and of a csv cell with line breaks; bounds the memory
MOST_LINES = 2**18  # of a csv record; beyond it a quote was not closed
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_BREAKS = re.compile(r"\r\n|[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ufeff]"
)  # joiners and direction marks stay: scripts and emoji need them
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Takes control characters out, makes line breaks and tabs blanks, strips; "" if nothing is left.

    Raises:
        ValueError: why the text cannot be used: it is not UTF-8, longer than LONGEST_TEXT, or no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"is {_kind(text)}, not text")
    text = text.strip()
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"has {len(text)} characters, more than {LONGEST_TEXT}")
    if _SURROGATES.search(text):
        raise ValueError("is not UTF-8")
    text = _CONTROLS.sub("", _BREAKS.sub(" ", text)).strip()
    return (
        text if any(unicodedata.category(letter) not in ("Cf", "Zs", "Zl", "Zp") for letter in text) else ""
    )


def read_json(path: Path, *keys: str) -> Any:
    """Reads a json file whole; bytes that are not UTF-8 become lone surrogates.

    Args:
        keys: what the object at the top must have.

    Raises:
        UserError: it cannot be read, is not JSON (with the place, and the last good record before it), has a key
            twice or NaN, is nested too deep, or lacks one of the keys.
    """
    path = Path(path)
    with _open(path) as file:
        text = _guarded(path, file.read)
    try:
        content = _DECODER.decode(text.lstrip("\ufeff"))
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep to be read. Check that it is the right file.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON: {_place(text, error)}. It may be cut off or edited: write or download it again."
        ) from error
    if not keys:
        return content
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {_kind(content)}, not an object with {', '.join(keys)}. Give the file as published."
        )
    if missing := [key for key in keys if key not in content]:
        holds = ", ".join(map(shown, list(content)[:20])) or "nothing"
        raise UserError(f"{path} lacks {', '.join(missing)}; it holds {holds}. Give the file as published.")
    return content


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yields (line where the record starts, from 1; record) of a .csv, .tsv or .jsonl, streamed.

    The cells of .csv and .tsv are texts, by the names of the header, stripped; a .csv may be separated by ; or tabs or |.
    A .json list of objects is read whole and counted by objects. A bad record is a ValueError that says why.

    Raises:
        UserError: the file cannot be read, has an unknown suffix, no header, or a column name twice.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no table that can be read. Possible: {', '.join(SUFFIXES)}. Save it as one of these."
        )
    if suffix == ".json":
        yield from _list_rows(path)
        return
    with _open(path) as file:
        lines = _lines(path, file)
        yield from _json_rows(lines) if suffix == ".jsonl" else _cell_rows(path, lines, suffix)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line) of a plain text, without BOM and line ends; blank lines too.

    A line longer than LONGEST_RECORD comes cut to that.

    Raises:
        UserError: it cannot be read.
    """
    with _open(Path(path)) as file:
        for number, line, _ in _lines(Path(path), file):
            yield number, line.rstrip("\r\n")


def shown(text: Any, most: int = 120) -> str:
    """A value as messages show it: short, printable, on one line."""
    text = text if isinstance(text, str) else json.dumps(text)
    end = "..." if len(text) > most else ""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[:most]) + end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {shown(name, 60)!r} twice")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|NaN|-?Infinity|[{}]', re.DOTALL)


def _fault(text: str) -> int | None:
    """Where a doubled key or NaN stands in otherwise good json: the decoder does not say."""
    objects: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            objects.append(set())
        elif token[0] == "}":
            objects.pop()
        elif not token[1] or (token[2] and token[1] in objects[-1]):
            return token.start()
        elif token[2]:
            objects[-1].add(token[1])
    return None


def _place(text: str, error: ValueError) -> str:
    """What is wrong with json, at which line and column, and the last good record before it."""
    decoding = isinstance(error, json.JSONDecodeError)
    position = error.pos if decoding else _fault(text)
    reason = error.msg if decoding else str(error)
    if not text.strip():
        return "it is empty"
    if position is None:
        return reason
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    place = f"{reason} at line {line}, column {column}"
    end = text.rfind("}", max(0, position - LONGEST_TEXT), position) + 1
    start = end
    while end and (start := text.rfind("{", max(0, end - LONGEST_TEXT), start)) >= 0:
        try:
            if _DECODER.raw_decode(text, start)[1] == end:
                record = " ".join(text[start:end].split())
                return f"{place}; the last good record before it is {shown(record)}"
        except (ValueError, RecursionError):
            pass
    return f"{place}; before it stands {shown(text[max(0, position - 60) : position])!r}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _open(path: Path) -> TextIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise UserError(f"{path} is no file (a folder, a pipe or a device). Give a file.")
        with path.open("rb") as file:
            start = file.read(4)
        wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # Excel's "Unicode text"
        encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
        return path.open(encoding=encoding, errors=errors, newline="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}. Check the path and its permissions.") from error


def _guarded(path: Path, read, *arguments) -> str:
    try:
        return read(*arguments)
    except (OSError, UnicodeError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it is larger than the memory"
        raise UserError(f"{path} cannot be read: {reason}. Check the disk and the file.") from error


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str, bool]]:
    """(number, line with its end, whether it is whole); what is beyond LONGEST_RECORD is read over, not kept."""
    number = 0
    while line := _guarded(path, file.readline, LONGEST_RECORD):
        number += 1
        rest = line
        while len(rest) == LONGEST_RECORD and not rest.endswith(("\n", "\r")):
            rest = _guarded(path, file.readline, LONGEST_RECORD)
        yield number, line, rest is line


def _too_long() -> ValueError:
    return ValueError(f"is a line of more than {LONGEST_RECORD} characters")


def _json_rows(lines) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for number, line, whole in lines:
        if not whole:
            yield number, _too_long()
        elif line := line.strip().lstrip("\ufeff"):
            try:
                record = _DECODER.decode(line)
                yield number, record if isinstance(record, dict) else _no_object(record)
            except RecursionError:
                yield number, ValueError("is nested too deep")
            except ValueError as error:
                yield number, ValueError(f"is not JSON: {_place(line, error)}")


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {_kind(content)}, not a list of objects. Possible: [{{...}}, {{...}}]. Write it so, or as .jsonl."
        )
    for number, record in enumerate(content, 1):
        yield number, record if isinstance(record, dict) else _no_object(record)


def _no_object(record: Any) -> ValueError:
    return ValueError(f"is {_kind(record)}, not an object: {shown(record, 60)}")


def _cell_rows(path: Path, lines, suffix: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    csv.field_size_limit(LONGEST_RECORD)  # of the process; the default of 128 kB is no text's limit
    first = next((one for one in lines if one[1].strip()), None)
    if first is None:
        raise UserError(f"{path} is empty. It needs a line of column names, then a line a record.")
    present = [mark for mark in (",", ";", "\t", "|") if mark in first[1]]
    delimiter = "\t" if suffix == ".tsv" else (present or [","])[0]
    records = _records(first, lines, delimiter)
    number, header = next(records)
    if isinstance(header, ValueError):
        raise UserError(
            f"{path}, line {number}: the column names cannot be read: it {header}. Mend that line."
        )
    header = [name.strip() for name in header]
    for place, name in enumerate(header):
        if name and name in header[:place]:
            raise UserError(
                f"{path}: columns {header.index(name) + 1} and {place + 1} are both named {shown(name, 60)!r}. "
                f"Name them apart, e.g. {shown(name, 60)}_1 and {shown(name, 60)}_2."
            )
    for number, cells in records:
        if isinstance(cells, ValueError):
            yield number, cells
        elif len(cells) < len(header) or any(map(str.strip, cells[len(header) :])):
            hint = "; a cell that holds the separator needs quotes" if len(cells) > len(header) else ""
            yield number, ValueError(f"has {len(cells)} cells, the header has {len(header)}{hint}")
        else:  # a column without name is a row number that pandas wrote
            yield number, {name: cell for name, cell in zip(header, cells, strict=False) if name}


class _Ahead:
    """The lines of one csv record, those that a wrong quote swallowed put back for the next."""

    def __init__(self, first: tuple[int, str, bool], lines: Iterator[tuple[int, str, bool]]) -> None:
        self.lines, self.ahead = lines, collections.deque([first])
        self.used: list[tuple[int, str, bool]] = []
        self.size = 0

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> str:
        if self.size > LONGEST_RECORD or len(self.used) > MOST_LINES:
            raise StopIteration
        self.used.append(self.ahead.popleft() if self.ahead else next(self.lines))
        self.size += len(self.used[-1][1])
        return self.used[-1][1]

    def keep(self, count: int) -> None:
        """Ends a record after `count` of its lines."""
        self.ahead.extendleft(reversed(self.used[count:]))
        self.used, self.size = [], 0


def _records(first, lines, delimiter: str) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Cells of the records of a csv that are not blank; after a wrong quote it goes on with the very next line."""
    ahead = _Ahead(first, lines)
    while True:
        try:
            cells = next(csv.reader(ahead, delimiter=delimiter, strict=True, skipinitialspace=True), None)
        except csv.Error:
            cells = ValueError(
                "has a quote that is not closed, or one inside a cell that is not written twice"
            )
        if not ahead.used:
            return
        (number, line, _), count = ahead.used[0], len(ahead.used)
        # Most .tsv are written without quotes: there a line break and a tab in one cell are lines that a quote swallowed.
        swallowed = isinstance(cells, ValueError) or any("\t" in one and "\n" in one for one in cells or ())
        if not all(one[2] for one in ahead.used):
            cells, count = _too_long(), 1
        elif delimiter == "\t" and swallowed:
            cells, count = line.rstrip("\r\n").split("\t"), 1
        elif swallowed and isinstance(cells, ValueError):
            count = 1
        ahead.keep(count)
        if isinstance(cells, ValueError) or any(map(str.strip, cells or ())):
            yield number, cells
