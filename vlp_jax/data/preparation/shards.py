# SPDX-License-Identifier: Apache-2.0
"""Writes one ArrayRecord shard, whole or not at all: the work of one process of data/preparation/writer.py."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped
from vlp_jax.data.preparation import completion
from vlp_jax.files import digest, save
from vlp_jax.types import ENVIRONMENT, UserError

COLUMNS = {  # of the index beside the shards: what a run or a check needs of every record without reading it
    "captions": np.uint32,
    "height": np.uint16,
    "width": np.uint16,
    "pixels": np.uint64,
    "coco_id": np.int64,
    "flickr_id": np.int64,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard, and which lines of a listing it is made of.

    Attributes:
        name: of the shard's file.
        folder: where it is written.
        listing: file of entries, one a line.
        offset, count: place of the first entry in the file, bytes, and how many.
        source: folder that the entries' paths start from.
        fields: optional fields of the records.
        upright: turns pictures as their EXIF says.
        strict: the first example that cannot be used ends the run.
    """

    name: str
    folder: str
    listing: str
    offset: int
    count: int
    source: str
    fields: tuple[str, ...]
    upright: bool
    strict: bool


def write_shard(job: Job) -> dict:
    """Writes one shard, or finds it finished; returns what the manifest needs of it.

    Returns:
        file, records, bytes, sha256; dropped [{file, reason, missing}]; changed {phrase: count}; box_names {name:
        count}. The index columns lie beside the shard, in NAME.columns.npz.

    Raises:
        UserError: an example cannot be used and `job.strict`.
    """
    path = Path(job.folder) / job.name
    note, columns = path.with_name(f"{job.name}.done.json"), path.with_name(f"{job.name}.columns.npz")
    with open(job.listing, "rb") as file:
        file.seek(job.offset)
        lines = list(itertools.islice(file, job.count))
    entries = hashlib.sha256(b"".join(lines)).hexdigest()
    if note.is_file() and path.is_file() and columns.is_file():
        result = json.loads(note.read_bytes())
        # One with dropped pictures is written again: they may have been repaired.
        bad = any(not one["missing"] for one in result["dropped"])
        same = result["entries"] == entries and "box_names" in result
        if same and not bad and digest(path) == result["sha256"]:
            return result
    temporary = path.with_name(f"{job.name}.{os.getpid()}.tmp")
    try:
        result = _write(job, lines, temporary, columns)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    save(note, json.dumps(result | {"entries": entries}))
    return result


def _write(job: Job, lines: list[bytes], path: Path, columns: Path) -> dict:
    dropped, changed, names = [], collections.Counter(), collections.Counter()
    index: dict[str, list[int]] = {name: [] for name in COLUMNS}
    with _record_writer(path) as append:
        for line in lines:
            example = _example(json.loads(line), job, changed)
            if isinstance(example, Dropped):
                if job.strict and not example.missing:
                    raise UserError(
                        f"{example.file} cannot be used: {example.reason}. Repair it, or give --on_bad=skip."
                    )
                dropped.append(dataclasses.asdict(example))
                continue
            append(record.encode(example))
            names.update(example.get("box_names", ()))
            example["captions"] = len(example.get("captions", ()))
            for name, values in index.items():
                values.append(example[name])
    _check_shard(path, len(index["height"]))
    # Through int64, whose bits a uint64 digest is.
    arrays = {name: np.array(index[name], np.int64).astype(kind) for name, kind in COLUMNS.items()}
    with columns.open("wb") as file:
        np.savez(file, **arrays)
    return {
        "file": job.name,
        "records": len(index["height"]),
        "bytes": path.stat().st_size,
        "sha256": digest(path),
        "dropped": dropped,
        "changed": changed,
        "box_names": names,
    }


def _example(entry: dict, job: Job, changed: collections.Counter) -> dict | Dropped:
    if "reason" in entry:  # the data set itself had nothing better to say
        return Dropped(**entry)
    completed = completion.complete(entry, Path(job.source), job.fields, upright=job.upright)
    changed.update(completed.changes)
    return completed.example


@contextlib.contextmanager
def _record_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """An ArrayRecord file on disk; its writer's RuntimeErrors become the OSErrors that they stand for."""
    from array_record.python import array_record_module

    try:
        # One record a group, so that a record can be read alone.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        try:
            yield writer.write
        finally:
            writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except RuntimeError as error:
        for number in sorted(ENVIRONMENT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _check_shard(path: Path, records: int) -> None:
    """Reads the count back, because a cut-off shard reports no error, only no records."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != records:
        raise OSError(errno.EIO, f"{found} records of {records} were written", str(path))
