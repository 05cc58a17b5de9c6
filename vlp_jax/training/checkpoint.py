# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, committed by rename, digested, verified before use. The only orbax import.

A step directory holds `params`, `ema` if kept, `state` (step, optimizer, extra, rng), `meta` (JSON), `assets`
(plain files) and, last of all, `digests.<process>.json`. A step without all of its digests does not exist for
resume: orbax checks no array bytes, and a flipped one would give silently wrong parameters.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlp_jax.files import save
from vlp_jax.parallel import processes
from vlp_jax.training.digests import (
    BARRIER_SECONDS,
    complete_steps,
    damaged,
    is_complete,
    verify,
    write_digests,
)
from vlp_jax.training.paths import flatten, nest
from vlp_jax.types import ENVIRONMENT, Params, UserError

FILE_SIZE = 1 << 27  # bytes of a data file of a converted checkpoint, at least


class Checkpointer:
    """Saves and restores the state of one run in `directory`, `<directory>/<step>/...`."""

    def __init__(
        self, directory: str | Path, *, keep: int, best: str = "", asynchronous: bool = True
    ) -> None:
        """Writes nothing yet.

        Args:
            directory: made at the first save.
            keep: newest steps that stay; the newest finite one and the best one stay besides.
            best: metric whose highest value is kept for ever; "" = none.
            asynchronous: whether `save` returns as soon as the arrays are copied to the host.
        """
        self._directory = Path(directory).absolute()
        self._keep, self._best, self._asynchronous = max(keep, 1), best, asynchronous
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        assets: Mapping[str, bytes | str],
        metrics: Mapping[str, float],
    ) -> bool:
        """Saves a `TrainState`; returns whether it did.

        A step that is already complete is left alone: the same run makes the same bits.

        Raises:
            UserError: disk full, no permission (now, or in the save before); older steps are untouched.
        """
        path = self._directory / str(step)
        self.wait()
        if is_complete(path):
            return False
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["meta"] = ocp.args.JsonSave({**meta, "step": step, "metrics": dict(metrics)})
        processes.meet("save")  # orbax's own meetings are collectives
        with self._explaining(path):
            self._prepare(path)
            self._orbax.save(path, args=ocp.args.Composite(**items))
        self._pending = self._thread.submit(self._finish, path, dict(assets))
        if not self._asynchronous:
            self.wait()
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns (state, meta) of a step (default: the newest), each array placed as `abstract_state` says.

        Args:
            abstract_state: a `TrainState` of `ShapeDtypeStruct`s with shardings, of any mesh.

        Raises:
            UserError: no such step, a file of it missing or changed, or other parameters than wanted.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self._directory} holds no complete checkpoint. Start a new run.")
        path = self._directory / str(step)
        verify(path)
        items = _items(abstract_state)
        _check_tree(path, "params", items["params"])
        if "ema" in items:
            _check_tree(path, "ema", items["ema"])
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            restored = orbax.restore(path, args=ocp.args.Composite(**args))
        state = dict(restored.state)
        state = {
            name: state.get(name, getattr(abstract_state, name))
            for name in ("step", "opt_state", "extra", "rng")
        }
        ema = restored.ema if "ema" in items else {}
        return dataclasses.replace(abstract_state, params=restored.params, ema=ema, **state), _read_meta(path)

    def latest(self) -> int | None:
        """The newest step that is committed with all its digests, or None."""
        return max(complete_steps(self._directory), default=None)

    def check(self) -> None:
        """Raises what a save in the background has failed with; call it at every log interval."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background and raises what it has failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and gives the threads back."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def _prepare(self, path: Path) -> None:
        if self._orbax is None:
            _silence_orbax()
            # Folders made in the background would report a closed one only after 300 seconds.
            options = ocp.AsyncOptions(timeout_secs=BARRIER_SECONDS, create_directories_asynchronously=False)
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                for leftover in self._directory.iterdir():
                    half = leftover.name.isdigit() and not is_complete(leftover)
                    if half or ".orbax-checkpoint-tmp" in leftover.name:
                        shutil.rmtree(leftover)
        elif jax.process_index() == 0 and path.exists():
            shutil.rmtree(path)

    def _finish(self, path: Path, assets: Mapping[str, bytes | str]) -> None:
        with self._explaining(path):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                (path / "assets").mkdir()
                for name, content in assets.items():
                    save(path / "assets" / name, content)
            write_digests(path)
            processes.meet("digests")  # complete only now
            if jax.process_index() == 0:
                self._delete_old()

    def _delete_old(self) -> None:
        steps = complete_steps(self._directory)
        metas = {step: _read_meta(self._directory / str(step)) for step in steps}
        for step in set(steps) - preserved(metas, self._keep, self._best):
            path = self._directory / str(step)
            # Digests first: what is left by a kill in between is no candidate for resume.
            for file in path.glob("digests.*.json"):
                file.unlink()
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _explaining(self, path: Path) -> Iterator[None]:
        """Makes a UserError of what the environment is at fault for, after removing what is half written."""
        try:
            yield
        except Exception as error:
            if (number := _environment(error)) is None:
                raise
            if jax.process_index() == 0:
                self._remove_half(path)
            left = ", ".join(map(str, complete_steps(self._directory))) or "none"
            raise UserError(
                f"The checkpoint of step {path.name} could not be written to {self._directory}: "
                f"{os.strerror(number)}. Complete steps there: {left}. Make room or give permission, and start "
                "the same command again."
            ) from error

    def _remove_half(self, path: Path) -> None:
        for _ in range(20):  # orbax's other threads may still be writing into it
            halves = list(self._directory.glob(f"{path.name}.orbax-checkpoint-tmp*"))
            halves += [path] if path.exists() and not is_complete(path) else []
            if not halves:
                return
            for half in halves:
                shutil.rmtree(half, ignore_errors=True)
            time.sleep(0.1)


def preserved(metas: Mapping[int, Mapping[str, Any]], keep: int, best: str) -> set[int]:
    """Which steps stay: the newest `keep`, the newest finite one, and the first of the highest `best` metric."""
    steps = sorted(metas)
    finite = [step for step in steps if metas[step].get("finite", True)]
    kept = {*steps[-keep:], *finite[-1:]}
    scores = {step: metas[step].get("metrics", {}).get(best, math.nan) for step in finite}
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    return kept | ({max(scores, key=scores.get)} if scores else set())


def write(path: Path, params: Params, meta: Mapping[str, Any], assets: Mapping[str, bytes | str]) -> None:
    """Writes a checkpoint without optimizer state, as `convert` makes it, into the folder `path`, which is made.

    Not atomic by itself: a folder is complete when its digests are there, which come last.
    """
    _silence_orbax()
    params = jax.tree.map(np.asarray, params)  # the only type that `_lean` writes
    # Several files, so that several threads hash them. An array larger than its file would be copied to be written.
    size = max([FILE_SIZE, *(array.nbytes for array in jax.tree.leaves(params))])
    items = {
        "params": ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=size),
        "meta": ocp.args.JsonSave(dict(meta)),
    }
    handlers = {"params": _lean(), "meta": ocp.JsonCheckpointHandler()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as orbax:
            orbax.save(path.absolute(), args=ocp.args.Composite(**items))
    except Exception as error:
        if (number := _environment(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    (path / "assets").mkdir()
    for name, content in assets.items():
        save(path / "assets" / name, content)
    write_digests(path)


def _lean() -> ocp.PyTreeCheckpointHandler:
    """Writes numpy arrays from where they lie. Orbax alone copies all of them, and holds them all packed besides.

    Weights are 8 % shorter packed by zstd, and that takes longer than all the rest.
    """
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def restore_params(path: str | Path) -> Params:
    """Returns the parameters at `path` as numpy arrays.

    Args:
        path: a step directory, a `checkpoints` directory or a workdir (of these, the newest finite step).

    Raises:
        UserError: nothing complete there, a file missing or changed.
    """
    path = _resolve(Path(path))
    verify(path, ("params", "meta"))
    return _arrays(path, "params")


def open_for_inference(
    path: str | Path, averages: bool = False
) -> tuple[Params, dict[str, Any], dict[str, Path]]:
    """Returns (parameters as nested dict of numpy arrays, meta, assets by file name) of a checkpoint.

    Args:
        path: as for `restore_params`.
        averages: take the moving average in place of each parameter that has one.

    Raises:
        UserError: as `restore_params`, a missing or changed asset, or no averages where they are wanted.
    """
    path = _resolve(Path(path))
    verify(path, ("assets",))
    params = restore_params(path)
    if averages:
        if not (path / "ema").is_dir():
            raise UserError(
                f"Checkpoint {path} holds no moving averages: config.ema.decay of its run was 0. Use its parameters."
            )
        verify(path, ("ema",))
        params = nest((dict(flatten(params)) | dict(flatten(_arrays(path, "ema")))).items())
    meta = {**_read_meta(path), "averages": averages}
    return params, meta, {file.name: file for file in sorted((path / "assets").iterdir())}


def _environment(error: Exception) -> int | None:
    """The error number where the environment is at fault, also for what tensorstore raises."""
    found = re.search(r"os_error_code='(\d+)'", str(error))  # as it ends its messages
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number if number in ENVIRONMENT else None


def _arrays(path: Path, item: str) -> Params:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path / item).tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.Checkpointer(handler) as orbax:
        return orbax.restore(path / item, args=ocp.args.PyTreeRestore(restore_args=wanted))


def _items(state: Any) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "extra": state.extra, "rng": state.rng}
    items = {
        "params": state.params,
        "state": {name: tree for name, tree in rest.items() if jax.tree.leaves(tree)},
    }
    return {**items, "ema": state.ema} if jax.tree.leaves(state.ema) else items


def _resolve(path: Path) -> Path:
    """The step directory that a checkpoint path of any kind means."""
    path = path.expanduser().absolute()
    if (path / "params").is_dir():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    metas = {step: _read_meta(directory / str(step)) for step in complete_steps(directory)}
    finite = [step for step, meta in metas.items() if meta.get("finite", True)]
    if not finite:
        there = "holds no complete checkpoint" if path.is_dir() else "is no folder"
        given = there if path.exists() else "does not exist"
        raise UserError(
            f"{path} {given}. Possible: a workdir, its folder checkpoints, or one step in it. Give one of these, "
            "or train first."
        )
    return directory / str(max(finite))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise damaged(path, "meta/metadata", "is missing or unreadable") from error


def _check_tree(path: Path, item: str, wanted: Any) -> None:
    """Compares names and shapes with what an item holds.

    Raises:
        UserError: one sorted report of missing, unexpected and mis-shaped arrays.
    """
    if not (path / item).is_dir():
        raise UserError(
            f"Checkpoint {path} has no {item}, but this configuration needs it. Use the run's own config."
        )
    held = _shapes(ocp.PyTreeCheckpointHandler().metadata(path / item).tree)
    shapes = _shapes(wanted)
    lines = [f"  missing {name} {shapes[name]}" for name in shapes.keys() - held.keys()]
    lines += [f"  unexpected {name} {held[name]}" for name in held.keys() - shapes.keys()]
    lines += [
        f"  shape of {name}: {held[name]}, wanted {shapes[name]}"
        for name in shapes.keys() & held.keys()
        if shapes[name] != held[name]
    ]
    if lines:
        report = "\n".join(sorted(lines)[:20])
        raise UserError(
            f"Checkpoint {path}: {item} does not fit this configuration in {len(lines)} of {len(shapes)} arrays.\n"
            f"{report}\nUse the config it was written with (config.json of its workdir, or its meta)."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
        for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    }


@functools.cache  # once a process
def _silence_orbax() -> None:
    """Leaves the one failure that is raised to us: orbax prints it three times besides, with tracebacks.

    Its event loop ends with the first failed write; what the others then have to say is printed one by one.
    """
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_abandoned)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = functools.partial(_not_late, sys.unraisablehook)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _not_late(report: Callable[[Any], None], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)
