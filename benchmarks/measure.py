# SPDX-License-Identifier: Apache-2.0
"""The core of every benchmark: programs by turns in one process, their minima, medians and CPU-seconds, as ratios.

A machine that does other work is refused, because threads that wait for each other suffer from it unequally.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags as absl_flags

from benchmarks import results
from vlp_jax.types import UserError

PEERS = ("torch", "transformers")
BUSY = 0.5  # load average, and cores that others use, from which on a measurement says little
SETTLE = 0.3  # seconds between programs: the threads of the one before go on spinning for a while


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the things to compare: `run()` does a whole unit of work and returns when it is done."""

    name: str
    run: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each repetition: on the clock, and of all threads of this process together."""

    name: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy the machine was: one-minute load averages, and cores that other processes used meanwhile."""

    before: float
    highest: float
    others: float | None  # None where the system does not tell

    def __str__(self) -> str:
        others = "unknown" if self.others is None else f"{self.others:.2f} cores"
        line = f"load {self.before:.2f} before, {self.highest:.2f} at most; others used {others}"
        # Seen: the same PyTorch step at 6.0 CPU-seconds alone and at 15.0 beside other work, ours at 7.3 and 7.5.
        return f"{line}: DISTURBED, no ratio to quote" if self.disturbed else line

    @property
    def disturbed(self) -> bool:
        """Whether others used more than `BUSY` cores; threads that spin for each other then burn what they wait."""
        return self.others is not None and self.others > BUSY


def define(flags: absl_flags.FlagValues, repeats: int) -> None:
    """Adds the flags that every benchmark has."""
    common = {"flag_values": flags}
    absl_flags.DEFINE_integer("repeats", repeats, "repetitions of each program", 1, **common)
    absl_flags.DEFINE_boolean("loaded", False, "measure although the machine does other work", **common)
    absl_flags.DEFINE_boolean("record", False, "append the result to benchmarks/RESULTS.md", **common)


def start(flags: absl_flags.FlagValues, peers: Sequence[str] = PEERS) -> float:
    """Checks what a benchmark needs before it begins and returns the load average.

    Raises:
        UserError: the load average is above `BUSY` without --loaded, a package of `peers` is missing, or --record
            has no file to append to.
    """
    load = load_average()
    if load > BUSY and not flags.loaded:
        raise UserError(
            f"The load average is {load:.2f}; a measurement needs {BUSY} or less. Wait until the machine is idle, or "
            "give --loaded: the load then stands beside the numbers."
        )
    missing = [name for name in peers if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Not installed: {', '.join(missing)}, which this benchmark compares with. "
            "Install them by: pip install -r requirements-oracle.txt"
        )
    if flags.record:
        results.check_there()
    return load


def load_average() -> float:
    """The one-minute load average; 0 where the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def compare(
    programs: Sequence[Program], repeats: int, before: float, settle: float = SETTLE
) -> tuple[list[Timing], Load]:
    """Runs each program twice to warm up, because the first run may compile, and then all of them by turns.

    Every second time the order is turned round.

    Args:
        programs: names must differ.
        repeats: of each, 1 and more.
        before: the load average before the benchmark began, from `start`.
        settle: seconds of rest before each run.

    Returns:
        timings in the order of `programs`, and the load of the time in which they were taken.
    """
    for program in programs:
        _say(f"warming up: {program.name}")
        program.run()
        program.run()
    wall, cpu = ({program.name: [] for program in programs} for _ in range(2))
    highest, start = before, others_clock()
    for repetition in range(repeats):
        for program in list(programs)[:: -1 if repetition % 2 else 1]:
            time.sleep(settle)
            begun = time.perf_counter(), time.process_time()
            program.run()
            wall[program.name].append(time.perf_counter() - begun[0])
            cpu[program.name].append(time.process_time() - begun[1])
            highest = max(highest, load_average())
        _say(f"repetition {repetition + 1} of {repeats}")
    timings = [Timing(p.name, tuple(wall[p.name]), tuple(cpu[p.name])) for p in programs]
    return timings, Load(before, highest, _others_cores(start, others_clock()))


def product_rate(size: int = 2048, tries: int = 20) -> float:
    """FLOPs a CPU-second of a large float32 product, the best of `tries` by PyTorch and by JAX.

    What consists of float32 products cannot be faster than this, whoever computes it.
    """
    import jax
    import jax.numpy as jnp
    import torch

    ours, theirs = jnp.ones((size, size)), torch.ones(size, size)
    product = jax.jit(jnp.matmul)
    seconds = []
    for run in (lambda: product(ours, ours).block_until_ready(), lambda: theirs @ theirs):
        run()
        for _ in range(tries):
            begun = time.process_time()
            run()
            seconds.append(time.process_time() - begun)
    return 2 * size**3 / min(seconds)


def check_undisturbed(load: Load, loaded: bool) -> None:
    """Raises UserError when other processes used the machine during the measurement and `loaded` is not set."""
    if load.disturbed and not loaded:
        raise UserError(
            f"Other processes used {load.others:.2f} cores meanwhile; {BUSY} is the most. Nothing was recorded. Start "
            "again when the machine is idle, or give --loaded."
        )


def table(timings: Sequence[Timing], baseline: str) -> list[list[str]]:
    """Rows of text, the head first: seconds, and how many times as fast as `baseline` each program is."""
    base = _summary(next(timing for timing in timings if timing.name == baseline))
    rows = [["program", "min s", "median s", "min CPU s", "x by min", "x by median", "x by CPU s"]]
    for timing in timings:
        values = _summary(timing)
        ratios = (theirs / ours for theirs, ours in zip(base, values, strict=True))
        rows.append([timing.name, *(f"{v:.3f}" for v in values), *(f"{ratio:.2f}" for ratio in ratios)])
    return rows


def _summary(timing: Timing) -> tuple[float, float, float]:
    # A clock of coarse ticks may give 0 for a toy.
    return tuple(max(x, 1e-6) for x in (min(timing.wall), statistics.median(timing.wall), min(timing.cpu)))


def others_clock() -> tuple[float, float] | None:
    """Seconds on the clock, and CPU-seconds that all but this process have used since the machine started."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, interrupt, soft, stolen = (int(word) for word in words)
    busy = (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy - time.process_time()


def _others_cores(start: tuple[float, float] | None, end: tuple[float, float] | None) -> float | None:
    if start is None or end is None:
        return None
    return max(0.0, (end[1] - start[1]) / max(end[0] - start[0], 1e-9))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
