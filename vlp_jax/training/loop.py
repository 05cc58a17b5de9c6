# SPDX-License-Identifier: Apache-2.0
"""The one loop: restore or initialise, then step, log, evaluate and save until the last step.

It knows the `System` protocol, never a system, and gets its data as a function of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import processes, shard
from vlp_jax.systems.base import System
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.hooks import Meter, Signals, Watchdog
from vlp_jax.training.state import TrainState, initial_state, moving_average
from vlp_jax.training.step import make_train_step
from vlp_jax.training.window import Window
from vlp_jax.training.writers import Writers
from vlp_jax.types import Batch, Params, Stop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the main hands to the loop beside config and system."""

    batches: Callable[
        [int], Iterator[Mapping[str, np.ndarray]]
    ]  # from a step on: this host's rows of each batch
    spec: Batch  # key -> shape and type of the global batch
    evaluate: Callable[[Params], dict[str, float]] | None  # "itm/accuracy" -> value, on the validation split
    assets: Mapping[str, bytes]  # files that a checkpoint needs to be used without the data
    initial: Callable[[Params], Params] | None  # drawn parameters -> those that the run starts with
    meta: Mapping[str, object]  # written into every checkpoint: resolved config, versions, data


def run(config: ConfigDict, system: System, inputs: Inputs, workdir: Path, mesh: Mesh) -> TrainState:
    """Trains to `config.train.steps` and returns the last state.

    Raises:
        UserError: the batch does not divide over the mesh, or the checkpoint does not fit.
        Stop: 75 after SIGTERM and 130 after Ctrl-C, both after saving; 1 for too many non-finite steps.
    """
    meshes.check_batch_size(
        "config.train.batch_size", config.train.batch_size, mesh, config.train.accumulation
    )
    keeping = {name: config.checkpoint[name] for name in ("keep", "best", "asynchronous")}
    checkpointer = Checkpointer(workdir / "checkpoints", **keeping)
    with contextlib.closing(checkpointer), shard.context(mesh, config.parallel.rules), Signals() as signals:
        optimizer = optimizers.make(config.optimizer, config.train.steps)
        state, saved = _start(config, system, optimizer, inputs, checkpointer, mesh)
        start = int(state.step)
        writers = Writers(workdir, config.train.steps, start)
        if start >= config.train.steps:
            log.info("All %d steps are done.", start)
            return state
        step = _Programs(
            jax.jit(
                make_train_step(config, system, optimizer),
                donate_argnums=0,
                out_shardings=(shard.shardings(state), shard.replicated(mesh)),
            )
        )
        work = _Work(config, inputs, checkpointer, writers, Window(config.train.max_skipped, saved))
        with Watchdog(config.train.watchdog) as watchdog, writers:
            batches, place = inputs.batches(start), meshes.placer(mesh)
            for number in range(start + 1, config.train.steps + 1):
                waited = time.perf_counter()
                batch = place(next(batches))
                work.meter.waited(time.perf_counter() - waited)
                state, metrics = step(state, batch, work.meter)
                work.window.add(metrics)
                watchdog.feed()
                work.after(number, state, signals)
    return state


class _Programs:
    """The step compiled once for each shape of batch that comes along; buckets of patches give several."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, state: TrainState, batch: Batch, meter: Meter) -> tuple[TrainState, dict]:
        """Runs the step; compiles it first, outside of the meter, where the shapes are new."""
        shapes = tuple(value.shape for value in batch.values())
        if shapes not in self._compiled:
            with meter.paused():
                self._compiled[shapes] = _compiled(self._step, state, batch)
                processes.meet("first step")
        return self._compiled[shapes](state, batch)


def _compiled(step: Any, state: TrainState, batch: Batch) -> Any:
    """Compiles the step for the shapes that it will have and logs how long that took."""
    events, begun = processes.cache_events.copy(), time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds, cache = time.perf_counter() - begun, processes.cache_result(events)
    log.info("train step compiled in %.1f s, compilation cache: %s", seconds, cache)
    return compiled


def _start(
    config: ConfigDict, system: System, optimizer: optimizers.Optimizer, inputs: Inputs, checkpointer: Checkpointer,
    mesh: Mesh,
) -> tuple[TrainState, dict]:  # fmt: skip
    """This run's newest checkpoint, else step 0, perhaps with other parameters; and the saved window."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    example = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in inputs.spec.items()}
    make = initial_state(config, system, optimizer, example)
    target = shard.abstract(make, mesh, config.parallel.rules)
    log.info("%s", optimizer.describe(target.params))
    # A network file system may still show another host an older one.
    latest = json.loads(processes.announced("newest checkpoint", json.dumps(checkpointer.latest())))
    if latest is not None:
        state, meta = checkpointer.restore(target, latest)
        log.info("resumed from step %d", latest)
        return state, meta["window"]
    state = shard.concrete(make, target)
    if inputs.initial:
        params = inputs.initial(state.params)
        # The averages begin with these parameters, not with the drawn ones; in arrays of their own, for donation.
        ema = moving_average(state.ema, params, decay=0.0)
        state = dataclasses.replace(state, params=params, ema=ema)
    return state, {}


@dataclasses.dataclass
class _Work:
    """What happens after a step: log lines, evaluation, checkpoints, stopping."""

    config: ConfigDict
    inputs: Inputs
    checkpointer: Checkpointer
    writers: Writers
    window: Window
    validation: tuple[int, dict[str, float]] = (0, {})  # the last scores, and of which step
    meter: Meter = dataclasses.field(default_factory=Meter)

    def after(self, step: int, state: TrainState, signals: Signals) -> None:
        """Does what is due at this step; leaves by `Stop` when a signal came."""
        train, last = self.config.train, step == self.config.train.steps
        if step % train.log_every == 0 or last:
            self.checkpointer.check()
            means = self.window.close()
            self.writers.write(step, {**means, **self.meter.read(self.config.train.batch_size)})
        if self.inputs.evaluate and (last or self._due(train.evaluate_every, step)):
            with self.meter.paused():
                processes.meet("evaluation")
                self.validation = step, self.inputs.evaluate(state.params)
            self.writers.write(step, {f"validation/{k}": v for k, v in self.validation[1].items()})
        stopping = signals.agreed(step % train.log_every == 0)
        if stopping or last or self._due(self.config.checkpoint.every, step):
            with self.meter.paused():
                self._save(step, state)
        if stopping and not last:
            self.checkpointer.wait()
            raise Stop(
                stopping, f"Saved at step {step} of {train.steps}. Start the same command again to go on."
            )

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _save(self, step: int, state: TrainState) -> None:
        window = self.window.saved()
        meta = {**self.inputs.meta, "window": window, "finite": window["in_a_row"] == 0}
        # Scores of another step would make a step "the best" that was never scored.
        scores = self.validation[1] if self.validation[0] == step else {}
        self.checkpointer.save(step, state, meta, self.inputs.assets, scores)
