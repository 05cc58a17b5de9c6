# SPDX-License-Identifier: Apache-2.0
"""Where a run starts from (`config.init_from`): checkpoints of ours and files from elsewhere, by the engine of `convert`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vlp_jax.convert import engine, settings, sources, tables
from vlp_jax.convert.importing import Resizer
from vlp_jax.convert.sources import Source, Tensor
from vlp_jax.convert.tables import Classes, Row, Table
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten, nest
from vlp_jax.types import Params, UserError

log = logging.getLogger(__name__)

# What shapes do not show; a system has some of it.
PARTS = ("fusion", "text_embed", "heads", "encoder", "decoder")
SHARED = (*(f"model.{part}.{key}" for key in ("num_heads", "eps") for part in PARTS), "model.gelu")


class Checkpoint:
    """A checkpoint of ours as a `sources.Source`: names are our paths."""

    container = "checkpoint"

    def __init__(self, path: Path) -> None:
        """Reads all parameters.

        Raises:
            UserError: nothing complete there, or a file of it is missing or changed.
        """
        params, self.meta, _ = checkpoint.open_for_inference(path)
        self.path, self.files, self.skipped = path, (), {}
        self._arrays = dict(flatten(params))
        self.tensors = {
            name: Tensor(array.shape, array.dtype) for name, array in sorted(self._arrays.items())
        }

    def read(self, name: str) -> np.ndarray:
        """Returns an array, which is let go here."""
        return self._arrays.pop(name)

    def close(self) -> None:
        """Lets go of the arrays."""
        self._arrays = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one of ours: a step, a folder of steps, or a workdir."""
    steps = [path / "params", path / "checkpoints", *path.glob("[0-9]*/params")]
    return path.is_dir() and any(step.is_dir() for step in steps)


def starter(config: ConfigDict, vocabulary_sha256: str = "") -> Callable[[Params], Params] | None:
    """Returns what turns the drawn parameters of a run into those it starts with; None without `config.init_from`.

    A checkpoint whose vocabulary is another than that of the data, `vocabulary_sha256`, is used with a warning.
    """
    if not config.init_from:
        return None
    return lambda drawn: parameters(config, drawn, vocabulary_sha256)


def parameters(config: ConfigDict, drawn: Params, vocabulary_sha256: str = "") -> Params:
    """Reads what `config.init_from` names, one or several joined by commas, into a run's parameters.

    Args:
        config: resolved; reads init_from, system and model.
        drawn: initial values, placed on the mesh.
        vocabulary_sha256: of the run's data; "" = not compared.

    Returns:
        `drawn`, each parameter that the files have replaced and placed like the one before; the log says which stay.

    Raises:
        UserError: a file cannot be used or does not fit, all that does not fit in one sorted report.
    """
    known, leaves = tables.get(config.system), dict(flatten(drawn))
    with contextlib.ExitStack() as stack:
        names = [name.strip() for name in config.init_from.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(
                f"config.init_from={config.init_from!r} has an empty part, or one twice. Give each once."
            )
        paths = [Path(name).expanduser() for name in names]
        opened = [stack.enter_context(_open(path)) for path in paths]
        readings = [engine.match(source, _table(source, known.TABLES)) for source in opened]
        for reading in readings:
            _compare(reading, config)
            _compare_vocabulary(reading, vocabulary_sha256)
        plan = engine.check(
            readings, {path: tuple(x.shape) for path, x in leaves.items()}, known.HEADS, known.RESIZE
        )
        _tell(plan, config.system)
        filled = plan.fill({path: _whole(leaves[path]) for path in plan.resized}, Resizer(known.RESIZE))
    for path, array in filled.items():
        leaves[path] = _placed(array, leaves[path])
    return nest(leaves.items())


def _open(path: Path) -> Source:
    return Checkpoint(path) if is_checkpoint(path) else sources.open_source(path)


def _table(source: Source, known: tuple[Table, ...]) -> Table:
    if not isinstance(source, Checkpoint):
        return engine.recognise(source, known)
    return Table(
        "checkpoint of vlp_jax", tuple(Row(name, name) for name in source.tensors), marks=(), complete=True
    )


def _compare(reading: engine.Reading, config: ConfigDict) -> None:
    """Looks at what shapes do not show.

    Raises:
        UserError: another number of heads: the weights would mean something else.
    """
    if isinstance(reading.source, Checkpoint):
        theirs: Mapping[str, Any] = {key: _get(reading.source.meta["config"], key) for key in SHARED}
    else:
        # The original's number of heads, which its file does not say.
        theirs = {key: value for key, value in reading.table.defaults.items() if key.endswith("num_heads")}
        theirs |= {setting.key: setting.value for setting in settings.beside(reading)}
    for key in SHARED:
        ours = _get(config.to_dict(), key)
        if theirs.get(key) is None or theirs[key] == ours:
            continue
        if key.endswith("num_heads"):
            raise UserError(
                f"config.init_from: {reading.source.path} has {theirs[key]} attention heads, but config.{key} is {ours}. "
                f"Set config.{key}={theirs[key]}."
            )
        log.warning("%s was trained with %s %s, this run has %s", reading.source.path, key, theirs[key], ours)


def _compare_vocabulary(reading: engine.Reading, sha256: str) -> None:
    facts = reading.source.meta.get("facts", {}) if isinstance(reading.source, Checkpoint) else {}
    theirs = facts.get("vocabulary_sha256", sha256)
    if sha256 and theirs != sha256 and "text_embed/word" in reading.shapes:
        log.warning(
            "%s was trained with another vocabulary (sha256 %s...) than the data has (%s...): its rows of the word table "
            "belong to other pieces", reading.source.path, theirs[:12], sha256[:12],
        )  # fmt: skip


def _get(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _tell(plan: engine.Plan, system: str) -> None:
    for reading in plan.readings:
        log.info("parameters from %s (%s)", reading.source.path, reading.table.name)
    kinds = {"fresh": plan.fresh, "a copy": plan.copied, "not taken": plan.unused}
    for kind, reasons in kinds.items():
        for path, why in reasons.items():
            log.info("  %s: %s (%s)", kind, path, why)
    for path, (old, new) in plan.resized.items():
        if tables.get(system).RESIZE[path] == "answers":
            more = next(one.more for one in tables.get(system).CLASSES if path.startswith(_head(one)))
            log.info("  fresh: %s (which of its %d classes are which is not known)", path, old[-1] - more)
            continue
        log.info("  resized: %s from %s to %s", path, list(old), list(new))


def _head(classes: Classes) -> str:
    """What the paths of a head begin with: "heads/answer/"."""
    return "/".join(classes.ends[0].split("/")[:2]) + "/"


def _whole(leaf: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    array = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
