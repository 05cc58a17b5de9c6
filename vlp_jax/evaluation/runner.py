# SPDX-License-Identifier: Apache-2.0
"""One pass over the evaluation batches that feeds every task; what all tasks share lies here.

A task is made once and used for any number of passes, so that what it compiles is compiled once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlp_jax.parallel.mesh import placer
from vlp_jax.types import Array, Batch, Params, UserError

PICTURE_KEYS = ("patches", "patch_mask", "image", "image_mask")


class Task(Protocol):
    """What an evaluation measures."""

    def begin(self) -> None:
        """Forgets the last pass."""

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Takes a batch that lies on the mesh; `index` is its number in the pass."""

    def result(self, params: Params) -> dict[str, float]:
        """Returns the scores as fractions in [0, 1], under the names that evaluation.json has."""


def evaluate(
    system: Any,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    tasks: Sequence[Task],
    mesh: Mesh,
    examples: int | None = None,
) -> dict[str, float]:
    """Runs one pass and returns the scores of all tasks.

    Call it inside `parallel.shard.context`. With several processes each gives its own rows, all give the same
    number of batches, and all get the same scores.

    Args:
        system: a `systems.base.System`; named in the error.
        params: its parameters on `mesh`.
        batches: this host's rows of each global batch; rows of `example_id` -1 are never counted.
        tasks: what to measure.
        mesh: the devices.
        examples: how many there are, for the time left.

    Raises:
        UserError: there is no example at all.
    """
    place, count = placer(mesh), 0
    for task in tasks:
        task.begin()
    with progress("evaluate", "examples", examples) as bar:
        for index, batch in enumerate(batches):
            placed = place(batch)
            for task in tasks:
                task.update(params, placed, index)
            counted = int(np.sum(fetch(placed["example_id"]) >= 0))
            count += counted
            bar.update(counted)
    if not count:
        raise UserError(
            f"The evaluation of {type(system).__name__} got 0 examples; at least 1 is needed. "
            "Choose another split or data directory (config.evaluation.split, config.data.dir)."
        )
    return {name: value for task in tasks for name, value in task.result(params).items()}


def progress(label: str, unit: str, total: int | None = None) -> tqdm.tqdm:
    """A progress bar on standard error, of the first process only; short work shows none."""
    seldom = not sys.stderr.isatty()
    return tqdm.tqdm(
        desc=label,
        unit=f" {unit}",
        total=total,
        file=sys.stderr,
        mininterval=30.0 if seldom else 0.5,
        delay=30.0 if seldom else 1.0,
        leave=False,
        disable=jax.process_index() != 0,
    )


def withhold(batch: Batch) -> dict[str, Array]:
    """The blind twin of a batch: no picture is left, neither its content nor which slots it fills."""
    return {
        key: jnp.zeros(value.shape, value.dtype, device=value.sharding) if key in PICTURE_KEYS else value
        for key, value in batch.items()
    }


def fetch(tree: Any) -> Any:
    """Brings arrays of the mesh, whole, to every process as numpy arrays."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def ratio(part: float, whole: float) -> float:
    """`part / whole`, 0 where nothing was counted."""
    return float(part) / float(whole) if whole else 0.0


def picture_rows(batch: Batch, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Fetches the pictures of some rows of a batch of patches; empty ones where there are no patches."""
    names = [name for name in ("patches", "patch_positions", "patch_mask", "grid_size") if name in batch]
    if not len(rows):
        return []
    columns = fetch({name: batch[name] for name in names})
    return [{name: column[row] for name, column in columns.items()} for row in rows]
