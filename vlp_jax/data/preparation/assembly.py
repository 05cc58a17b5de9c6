# SPDX-License-Identifier: Apache-2.0
"""From what a data set lists to finished shards and their manifest, in a folder that nobody reads yet.

The listing is written down first, so that workers take their part of it from the disk and memory stays flat.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TextIO

import numpy as np

from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped
from vlp_jax.data.preparation import tables
from vlp_jax.data.preparation.shards import COLUMNS, Job, write_shard
from vlp_jax.data.preparation.workers import progress
from vlp_jax.files import digest, save
from vlp_jax.types import UserError

DROPPED = "dropped.jsonl"
LISTING = "listing.jsonl"
SHARD_RECORDS = 256  # about 40 MB of photographs of COCO's size: what is lost when a worker is killed
MOST_SHARDS = 512  # of a split, all of them open while training; large sets have larger shards
MOST_SOURCES = 1000  # that a manifest lists one by one
PACKAGES = ("array-record", "numpy", "pillow", "sentencepiece", "tensorflow-datasets")  # that make the bytes


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be made of what, and what tells it from other data sets."""

    module: ModuleType
    source: Path
    target: Path
    options: dict
    vocab: Path | None
    vocab_size: int
    identity: dict  # as json gives it back


def assemble(order: Order, each: Callable, folder: Path, max_bad: float, strict: bool) -> dict:
    """Writes shards, index, vocabulary and TFDS metadata into a folder and returns the manifest to them.

    Args:
        order: what is to be made.
        each: from `workers.processes`.
        folder: shards that are finished there are kept.
        max_bad: largest share of a split's examples that may be unusable.
        strict: the first unusable one ends it.

    Raises:
        UserError: the source cannot be used, or too much of it.
    """
    module = order.module
    listed, seen = _list(order, each, folder)
    fields = tuple(record.stored_fields(seen & {*module.FIELDS}))
    jobs = {split: _jobs(order, folder, split, count, fields, strict) for split, count in listed.items()}
    results, dropped, changed, names = _write_shards(each, jobs, listed, folder, max_bad)
    splits = {}
    for split, count in listed.items():
        entry = _index(folder, split, results[split])
        splits[split] = {**entry, "listed": count, "alive": entry["records"] / count}
    _metadata(module, folder, splits, fields)
    vocabulary = _vocabulary(order, folder, next(iter(listed)))
    return {
        "dataset": module.NAME,
        "builder_version": module.VERSION,
        "licence": order.options.get("licence", module.LICENCE),
        "created_with": {name: importlib.metadata.version(name) for name in PACKAGES},
        "splits": splits,
        "fields": list(fields),
        "box_names": names,
        "sources": source_entries(module.sources(order.source, **order.options), order.source),
        "dropped": file_entries([folder / DROPPED], folder)[0] | dropped,
        "changed": changed,
        "vocabulary": vocabulary,
        "visual_words": list(module.VISUAL_WORDS),
        "options": order.identity["options"],
    }


def _list(order: Order, each: Callable, folder: Path) -> tuple[dict[str, int], set[str]]:
    """Writes SPLIT.listing.jsonl for each split; returns the number of entries of each, train first, and all keys."""
    counts: dict[str, int] = {}
    seen: set[str] = set()
    with contextlib.ExitStack() as stack, progress(0, " pictures", "list") as bar:
        files: dict[str, TextIO] = {}
        for split, entry in order.module.listing(order.source, each, **order.options):
            if split not in files:
                path = folder / f"{split}.{LISTING}"
                files[split] = stack.enter_context(path.open("w", encoding="utf-8"))
            entry = dataclasses.asdict(entry) if isinstance(entry, Dropped) else entry
            files[split].write(json.dumps(entry) + "\n")  # ASCII: lone surrogates pass
            counts[split] = counts.get(split, 0) + 1
            seen.update(entry)
            bar.update()
    if not counts:
        raise UserError(
            f"{order.source} lists no picture. Check its annotation files, and --help for what is read."
        )
    first = ("train", "validation", "test")
    splits = [*filter(counts.get, first), *sorted({*counts} - {*first})]
    return {split: counts[split] for split in splits}, seen


