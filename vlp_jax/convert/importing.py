# SPDX-License-Identifier: Apache-2.0
"""From files to a checkpoint of ours: recognised, planned and checked before a tensor is read; then read and written."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import systems
from vlp_jax.convert import engine, labels, resizing, settings, sources, tables
from vlp_jax.convert.engine import Plan
from vlp_jax.convert.ops import Shape
from vlp_jax.convert.sources import Source
from vlp_jax.convert.tables import Classes
from vlp_jax.data import spec
from vlp_jax.data.text import Vocabulary
from vlp_jax.files import LABELS, digest
from vlp_jax.parallel import shard
from vlp_jax.training import checkpoint, limits
from vlp_jax.training.paths import flatten, nest
from vlp_jax.types import UserError

VOCABULARIES = ("vocab.txt", "vocabulary.model")


@dataclasses.dataclass(frozen=True)
class Import:
    """A conversion that is planned and checked; no tensor is read yet."""

    config: ConfigDict  # resolved
    settings: Sequence[settings.Setting]
    plan: Plan
    vocabulary: Vocabulary | None
    labels: Sequence[str]  # of the classes in the new model; () = not known
    file_labels: Sequence[str]  # of the classes in the file; () = not known
    named: Classes | None  # whose outputs the labels name
    resizing: Mapping[str, str]  # our path -> how it takes another shape
    position_resize: str  # method for a position grid
    notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Resizer:
    """How arrays take the shapes of the new model, for `Plan.fill`."""

    ways: Mapping[str, str]  # our path -> grid, rows, repeated or answers
    position_resize: str = "bilinear"
    old_labels: Sequence[str] = ()
    new_labels: Sequence[str] = ()
    more: int = 0  # outputs behind the classes

    def __call__(self, path: str, array: np.ndarray, shape: Shape, drawn: np.ndarray) -> np.ndarray:
        """Returns an array of the wanted shape; `drawn` are its initial values."""
        way = self.ways[path]
        if way == "grid":
            return resizing.grid(array, shape[:2], self.position_resize)
        if way == "rows":
            return resizing.rows(array, drawn)
        if way == "repeated":
            return resizing.repeated_rows(array, shape[0])
        if not (self.old_labels and self.new_labels):
            return drawn  # which class is which cannot be known
        return resizing.answers(array, drawn, self.old_labels, self.new_labels, -1, self.more)[0]


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user asks for besides the files."""

    system: str
    config: ConfigDict
    config_given: bool = False
    vocab: str = ""
    labels: str = ""
    position_resize: str = "bilinear"


def open_all(stack: contextlib.ExitStack, paths: Sequence[str]) -> list[Source]:
    """Opens every source for as long as `stack` lives.

    Raises:
        UserError: none is given, one twice, or one cannot be used.
    """
    if not paths:
        raise UserError(
            "--source is missing: nothing to read. Give --source=FILE, several times for several parts."
        )
    resolved = [str(Path(path).expanduser().resolve()) for path in paths]
    if "" in paths:
        raise UserError("--source= is empty. Give --source=FILE.")
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"--source={path} is given {resolved.count(path)} times. Give each file once.")
    for path in resolved:
        if (Path(path) / "params").is_dir() or (Path(path) / "checkpoints").is_dir():
            raise UserError(
                f"--source={path} is a checkpoint of ours already. Give --format=hf or --format=original to export it."
            )
    return [stack.enter_context(sources.open_source(Path(path).expanduser())) for path in paths]


