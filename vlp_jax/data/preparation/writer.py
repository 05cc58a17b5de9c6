# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared data directory: ArrayRecord shards with TFDS metadata, an index, the vocabulary, the manifest.

All is written in DATA_DIR/unfinished and renamed at the end, the manifest last: a directory with a manifest is whole.
A run that was cut off goes on with the shards that it had finished. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from vlp_jax.data.preparation import assembly
from vlp_jax.data.preparation.assembly import Order, source_entries
from vlp_jax.data.preparation.workers import processes, progress
from vlp_jax.data.source import MANIFEST, stored
from vlp_jax.files import digest, save
from vlp_jax.types import ENVIRONMENT, UserError, closest

ON_BAD = ("skip", "error")
UNFINISHED = "unfinished"
PLAN = "plan.json"  # in it: what the work is for
TFDS_FILES = ("dataset_info.json", "features.json")
VOCAB_SIZES = (16, 1_000_000)  # pieces that can be asked for
RAW = "raw"
VOCAB_SIZE = 8000


def write(
    module: ModuleType,
    source: str | Path,
    target: str | Path,
    *,
    options: dict | None = None,
    vocab: str | Path = "",
    vocab_size: int = VOCAB_SIZE,
    workers: int = 0,
    max_bad: float = 0.01,
    on_bad: str = "skip",
    overwrite: bool = False,
) -> tuple[dict, bool]:
    """Prepares a data set; returns its manifest and whether anything had to be done.

    Args:
        module: a data set, see `datasets.get`.
        source: folder of its raw files; not used where the module draws them itself, into target/raw.
        target: the data directory, made if need be; other files in it are left alone.
        options: of the data set (its OPTIONS hold the defaults).
        vocab: vocab.txt or *.model to copy; "" trains one on the texts of the data set.
        vocab_size: of the trained one, at most.
        workers: processes; 0 = one a core, 1 = none besides this one.
        max_bad: largest share of a split's examples that may be unusable; what a web set never got is not counted.
        on_bad: "skip" leaves out what cannot be used, "error" ends at the first one.
        overwrite: replaces a data set that was prepared otherwise, once the new one is finished.

    Raises:
        UserError: whatever is wrong with the source, the target, the options or the disk.
    """
    if on_bad not in ON_BAD:
        raise UserError(
            f"--on_bad={on_bad} is unknown.{closest(on_bad, ON_BAD)} Possible: {', '.join(ON_BAD)}. Choose one."
        )
    order = _order(module, source, target, {**module.OPTIONS, **(options or {})}, vocab, vocab_size)
    with _place(order.target):
        there = _prepared(order, overwrite)
        if there is not None:
            return there, False
        _check_free(order.target, module.NAME)
        with processes(workers) as each:
            if hasattr(module, "draw"):
                _draw(order, each, overwrite)
            folder = _begin(order)
            manifest = assembly.assemble(order, each, folder, max_bad, on_bad == "error")
        _install(folder, order.target, manifest)
        return manifest, True


def summary(manifest: dict) -> str:
    """What a prepared directory holds, a few lines for people."""
    lines = [
        f"{name}: {one['records']} pictures, {one['pairs']} captions"
        for name, one in manifest["splits"].items()
    ]
    listed = sum(one["listed"] for one in manifest["splits"].values())
    dropped, changed = manifest["dropped"], manifest["changed"]
    lines.append(f"vocabulary: {manifest['vocabulary']['size']} pieces in {manifest['vocabulary']['file']}")
    lines.append(f"dropped: {dropped['count']} pictures ({dropped['count'] / listed:.2%})")
    if dropped["count"]:
        lines[-1] += f", listed in {dropped['file']}"
    lines += [f"  {count} x {reason}" for reason, count in [*dropped["reasons"].items()][:5]]
    lines += [f"changed: {count} x {phrase}" for phrase, count in [*changed.items()][:5]]
    return "\n".join(lines)


