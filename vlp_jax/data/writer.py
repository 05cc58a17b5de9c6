# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared data directory: ArrayRecord shards with TFDS metadata, an index, the vocabulary, the manifest.

All is written in DATA_DIR/unfinished and renamed at the end, the manifest last: a directory with a manifest is whole.
A run that was cut off goes on with the shards that it had finished. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np

from vlp_jax.data.shards import write_shard
from vlp_jax.data.source import MANIFEST, stored
from vlp_jax.files import digest, save
from vlp_jax.types import ENVIRONMENT, UserError

UNFINISHED = "unfinished"
RAW = "raw"
SHARD_RECORDS = 4096  # about 0.7 GB of photographs of COCO's size
VOCABULARY_SIZE = 8000
PACKAGES = ("array-record", "numpy", "pillow", "sentencepiece", "tensorflow-datasets")  # that make the bytes


@dataclasses.dataclass(frozen=True)
class _Order:
    """What is to be made of what, and what tells it from other data sets."""

    module: ModuleType
    source: Path
    target: Path
    options: dict
    vocabulary: Path | None
    vocabulary_size: int
    identity: dict  # as json gives it back


def write(
    module: ModuleType,
    source: str | Path,
    target: str | Path,
    *,
    options: dict | None = None,
    vocabulary: str | Path = "",
    vocabulary_size: int = VOCABULARY_SIZE,
    workers: int = 0,
    max_bad: float = 0.01,
    overwrite: bool = False,
) -> tuple[dict, bool]:
    """Prepares a data set; returns its manifest and whether anything had to be done.

    Args:
        module: a data set, see `datasets.get`.
        source: folder of its raw files; not used where the module draws them itself, into target/raw.
        target: the data directory, made if need be; other files in it are left alone.
        options: of the data set (its OPTIONS hold the defaults).
        vocabulary: vocab.txt or *.model to copy; "" trains one on the texts of the data set.
        vocabulary_size: of the trained one, at most.
        workers: processes; 0 = one a core, 1 = none besides this one.
        max_bad: largest share of examples that may be dropped.
        overwrite: replaces a data set that was prepared otherwise, once the new one is finished.

    Raises:
        UserError: whatever is wrong with the source, the target, the options or the disk.
    """
    order = _order(module, source, target, {**module.OPTIONS, **(options or {})}, vocabulary, vocabulary_size)
    with _place(order.target):
        there = _prepared(order, overwrite)
        if there is not None:
            return there, False
        with _processes(workers) as each:
            if hasattr(module, "draw"):
                _draw(order, each, overwrite)
            return _build(order, each, max_bad), True


def summary(manifest: dict) -> str:
    """What a prepared directory holds, a few lines for people."""
    lines = [
        f"{name}: {one['records']} pictures, {one['pairs']} captions"
        for name, one in manifest["splits"].items()
    ]
    records, dropped = sum(one["records"] for one in manifest["splits"].values()), manifest["dropped"]
    lines.append(f"vocabulary: {manifest['vocabulary']['size']} pieces in {manifest['vocabulary']['file']}")
    lines.append(f"dropped: {len(dropped)} pictures ({len(dropped) / (records + len(dropped)):.2%})")
    lines += [f"  {one['split']}: {one['file']} {one['reason']}" for one in dropped[:5]]
    return "\n".join(lines)


def _order(module, source, target, options: dict, vocabulary, vocabulary_size: int) -> _Order:
    """Looks at everything that can be wrong before anything is made."""
    target = Path(target).expanduser().absolute()
    identity = {"dataset": module.NAME, "builder_version": module.VERSION, "options": options}
    identity["vocabulary"] = f"trained, at most {vocabulary_size} pieces"
    if vocabulary:
        from vlp_jax.data.text import Vocabulary

        vocabulary = Path(vocabulary).expanduser()
        Vocabulary.load(vocabulary)
        identity["vocabulary"] = digest(vocabulary)
    if hasattr(module, "draw"):
        module.check(**options)
        source = target / RAW  # its options say all: no sources
    else:
        source = Path(source).expanduser().absolute()
        identity["sources"] = _entries(module.sources(source, **options), source)
        module.splits(source, **options)
    plain = json.loads(json.dumps(identity))
    return _Order(module, source, target, options, vocabulary or None, vocabulary_size, plain)