def plan(opened: Sequence[Source], wishes: Wishes) -> Import:
    """Recognises the files, makes the config, and checks both sides.

    Raises:
        UserError: a file of no known layout, a config that does not fit, names or shapes that do not, a vocabulary
            or labels of another size.
    """
    known = tables.get(wishes.system)
    if wishes.position_resize not in resizing.METHODS:
        resizing.grid(np.zeros((1, 1, 1)), (1, 1), wishes.position_resize)  # raises, with the possible ones
    readings = [engine.match(source, engine.recognise(source, known.TABLES)) for source in opened]
    vocabulary = _vocabulary(readings, wishes.vocab)
    if vocabulary and "text_embed" not in wishes.config.model:
        raise UserError(f"--vocab={wishes.vocab}: a {wishes.system} reads no text. Leave --vocab away.")
    size = vocabulary.size if vocabulary else 0
    config, found = settings.configure(readings, known, wishes.config, wishes.config_given, size)
    notes: list[str] = []
    named = next((one for one in known.CLASSES if settings.get(config, one.key)), None)
    theirs, ours = _labels(readings, config, wishes, named, notes)
    limits.check_numbers(config)
    config = systems.get(wishes.system).resolve(config, {})
    if vocabulary and vocabulary.size > config.model.text_embed.vocab_size:
        raise UserError(
            f"The vocabulary {vocabulary.path} has {vocabulary.size} pieces, but the word table only "
            f"{config.model.text_embed.vocab_size} rows. Give the vocabulary that the weights were trained with."
        )
    checked = engine.check(readings, shapes(config), known.HEADS, known.RESIZE)
    if ours and theirs and list(ours) != list(theirs):
        paths = [path for path, way in known.RESIZE.items() if way == "answers" and path in checked.wanted]
        given = {path: shape for one in readings for path, shape in one.shapes.items()}
        extra = {path: (given[path], checked.wanted[path]) for path in paths if path in given}
        checked = dataclasses.replace(checked, resized={**checked.resized, **extra})
    resolved = Import(
        config, found, checked, vocabulary, ours, theirs, named, known.RESIZE, wishes.position_resize, ()
    )
    return dataclasses.replace(resolved, notes=notes + _notes(resolved))


def shapes(config: ConfigDict) -> dict[str, Shape]:
    """Shape by path of the parameters that a resolved config makes."""
    tree = shard.shapes(_initial(config))
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree)}


def fill(conversion: Import) -> dict[str, np.ndarray]:
    """Reads all tensors; returns every parameter by its path, the fresh ones with their initial values.

    Raises:
        UserError: a file is damaged.
    """
    needed = [*conversion.plan.fresh, *conversion.plan.resized]
    make = _initial(conversion.config)

    def choose(params: Mapping[str, Any]) -> dict[str, Any]:
        leaves = dict(flatten(params))
        return {path: leaves[path] for path in needed}

    drawn = jax.tree.map(np.asarray, shard.selected(make, choose)) if needed else {}
    resize = Resizer(
        conversion.resizing,
        conversion.position_resize,
        conversion.file_labels,
        conversion.labels,
        conversion.named.more if conversion.named else 0,
    )
    filled = conversion.plan.fill(drawn, resize)
    return filled | {path: drawn[path] for path in conversion.plan.fresh}


def digests(
    stack: contextlib.ExitStack, opened: Sequence[Source]
) -> dict[Path, concurrent.futures.Future[str]]:
    """Starts on the sha256 of every file, beside planning and reading; what is not begun ends with `stack`."""
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sha256")
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    return {file: pool.submit(digest, file) for source in opened for file in source.files}


def write(
    conversion: Import,
    params: Mapping[str, np.ndarray],
    sha256: Mapping[Path, concurrent.futures.Future[str]],
    folder: Path,
) -> None:
    """Writes parameters, meta (the files' `sha256` is in it, from `digests`) and assets into an empty folder."""
    plan, assets = conversion.plan, {}
    facts: dict[str, Any] = {}
    if conversion.vocabulary:
        path = conversion.vocabulary.path
        assets[path.name] = path.read_bytes()
        facts = {"vocab_size": conversion.vocabulary.size, "vocabulary_sha256": digest(path)}
    if conversion.labels:
        assets[LABELS] = json.dumps(list(conversion.labels), ensure_ascii=False, indent=0)
        if conversion.named.facts:
            facts |= {"categories": list(conversion.labels), "classes": len(conversion.labels)}
    files = [
        {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256[file].result(),
            "layout": one.table.name,
        }
        for one in plan.readings
        for file in one.source.files
    ]
    imported = {
        "sources": files,
        "fresh": dict(plan.fresh),
        "copied": dict(plan.copied),
        "unused": dict(plan.unused),
        "resized": {path: [list(old), list(new)] for path, (old, new) in plan.resized.items()},
        "dropped": {name: why for one in plan.readings for name, why in one.dropped.items()},
        "settings": [dataclasses.asdict(setting) for setting in conversion.settings],
    }
    meta = {"config": conversion.config.to_dict(), "facts": facts, "imported": imported}
    folder.rmdir()  # orbax makes it
    checkpoint.write(folder, nest(params.items()), {**meta, "step": 0, "metrics": {}, "finite": True}, assets)


def _initial(config: ConfigDict) -> Callable[[], Any]:
    """Draws the parameters that a run of this config and seed would begin with."""
    system, batch = systems.get(config.system).build(config), spec.spec(config, 1)

    def make() -> Any:
        zeros = {key: jnp.zeros(entry.shape, entry.dtype) for key, entry in batch.items()}
        return system.init(jax.random.split(jax.random.key(config.seed))[0], zeros)[0]

    return make


