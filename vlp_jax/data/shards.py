# SPDX-License-Identifier: Apache-2.0
"""Writes one ArrayRecord shard, whole or not at all: the work of one process of data/writer.py."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import Dropped, get
from vlp_jax.files import digest, save
from vlp_jax.types import ENVIRONMENT


def write_shard(job: tuple[str, str, dict, str, int, int, str]) -> dict:
    """Writes one shard, or finds it finished; returns what the manifest and the index need of it."""
    dataset, source, options, split, shard, shards, folder = job
    name = f"{dataset}-{split}.array_record-{shard:05d}-of-{shards:05d}"
    path, note = Path(folder) / name, Path(folder) / f"{name}.done.json"
    if note.is_file() and path.is_file():
        result = json.loads(note.read_bytes())
        # One with dropped pictures is written again: they may have been repaired.
        if not result["dropped"] and digest(path) == result["sha256"]:
            return result
    module = get(dataset)
    features = module.features()
    result = {"file": name, "captions": [], "height": [], "width": [], "dropped": []}
    temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
    with _record_writer(temporary) as append:
        for example in module.examples(Path(source), split, shard, shards, **options):
            if isinstance(example, Dropped):
                result["dropped"].append({"split": split, "file": example.file, "reason": example.reason})
                continue
            append(_in_order(features.serialize_example(example)))
            result["captions"].append(len(example["captions"]))
            result["height"].append(example["height"])
            result["width"].append(example["width"])
    _check_shard(temporary, len(result["captions"]))
    result |= {"bytes": temporary.stat().st_size, "sha256": digest(temporary)}
    temporary.rename(path)
    save(note, json.dumps(result).encode())
    return result


def _in_order(record: bytes) -> bytes:
    """The same tf.train.Example with its fields sorted: protobuf leaves their order to the process."""
    from tensorflow.core.example import example_pb2

    return example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


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
