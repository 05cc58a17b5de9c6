# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of ours to files under other names: planned and checked on both sides, then streamed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.convert import labels, settings, tables, writing
from vlp_jax.convert.sources import safetensors_file
from vlp_jax.convert.tables import Classes, Row, Table
from vlp_jax.data.text import Vocabulary
from vlp_jax.files import LABELS
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten
from vlp_jax.types import UserError, closest

WEIGHTS = "model.safetensors"
FORMATS = ("hf", "original")


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user asks for besides source and target."""

    system: str
    format: str
    class_name: str = ""
    drop: Sequence[str] = ()
    vocab: str = ""
    labels: str = ""


@dataclasses.dataclass(frozen=True)
class Export:
    """An export that is planned and checked."""

    source: Path
    config: ConfigDict  # of the checkpoint, less the heads that are dropped
    table: Table
    class_name: str  # of transformers; "" in another format
    params: Mapping[str, np.ndarray]  # by our path, dropped heads left away
    tensors: Mapping[str, np.ndarray]  # by the name in the file, made when asked for
    files: Mapping[str, bytes]  # beside the weights
    notes: Sequence[str]
    owned: Sequence[str]  # config keys that only our import reads from the files


class Tensors(Mapping):
    """The tensors of a file by name, each made from our parameters when it is asked for."""

    def __init__(self, rows: Mapping[str, tuple[Row, int | None]], params: Mapping[str, np.ndarray]) -> None:
        self._rows, self._params = rows, params

    def __getitem__(self, name: str) -> np.ndarray:
        return writing.written(*self._rows[name], self._params)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def plan(source: str, wishes: Wishes) -> Export:
    """Reads a checkpoint and finds the name of each of its parameters.

    Raises:
        UserError: no checkpoint of this system, an unknown format, a head that has no place, or a vocabulary or
            labels that do not fit.
    """
    known = tables.get(wishes.system)
    if wishes.format not in FORMATS:
        raise UserError(
            f"--format={wishes.format}: no such format.{closest(wishes.format, FORMATS)} Possible: "
            f"{', '.join(FORMATS)}, or none to import."
        )
    path = Path(source).expanduser()
    params, meta, assets = checkpoint.open_for_inference(path)
    config = ConfigDict(meta["config"])
    if config.system != wishes.system:
        raise UserError(f"{path} is a checkpoint of {config.system}. Give --system={config.system}.")
    names = _labels(wishes, assets, config, known.CLASSES)
    vocabulary = _vocabulary(wishes, assets, config)
    fitting = [table for table in known.TABLES if table.format == wishes.format]
    if wishes.format == "hf":
        name = known.HUB.choose(config.model.heads, wishes.class_name, wishes.drop)
        drop = [head for head in _heads(config, known) if head not in known.HUB.needed(name)]
    else:
        name, drop = "", [head.removesuffix("_head") for head in wishes.drop]
        _check_heads(_heads(config, known), drop)
    kept = ConfigDict(config.to_dict())
    for head in drop:
        kept.model.heads[head] = type(kept.model.heads[head])()
        if head in kept.objectives:
            kept.objectives[head] = 0.0  # an objective would switch its head on again
    pattern = rf"heads/({'|'.join(map(re.escape, drop))})/" if drop else r"(?!)"
    params = {path: array for path, array in flatten(params) if not re.match(pattern, path)}
    table, rows = _rows(fitting, params)
    prefix = table.prefix if name == "ViltModel" else ""
    tensors = Tensors({key.removeprefix(prefix): (row, layer) for key, row, layer in rows}, params)
    if wishes.format == "hf":
        folder = known.HUB.files(kept, name, names, vocabulary)
        files, notes = folder.files, folder.notes
        if vocabulary and vocabulary.suffix == ".model":
            # transformers reads tokenizer.json, our import the vocabulary itself.
            files = {**files, "vocabulary.model": vocabulary.read_bytes()}
    else:
        files, notes = _beside(kept, table, names, vocabulary), _notes(kept, table)
    files = _with_owned(files, kept, known.OWNED)
    return Export(path, kept, table, name, params, tensors, files, notes, known.OWNED)


def write(export: Export, folder: Path) -> Path:
    """Writes weights and all files beside them into an empty folder; returns the weights' path."""
    for name, content in export.files.items():
        (folder / name).write_bytes(content)
    safetensors_file.write(folder / WEIGHTS, export.tensors)
    return folder / WEIGHTS


