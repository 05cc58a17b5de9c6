# SPDX-License-Identifier: Apache-2.0
"""Random access to a prepared directory: ArrayRecord shards, checked against `manifest.json` before use.

ArrayRecord keeps a checksum of every record but reports a truncated shard as one of zero records, so sizes and
counts are compared when a source is opened.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.types import UserError, closest

MANIFEST = "manifest.json"
PREPARE = "python -m vlp_jax.prepare scenes --target={}"
AGAIN = "Copy the directory again or prepare it again."
LISTS = frozenset({"captions"})  # features with any number of values
BYTES = frozenset({"image"})  # features that are no text
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
        manifest["dataset"], manifest["vocabulary"]["file"], manifest["vocabulary"]["sha256"]
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
        captions, heights, widths: int64 [records], captions and pixels of each picture.
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
                f"The split '{split}' of {self.directory} {wrong} Possible: {possible}. Choose one of them."
            )
        self._entry = splits[split]
        self._shards = [shard["file"] for shard in self._entry["shards"]]
        self._ends = np.cumsum([shard["records"] for shard in self._entry["shards"]])
        self._readers = [self._open(shard) for shard in self._entry["shards"]]
        self.captions, self.heights, self.widths = self._read_index()
        self.pairs = int(self._entry["pairs"])
        self._pair_ends = np.cumsum(self.captions)
        self.vocabulary_path = self.directory / self.manifest["vocabulary"]["file"]

    def __len__(self) -> int:
        """Number of records (pictures)."""
        return int(self._entry["records"])

    def locate(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the record and the number of its caption for each pair, int64 [n]."""
        record = np.searchsorted(self._pair_ends, pairs, side="right")
        return record, pairs - (self._pair_ends - self.captions)[record]

    def pair(self, record: np.ndarray, caption: np.ndarray) -> np.ndarray:
        """Returns the pair of a record and the number of its caption, int64 [n]; the inverse of `locate`."""
        return (self._pair_ends - self.captions)[record] + caption

    def where(self, row: int) -> str:
        """Returns "record 3 of train-00000-of-00002" for messages."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return f"record {row - self._start(shard)} of {self.directory / self._shards[shard]}"

    def read(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Reads records by row: {"image": bytes, "captions": [str], "image_name", "image_key", ...}.

        Raises:
            UserError: a record that is damaged, by shard, record and offset in bytes.
        """
        rows = np.asarray(rows, np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        records: list[dict[str, Any]] = [{}] * len(rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            inside = (rows[places] - self._start(shard)).tolist()
            try:
                contents = self._readers[shard].read(inside)
            except RuntimeError:
                contents = [self._read_one(shard, number) for number in inside]
            for place, content in zip(places, contents, strict=True):
                records[place] = self._parse(content, int(rows[place]))
        return records

    def _start(self, shard: int) -> int:
        return int(self._ends[shard] - self._entry["shards"][shard]["records"])

    def _read_one(self, shard: int, number: int) -> bytes:
        try:
            return self._readers[shard].read([number])[0]
        except RuntimeError as error:
            where = self.where(self._start(shard) + number)
            raise UserError(
                f"The {where} is damaged: {' '.join(str(error).split())[:200]}. {AGAIN}"
            ) from error

    def _parse(self, content: bytes, row: int) -> dict[str, Any]:
        """Reads a tf.train.Example as TFDS writes it; by hand, because its decoder costs 30 times as much."""
        import tensorflow as tf
        from google.protobuf.message import DecodeError

        record: dict[str, Any] = {}
        try:
            for name, feature in tf.train.Example.FromString(content).features.feature.items():
                kind = feature.WhichOneof("kind")
                values = list(getattr(feature, kind).value) if kind else []
                if kind == "bytes_list" and name not in BYTES:
                    values = [value.decode("utf-8", "replace") for value in values]
                record[name] = values[0] if len(values) == 1 and name not in LISTS else values
            if len(record["captions"]) != self.captions[row]:
                raise KeyError(f"{len(record['captions'])} captions where the index has {self.captions[row]}")
            record["image"]
        except (DecodeError, KeyError) as error:
            raise UserError(
                f"The {self.where(row)} is no picture with captions ({type(error).__name__}: {error}). {AGAIN}"
            ) from error
        return record

    def _open(self, shard: dict[str, Any]) -> Any:
        from array_record.python import array_record_module

        path = self.directory / shard["file"]
        size = path.stat().st_size if path.is_file() else -1
        if size != shard["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise UserError(f"The shard {path} {found}; the manifest states {shard['bytes']} bytes. {AGAIN}")
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

    def _read_index(self) -> list[np.ndarray]:
        path = self.directory / self._entry["index"]["file"]
        try:
            with np.load(path) as arrays:
                columns = [arrays[name].astype(np.int64) for name in ("captions", "height", "width")]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"The index {path} cannot be read: {error}. {AGAIN}") from error
        lengths, pairs = {len(column) for column in columns}, int(columns[0].sum())
        if lengths != {len(self)} or pairs != self._entry["pairs"]:
            raise UserError(
                f"The index {path} holds {sorted(lengths)} records and {pairs} pairs; the manifest states "
                f"{len(self)} and {self._entry['pairs']}. {AGAIN}"
            )
        return columns


def parse_spec(spec: str) -> list[tuple[str, Path, float]]:
    """Reads `config.data.dir`: "DIR", or a mixture "coco=DIR:1,vg=DIR:2" of name=directory:weight.

    Returns:
        (name, directory, weight) of each source; a directory alone has the name "".

    Raises:
        UserError: nothing given, or a mixture that cannot be read.
    """
    if not spec:
        raise UserError(
            "No data directory is given (config.data.dir is empty). Possible: a prepared directory, or a mixture "
            f"'coco=DIR:1,vg=DIR:2'. Make a small one with: {PREPARE.format('DIR')} and give --config.data.dir=DIR"
        )
    if "=" not in spec or Path(spec).expanduser().is_dir():
        return [("", Path(spec).expanduser(), 1.0)]
    sources = []
    for part in spec.split(","):
        name, given, rest = part.strip().partition("=")
        directory, _, weight = rest.rpartition(":")
        try:
            if not (given and name and directory):
                raise ValueError
            sources.append((name, Path(directory).expanduser(), float(weight)))
        except ValueError:
            raise UserError(
                f"config.data.dir: '{part}' in '{spec}' is not name=directory:weight. Possible: a directory, or "
                "for example coco=DIR:1,vg=DIR:2. Correct it."
            ) from None
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
                "vocabulary. Prepare them again with the same --vocabulary."
            )
    return [(name or source.manifest["dataset"], source, weight) for name, source, weight in opened]
