# SPDX-License-Identifier: Apache-2.0
"""Random access to a prepared directory: ArrayRecord shards, checked against `manifest.json` before use.

ArrayRecord keeps a checksum of every record but reports a truncated shard as one of zero records, so sizes and
counts are compared when a source is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import record
from vlp_jax.types import UserError, closest

MANIFEST = "manifest.json"
PREPARE = "python -m vlp_jax.prepare scenes --target={}"
AGAIN = "Copy the directory again or prepare it again."
# No read-ahead: neighbours in a shard are not wanted next.
READER = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """Returns the manifest of a prepared directory and the sha256 of its bytes.

    Raises:
        UserError: no such directory, an empty one, or a manifest that cannot be used.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        wrong = "does not exist" if not directory.exists() else "is not a directory"
        if directory.is_dir():
            wrong = "is empty" if not any(directory.iterdir()) else f"has no readable {MANIFEST}"
        raise UserError(
            f"The data directory {directory} {wrong} ({error.strerror}). Needed is a directory written by "
            f"prepare. Make one with: {PREPARE.format(directory)}"
        ) from error
    try:
        manifest = json.loads(content)
        for name, split in manifest["splits"].items():
            shards = [(s["file"], s["records"], s["bytes"], s["sha256"]) for s in split["shards"]]
            found, stated = sum(shard[1] for shard in shards), split["records"]
            if found != stated:
                raise ValueError(f"split {name} states {stated} records, its shards {found}")
            split["pairs"], split["index"]["file"], split["index"]["bytes"], split["index"]["sha256"]
            split["listed"], split["alive"]
        manifest["dataset"], manifest["vocabulary"]["file"], manifest["vocabulary"]["sha256"]
        manifest["dropped"]["count"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}. {AGAIN}") from error
    return manifest, hashlib.sha256(content).hexdigest()


