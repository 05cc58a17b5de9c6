# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.convert [--models=768x12,1024x36] [--containers=safetensors,ckpt] [--repeats=5] [--record]

Importing ViLT's weights: peak memory above that of the imports, and seconds against reading the file plus a plain orbax
save of the same arrays. Files of drawn weights in the original's names are made; every measurement has a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags
from ml_collections import ConfigDict

from benchmarks import measure, results
from benchmarks.input import Watch
from benchmarks.measure import Load, Timing
from vlp_jax import cli, systems
from vlp_jax.convert import command, importing, writing
from vlp_jax.convert.sources import safetensors_file
from vlp_jax.convert.tables import vilt
from vlp_jax.training.paths import nest
from vlp_jax.types import UserError, closest

CONTAINERS = ("safetensors", "ckpt")  # ckpt: as Lightning saves, by torch
PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "numpy")
OURS, READ, SAVE = "conversion", "reading the file", "orbax save"
TINY = (64, 1, 99)  # width, layers, words: the conversion that imports everything
WORDS = 30522
PEAKS = ["file", "GB", "proof", "imports, GB", "peak above them, GB", "x file, median", "x file, least"]
WALLS = [
    "file",
    "program",
    "min s",
    "median s",
    "min CPU s",
    "x both by min",
    "x both by median",
    "x by CPU s",
]
DRAWN = 1 << 22  # numbers; they are repeated
READ_SIZE = 1 << 22  # bytes
HEAD = 64  # numbers a head


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=5)
    common = {"flag_values": flags}
    # ViLT-B/32 with both heads of pretraining, 0.54 GB, and 2.09 GB.
    absl_flags.DEFINE_list("models", ["768x12", "1024x36"], "width x layers of each file", **common)
    absl_flags.DEFINE_list(
        "containers", list(CONTAINERS), f"of {', '.join(CONTAINERS)}; ckpt needs torch", **common
    )
    absl_flags.DEFINE_integer("words", WORDS, "rows of the word table", 1, **common)
    absl_flags.DEFINE_boolean("proof", True, "measure memory with the proof, too (needs torch)", **common)


def main(flags: absl_flags.FlagValues) -> None:
    """Measures every file, prints a table of memory and one of time, and records both or none."""
    for name in flags.containers or [""]:
        if name not in CONTAINERS:
            raise UserError(
                f"--containers has no '{name}'.{closest(name, CONTAINERS)} Possible: {', '.join(CONTAINERS)}. Give "
                "one or more."
            )
    models = [sizes(text) for text in flags.models or [""]]
    torch_needed = "ckpt" in flags.containers or flags.proof
    before = measure.start(flags, peers=("torch",) if torch_needed else ())
    peaks, walls, loads = [PEAKS], [WALLS], []
    with tempfile.TemporaryDirectory(prefix="vlp_jax_convert_") as folder:
        task = Task(Path(folder), flags.repeats, before)
        task.make(TINY, task.tiny)
        for width, depth in models:
            for container in dict.fromkeys(flags.containers):
                file = task.folder / f"vilt-{width}x{depth}.{container}"
                task.make((width, depth, flags.words), file)
                for proof in (False, True) if flags.proof else (False,):
                    peaks.append(peak_row(file, task.peaks(file, proof), proof))
                timings, load = task.timings(file)
                walls += wall_rows(file, timings)
                loads.append(load)
                file.unlink()
    load = together(loads)
    what = f"ViLT's weights, float32, {flags.repeats} repetitions, page cache warm"
    packages = (*PACKAGES, "torch") if torch_needed else PACKAGES
    sections = [
        results.section(f"Convert: {heading}", what, load, packages, rows)
        for heading, rows in (("memory", peaks), ("time", walls))
    ]
    measure.check_undisturbed(load, flags.loaded)
    if flags.record:
        results.append(sections)