def _jobs(
    order: Order, folder: Path, split: str, count: int, fields: tuple[str, ...], strict: bool
) -> list[Job]:
    """Cuts a listing into shards of nearly equal numbers, whatever the number of workers."""
    shards = min(MOST_SHARDS, -(-count // SHARD_RECORDS))
    starts = [shard * count // shards for shard in range(shards + 1)]
    listing, offsets = folder / f"{split}.{LISTING}", {}
    with listing.open("rb") as file:
        offset, wanted = 0, set(starts)
        for number, line in enumerate(file):
            if number in wanted:
                offsets[number] = offset
            offset += len(line)
    return [
        Job(
            name=f"{order.module.NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}",
            folder=str(folder),
            listing=str(listing),
            offset=offsets[start],
            count=end - start,
            source=str(order.source),
            fields=fields,
            upright=order.module.UPRIGHT,
            strict=strict,
        )
        for shard, (start, end) in enumerate(itertools.pairwise(starts))
    ]


def _write_shards(
    each: Callable, jobs: dict[str, list[Job]], listed: dict[str, int], folder: Path, max_bad: float
) -> tuple[dict[str, list[dict]], dict, dict, dict[str, int]]:
    """Writes all shards, and what was dropped into dropped.jsonl.

    Returns:
        split -> shards as the manifest has them; "count" and "reasons" of what was dropped; phrase -> number of
        what was changed; the names that boxes have, sorted, and how many have each.
    """
    reasons, changed, names = (collections.Counter() for _ in range(3))
    results: dict[str, list[dict]] = {split: [] for split in jobs}
    bad = collections.Counter()
    order = [(split, job) for split, members in jobs.items() for job in members]
    with (
        progress(sum(listed.values()), " pictures", "write") as bar,
        (folder / DROPPED).open("w", encoding="utf-8") as file,
    ):
        for (split, job), result in zip(order, each(write_shard, [job for _, job in order]), strict=True):
            bar.update(job.count)
            for one in result["dropped"]:
                file.write(json.dumps({"split": split, **one}) + "\n")
                reasons[re.sub(r"\d+", "N", one["reason"])] += 1  # else every size would be one of its own
                bad[split] += not one["missing"]
            changed.update(result["changed"])
            names.update(result["box_names"])
            results[split].append({key: result[key] for key in ("file", "records", "bytes", "sha256")})
            if bad[split] > max_bad * listed[split]:
                file.flush()
                raise _too_many(split, bad[split], listed[split], max_bad, folder / DROPPED)
    for split, shards in results.items():
        if not any(shard["records"] for shard in shards):
            raise _too_many(split, listed[split], listed[split], max_bad, folder / DROPPED)
    return (
        results,
        {"count": reasons.total(), "reasons": dict(reasons.most_common())},
        dict(changed.most_common()),
        dict(sorted(names.items())),
    )


def _too_many(split: str, bad: int, listed: int, max_bad: float, path: Path) -> UserError:
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in itertools.islice(file, 5)]
    shown = "; ".join(f"{one['file']} {one['reason']}" for one in lines)
    return UserError(
        f"{bad} of {listed} pictures of the split {split} cannot be used ({bad / listed:.2%} already; allowed are "
        f"{max_bad:.2%}): {shown}{'; ...' if bad > 5 else ''}. Those so far are listed in {path}. Repair the source "
        "and start again (what is finished is kept), or give a larger --max_bad."
    )


def source_entries(paths: list[Path], folder: Path) -> list[dict]:
    """As `file_entries`; very many files (a text beside each picture) are one entry, with a digest over all."""
    entries = file_entries(paths, folder)
    if len(entries) <= MOST_SOURCES:
        return entries
    size, together = sum(one["bytes"] for one in entries), json.dumps(entries).encode()
    name = f"{len(entries)} files, {entries[0]['file']} to {entries[-1]['file']}"
    return [{"file": name, "bytes": size, "sha256": hashlib.sha256(together).hexdigest()}]


def file_entries(paths: Iterable[Path], folder: Path) -> list[dict]:
    """What a manifest says of files below a folder: "file", "bytes", "sha256"."""
    return [
        {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": digest(path)}
        for path in paths
    ]


def _index(folder: Path, split: str, shards: list[dict]) -> dict:
    """Writes SPLIT.index.npz and returns the split's part of the manifest."""
    parts = []
    for shard in shards:
        with np.load(folder / f"{shard['file']}.columns.npz") as arrays:
            parts.append(dict(arrays))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    path = folder / f"{split}.index.npz"
    with path.open("wb") as file:
        np.savez(file, **columns)
        file.flush()
        os.fsync(file.fileno())
    records, pairs = len(columns["captions"]), int(columns["captions"].sum(dtype=np.int64))
    return {"records": records, "pairs": pairs, "shards": shards, "index": file_entries([path], folder)[0]}


def _vocabulary(order: Order, folder: Path, split: str) -> dict:
    """Copies the vocabulary, or trains one on the texts of a split, and returns its part of the manifest."""
    from vlp_jax.data import text

    given = order.vocab
    path = folder / ("vocab.txt" if given and given.suffix == ".txt" else "vocabulary.model")
    if given:
        save(path, given.read_bytes())
    elif hasattr(order.module, "texts"):
        text.train(order.module.texts(order.source, **order.options), path, order.vocab_size)
    else:
        texts = _texts(folder / f"{split}.{LISTING}")
        if (first := next(texts, None)) is None:
            raise UserError(
                f"The split {split} has no text that a vocabulary could be trained on. Give --vocab=FILE (vocab.txt or "
                "*.model) and start again: what is finished is kept."
            )
        text.train(itertools.chain([first], texts), path, order.vocab_size)
    return {
        "file": path.name,
        "size": text.Vocabulary.load(path).size,
        "sha256": digest(path),
        "origin": order.identity["vocabulary"],
    }


def _texts(listing: Path) -> Iterator[str]:
    with listing.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            for name in ("captions", "questions", "answers", "labels", "box_names"):
                for text in entry.get(name, ()):
                    with contextlib.suppress(ValueError):  # it will not be in a record either
                        if cleaned := tables.clean_text(text):
                            yield cleaned


def _metadata(module: ModuleType, folder: Path, splits: dict, fields: tuple[str, ...]) -> None:
    """dataset_info.json and features.json, so that `tfds.builder_from_directory` reads the folder."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=module.NAME, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard["records"] for shard in split["shards"]],
            num_bytes=sum(shard["bytes"] for shard in split["shards"]),
            filename_template=template.replace(split=name),
        )
        for name, split in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record.features(fields),
        split_infos=infos,
        version=f"{module.VERSION}.0.0",
        check_data=False,  # each shard's count was read back when it was written
    )
