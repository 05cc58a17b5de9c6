# SPDX-License-Identifier: Apache-2.0
"""Whether a prepared directory is what was written: manifest, files, index, every record, every picture.

Nothing here trusts the disk or stops at the first fault: what can still be read is read, by shard, without `Source`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax import files
from vlp_jax.data.preparation import admission
from vlp_jax.data.source import AGAIN, MANIFEST, PREPARE, READER
from vlp_jax.types import UserError

COLUMNS = ("captions", "height", "width", "pixels", "coco_id", "flickr_id")  # of an index
IN_RECORD = ("height", "width", "pixels", "coco_id", "flickr_id")  # those that a record states too
OLDER = "was prepared by an older version ({}). Prepare the data again."
CHUNK = 64  # records in memory at once
_WORDS = {int: "a whole number", float: "a share", str: "text", list: "a list", dict: "an object"}
_FILE = {"file": str, "bytes": int, "sha256": str}
_TOP = {"dataset": str, "licence": str, "splits": dict, "dropped": dict, "changed": dict, "vocabulary": dict}
_SPLIT = {"records": int, "pairs": int, "listed": int, "alive": float, "shards": list, "index": dict}


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """Returns a manifest whose keys and types are those that prepare writes, and the sha256 of its bytes.

    Raises:
        UserError: no such directory, no manifest, one of an older version, or one that cannot be used.
    """
    path = directory / MANIFEST
    try:
        if not directory.exists():
            raise _unusable(directory, "does not exist")
        if not directory.is_dir():
            raise _unusable(directory, "is a file, not a directory")
        if not path.is_file():
            empty = not any(directory.iterdir())
            raise _unusable(directory, "is empty" if empty else f"has no file {MANIFEST}")
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(directory, f"cannot be read ({error.strerror}: {error.filename})") from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:120]}). {AGAIN}") from error
    lacking = _newer_keys(manifest)
    if lacking:
        raise UserError(f"{directory} {OLDER.format(f'its {MANIFEST} lacks {lacking}')}")
    try:
        _check(manifest)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}. {AGAIN}") from None
    return manifest, hashlib.sha256(content).hexdigest()


def _unusable(directory: Path, wrong: str) -> UserError:
    return UserError(
        f"The data directory {directory} {wrong}. Needed is a directory written by prepare. Check the path, or make "
        f"one with: {PREPARE.format(directory)}"
    )


def _newer_keys(manifest: Any) -> str:
    """Names the first key that manifests did not always have and this one has not."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        return ""
    for name, split in manifest["splits"].items():
        for key in ("listed", "alive"):
            if isinstance(split, dict) and key not in split:
                return f"splits.{name}.{key}"
    if "changed" not in manifest:
        return "changed"
    dropped = manifest.get("dropped")
    return "" if isinstance(dropped, dict) and "file" in dropped else "dropped.file"


def _check(manifest: Any) -> None:
    """Compares keys and types with what prepare writes; ValueError for the first that differs."""
    _fit(manifest, "", _TOP)
    _fit(manifest["dropped"], "dropped.", _FILE | {"count": int, "reasons": dict})
    _fit(manifest["vocabulary"], "vocabulary.", {"file": str, "size": int, "sha256": str})
    _fit(
        manifest["dropped"]["reasons"], "dropped.reasons.", dict.fromkeys(manifest["dropped"]["reasons"], int)
    )
    _fit(manifest["changed"], "changed.", dict.fromkeys(manifest["changed"], int))
    for name, split in manifest["splits"].items():
        where = f"splits.{name}."
        _fit(split, where, _SPLIT)
        _fit(split["index"], f"{where}index.", _FILE)
        for number, shard in enumerate(split["shards"]):
            _fit(shard, f"{where}shards[{number}].", _FILE | {"records": int})
            if shard["records"] > shard["bytes"]:
                raise ValueError(f"{where}shards[{number}] states more records than bytes")
        found = sum(shard["records"] for shard in split["shards"])
        if found != split["records"]:
            raise ValueError(f"{where}records is {split['records']}, its shards have {found}")