def _with_owned(files: Mapping[str, bytes], config: ConfigDict, owned: Sequence[str]) -> dict[str, bytes]:
    """Adds to config.json what it has one place for, or none; transformers keeps it without reading it."""
    content = json.loads(files["config.json"])
    content[settings.OWN] = {key: settings.get(config, key) for key in owned}
    return {**files, "config.json": json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"}


def one_epsilon(export: Export) -> ConfigDict | None:
    """The config as transformers reads it, with one epsilon for all norms; None where it reads what we have."""
    config = ConfigDict(export.config.to_dict())
    epsilons = [key for key in export.owned if key.endswith("eps")]
    only = json.loads(export.files["config.json"]).get("layer_norm_eps")
    if not export.class_name or only is None or len({settings.get(config, key) for key in epsilons}) == 1:
        return None
    for key in epsilons:
        settings.put(config, key, only)
    return config


def _rows(
    fitting: Sequence[Table], params: Mapping[str, np.ndarray]
) -> tuple[Table, list[tuple[str, Row, int | None]]]:
    """The first table of a format that has a place for every parameter; else what the last one lacks."""
    shapes = {path: array.shape for path, array in params.items()}
    error: UserError | None = None
    for table in fitting:
        try:
            return table, writing.written_names(table, shapes)
        except UserError as found:
            error = error or found
    raise error or UserError("This system has no table that can be written in this format.")


def _heads(config: ConfigDict, known: ModuleType) -> list[str]:
    """The heads that a checkpoint has, of those that it may lack."""
    return [name for name in known.HUB.HEADS if config.model.heads[name]]


def _check_heads(there: Sequence[str], drop: Sequence[str]) -> None:
    for name in drop:
        if name not in there:
            raise UserError(
                f"--drop={name}: the checkpoint has no such head.{closest(name, there)} There are: "
                f"{', '.join(there) or 'none'}."
            )


def _labels(
    wishes: Wishes, assets: Mapping[str, Path], config: ConfigDict, named: Sequence[Classes]
) -> list[str] | None:
    blank = named[0].blank if named else ()
    if not wishes.labels:
        return labels.load(assets[LABELS], blank) if LABELS in assets else None
    found = labels.load(Path(wishes.labels).expanduser(), blank)
    classes = [count for one in named if (count := settings.get(config, one.key))]
    if len(found) not in classes:
        raise UserError(
            f"--labels={wishes.labels} names {len(found)} classes, but the heads of the checkpoint have "
            f"{' and '.join(map(str, classes)) or 'none'}. Give as many labels as there are classes."
        )
    return found


def _vocabulary(wishes: Wishes, assets: Mapping[str, Path], config: ConfigDict) -> Path | None:
    """The vocabulary that the user gave, or the one among the assets."""
    if wishes.vocab and "text_embed" not in config.model:
        raise UserError(f"--vocab={wishes.vocab}: a {config.system} reads no text. Leave --vocab away.")
    if wishes.vocab:
        vocabulary, rows = (
            Vocabulary.load(Path(wishes.vocab).expanduser()),
            config.model.text_embed.vocab_size,
        )
        if vocabulary.size > rows:
            raise UserError(
                f"--vocab={wishes.vocab} has {vocabulary.size} pieces, but the word table {rows} rows. Give the "
                "vocabulary that the weights were trained with."
            )
        return vocabulary.path
    return next((path for name, path in assets.items() if name.endswith((".txt", ".model"))), None)


def _beside(
    config: ConfigDict, table: Table, names: Sequence[str] | None, vocabulary: Path | None
) -> dict[str, bytes]:
    """What the weights alone do not say, as files."""
    content = {name: settings.get(config, key) for key, name in table.settings.items()}
    if "hidden_act" in content:
        ours = content["hidden_act"]
        content["hidden_act"] = next(
            (name for name, one in settings.ACTIVATIONS.items() if one == ours), "gelu"
        )
    files = {"config.json": json.dumps(content, indent=1).encode()}
    if vocabulary:
        files[vocabulary.name] = vocabulary.read_bytes()
    if names:
        files[LABELS] = json.dumps(list(names), ensure_ascii=False, indent=0).encode()
    return files


def _notes(config: ConfigDict, table: Table) -> list[str]:
    """Where the code that these names belong to would compute something else."""
    notes = []
    for key, theirs in table.defaults.items():
        ours = settings.get(config, key)
        if ours != theirs:
            notes.append(f"{key} is {ours} here; {table.name} has {theirs}, and a file does not say it")
    return notes