def sizes(text: str) -> tuple[int, int]:
    """Width and layers of "768x12".

    Raises:
        UserError: it is something else, or the width is no multiple of a head's.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,2})", text)
    if found is None or int(found[1]) % HEAD:
        raise UserError(
            f"--models has '{text}'. It takes width x layers, the width a multiple of {HEAD}: --models=768x12,1024x36."
        )
    return int(found[1]), int(found[2])


def together(loads: Sequence[Load]) -> Load:
    """The worst of several loads."""
    others = [load.others for load in loads if load.others is not None]
    return Load(loads[0].before, max(load.highest for load in loads), max(others, default=None))


@dataclasses.dataclass(frozen=True)
class Task:
    """What all measurements share: a folder, how often, and the load before."""

    folder: Path
    repeats: int
    before: float

    @property
    def tiny(self) -> Path:
        """The file of the conversion that imports everything."""
        return self.folder / "tiny.safetensors"

    def make(self, sizes: tuple[int, int, int], file: Path) -> None:
        """Writes a file in a process of its own, whose memory goes with it."""
        child("make", sizes=sizes, file=str(file))

    def peaks(self, file: Path, proof: bool) -> list[dict[str, Any]]:
        """What `side_memory` says, of `repeats` processes."""
        order = {"tiny": str(self.tiny), "file": str(file), "proof": proof}
        return [child("memory", **order) for _ in range(self.repeats)]

    def timings(self, file: Path) -> tuple[list[Timing], Load]:
        """Timings of the three programs, by turns in one process, and its load."""
        answer = child("time", file=str(file), repeats=self.repeats, before=self.before)
        timings = [Timing(one["name"], tuple(one["wall"]), tuple(one["cpu"])) for one in answer["timings"]]
        return timings, Load(**answer["load"])


def peak_row(file: Path, peaks: Sequence[Mapping[str, Any]], proof: bool) -> list[str]:
    """A row of PEAKS: bytes at most less bytes at most before, against the bytes of the file."""
    above = [one["peak"] - one["imported"] for one in peaks]
    size = peaks[0]["size"]
    median = statistics.median(above)
    imported = statistics.median(one["imported"] for one in peaks)
    numbers = [
        f"{imported / 1e9:.2f}",
        f"{median / 1e9:.2f}",
        f"{median / size:.2f}",
        f"{min(above) / size:.2f}",
    ]
    return [file.name, f"{size / 1e9:.2f}", "yes" if proof else "no", *numbers]


def wall_rows(file: Path, timings: Sequence[Timing]) -> list[list[str]]:
    """Rows of WALLS; ratios are against the sum of reading and saving, smaller is better."""

    def values(timing: Timing) -> np.ndarray:
        return np.array([min(timing.wall), statistics.median(timing.wall), min(timing.cpu)])

    both = np.maximum(sum(values(timing) for timing in timings if timing.name != OURS), 1e-6)
    return [
        [file.name, timing.name, *(f"{v:.2f}" for v in values(timing)), *(f"{x:.2f}" for x in values(timing) / both)]
        for timing in timings
    ]  # fmt: skip


def child(kind: str, **order: Any) -> dict[str, Any]:
    """Runs `side_KIND(**order)` in a new process and returns its answer.

    Raises:
        RuntimeError: it failed; its traceback has been shown on standard error.
    """
    call = f"from benchmarks import convert; convert.side({kind!r})"
    command_line = [sys.executable, "-c", call]
    run = subprocess.run(
        command_line, input=json.dumps(order), stdout=subprocess.PIPE, cwd=results.ROOT, text=True
    )
    if run.returncode:
        raise RuntimeError(f"'{kind}' ended with {run.returncode}")
    return json.loads(run.stdout)


def side(kind: str) -> None:
    """The other side of `child`: an order on standard input, an answer on standard output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    json.dump(SIDES[kind](**json.load(sys.stdin)), answers)
    answers.close()


def side_make(sizes: Sequence[int], file: str) -> dict[str, Any]:
    """Writes a file of drawn weights in the original's names.

    Args:
        sizes: width, layers, rows of the word table.
        file: its ending says the container.
    """
    tensors = Drawn(config(*sizes))
    if file.endswith(".ckpt"):
        import torch

        state = {name: torch.from_numpy(tensors[name]) for name in tensors}
        torch.save({"epoch": 10, "global_step": 100_000, "state_dict": state}, file)
    else:
        safetensors_file.write(Path(file), tensors)
    return {}


def side_memory(tiny: str, file: str, proof: bool) -> dict[str, Any]:
    """Most resident bytes after a conversion of `tiny`, which imports everything, and after one of `file`."""
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
        convert(tiny, f"{folder}/tiny", proof)
        imported = most_resident()
        convert(file, f"{folder}/converted", proof)
        return {"imported": imported, "peak": most_resident(), "size": Path(file).stat().st_size}