def _fit(node: Any, where: str, kinds: dict[str, type]) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{where.rstrip('.') or 'the whole'} is {_short(node)}, not an object")
    for key, kind in kinds.items():
        if key not in node:
            raise ValueError(f"it lacks {where}{key}")
        value = node[key]
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if fits and kind is int:
            fits = 0 <= value < 2**48
        elif fits and kind is float:
            fits = math.isfinite(value) and 0 <= value <= 1
        elif fits and key == "file":  # never a way out of the directory
            fits = value.isprintable() and value == Path(value).name and value not in ("", "..")
        elif fits and key == "sha256":
            fits = re.fullmatch("[0-9a-f]{64}", value) is not None
        if not fits:
            wanted = {"file": "the name of a file beside it", "sha256": "64 hex digits"}.get(
                key, _WORDS[kind]
            )
            raise ValueError(f"{where}{key} is {_short(value)}, not {wanted}")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def damaged_files(
    directory: Path, entries: Iterable[dict[str, Any]], *, deep: bool
) -> Iterator[tuple[str, str, bool]]:
    """Looks at files that a manifest names: there, of the stated size, with `deep` of the stated sha256.

    Yields:
        (name, what is wrong, whether reading it makes sense) for those that differ.
    """
    for entry in entries:
        path, wrong, readable = directory / entry["file"], "", False
        try:
            size = path.stat().st_size if path.is_file() else -1
            if size < 0:
                wrong = "is missing"
            elif size != entry.get("bytes", size):
                wrong = f"has {size} bytes, the manifest states {entry['bytes']}"
            elif deep and files.digest(path) != entry["sha256"]:
                wrong, readable = "is not what was written: its sha256 differs from the manifest's", True
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        except UserError as error:
            wrong = f"is damaged: {error}"
        if wrong:
            yield entry["file"], f"{path} {wrong}. {AGAIN}", readable


