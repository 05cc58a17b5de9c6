# SPDX-License-Identifier: Apache-2.0
"""Folders of files that somebody downloaded from a list of addresses: which file belongs to which row.

The folder is read once, with no look at single files; its naming scheme is the one by which most rows have a file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vlp_jax.data.datasets import Dropped, published
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

NAMING = (
    "Files may lie in subfolders, with any extension or none, and be named by row number (0 for the first row, any "
    "zeros before it: img2dataset with 10,000 files a shard, ViLT), by crc32 of the address in decimal, or ROW_CRC32 "
    "(DownloadConceptualCaptions), by md5, sha1 or sha256 of the address in hex, by the last part of the address, or "
    "by its whole path with _ for /"
)
NO_PICTURES = frozenset(".json .jsonl .txt .tsv .csv .parquet .tar .zip .gz .part .tmp .log .md".split())
SURE = 10_000  # rows that are all tried under every scheme; of the later ones every 16th


class Row(NamedTuple):
    """A row of a list: its number from 0, where it stands, and what it says."""

    number: int
    place: str
    url: str  # or a path, see `by_path`
    captions: tuple[str, ...]


def _whole_path(row: Row, first: int) -> str:
    return stem(_path(row).strip("/").replace("/", "_"))[0]


def _last_part(row: Row, first: int) -> str:
    return stem(_path(row).rpartition("/")[2])[0]


def _path(row: Row) -> str:
    """By hand: urllib refuses addresses that the lists have."""
    return re.split("[?#]", row.url.partition("://")[2].partition("/")[2], maxsplit=1)[0]


def _crc32(row: Row) -> int:
    return zlib.crc32(_bytes(row))


def _bytes(row: Row) -> bytes:
    return row.url.encode("utf-8", "surrogateescape")


SCHEMES: dict[str, Callable[[Row, int], str]] = {  # scheme -> stem of a row's file; the first wins a tie
    "row number and crc32 of the address": lambda row, first: f"{row.number + first}_{_crc32(row)}",
    "md5 of the address": lambda row, first: hashlib.md5(_bytes(row)).hexdigest(),
    "sha1 of the address": lambda row, first: hashlib.sha1(_bytes(row)).hexdigest(),
    "sha256 of the address": lambda row, first: hashlib.sha256(_bytes(row)).hexdigest(),
    "crc32 of the address": lambda row, first: str(_crc32(row)),
    "path of the address": _whole_path,
    "row number": lambda row, first: str(row.number + first),
    "last part of the address": _last_part,
}
SHARED = "last part of the address"  # the only scheme by which two addresses may want one file


def stem(name: str) -> tuple[str, str]:
    """Splits a file name into stem and extension; a number loses the zeros before it."""
    body, dot, suffix = name.rpartition(".")
    if not body or len(suffix) > 5:
        body, dot, suffix = name, "", ""
    return (body.lstrip("0") or "0") if body.isdecimal() else body, dot + suffix


class Folder:
    """The files below a folder, by stem: about 200 bytes of memory each."""

    def __init__(self, path: Path) -> None:
        """Reads the names of all files below `path`.

        Raises:
            UserError: it cannot be read.
        """
        self.path = path
        self.kinds: list[tuple[str, str, int]] = []  # (subfolder with /, extension, zeros before the number)
        self.stems: dict[str, int] = {}  # -> row of kinds
        rows: dict[tuple[str, str, int], int] = {}
        waiting = [""]
        while waiting:
            below = waiting.pop()
            for name, folder in _entries(path / below):
                if folder:
                    waiting.append(f"{below}{name}/")
                    continue
                body, suffix = stem(name)
                if suffix.lower() in NO_PICTURES or name.startswith("."):
                    continue
                kind = (below, suffix, len(name) - len(suffix) - len(body))
                row = rows.setdefault(kind, len(rows))
                if row == len(self.kinds):
                    self.kinds.append(kind)
                there = self.stems.setdefault(body, row)
                if there != row and kind < self.kinds[there]:  # whatever order the disk has
                    self.stems[body] = row

    def find(self, body: str) -> str | None:
        """The path of the file with this stem, from the folder on."""
        row = self.stems.get(body)
        if row is None:
            return None
        below, suffix, zeros = self.kinds[row]
        return f"{below}{'0' * zeros}{body}{suffix}"


def _entries(path: Path) -> Iterator[tuple[str, bool]]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                yield entry.name, entry.is_dir(follow_symlinks=False)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check its place and permissions."
        ) from error


def find_folder(source: Path, names: Iterable[str], chosen: str) -> Path:
    """The folder of a split's files: as chosen by --images, else the first of `names` that is there.

    Raises:
        UserError: none is; the message lists where it looked.
    """
    looked = [source / name for name in ([chosen] if chosen else names)]
    for path in looked:
        if path.is_dir():
            return path
    raise UserError(
        f"No folder of downloaded files. Looked for {', '.join(map(str, looked))}. Download the files of the list into "
        "one of these, or name the folder: --images=split=FOLDER, FOLDER from --source on."
    )


def by_address(
    split: str,
    rows: Callable[[], Iterable[Row | Dropped]],
    folder: Folder,
    source: Path,
    *,
    first: int = 0,
    alone: bool = True,
) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) for each row of a list of addresses, in its order.

    Args:
        split: of the list.
        rows: gives the rows from the start each time it is called.
        folder: of the downloaded files.
        source: folder that the paths of entries start from.
        first: number of the first row in file names.
        alone: no other list has its files there.

    Raises:
        UserError: no row has a file, or row numbers name files of several lists.
    """
    scheme = _scheme(rows, folder, first)
    if not alone and scheme == "row number":
        raise UserError(
            f"The files of {folder.path} are named by row number, of which list is not said. Possible: a folder for each "
            "list. Name two with --images."
        )
    logging.getLogger("vlp_jax").info("%s: files are named by %s.", folder.path, scheme)
    name = SCHEMES[scheme]
    wanted: dict[str, str] = {}  # stem -> address, or "" for several
    if scheme == SHARED:
        for row in _good(rows()):
            body = name(row, first)
            if wanted.setdefault(body, row.url) != row.url:
                wanted[body] = ""
    for row in rows():
        if isinstance(row, Dropped):
            yield split, row
            continue
        body = name(row, first)
        found = folder.find(body)
        if found and wanted.get(body, row.url) != row.url:
            yield split, Dropped(row.url, f"another address ends in {body}, too", missing=True)
        else:
            yield split, entry(row, found and _below(source, folder.path, found))


