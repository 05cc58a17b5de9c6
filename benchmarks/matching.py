# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.matching [--repeats=15] [--solves=10] [--record]

objectives/matching.py against optax.assignment under vmap, on DETR's costs: 8 pictures, their 6 decoder layers at once,
targets padded to 100, and a decoder whose queries are still alike, the hardest case. Wanted: 3 times as fast.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags as absl_flags

from benchmarks import measure, results
from benchmarks.measure import Program, Timing
from vlp_jax import cli
from vlp_jax.objectives import matching

HEAD = ["batch x query x target", "program", "min ms", "median ms", "CPU ms", "x by median"]
CLASSES = 92  # DETR's on COCO
PADDING = 22.0  # above DETR's largest cost, 5 * 4 + 2 * 1


@dataclasses.dataclass(frozen=True)
class Case:
    """What is matched at once."""

    batch: int
    queries: int
    targets: int
    most: int  # real targets of a picture; from 1 to this
    spread: float  # of the queries' boxes, 1 = anywhere, half of them near a target; 0 = all in one place

    @property
    def name(self) -> str:
        """Sizes and, where they are unusual, targets and queries."""
        real = f", {self.most} real" if self.most < self.targets else ""
        return (
            f"{self.batch}x{self.queries}x{self.targets}{real}{', queries alike' if self.spread < 1 else ''}"
        )


CASES = (
    Case(8, 100, 20, 20, 1.0),
    Case(48, 100, 20, 20, 1.0),
    Case(8, 100, 100, 20, 1.0),
    Case(48, 100, 20, 20, 0.01),
)


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=15)
    common = {"flag_values": flags}
    absl_flags.DEFINE_integer("solves", 10, "batches that a repetition matches, each drawn anew", 1, **common)
    absl_flags.DEFINE_integer("batch", 0, "rows in every case, to see that all of it runs", 0, **common)


def main(flags: absl_flags.FlagValues) -> None:
    """Checks that both find assignments of one cost, measures them by turns and prints one table."""
    before = measure.start(flags, peers=())
    cases = [dataclasses.replace(case, batch=flags.batch or case.batch) for case in CASES]
    programs = []
    for case in cases:
        draws = [draw(case, seed) for seed in range(flags.solves)]
        found = []
        for name, function in (("ours", matching.match), ("optax", by_optax)):
            run = jax.jit(function).lower(*draws[0]).compile()
            found.append([run(*each) for each in draws])
            programs.append(_program(f"{case.name}: {name}", run, draws))
        for each, ours, theirs in zip(draws, *found, strict=True):
            np.testing.assert_allclose(totals(each[0], ours), totals(each[0], theirs), rtol=1e-5, atol=1e-5)
    timings, load = measure.compare(programs, flags.repeats, before)
    what = f"float32, 1 to 20 real targets a picture, median of {flags.repeats} repetitions of {flags.solves} batches"
    rows = table(cases, timings, flags.solves)
    section = results.section("Matching against optax", what, load, ("jax", "optax"), rows)
    measure.check_undisturbed(load, flags.loaded)
    if flags.record:
        results.append([section])


def _program(name: str, run: Callable, draws: Sequence[tuple[jax.Array, jax.Array]]) -> Program:
    def whole() -> None:
        for each in draws:
            run(*each).block_until_ready()  # as a step waits for it

    return Program(name, whole)


def by_optax(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """What `matching.match` returns, by optax; padded targets cost the same with every query."""

    def one(cost: jax.Array, real: jax.Array) -> jax.Array:
        query, target = optax.assignment.hungarian_algorithm(jnp.where(real[None], cost, PADDING))
        found = jnp.full(real.shape, -1, jnp.int32).at[target].set(query.astype(jnp.int32))
        return jnp.where(real, found, -1)

    return jax.vmap(one)(cost, jnp.arange(cost.shape[2])[None] < valid[:, None])


def totals(cost: jax.Array, found: jax.Array) -> np.ndarray:
    """The cost of each row's assignment, in float64."""
    taken = np.take_along_axis(np.asarray(cost, np.float64), np.maximum(found, 0)[:, None], 1)[:, 0]
    return np.where(np.asarray(found) >= 0, taken, 0.0).sum(1)


def draw(case: Case, seed: int) -> tuple[jax.Array, jax.Array]:
    """DETR's matching costs, -probability + 5 L1 - 2 GIoU, of drawn boxes, and the counts of real targets."""
    random = np.random.default_rng(seed)
    batch, queries, targets = case.batch, case.queries, case.targets

    def boxes(count: int) -> np.ndarray:
        return random.uniform([0.2, 0.2, 0.05, 0.05], [0.8, 0.8, 0.4, 0.4], (batch, count, 4))

    wanted, given = boxes(targets), boxes(queries)
    near = np.take_along_axis(wanted, random.integers(0, targets, (batch, queries, 1)), 1)
    near = np.clip(near + random.normal(0, 0.03, given.shape), 0.02, 0.98)
    given = np.where(random.random((batch, queries, 1)) < 0.5, near, given)
    given = case.spread * given + (1 - case.spread) * np.array([0.5, 0.5, 0.2, 0.2])
    logits = case.spread * random.normal(0, 3, (batch, queries, CLASSES))
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    label = np.broadcast_to(random.integers(0, CLASSES - 1, (batch, 1, targets)), (batch, queries, targets))
    distance = np.abs(given[:, :, None] - wanted[:, None]).sum(-1)
    cost = 5 * distance - np.take_along_axis(probability, label, 2) - 2 * giou(given, wanted)
    valid = random.integers(1, case.most + 1, batch)
    return jnp.asarray(cost, jnp.float32), jnp.asarray(valid, jnp.int32)


def giou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Generalised intersection over union of all pairs of boxes `cx cy w h`."""
    ends = [(b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2) for b in (first, second)]
    (low, high), (other_low, other_high) = ends
    low, high, other_low, other_high = (
        low[:, :, None],
        high[:, :, None],
        other_low[:, None],
        other_high[:, None],
    )
    shared = np.maximum(np.minimum(high, other_high) - np.maximum(low, other_low), 0).prod(-1)
    whole = (np.maximum(high, other_high) - np.minimum(low, other_low)).prod(-1)
    union = (high - low).prod(-1) + (other_high - other_low).prod(-1) - shared
    return shared / union - (whole - union) / whole


def table(cases: Sequence[Case], timings: Sequence[Timing], solves: int) -> list[list[str]]:
    """Rows of text, the head first: milliseconds a batch, and how many times as fast as optax, by the median."""
    rows = [HEAD]
    for place, case in enumerate(cases):
        pair = timings[2 * place : 2 * place + 2]
        medians = [statistics.median(timing.wall) for timing in pair]
        for name, timing, median in zip(("ours", "optax"), pair, medians, strict=True):
            values = (min(timing.wall), median, statistics.median(timing.cpu))
            rows.append(
                [
                    case.name,
                    name,
                    *(f"{value / solves * 1e3:.2f}" for value in values),
                    f"{medians[1] / max(median, 1e-9):.1f}",
                ]
            )
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
