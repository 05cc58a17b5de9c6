# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared data directory: ArrayRecord shards with TFDS metadata, an index, the vocabulary, the manifest.

All is written in DATA_DIR/unfinished and renamed at the end, the manifest last: a directory with a manifest is whole.
A run that was cut off goes on with the shards that it had finished. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from vlp_jax.data.datasets import Dropped, get
from vlp_jax.types import UserError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
RAW = "raw"
SHARD_RECORDS = 4096  # about 0.7 GB of photographs of COCO's size
VOCABULARY_SIZE = 8000
PACKAGES = ("array-record", "numpy", "pillow", "sentencepiece", "tensorflow-datasets", "vlp_jax")
PLACE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


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
) -> dict:
    """Prepares a data set and returns its manifest, with "fresh": whether anything had to be done.

    Args:
        module: a data set, see `datasets.get`.
        source: folder of its raw files; ignored where the module draws them itself, into target/raw.
        target: the data directory, made if need be; files of other people in it are left alone.
        options: of the data set (its OPTIONS hold the defaults).
        vocabulary: vocab.txt or *.model to copy; "" trains one on the captions.
        vocabulary_size: of the trained one, at most.
        workers: processes; 0 = one a core, 1 = none besides this one.
        max_bad: largest share of examples that may be dropped.
        overwrite: replaces a data set that was prepared otherwise.

    Raises:
        UserError: whatever is wrong with the source, the target, the options or the disk.
    """
    target = Path(target).expanduser().absolute()
    options = {**module.OPTIONS, **(options or {})}
    asked = {
        "dataset": module.NAME,
        "builder_version": module.VERSION,
        "options": options,
        "vocabulary": digest(Path(vocabulary))
        if vocabulary
        else f"trained, at most {vocabulary_size} pieces",
    }
    with _place(target):
        drawn = hasattr(module, "draw")
        if drawn:
            module.check(**options)
            source = target / RAW
        else:
            source = Path(source).expanduser().absolute()
            asked["sources"] = [_entry(path, source) for path in module.sources(source, **options)]
        done = _prepared(target, asked, overwrite)
        if done is not None:
            return done | {"fresh": False}
        with _processes(workers) as each:
            if drawn:
                _draw(module, source, asked, each, overwrite)
                asked["sources"] = [_entry(path, source) for path in module.sources(source, **options)]
            manifest = _build(module, source, target, asked, Path(vocabulary), vocabulary_size, max_bad, each)
    return manifest | {"fresh": True}