def by_path(
    split: str, rows: Iterable[Row | Dropped], folder: Folder, source: Path
) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) for each row of a list of paths, of which only the file's name counts, as in ViLT."""
    for row in rows:
        if isinstance(row, Dropped):
            yield split, row
        else:
            found = folder.find(stem(row.url.rpartition("/")[2])[0])
            yield split, entry(row, found and _below(source, folder.path, found))


def entry(row: Row, image: str | None) -> dict | Dropped:
    """What the writer needs of a row; a row without file was never downloaded."""
    if not image:
        return Dropped(row.url, "was never downloaded", missing=True)
    return {
        "image": image,
        "image_name": image.rpartition("/")[2],
        "image_key": row.number,
        "flickr_id": published.flickr_id(row.url),
        "captions": list(row.captions),
    }


def read_pairs(path: Path) -> list[Row | Dropped]:
    """Reads ViLT's list of [path, caption] pairs; the captions of one path come together.

    Raises:
        UserError: it does not read, or is laid out otherwise.
    """
    content = tables.read_json(path)
    if not isinstance(content, list):
        raise published.malformed(path, "it", TypeError("is no list of [path, caption]"))
    captions: dict[str, list[str]] = {}
    for number, pair in enumerate(content, 1):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise published.malformed(path, f"pair {number}", TypeError("is no [path, caption]"))
        texts = pair[1] if isinstance(pair[1], list) else [pair[1]]
        captions.setdefault(pair[0], []).extend(texts)
    return [
        Row(number, f"pair {number + 1}", name, tuple(texts))
        for number, (name, texts) in enumerate(captions.items())
    ]


def _good(rows: Iterable[Row | Dropped]) -> Iterator[Row]:
    return (row for row in rows if isinstance(row, Row))


def _scheme(rows: Callable[[], Iterable[Row | Dropped]], folder: Folder, first: int) -> str:
    hits: Counter[str] = Counter()
    example = None
    for row in _good(rows()):
        example = example or row
        if row.number < SURE or row.number % 16 == 0:
            hits.update(scheme for scheme, name in SCHEMES.items() if name(row, first) in folder.stems)
    best = max(SCHEMES, key=lambda scheme: hits[scheme])
    if not hits[best]:
        there = ", ".join(tables.shown(name, 60) for name in sorted(folder.stems)[:3]) or "nothing"
        wanted = (
            "; ".join(f"{name(example, first)} ({scheme})" for scheme, name in SCHEMES.items())
            if example
            else ""
        )
        raise UserError(
            f"No file of {folder.path} belongs to a row of the list. It holds {there}; the first row may have "
            f"{tables.shown(wanted, 500) or 'nothing, the list is empty'}. Rename the files or download them again."
        )
    return best


def _below(source: Path, folder: Path, name: str) -> str:
    folder = folder.relative_to(source) if folder.is_relative_to(source) else folder
    return f"{folder.as_posix()}/{name}".removeprefix("./")