def side_time(file: str, repeats: int, before: float) -> dict[str, Any]:
    """Converts, reads and saves by turns, once to warm up; what was written is removed off the clock."""
    params = nest(filled(file).items())
    wall, cpu = ({name: [] for name in (OURS, READ, SAVE)} for _ in range(2))
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
        target = Path(folder) / "written"
        programs = [
            measure.Program(OURS, lambda: convert(file, str(target), proof=False)),
            measure.Program(READ, lambda: read(file)),
            measure.Program(SAVE, lambda: save(params, target)),
        ]
        watch = Watch(before)
        for repetition in range(repeats + 1):
            for program in programs[:: -1 if repetition % 2 else 1]:
                time.sleep(measure.SETTLE)
                begun = time.perf_counter(), time.process_time()
                program.run()
                if repetition:
                    wall[program.name].append(time.perf_counter() - begun[0])
                    cpu[program.name].append(time.process_time() - begun[1])
                shutil.rmtree(target, ignore_errors=True)
                watch.add(0.0)
            print(f"{Path(file).name}: repetition {repetition} of {repeats}", file=sys.stderr, flush=True)
    timings = [{"name": name, "wall": wall[name], "cpu": cpu[name]} for name in wall]
    return {"timings": timings, "load": dataclasses.asdict(watch.load())}


SIDES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "make": side_make,
    "memory": side_memory,
    "time": side_time,
}


def config(width: int, depth: int, words: int) -> ConfigDict:
    """ViLT-B/32 in other sizes, with its heads of pretraining."""
    changed = cli.load_config("vilt:variant=b32")
    changed.model.width = width
    changed.model.fusion.depth = changed.model.unroll = depth
    changed.model.fusion.num_heads = width // HEAD
    changed.model.fusion.mlp_width = 4 * width
    changed.model.text_embed.vocab_size = words
    changed.model.text_embed.length = changed.data.text_length
    changed.model.patch_embed.patch_size = changed.data.patch_size
    changed.model.patch_embed.grid = changed.data.image_size // changed.data.patch_size
    return systems.get("vilt").resolve(changed, {})


class Drawn(Mapping):
    """Tensors by the original's names, each made when it is asked for."""

    def __init__(self, wanted: ConfigDict) -> None:
        self._shapes = importing.shapes(wanted)
        absent = "|".join(vilt.ORIGINAL.fresh)
        rows = writing.written_names(vilt.ORIGINAL, self._shapes, drop=absent)
        self._rows = {name: (row, layer) for name, row, layer in rows}
        self._numbers = np.random.default_rng(0).normal(0.0, 0.02, DRAWN).astype(np.float32)

    def __getitem__(self, name: str) -> np.ndarray:
        row, layer = self._rows[name]
        parts = {}
        for path in row.targets:
            shape = self._shapes[path]
            parts[path] = np.resize(self._numbers, shape if layer is None else shape[1:])
        return np.ascontiguousarray(row.op.inverse([parts[path] for path in row.targets], None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def convert(file: str, target: str, proof: bool) -> None:
    """The whole command but for its flags; what it prints is lost."""
    with open(os.devnull, "w", encoding="utf-8") as lost, contextlib.redirect_stdout(lost):
        command.bring(command.Options([file], target, proof=proof), wishes())


def wishes() -> importing.Wishes:
    """What the command asks for where the user gave a file only."""
    return importing.Wishes("vilt", cli.load_config(vilt.CONFIG))


def filled(file: str) -> dict[str, np.ndarray]:
    """The arrays that a conversion writes, by path."""
    with contextlib.ExitStack() as stack:
        return importing.fill(importing.plan(importing.open_all(stack, [file]), wishes()))


def read(file: str) -> None:
    """Reads all bytes of a file once, into one small buffer."""
    buffer = bytearray(READ_SIZE)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def save(params: Mapping[str, Any], target: Path) -> None:
    """Orbax as it comes, which packs the arrays with zstd; no digests."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        orbax.save(target, args=ocp.args.StandardSave(params))


def most_resident() -> int:
    """Most bytes of this process that lay in memory at a time, from its start on."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