def stored(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what a manifest says of each shard and index: "file", "bytes", "sha256" and more."""
    return [one for split in manifest["splits"].values() for one in [*split["shards"], split["index"]]]


class Source:
    """One split of a prepared directory.

    Attributes:
        directory, split: what was opened.
        manifest: the parsed manifest.
        pairs: number of (picture, caption) pairs.
        captions, heights, widths: [records], captions and pixels of each picture, in the types of the index.
        vocabulary_path: the vocabulary file beside the shards.
    """

    def __init__(self, directory: str | Path, split: str):
        """Opens and checks a split.

        Raises:
            UserError: an unusable directory, an unknown or empty split, or files that differ from the manifest.
        """
        self.directory = Path(directory).expanduser()
        self.split = split
        self.manifest, _ = read_manifest(self.directory)
        splits = self.manifest["splits"]
        if split not in splits or not splits[split]["records"]:
            wrong = "is empty." if split in splits else f"does not exist.{closest(split, splits)}"
            possible = ", ".join(name for name in splits if splits[name]["records"]) or "none"
            raise UserError(
                f"The split '{split}' of {self.directory} {wrong} Possible: {possible}. Choose one of them "
                "(config.data.split, config.evaluation.train_split, config.evaluation.split)."
            )
        self._entry = splits[split]
        self._shards = [shard["file"] for shard in self._entry["shards"]]
        self._ends = np.cumsum([shard["records"] for shard in self._entry["shards"]])
        for shard in self._entry["shards"]:
            self._check_size(shard)
        _allow_open_files(len(self._shards))
        self._readers: list[Any] = [None] * len(self._shards)  # opened when first read from
        self._opening = threading.Lock()
        self._index_path = self.directory / self._entry["index"]["file"]
        self.captions, self.heights, self.widths = map(self.column, ("captions", "height", "width"))
        self.pairs = int(self._entry["pairs"])
        self._pair_ends = np.cumsum(self.captions, dtype=np.int64)
        if self._pair_ends[-1] != self.pairs:
            raise UserError(
                f"The index {self._index_path} holds {self._pair_ends[-1]} pairs; the manifest states "
                f"{self.pairs}. {AGAIN}"
            )
        self.vocabulary_path = self.directory / self.manifest["vocabulary"]["file"]

    def __len__(self) -> int:
        """Number of records (pictures)."""
        return int(self._entry["records"])

    def locate(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the record and the number of its caption for each pair, int64 [n]."""
        record = np.searchsorted(self._pair_ends, pairs, side="right")
        return record, pairs - self._first_pair(record)

    def pair(self, record: np.ndarray, caption: np.ndarray) -> np.ndarray:
        """Returns the pair of a record and the number of its caption, int64 [n]; the inverse of `locate`."""
        return self._first_pair(record) + caption

    def _first_pair(self, record: np.ndarray) -> np.ndarray:
        return self._pair_ends[record] - self.captions[record]

    def where(self, row: int) -> str:
        """Returns "record 3 of train-00000-of-00002" for messages."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return f"record {row - self._start(shard)} of {self.directory / self._shards[shard]}"

    def column(self, name: str) -> np.ndarray:
        """Returns a column of the index, [records]: captions, height, width, pixels, coco_id or flickr_id.

        Raises:
            UserError: the index cannot be read, or is another's.
        """
        try:
            with np.load(self._index_path) as arrays:
                column = arrays[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"The index {self._index_path} cannot be read: {error}. {AGAIN}") from error
        if column.shape != (len(self),) or column.dtype.kind not in "iu":
            raise UserError(
                f"The column {name} of {self._index_path} is {column.dtype}{list(column.shape)}; the manifest states "
                f"{len(self)} records. {AGAIN}"
            )
        return column

    def read(self, rows: Sequence[int] | np.ndarray, names: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Reads records by row: {"image": bytes, "captions": [str], "image_name", ...}, see `record.parse`.

        Args:
            rows: int [n].
            names: the fields wanted; () = all.

        Raises:
            UserError: a record that is damaged, by shard and record.
        """
        rows = np.asarray(rows, np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        records: list[dict[str, Any]] = [{}] * len(rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            inside = (rows[places] - self._start(shard)).tolist()
            try:
                contents = self._reader(shard).read(inside)
            except RuntimeError:
                contents = [self._read_one(shard, number) for number in inside]
            for place, content in zip(places, contents, strict=True):
                records[place] = self._parse(content, int(rows[place]), names)
        return records

    def _start(self, shard: int) -> int:
        return int(self._ends[shard] - self._entry["shards"][shard]["records"])

    def _read_one(self, shard: int, number: int) -> bytes:
        try:
            return self._reader(shard).read([number])[0]
        except RuntimeError as error:
            where = self.where(self._start(shard) + number)
            raise UserError(
                f"The {where} is damaged: {' '.join(str(error).split())[:200]}. {AGAIN}"
            ) from error

    def _parse(self, content: bytes, row: int, names: Sequence[str]) -> dict[str, Any]:
        try:
            parsed = record.parse(content, names)
            found = len(parsed.get("captions", ()))
            if found != self.captions[row] and (not names or "captions" in names):
                raise ValueError(f"{found} captions where the index has {self.captions[row]}")
        except ValueError as error:
            raise UserError(f"The {self.where(row)} cannot be used: {error}. {AGAIN}") from error
        return parsed

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.directory / shard["file"]
        size = path.stat().st_size if path.is_file() else -1
        if size != shard["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise UserError(f"The shard {path} {found}; the manifest states {shard['bytes']} bytes. {AGAIN}")

    def _reader(self, number: int) -> Any:
        if self._readers[number] is None:
            with self._opening:
                if self._readers[number] is None:
                    self._readers[number] = self._open(self._entry["shards"][number])
        return self._readers[number]

    def _open(self, shard: dict[str, Any]) -> Any:
        from array_record.python import array_record_module

        path = self.directory / shard["file"]
        try:
            reader = array_record_module.ArrayRecordReader(str(path), **READER)
            count = reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"The shard {path} cannot be read: {str(error)[:200]}. {AGAIN}") from error
        if count != shard["records"]:
            raise UserError(
                f"The shard {path} holds {count} records; the manifest states {shard['records']}. {AGAIN}"
            )
        return reader


def _allow_open_files(more: int) -> None:
    """Every shard stays open, and the usual limit of 1,024 files is soon reached; the hard one is far above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + more + 512 if os.path.isdir("/proc/self/fd") else soft + more
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def parse_spec(spec: str) -> list[tuple[str, Path, float]]:
    """Reads `config.data.dir`: "DIR", or a mixture "coco=DIR:1,vg=DIR:2" of name=directory:weight.

    Returns:
        (name, directory, weight) of each source; a directory alone has the name "". Without weights
        ("coco=DIR,vg=DIR") all are 0: each source has the share that its size gives it.

    Raises:
        UserError: nothing given, or a mixture that cannot be read.
    """
    if not spec:
        raise UserError(
            "No data directory is given (config.data.dir is empty). Possible: a prepared directory, or a mixture "
            f"'coco=DIR:1,vg=DIR:2'. Make a small one with: {PREPARE.format('DIR')} and give --config.data.dir=DIR"
        )
    if "=" not in spec or Path(spec).expanduser().is_dir():
        return [("", Path(spec).expanduser(), 0.0)]
    sources, weighted = [], set()
    for part in spec.split(","):
        name, _, rest = part.strip().partition("=")
        directory, colon, weight = rest.rpartition(":") if ":" in rest else (rest, "", "0")
        name, directory = name.strip(), directory.strip()
        try:
            if not (re.fullmatch(r"[\w-]+", name) and directory):  # names become parts of file names
                raise ValueError
            sources.append((name, Path(directory).expanduser(), float(weight)))
        except ValueError:
            raise UserError(
                f"config.data.dir: '{part}' in '{spec}' is not name=directory:weight, the name of letters, digits, _ and -. "
                "Possible: a directory, or for example coco=DIR:1,vg=DIR:2, or coco=DIR,vg=DIR for shares by size. Correct it."
            ) from None
        weighted.add(bool(colon))
        if colon and not 0 < sources[-1][2] < float("inf"):
            raise UserError(
                f"config.data.dir: the weight of '{part}' is {weight}. Weights are numbers above 0; leave a source out "
                "instead, or all weights for shares by size."
            )
    if len(weighted) > 1:
        raise UserError(
            f"config.data.dir: '{spec}' gives a weight to some sources only. Give one to each, or to none for shares "
            "by size."
        )
    names = [name for name, _, _ in sources]
    if len(set(names)) < len(names):
        raise UserError(f"config.data.dir names a source twice: {', '.join(names)}. Give each its own name.")
    return sources


def open_sources(spec: str, split: str) -> list[tuple[str, Source, float]]:
    """Opens the directory or the mixture that `config.data.dir` names.

    Returns:
        (name, source, weight) of each; the name of a directory alone is its data set's.

    Raises:
        UserError: a source cannot be used, or the sources have different vocabularies.
    """
    opened = [(name, Source(directory, split), weight) for name, directory, weight in parse_spec(spec)]
    first = opened[0][1]
    for _, source, _ in opened[1:]:
        if source.manifest["vocabulary"]["sha256"] != first.manifest["vocabulary"]["sha256"]:
            raise UserError(
                f"{first.vocabulary_path} and {source.vocabulary_path} differ. The sources of a mixture need one "
                "vocabulary. Prepare them again with the same --vocab."
            )
    return [(name or source.manifest["dataset"], source, weight) for name, source, weight in opened]