def digest(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error


def _entry(path: Path, folder: Path) -> dict:
    return {"file": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": digest(path)}


@contextlib.contextmanager
def _place(target: Path) -> Iterator[None]:
    """Makes the folder, keeps a second run out of it, and words what the file system objects to."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another run is preparing {target}. Wait for it, or choose another --target."
            ) from None
        except OSError:
            pass  # a file system without locks: nothing to hold on to
        try:
            yield
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        where = error.filename or target
        raise UserError(
            f"{where} cannot be written: {error.strerror or os.strerror(error.errno)}. {_free(target)} Nothing "
            "half-written counts; free space or choose another --target, then start again: finished shards are kept."
        ) from error


def _free(target: Path) -> str:
    place = next(path for path in (target, *target.parents) if path.is_dir())
    return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB are free there."


def _prepared(target: Path, asked: dict, overwrite: bool) -> dict | None:
    """The manifest that is there if it is what was asked for; clears it away if it may be overwritten."""
    path = target / MANIFEST
    if not path.exists():
        return None
    try:
        there = json.loads(path.read_bytes())
        files = [shard for split in there["splits"].values() for shard in [*split["shards"], split["index"]]]
    except (ValueError, KeyError, TypeError) as error:
        there, files, damage = {}, [], f"its manifest does not read ({type(error).__name__})"
    else:
        bad = [one["file"] for one in files if _size(target / one["file"]) != one["bytes"]]
        damage = f"{bad[0]} is missing or has a wrong size" if bad else ""
    # A drawn data set has no sources before it is drawn; its options say all.
    other = [key for key, value in asked.items() if there.get("asked", {}).get(key) != _plain(value)]
    if not damage and not other:
        return there
    if not overwrite:
        why = damage or "; ".join(
            _difference(key, there.get("asked", {}).get(key), _plain(asked[key])) for key in other
        )
        raise UserError(
            f"{target} holds a data set already, and it is not the one asked for: {why}. Choose another --target, or "
            "give --overwrite to replace it."
        )
    path.unlink()
    for name in [one["file"] for one in files]:
        (target / name).unlink(missing_ok=True)
    return None


def _difference(key: str, there: object, wanted: object) -> str:
    if isinstance(there, dict) and isinstance(wanted, dict):
        keys = [name for name in wanted if there.get(name) != wanted[name]]
        return "; ".join(f"{name} is {there.get(name)!r}, asked for {wanted[name]!r}" for name in keys)
    if isinstance(there, list) and isinstance(wanted, list):
        changed = [one["file"] for one in wanted if one not in there] + [
            one["file"] for one in there if one not in wanted
        ]
        return f"source files differ ({', '.join(sorted(set(changed))[:4])})"
    return f"{key} is {there!r}, asked for {wanted!r}"


def _plain(value: object) -> object:
    """As json gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Callable[[Callable, list], Iterator]]:
    """Gives `each(function, jobs)`: function(job) in the order of jobs, in this process or in several."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield lambda function, jobs: map(function, jobs)
        return
    # Spawned, not forked: tensorflow and jax have threads that a fork would not take along.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda function, jobs: pool.imap(function, jobs) if len(jobs) > 1 else map(function, jobs)


def _bar(items: Iterable, total: int, unit: str, what: str) -> Iterator:
    """A progress bar on standard error where somebody looks at it."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, desc=what, disable=None)


def _draw(module: ModuleType, raw: Path, asked: dict, each: Callable, overwrite: bool) -> None:
    """Draws the raw files beside their place and renames the folder, so that a folder `raw` is whole."""
    mark = raw / "options.json"
    wanted = _plain({key: asked[key] for key in ("dataset", "builder_version", "options")})
    if raw.exists():
        there = json.loads(mark.read_bytes()) if mark.is_file() else None
        if there == wanted:
            return
        if there is None or not overwrite:
            why = "was drawn with other options" if there else "is not a folder that was drawn here"
            raise UserError(
                f"{raw} {why}. Choose another --target" + (", or give --overwrite." if there else ".")
            )
        shutil.rmtree(raw)
    unfinished = raw.with_name(f"{RAW}.{UNFINISHED}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    module.draw(
        unfinished,
        lambda function, jobs: _bar(each(function, jobs), len(jobs), "part", "draw"),
        **asked["options"],
    )
    (unfinished / mark.name).write_text(json.dumps(wanted))
    unfinished.rename(raw)


def _build(
    module: ModuleType,
    source: Path,
    target: Path,
    asked: dict,
    vocabulary: Path,
    vocabulary_size: int,
    max_bad: float,
    each: Callable,
) -> dict:
    """Writes everything into target/unfinished, moves it to its place and returns the manifest."""
    asked, options = _plain(asked), asked["options"]
    folder = _begin(target / UNFINISHED, asked)
    jobs = [
        (module.NAME, str(source), options, split, shard, shards, str(folder))
        for split in module.splits(source, **options)
        for shards in [-(-module.count(source, split, **options) // SHARD_RECORDS)]
        for shard in range(shards)
    ]
    done = list(_bar(each(_shard, jobs), len(jobs), "shard", "write"))
    dropped = [one for result in done for one in result["dropped"]]
    records = sum(len(result["captions"]) for result in done)
    _check_dropped(module.NAME, dropped, records, max_bad)
    splits = {}
    for split in dict.fromkeys(job[3] for job in jobs):
        results = [result for job, result in zip(jobs, done, strict=True) if job[3] == split]
        splits[split] = _index(folder, split, results)
    words = _vocabulary(module, source, folder, options, vocabulary, vocabulary_size)
    _metadata(module, folder, splits)
    manifest = {
        "dataset": module.NAME,
        "builder_version": module.VERSION,
        "licence": module.LICENCE,
        "created_with": {name: _version(name) for name in PACKAGES},
        "splits": splits,
        "sources": asked["sources"],
        "dropped": dropped,
        "vocabulary": words,
        "visual_words": list(module.VISUAL_WORDS),
        "options": asked["options"],
        "asked": asked,
    }
    (folder / "plan.json").unlink()
    for path in sorted(folder.glob("*.done.json")):
        path.unlink()
    for path in sorted(folder.iterdir()):
        path.rename(target / path.name)
    folder.rmdir()
    _save(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _begin(folder: Path, asked: dict) -> Path:
    """The folder of unfinished work: kept if it was for the same data set, else emptied."""
    plan = folder / "plan.json"
    content = json.dumps(
        asked | {"records_a_shard": SHARD_RECORDS, "versions": [_version(name) for name in PACKAGES]}
    )
    if not plan.is_file() or plan.read_text() != content:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        _save(plan, content.encode())
    return folder


def _shard(job: tuple[str, str, dict, str, int, int, str]) -> dict:
    """Writes one shard, or finds it finished; returns what the manifest and the index need of it."""
    dataset, source, options, split, shard, shards, folder = job
    name = f"{dataset}-{split}.array_record-{shard:05d}-of-{shards:05d}"
    path, note = Path(folder) / name, Path(folder) / f"{name}.done.json"
    if note.is_file() and path.is_file():
        result = json.loads(note.read_bytes())
        if digest(path) == result["sha256"]:
            return result
    module = get(dataset)
    features = module.features()
    result = {"file": name, "captions": [], "height": [], "width": [], "dropped": []}
    temporary = path.with_name(f"{name}.tmp")
    with _record_writer(temporary) as append:
        for example in module.examples(Path(source), split, shard, shards, **options):
            if isinstance(example, Dropped):
                result["dropped"].append({"file": example.file, "reason": example.reason})
                continue
            append(features.serialize_example(features.encode_example(example)))
            result["captions"].append(len(example["captions"]))
            result["height"].append(example["height"])
            result["width"].append(example["width"])
    _check_shard(temporary, len(result["captions"]))
    result |= {"bytes": temporary.stat().st_size, "sha256": digest(temporary)}
    temporary.rename(path)
    _save(note, json.dumps(result).encode())
    return result


@contextlib.contextmanager
def _record_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """An ArrayRecord file on disk; its writer's RuntimeErrors become the OSErrors that they stand for."""
    from array_record.python import array_record_module

    try:
        writer = array_record_module.ArrayRecordWriter(
            str(path), "group_size:1"
        )  # one record a chunk: random access
        try:
            yield writer.write
        finally:
            writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except RuntimeError as error:
        for number in sorted(PLACE_ERRORS):
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


def _check_dropped(dataset: str, dropped: list[dict], records: int, max_bad: float) -> None:
    total = records + len(dropped)
    if total and len(dropped) / total > max_bad or not records:
        shown = "; ".join(f"{one['file']} {one['reason']}" for one in dropped[:5])
        raise UserError(
            f"{len(dropped)} of {total} examples of {dataset} cannot be used ({len(dropped) / max(total, 1):.2%}; "
            f"allowed: {max_bad:.2%}): {shown}{'; ...' if len(dropped) > 5 else ''}. Repair the source, or give a larger --max_bad."
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
    return {"records": records, "pairs": pairs, "shards": shards, "index": _entry(path, folder)}


def _vocabulary(
    module: ModuleType, source: Path, folder: Path, options: dict, given: Path, size: int
) -> dict:
    from vlp_jax.data import text

    if given.name:
        path = folder / ("vocab.txt" if given.suffix == ".txt" else "vocabulary.model")
        text.Vocabulary.load(given)
        shutil.copyfile(given, path)
    else:
        path = folder / "vocabulary.model"
        text.train(module.texts(source, **options), path, size)
    return {"file": path.name, "size": text.Vocabulary.load(path).size, "sha256": digest(path)}


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


def _save(path: Path, content: bytes) -> None:
    """Writes a small file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