def _order(module, source, target, options: dict, vocab, vocab_size: int) -> Order:
    """Looks at everything that can be wrong before anything is made."""
    target = Path(target).expanduser().absolute()
    identity = {"dataset": module.NAME, "builder_version": module.VERSION, "options": options}
    identity["vocabulary"] = f"trained, at most {vocab_size} pieces"
    if not VOCAB_SIZES[0] <= vocab_size <= VOCAB_SIZES[1]:
        raise UserError(
            f"--vocab_size={vocab_size} pieces cannot be trained. Possible: {VOCAB_SIZES[0]} to {VOCAB_SIZES[1]:,}, "
            f"and no more than the texts give. Leave it at {VOCAB_SIZE}."
        )
    if vocab:
        from vlp_jax.data.text import Vocabulary

        vocab = Path(vocab).expanduser()
        Vocabulary.load(vocab)
        identity["vocabulary"] = digest(vocab)
    drawn = hasattr(module, "draw")  # then its options say all: no sources
    source = target / RAW if drawn else Path(source).expanduser().absolute()
    module.check(source, **options)
    if not drawn:
        identity["sources"] = source_entries(module.sources(source, **options), source)
    plain = json.loads(json.dumps(identity))
    return Order(module, source, target, options, vocab or None, vocab_size, plain)


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
    if target.is_symlink() and not target.exists():
        return UserError(f"--target={target} is a link that points nowhere. Choose another --target.")
    if target.exists() and not target.is_dir():
        return UserError(f"--target={target} is a file. Choose another --target.")
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


def _prepared(order: Order, overwrite: bool) -> dict | None:
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
        if "box_names" not in manifest:
            changes.append(f"its {MANIFEST} does not list the names of boxes, as one of today does")
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


def _draw(order: Order, each: Callable, overwrite: bool) -> None:
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
    _empty(unfinished, PLAN)
    save(unfinished / PLAN, json.dumps(wanted))

    def shown(function: Callable, jobs: list) -> Iterator:
        with progress(len(jobs), " parts", "draw") as bar:
            for result in each(function, jobs):
                bar.update()
                yield result

    order.module.draw(unfinished, shown, **order.options)
    save(unfinished / mark.name, json.dumps(wanted).encode())
    if raw.exists():
        shutil.rmtree(raw)
    unfinished.rename(raw)
    (raw / PLAN).unlink()


def _empty(folder: Path, mark: str) -> None:
    """Makes a folder, or empties one that holds our mark; anything else there is somebody's and stays."""
    if folder.is_symlink() or folder.exists():
        theirs = folder.is_symlink() or not folder.is_dir()
        if (
            theirs
            or not all(path.name.startswith(mark) for path in folder.iterdir())
            and not (folder / mark).is_file()
        ):
            raise UserError(
                f"{folder} is in the way: it was not made by this program, which keeps unfinished work there. Rename "
                "it, or choose another --target."
            )
        _remove(folder, mark)
    folder.mkdir()


def _remove(folder: Path, mark: str) -> None:
    """Removes a folder of ours, its mark last: killed half-way, the next run still knows whose it is."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != mark:
            path.unlink()
    shutil.rmtree(folder)


def _begin(order: Order) -> Path:
    """The folder of unfinished work: kept if it was for the same data set, else emptied."""
    folder = order.target / UNFINISHED
    plan = folder / PLAN
    versions = [importlib.metadata.version(name) for name in assembly.PACKAGES]
    content = json.dumps(
        order.identity | {"shards": [assembly.SHARD_RECORDS, assembly.MOST_SHARDS], "versions": versions}
    )
    if folder.is_symlink() or not plan.is_file() or plan.read_text() != content:
        _empty(folder, PLAN)
        save(plan, content.encode())
    for path in folder.glob("*.tmp"):  # of workers that were killed
        path.unlink()
    return folder


def _check_free(target: Path, dataset: str) -> None:
    """Where no manifest says that they are ours, files of the names that will be written are somebody's."""
    if (target / MANIFEST).exists() or (target / UNFINISHED / PLAN).is_file():
        return
    written = ("vocab.txt", "vocabulary.model", "*.index.npz", assembly.DROPPED, *TFDS_FILES)
    for pattern in (*written, f"{dataset}-*.array_record-*"):
        for path in target.glob(pattern):
            raise UserError(
                f"{path} is in the way: it would be replaced, and no {MANIFEST} says that prepare has made it. Move "
                "it, or choose another --target."
            )


def _install(folder: Path, target: Path, manifest: dict) -> None:
    """Moves the finished files over what was there: from here to the end the directory has no manifest."""
    (target / MANIFEST).unlink(missing_ok=True)
    for pattern in (f"{manifest['dataset']}-*.array_record-*-of-*", "*.index.npz"):
        for path in target.glob(pattern):
            path.unlink()
    for path in (target / "vocab.txt", target / "vocabulary.model"):
        path.unlink(missing_ok=True)
    wanted = {one["file"] for one in stored(manifest)} | {manifest["vocabulary"]["file"], assembly.DROPPED}
    for path in sorted(folder.iterdir()):
        if path.name in wanted | {*TFDS_FILES}:
            path.rename(target / path.name)
    # The folder goes last: until then it says that the files are ours.
    save(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    _remove(folder, PLAN)