def _vocabulary(readings: Sequence[engine.Reading], given: str) -> Vocabulary | None:
    """The vocabulary that the user gave, or the `vocab.txt` beside a source that has a word table."""
    if given:
        return Vocabulary.load(Path(given).expanduser())
    for reading in readings:
        path = reading.source.path
        folder = path if path.is_dir() else path.parent
        beside = [file for name in VOCABULARIES if (file := folder / name).is_file()]
        if "text_embed/word" in reading.shapes and beside:
            return Vocabulary.load(beside[0])
    return None


def _labels(
    readings: Sequence[engine.Reading],
    config: ConfigDict,
    wishes: Wishes,
    named: Classes | None,
    notes: list[str],
) -> tuple[list[str], list[str]]:
    """(labels of the file's classes, labels of the new model's classes); sets the number of classes that follows."""
    theirs = _file_labels(readings, named, notes) if named else []
    classes = settings.get(config, named.key) if named else 0
    if not wishes.labels:
        ours = theirs or (list(named.unsaid(classes)) if named else [])
        return theirs, ours if len(ours) == classes else []
    ours = labels.load(Path(wishes.labels).expanduser(), named.blank if named else ())
    known = tables.get(wishes.system)
    if not named:
        raise UserError(
            f"--labels={wishes.labels} names {len(ours)} classes, but the model has no head with classes. Leave --labels "
            f"away, or give a config with one (config.model.heads.{', '.join(one.name for one in known.CLASSES)})."
        )
    resizable = any(end in known.RESIZE for end in named.ends)
    if not resizable and theirs and list(ours) != theirs and set(ours) & set(theirs):
        raise UserError(
            f"--labels={wishes.labels} has other classes than the file, or in another order: {', '.join(ours[:5])} and "
            f"{', '.join(theirs[:5])}. Of the head {named.name} they cannot be changed. Leave --labels away."
        )
    if len(ours) != classes:
        if wishes.config_given or not resizable:
            raise UserError(
                f"--labels={wishes.labels} names {len(ours)} classes, but the head {named.name} has {classes}. Give as "
                "many labels as there are classes."
            )
        settings.put(config, named.key, len(ours))
    return theirs, ours


def _file_labels(readings: Sequence[engine.Reading], named: Classes, notes: list[str]) -> list[str]:
    """What stands beside a file names its classes with; what cannot be their names is noted and not taken."""
    for reading in readings:
        classes = named.count(reading.shapes)
        file, content = settings.json_beside(reading.source.path)
        if beside := file.with_name(LABELS) if file.with_name(LABELS).is_file() else None:
            file = beside
        if beside:
            found = labels.load(beside, named.blank)
        else:
            found = labels.of_config(content, file, named.blank) if classes else []
        if len(found) == classes and labels.distinct(found):
            return found
        if found and classes:
            notes.append(
                f"{file}: its {len(set(found))} different labels are not taken for the {classes} classes"
            )
        if unsaid := list(named.unsaid(classes)):
            notes.append(
                f"{reading.source.path} does not name its {classes} classes: they are called as in the original's data"
            )
            return unsaid
    return []


def _notes(conversion: Import) -> list[str]:
    """What a user should know and did not ask."""
    notes = [
        f"{one.source.path}: {name} is not read: {why}"
        for one in conversion.plan.readings
        for name, why in one.source.skipped.items()
    ]
    answers = [path for path in conversion.plan.resized if conversion.resizing[path] == "answers"]
    if answers:
        kept = len((set(conversion.labels) & set(conversion.file_labels)) - {""})
        classes = settings.get(conversion.config, conversion.named.key)
        why = "" if conversion.file_labels else ": the file does not name its classes"
        notes.append(
            f"answers: {kept} of {classes} are taken over by their label, the others start fresh{why}"
        )
    if "text_embed" not in conversion.config.model:
        return notes
    if not conversion.vocabulary:
        notes.append(
            "no vocabulary: give --vocab=vocab.txt, so that texts can be read with this checkpoint alone"
        )
    elif conversion.vocabulary.size < conversion.config.model.text_embed.vocab_size:
        unused = conversion.config.model.text_embed.vocab_size - conversion.vocabulary.size
        notes.append(f"the word table has {unused} rows more than the vocabulary has pieces; they are kept")
    return notes
