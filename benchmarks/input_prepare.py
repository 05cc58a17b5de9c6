# SPDX-License-Identifier: Apache-2.0
"""`prepare folder` and TFDS builds as whole processes: seconds, CPU-seconds and the memory of all their processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import input_data
from benchmarks.results import ROOT

OURS, PEER, CHECKED = "ours, two workers", "TFDS, one process", "TFDS, one process, pictures decoded"
POLL = 0.1  # seconds between looks at the memory


@dataclasses.dataclass(frozen=True)
class Run:
    """One whole process with all that it started: seconds, CPU-seconds, most resident bytes at a time."""

    wall: float
    cpu: float
    peak: int


def measured(folders: Mapping[int, Path], target: Path, repeats: int) -> dict[str, dict[int, Run]]:
    """Runs every program on every folder, by turns, into `target`, which is removed each time.

    Args:
        folders: number of pictures -> what input_data.photographs wrote.
        target: does not exist.
        repeats: 1 and more.

    Returns:
        program -> number of pictures -> the least that any repetition took, of each figure.

    Raises:
        RuntimeError: a program failed, or its data hold another number of records.
    """
    runs: dict[str, dict[int, list[Run]]] = {}
    for repetition in range(repeats):
        for count, folder in folders.items():
            tfds = [sys.executable, "-m", "benchmarks.input_peer", str(folder), str(target)]
            commands = {
                OURS: input_data.prepare_folder(folder, target, 2),
                PEER: tfds,
                CHECKED: [*tfds, "--check"],
            }
            for name, command in list(commands.items())[:: -1 if repetition % 2 else 1]:
                runs.setdefault(name, {}).setdefault(count, []).append(whole(command))
                if (found := records(target)) != count:
                    raise RuntimeError(f"{name} wrote {found} records of {count}")
                shutil.rmtree(target)
        print(f"repetition {repetition + 1} of {repeats}", file=sys.stderr, flush=True)
    names = [field.name for field in dataclasses.fields(Run)]
    return {
        program: {
            count: Run(*(min(getattr(one, name) for one in some) for name in names))
            for count, some in of.items()
        }
        for program, of in runs.items()
    }


def whole(command: Sequence[str]) -> Run:
    """Runs a command to its end and watches it.

    Raises:
        RuntimeError: it failed; its message has been shown on standard error.
    """
    begun, used = time.perf_counter(), children_seconds()
    process, peak = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), 0
    try:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
    finally:
        process.kill()
    wall = time.perf_counter() - begun
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with {process.returncode}")
    return Run(wall, children_seconds() - used, peak)


def resident(pid: int) -> int:
    """Resident bytes of a process and all below it, shared pages counted in each; 0 when it has ended."""
    total = 0
    with contextlib.suppress(OSError):
        total = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += sum(map(resident, map(int, (task / "children").read_text(encoding="ascii").split())))
    return total


def children_seconds() -> float:
    """CPU-seconds of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def records(target: Path) -> int:
    """Records of the train split, in a prepared directory or in what TFDS wrote below `target`."""
    ours = target / "manifest.json"
    if ours.is_file():
        return json.loads(ours.read_bytes())["splits"]["train"]["records"]
    (info,) = target.rglob("dataset_info.json")
    (split,) = json.loads(info.read_bytes())["splits"]
    return sum(map(int, split["shardLengths"]))


def table(runs: Mapping[str, Mapping[int, Run]], small: int, large: int) -> list[list[str]]:
    """Rows of text, the head first; ratios are of the rates between `small` and `large` pictures, against TFDS."""

    def between(name: str) -> tuple[float, float]:
        first, last = runs[name][small], runs[name][large]
        return tuple(
            max(b - a, 1e-6) / (large - small) for a, b in ((first.wall, last.wall), (first.cpu, last.cpu))
        )

    rows = [
        [
            "program",
            f"s for {small}",
            f"s for {large}",
            "1/s between",
            "CPU ms each",
            "x by rate",
            "x, decoded",
        ]
        + [f"MiB at {small}", f"MiB at {large}"]
    ]
    for name, of in runs.items():
        wall, cpu = between(name)
        ratios = (between(peer)[0] / wall for peer in (PEER, CHECKED))
        row = [f"{of[small].wall:.2f}", f"{of[large].wall:.2f}", f"{1 / wall:.0f}", f"{1000 * cpu:.2f}"]
        row += [f"{ratio:.2f}" for ratio in ratios]
        rows.append([name, *row, *(f"{of[count].peak / 2**20:.0f}" for count in (small, large))])
    return rows