def read_index(directory: Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads the columns of a split's index, integers [records] each.

    Args:
        entry: the split's part of the manifest.

    Raises:
        UserError: an index of an older version, one that cannot be read, or that differs from the manifest.
    """
    path = directory / entry["index"]["file"]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in COLUMNS if name not in arrays]
            columns = {name: arrays[name] for name in COLUMNS if name in arrays}
    except Exception as error:  # zip, zlib and numpy raise all kinds of errors on broken bytes
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise UserError(f"The index {path} cannot be read ({reason}). {AGAIN}") from error
    if missing:
        raise UserError(f"{directory} {OLDER.format(f'its index {path.name} lacks {missing[0]}')}")
    for name, column in columns.items():
        if column.shape != (entry["records"],) or column.dtype.kind not in "iu":
            raise UserError(
                f"The index {path} has {column.dtype} {list(column.shape)} for {name}; the manifest states "
                f"{entry['records']} records. {AGAIN}"
            )
    columns["pixels"] = columns["pixels"].astype(
        np.uint64, copy=False
    )  # compared with those of other directories
    if entry["records"] and (columns["height"].min() < 1 or columns["width"].min() < 1):
        raise UserError(f"The index {path} has pictures without pixels. {AGAIN}")
    pairs = int(columns["captions"].sum(dtype=np.int64))
    if pairs != entry["pairs"]:
        raise UserError(
            f"The index {path} holds {pairs} pairs; the manifest states {entry['pairs']}. {AGAIN}"
        )
    return columns


def place(directory: Path, entry: dict[str, Any], row: int) -> str:
    """Returns "record 3 of DIRECTORY/SHARD" for a row of a split."""
    for shard in entry["shards"]:
        if row < shard["records"]:
            return f"record {row} of {directory / shard['file']}"
        row -= shard["records"]
    return f"record {row} behind the last of {directory}"


def records(
    directory: Path,
    entry: dict[str, Any],
    rows: np.ndarray | None = None,
    skip: Collection[str] = (),
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Reads records of a split, shard by shard, at most CHUNK in memory.

    Args:
        entry: the split's part of the manifest.
        rows: int64, ascending; None = all.
        skip: shards that are known to be damaged.

    Yields:
        (row, record), or (row, what is wrong); a shard that does not open is one fault, at its first row.
    """
    from array_record.python import array_record_module

    from vlp_jax.data import record

    start = 0
    for shard in entry["shards"]:
        end = start + shard["records"]
        if rows is None:
            wanted = np.arange(start, end) if shard["file"] not in skip else np.zeros(0, np.int64)
        else:
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
        first, start = start, end
        if shard["file"] in skip or not len(wanted):
            continue
        path = directory / shard["file"]
        try:
            reader = array_record_module.ArrayRecordReader(str(path), **READER)
            found = reader.num_records()
        except (RuntimeError, ValueError) as error:
            yield first, f"The shard {path} cannot be read: {_reason(error)}. {AGAIN}"
            continue
        if found != shard["records"]:
            yield first, f"The shard {path} holds {found} records; {shard['records']} were written. {AGAIN}"
            continue
        for begin in range(0, len(wanted), CHUNK):
            numbers = (wanted[begin : begin + CHUNK] - first).tolist()
            for number, content in zip(numbers, _contents(reader, numbers), strict=True):
                where = f"The record {number} of {path}"
                if isinstance(content, RuntimeError):
                    yield first + number, f"{where}{_offset(content)} is damaged: {_reason(content)}. {AGAIN}"
                    continue
                try:
                    yield first + number, record.parse(content)
                except (ValueError, AttributeError) as error:  # no such record, or values of other kinds
                    yield first + number, f"{where} cannot be used: {error}. {AGAIN}"
        reader.close()


def _contents(reader: Any, numbers: list[int]) -> list[bytes | RuntimeError]:
    try:
        return reader.read(numbers)
    except RuntimeError:
        pass
    contents: list[bytes | RuntimeError] = []
    for number in numbers:  # one by one, to know which
        try:
            contents += reader.read([number])
        except RuntimeError as error:
            contents.append(error)
    return contents


def _offset(error: RuntimeError) -> str:
    """Where the damaged chunk begins, from the words of the reader; a record is a chunk of its own."""
    match = re.search(r"chunk at (\d+)", str(error)) or re.search(r"at byte (\d+)", str(error))
    return f" at byte {match[1]}" if match else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def wrong_pictures(
    directory: Path,
    entry: dict[str, Any],
    columns: dict[str, np.ndarray],
    found: Iterable[tuple[int, dict[str, Any]]],
    threads: ThreadPoolExecutor,
) -> Iterator[str]:
    """Decodes the pictures of some records; yields each difference from the index, a sentence."""

    def look(pair: tuple[int, dict[str, Any]]) -> str:
        row, record = pair
        where = place(directory, entry, row)
        stated = {name: int(column[row]) for name, column in columns.items()}
        said = {name: record.get(name) for name in IN_RECORD} | {"captions": len(record.get("captions", ()))}
        if isinstance(said["pixels"], int):
            said["pixels"] %= 2**64  # stored as the bits of an int64
        for name, value in said.items():
            if value != stated[name]:
                return f"The {where} has {name} {value}, its index {stated[name]}. {AGAIN}"
        try:
            content = record.get("image")
            picture = admission.admit(content if isinstance(content, bytes) else b"")
        except ValueError as error:
            return f"The picture in {where} {error}. {AGAIN}"
        if (picture.height, picture.width) != (stated["height"], stated["width"]):
            size = f"{picture.height} x {picture.width} pixels, stated are {stated['height']} x {stated['width']}"
            return f"The picture in {where} has {size}. {AGAIN}"
        if picture.pixels != stated["pixels"]:
            return f"The picture in {where} is not the one that was prepared: its pixels differ. {AGAIN}"
        return ""

    yield from filter(None, threads.map(look, found))
