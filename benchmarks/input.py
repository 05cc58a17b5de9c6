# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.input [--parts=pictures,scaling,first,memory,prepare] [--repeats=5] [--record]

The data pipeline on the host: pictures a CPU-second against PyTorch's DataLoader with PIL, from one core to two, the
time to the first batch, memory over many batches, and `prepare` against a TFDS build. Each program has a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from benchmarks import input_data, input_prepare, measure, results
from benchmarks.input_side import SLOTS
from benchmarks.measure import Load, Timing
from vlp_jax import cli
from vlp_jax.types import UserError, closest

PARTS = ("pictures", "scaling", "first", "memory", "prepare")  # keys of MEASURES
BATCH = 16  # of `pictures` and `scaling`
PACKAGES = ("tensorflow-cpu", "torch", "pillow")
WORKERS = {1: "1 worker", 2: "2 workers"}  # of the DataLoader
# Where real photographs lie beside the project's own checkouts.
PHOTOGRAPHS = results.ROOT.parent / "shared" / "realdata" / "coco"
RANDAUGMENT = (2, 9)


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=5)
    common = {"flag_values": flags}
    absl_flags.DEFINE_list("parts", list(PARTS), f"of {', '.join(PARTS)}", **common)
    absl_flags.DEFINE_string(
        "photographs", str(PHOTOGRAPHS), "folder of JPEGs; where it is none, pictures are drawn", **common
    )
    absl_flags.DEFINE_integer("pictures", 512, f"of a repetition, a multiple of {BATCH}", BATCH, **common)
    absl_flags.DEFINE_integer("pairs", 10_000_000, "that `first` has, and starts at", 1000, **common)
    absl_flags.DEFINE_integer("batch", 64, "of `first`", 1, **common)
    absl_flags.DEFINE_integer("batches", 20_000, "of 8 scenes, that `memory` takes", 20, **common)
    absl_flags.DEFINE_list("sizes", ["500", "2000"], "two numbers of pictures, for `prepare`", **common)


def main(flags: absl_flags.FlagValues) -> None:
    """Measures part by part, prints a table each, and records them all or none."""
    for part in flags.parts or [""]:
        if part not in PARTS:
            raise UserError(
                f"--parts has no '{part}'.{closest(part, PARTS)} Possible: {', '.join(PARTS)}. Give one or more."
            )
    if flags.pictures % BATCH:
        raise UserError(f"--pictures={flags.pictures} is no multiple of {BATCH}, the batch. Change it.")
    if (
        len(flags.sizes) != 2
        or not all(size.isdigit() and int(size) for size in flags.sizes)
        or len(set(map(int, flags.sizes))) < 2
    ):
        raise UserError(f"--sizes={','.join(flags.sizes)}. It takes two whole numbers: --sizes=500,2000.")
    before = measure.start(flags, peers=("torch",))
    sections = []
    with tempfile.TemporaryDirectory(prefix="vlp_jax_input_") as folder:
        task = Task(flags, Path(folder), before)
        for part in dict.fromkeys(flags.parts):
            for heading, what, rows, load in MEASURES[part](task):
                packages = (*PACKAGES, "tensorflow-datasets") if part == "prepare" else PACKAGES
                sections.append(results.section(f"Input: {heading}", what, load, packages, rows))
                measure.check_undisturbed(load, flags.loaded)
    if flags.record:
        results.append(sections)