def _entries(paths: Iterable[Path], folder: Path) -> list[dict]:
    return [
        {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": digest(path)}
        for path in paths
    ]


@contextlib.contextmanager
def _place(target: Path) -> Iterator[None]:
    """Makes the folder, keeps a second run out of it, and words what the file system objects to."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        _lock(handle, target)
        yield
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        raise _unwritable(target, error) from error
    finally:
        os.close(handle)


def _unwritable(target: Path, error: OSError) -> UserError:
    folder = next(path for path in (target, *target.parents) if path.is_dir())
    return UserError(
        f"{error.filename or target} cannot be written: {error.strerror or error}; "
        f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {folder}. Make room or choose another "
        "--target, then start again: finished parts are kept."
    )


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another run is preparing {target}. Only one can. Wait for it, or choose another --target."
        ) from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to


def _prepared(order: _Order, overwrite: bool) -> dict | None:
    """The manifest that is there if it is what was asked for, None if there is none or it may be replaced."""
    path = order.target / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        there = {key: manifest[key] for key in order.identity}
        there["vocabulary"] = manifest["vocabulary"]["origin"]
        bad = [one["file"] for one in stored(manifest) if _size(order.target / one["file"]) != one["bytes"]]
    except (ValueError, KeyError, TypeError) as error:
        bad, other = [], f"its {MANIFEST} does not read ({type(error).__name__}: {error})"
    else:
        changes = [_change(key, there[key], order.identity[key]) for key in there]
        other = "; ".join(filter(None, changes))
        if not bad and not other:
            return manifest
    if not overwrite:
        why = f"{bad[0]} is missing or has a wrong size" if bad else other
        raise UserError(
            f"{order.target} holds a data set that is not the one asked for: {why}. Choose another --target, or give "
            "--overwrite to replace it."
        )
    return None


def _change(key: str, there: object, wanted: object) -> str:
    """What is different, "" if nothing is."""
    if there == wanted:
        return ""
    if isinstance(there, dict) and isinstance(wanted, dict):
        return "; ".join(filter(None, (_change(name, there.get(name), wanted[name]) for name in wanted)))
    if isinstance(there, list) and key == "sources":
        changed = {one["file"] for one in [*there, *wanted] if one not in there or one not in wanted}
        return f"source files have changed ({', '.join(sorted(changed))})"
    return f"{key} is {there!r}, asked for {wanted!r}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Callable[[Callable, list], Iterator]]:
    """Gives `each(function, jobs)`: function(job) in the order of jobs, in this process or in several."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield map
        return
    # Spawned, not forked: tensorflow and jax have threads that a fork would not take along.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker ends without a word on Ctrl-C, and when the process that started it is gone."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _bar(items: Iterable, total: int, unit: str, what: str) -> Iterator:
    """A progress bar on standard error where somebody looks at it."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, desc=what, disable=None)


def _draw(order: _Order, each: Callable, overwrite: bool) -> None:
    """Draws the raw files beside their place and renames the folder, so that a folder `raw` is whole."""
    raw = order.source
    mark = raw / "options.json"
    wanted = {key: order.identity[key] for key in ("dataset", "builder_version", "options")}
    if raw.exists():
        there = json.loads(mark.read_bytes()) if mark.is_file() else None
        if there == wanted:
            return
        if there is None or not overwrite:
            why = f"has {_change('', there, wanted)}" if there else "was not drawn by this program"
            what = "Choose another --target" + (", or give --overwrite to replace it." if there else ".")
            raise UserError(f"{raw} is in the way: it {why}. {what}")
    unfinished = raw.with_name(f"{RAW}.{UNFINISHED}")
    _empty(unfinished)
    order.module.draw(
        unfinished,
        lambda function, jobs: _bar(each(function, jobs), len(jobs), "part", "draw"),
        **order.options,
    )
    save(unfinished / mark.name, json.dumps(wanted).encode())
    if raw.exists():
        shutil.rmtree(raw)
    unfinished.rename(raw)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _build(order: _Order, each: Callable, max_bad: float) -> dict:
    """Writes everything into target/unfinished, moves it to its place and returns the manifest."""
    module, source, options = order.module, order.source, order.options
    folder = _begin(order)
    vocabulary = _vocabulary(order, folder)
    jobs = [
        (module.NAME, str(source), options, split, shard, shards, str(folder))
        for split in module.splits(source, **options)
        for shards in [-(-module.count(source, split, **options) // SHARD_RECORDS)]
        for shard in range(shards)
    ]
    done = list(_bar(each(write_shard, jobs), len(jobs), "shard", "write"))
    dropped = [one for result in done for one in result["dropped"]]
    splits = {}
    for split in dict.fromkeys(job[3] for job in jobs):
        results = [result for job, result in zip(jobs, done, strict=True) if job[3] == split]
        splits[split] = _index(folder, split, results)
        _check_dropped(split, dropped, splits[split]["records"], max_bad)
    _metadata(module, folder, splits)
    manifest = {
        "dataset": module.NAME,
        "builder_version": module.VERSION,
        "licence": module.LICENCE,
        "created_with": {name: importlib.metadata.version(name) for name in PACKAGES},
        "splits": splits,
        "sources": _entries(module.sources(source, **options), source),
        "dropped": dropped,
        "vocabulary": vocabulary,
        "visual_words": list(module.VISUAL_WORDS),
        "options": order.identity["options"],
    }
    _install(folder, order.target, manifest)
    return manifest


def _begin(order: _Order) -> Path:
    """The folder of unfinished work: kept if it was for the same data set, else emptied."""
    folder = order.target / UNFINISHED
    plan = folder / "plan.json"
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    content = json.dumps(order.identity | {"shard_records": SHARD_RECORDS, "versions": versions})
    if not plan.is_file() or plan.read_text() != content:
        _empty(folder)
        save(plan, content.encode())
    return folder


def _install(folder: Path, target: Path, manifest: dict) -> None:
    """Moves the finished files over what was there: from here to the end the directory has no manifest."""
    (target / MANIFEST).unlink(missing_ok=True)
    for path in target.glob(f"{manifest['dataset']}-*.array_record-*-of-*"):
        path.unlink()
    for path in (target / "vocab.txt", target / "vocabulary.model"):
        path.unlink(missing_ok=True)
    wanted = {one["file"] for one in stored(manifest)} | {manifest["vocabulary"]["file"]}
    for path in sorted(folder.iterdir()):
        if path.name in wanted | {"dataset_info.json", "features.json"}:
            path.rename(target / path.name)
    shutil.rmtree(folder)
    save(target / MANIFEST, json.dumps(manifest, indent=1).encode())


def _check_dropped(split: str, dropped: list[dict], records: int, max_bad: float) -> None:
    dropped = [one for one in dropped if one["split"] == split]
    total = records + len(dropped)
    if len(dropped) > max_bad * total or not records:
        shown = "; ".join(f"{one['file']} {one['reason']}" for one in dropped[:5])
        raise UserError(
            f"{len(dropped)} of {total} pictures of the split {split} cannot be used ({len(dropped) / total:.2%}; "
            f"allowed are {max_bad:.2%}): {shown}{'; ...' if len(dropped) > 5 else ''}. Repair the source and start "
            "again, or give a larger --max_bad."
        )


def _index(folder: Path, split: str, results: list[dict]) -> dict:
    """Writes SPLIT.index.npz and returns the split's part of the manifest."""
    columns = {
        name: np.array([value for result in results for value in result[name]], np.uint16)
        for name in ("captions", "height", "width")
    }
    path = folder / f"{split}.index.npz"
    with path.open("wb") as file:
        np.savez(file, **columns)
        file.flush()
        os.fsync(file.fileno())
    shards = [
        {"file": one["file"], "records": len(one["captions"]), "bytes": one["bytes"], "sha256": one["sha256"]}
        for one in results
    ]
    records, pairs = len(columns["captions"]), int(columns["captions"].sum(dtype=np.int64))
    return {"records": records, "pairs": pairs, "shards": shards, "index": _entries([path], folder)[0]}


def _vocabulary(order: _Order, folder: Path) -> dict:
    """Copies or trains the vocabulary and returns its part of the manifest."""
    from vlp_jax.data import text

    given = order.vocabulary
    path = folder / ("vocab.txt" if given and given.suffix == ".txt" else "vocabulary.model")
    if given:
        save(path, given.read_bytes())
    else:
        text.train(order.module.texts(order.source, **order.options), path, order.vocabulary_size)
    return {
        "file": path.name,
        "size": text.Vocabulary.load(path).size,
        "sha256": digest(path),
        "origin": order.identity["vocabulary"],
    }


def _metadata(module: ModuleType, folder: Path, splits: dict) -> None:
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
        features=module.features(),
        split_infos=infos,
        version=f"{module.VERSION}.0.0",
        check_data=False,  # each shard's count was read back when it was written
    )