@dataclasses.dataclass(frozen=True)
class Side:
    """A program in a process of its own (benchmarks/input_side.py)."""

    name: str
    process: subprocess.Popen

    def ask(self) -> dict[str, Any]:
        """Lets it do one unit of work and returns its answer.

        Raises:
            UserError: the data or the config is at fault.
            RuntimeError: it ended; its traceback has been shown.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"'{self.name}' ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


@contextlib.contextmanager
def sides(*orders: tuple[str, str, dict[str, Any], Sequence[int]]) -> Iterator[list[Side]]:
    """Starts a process for each (name, kind, options, cores or () for all) and ends them."""
    started = []
    try:
        for name, kind, options, cpus in orders:
            order = json.dumps({"kind": kind, "options": options, "cpus": list(cpus)})
            command = [sys.executable, "-m", "benchmarks.input_side", order]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            started.append(Side(name, subprocess.Popen(command, cwd=results.ROOT, **pipes)))
        yield started
    finally:
        for side in started:
            side.process.kill()
            side.process.wait()
            side.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                side.process.stdin.close()


class Watch:
    """What other processes use, from here to `load`: all CPU-seconds less ours and those that are told by `add`."""

    def __init__(self, before: float):
        self._before, self._highest, self._known = before, before, 0.0
        self._start = measure.others_clock()

    def add(self, cpu: float) -> None:
        """Counts CPU-seconds of a process that we have started."""
        self._known += cpu
        self._highest = max(self._highest, measure.load_average())

    def load(self) -> Load:
        """The load of the time so far."""
        end = measure.others_clock()
        if self._start is None or end is None:
            return Load(self._before, self._highest, None)
        seconds = max(end[0] - self._start[0], 1e-9)
        return Load(self._before, self._highest, max(0.0, (end[1] - self._start[1] - self._known) / seconds))


def by_turns(programs: Sequence[Side], repeats: int, before: float) -> tuple[list[Timing], Load, list[dict]]:
    """Every program once to warm up, then all of them by turns, every second time the other way round.

    Returns:
        timings in the order of `programs`, the load meanwhile, and the answers to the warm-up.
    """
    warm = [side.ask() for side in programs]
    wall, cpu = ({side.name: [] for side in programs} for _ in range(2))
    watch = Watch(before)
    for repetition in range(repeats):
        for side in list(programs)[:: -1 if repetition % 2 else 1]:
            answer = side.ask()
            wall[side.name].append(answer["wall"])
            cpu[side.name].append(answer["cpu"])
            watch.add(answer["cpu"])
        print(f"repetition {repetition + 1} of {repeats}", file=sys.stderr, flush=True)
    timings = [Timing(side.name, tuple(wall[side.name]), tuple(cpu[side.name])) for side in programs]
    return timings, watch.load(), warm


def rates(timings: Sequence[Timing], pictures: int, baseline: Sequence[Timing]) -> list[list[str]]:
    """Rows of text, the head first: pictures a second and a CPU-second, and how many times the best of `baseline`."""

    def values(timing: Timing) -> tuple[float, ...]:
        seconds = (min(timing.wall), statistics.median(timing.wall), min(timing.cpu))
        return tuple(pictures / max(one, 1e-6) for one in seconds)

    base = [max(column) for column in zip(*map(values, baseline), strict=True)]
    rows = [["program", "best 1/s", "median 1/s", "best 1/CPU s", "x by best", "x by median", "x by CPU s"]]
    for timing in timings:
        mine = values(timing)
        ratios = (ours / theirs for ours, theirs in zip(mine, base, strict=True))
        rows.append([timing.name, *(f"{value:.1f}" for value in mine), *(f"{x:.2f}" for x in ratios)])
    return rows


Table = tuple[str, str, list[list[str]], Load]  # heading, what was measured, rows, load


@dataclasses.dataclass
class Task:
    """What the parts share: flags, a folder for their data, and the load before all of it."""

    flags: absl_flags.FlagValues
    folder: Path
    before: float

    def photographs(self) -> tuple[Path, Path, str]:
        """The folder of JPEGs, what `prepare folder` made of it, and what they are, in words."""
        source, target = self.folder / "photographs", self.folder / "prepared"
        originals = self.originals()
        if not source.exists():
            say("writing pictures")
            input_data.photographs(source, self.flags.pictures, originals)
            input_data.run(input_data.prepare_folder(source, target, workers=0))
        kinds = f"made from {len(originals)} photographs" if originals else "drawn"
        return source, target, kinds

    def originals(self) -> list[Path]:
        """The photographs to start from, none where pictures are to be drawn."""
        return sorted(Path(self.flags.photographs).expanduser().rglob("*.jpg"))

    def scenes(self) -> Path:
        """Prepared scenes: one shard to train on."""
        target = self.folder / "scenes"
        if not target.exists():
            say("drawing scenes")
            input_data.run(input_data.prepare_scenes(target, train=256))
        return target


def pictures(task: Task) -> Iterator[Table]:
    """Ours against PIL doing the same, with RandAugment where the config has it, and against the published recipe."""
    folder, prepared, kinds = task.photographs()
    cores, count = len(os.sched_getaffinity(0)), task.flags.pictures
    for augment in (False, True):
        data: dict[str, Any] = {"threads": cores}
        if augment:
            if not has("randaugment"):
                say("no data.randaugment in the config: the rows with RandAugment are left out")
                continue
            data["randaugment"] = RANDAUGMENT
        options = {"directory": str(prepared), "batch": BATCH, "count": count // BATCH, "data": data}
        options["folder"] = "" if augment else str(folder)
        orders = [("ours", "ours", options, ())]
        for published in (False,) if augment else (False, True):
            for workers, words in WORKERS.items():
                name = f"PIL{' as published' if published else ''}, {words}"
                theirs = {"folder": str(folder), "workers": workers, "batch": BATCH}
                orders.append((name, "peer", theirs | {"published": published, "augment": augment}, ()))
        with sides(*orders) as programs:
            timings, load, warm = by_turns(programs, task.flags.repeats, task.before)
        apart = "" if augment else f", on average {warm[0]['apart']:.2f} levels apart"
        what = (
            f"{count} JPEGs {kinds}, 384 pixels, batch {BATCH}, {cores} cores, {task.flags.repeats} repetitions; ours "
            "with texts and masks, PIL without; uint8 patches on both sides; x against the best of PIL"
            + apart
        )
        name = "pictures with RandAugment(2, 9)" if augment else "pictures"
        yield name, what, rates(timings[:3], count, timings[1:3]), load
        if not augment:
            what = "as above; theirs float32, normalised and padded to the largest picture of a batch"
            rows = rates([timings[0], *timings[3:]], count, timings[3:])
            yield "pictures against the recipe as published", what, rows, load


def scaling(task: Task) -> Iterator[Table]:
    """Ours on one core and on two."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise UserError(
            f"`scaling` needs two cores; this process may use {len(cores)}. Leave it out of --parts."
        )
    _, prepared, kinds = task.photographs()
    count, orders = task.flags.pictures, []
    for name, some in (("one core", cores[:1]), ("two cores", cores)):
        options = {"directory": str(prepared), "batch": BATCH, "count": count // BATCH}
        orders.append((name, "ours", options | {"data": {"threads": len(some)}}, some))
    with sides(*orders) as programs:
        timings, load, _ = by_turns(programs, task.flags.repeats, task.before)
    what = f"{count} JPEGs {kinds}, 384 pixels, batch {BATCH}, as many threads as cores, {task.flags.repeats} repetitions"
    yield "one core and two", what, rates(timings, count, timings[:1]), load


def first(task: Task) -> Iterator[Table]:
    """Seconds to the first batch far into a large set; every repetition in a new process."""
    target, batch = task.folder / "many", task.flags.batch
    small = task.folder / "plain"
    input_data.plain(small)
    input_data.run(input_data.prepare_folder(small, task.folder / "plain.prepared", workers=1))
    pairs = input_data.many_pairs(task.folder / "plain.prepared", target, task.flags.pairs)
    kinds = {"one shape": {}} | ({"buckets": {"buckets": SLOTS}} if has("buckets") else {})
    if "buckets" not in kinds:
        say("no data.buckets in the config: the row with buckets is left out")
    wall, cpu = ({name: [] for name in kinds} for _ in range(2))
    watch = Watch(task.before)
    for _ in range(task.flags.repeats):
        for name, data in kinds.items():
            options = {"directory": str(target), "batch": batch, "start": task.flags.pairs // batch}
            used = input_prepare.children_seconds()
            with sides((name, "first", options | {"data": data}, ())) as (side,):
                answer = side.ask()
            watch.add(input_prepare.children_seconds() - used)
            wall[name].append(answer["wall"])
            cpu[name].append(answer["cpu"])
    load = watch.load()
    timings = [Timing(name, tuple(wall[name]), tuple(cpu[name])) for name in kinds]
    what = (
        f"start={task.flags.pairs // batch} x {batch} of {pairs:,} pairs of plain pictures at 384 pixels, without imports, "
        f"{task.flags.repeats} processes each"
    )
    yield "first batch", what, measure.table(timings, "one shape"), load


def memory(task: Task) -> Iterator[Table]:
    """Resident bytes a batch over many small batches."""
    directory, count = str(task.scenes()), task.flags.batches
    watch, used = Watch(task.before), input_prepare.children_seconds()
    with sides(("ours", "slope", {"directory": directory, "batch": 8, "count": count}, ())) as (side,):
        answer = side.ask()
    watch.add(input_prepare.children_seconds() - used)
    rows = [
        ["program", "bytes a batch", "MiB after a quarter", "MiB at the end", "batches/s", "CPU ms a batch"]
    ]
    values = (answer["slope"], answer["first"] / 2**20, answer["last"] / 2**20)
    speed = (count / answer["wall"], 1000 * answer["cpu"] / count)
    rows.append(["ours", *(f"{value:.1f}" for value in values), *(f"{value:.2f}" for value in speed)])
    what = f"resident memory over {count:,} batches of 8 scenes, slope by least squares without the first quarter"
    yield "memory", what, rows, watch.load()


def prepare(task: Task) -> Iterator[Table]:
    """`prepare folder` with two workers against TFDS in one process, on the same pictures."""
    small, large = sorted(int(size) for size in task.flags.sizes)
    folders = {count: task.folder / f"photographs-{count}" for count in (small, large)}
    say("writing pictures")
    originals = task.originals()
    input_data.photographs(folders[large], large, originals)
    input_data.part(folders[large], folders[small], small)
    watch, used = Watch(task.before), input_prepare.children_seconds()
    found = input_prepare.measured(folders, task.folder / "built", task.flags.repeats)
    watch.add(input_prepare.children_seconds() - used)
    kinds = f"made from {len(originals)} photographs" if originals else "drawn"
    size = sum(path.stat().st_size for path in (folders[large] / "images").iterdir()) / large / 1000
    what = (
        f"JPEGs {kinds}, {size:.0f} kB each; whole processes with imports; rates between {small} and {large} pictures "
        f"are without them; memory resident in all processes of a program; least of {task.flags.repeats} repetitions"
    )
    yield "prepare", what, input_prepare.table(found, small, large), watch.load()


MEASURES = {"pictures": pictures, "scaling": scaling, "first": first, "memory": memory, "prepare": prepare}


def has(key: str) -> bool:
    """Whether config.data has this key."""
    from configs import common

    return key in common.get_config().data


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
