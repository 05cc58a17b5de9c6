# SPDX-License-Identifier: Apache-2.0
"""Where the figures of a run go: metrics.jsonl, TensorBoard events, and one progress line on standard error."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import jax

from vlp_jax.files import save

QUIET = ("train/lr", "train/grad_norm", "train/skipped_steps")  # in the files, not on the progress line


class Writers:
    """Writes on process 0; on the others it does nothing."""

    def __init__(self, workdir: Path, steps: int, start: int = 0) -> None:
        """Opens nothing yet.

        Args:
            workdir: folder of the run.
            steps: of the whole run.
            start: the step that was restored; what an earlier run wrote of later steps is cut off.
        """
        self._workdir, self._steps, self._start = workdir, steps, start
        self._active = jax.process_index() == 0

    def __enter__(self) -> Writers:
        if self._active:
            path = self._workdir / "metrics.jsonl"
            cut(path, self._start)
            self._lines = path.open("a", encoding="utf-8", buffering=1)
            self._events = Events(self._workdir / "tensorboard", self._start)
            self._console = Console(self._steps, self._start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            with self._naming():
                self._lines.close()
                self._events.close()
            self._console.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes "train/loss" and the like at a step; floats keep all their digits."""
        if not self._active:
            return
        values = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        with self._naming():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._events.write(step, values)
        self._console.write(step, values)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """A write that fails does not say where; the message to the user must."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._workdir)
            raise


class Events:
    """A file of TensorBoard events, written at once.

    tensorboardX's SummaryWriter leaves that to a thread: a full disk ends the thread, and the run then waits for it
    for ever.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Makes the file, and tells TensorBoard to drop what an earlier run wrote after step `start`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps apart the files of two starts in one second.
        self._file = EventsWriter(str(folder / "events"), f".step{start}")
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=start + 1, session_log=log))
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary(value=points)
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()


def cut(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and what a kill or a crash has left unreadable, in one rename."""
    if not path.is_file():
        return
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        save(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Console:
    """The progress line: redrawn on a terminal, one line a log interval elsewhere."""

    def __init__(self, steps: int, start: int, stream: TextIO | None = None) -> None:
        self._steps, self._start, self._stream = steps, start, stream or sys.stderr
        self._redraws, self._drawn = self._stream.isatty(), False
        self._begun: tuple[int, float] | None = None  # the first line's step and time, after compiling

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Draws the progress of training values; a line of its own for validation values."""
        if any(name.startswith("train/") for name in values):
            self._progress(self._line(step, values))
        else:
            self.close()
            scores = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}: {scores}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the progress line as it stands."""
        if self._drawn:
            print(file=self._stream, flush=True)
            self._drawn = False

    def _progress(self, line: str) -> None:
        if self._redraws:
            # Cut, because a line that wraps cannot be redrawn.
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r{line}\x1b[K")
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        bar = ("#" * (20 * step // self._steps)).ljust(20, ".")
        parts = [f"[{bar}] {step}/{self._steps}"]
        parts += [
            f"{name.removeprefix('train/')} {value:.4g}"
            for name, value in values.items()
            if name.startswith("train/") and name.count("/") == 1 and name not in QUIET
        ]
        if values.get("train/skipped_steps"):
            parts.append(f"skipped {values['train/skipped_steps']}")
        if "time/examples_per_second" in values:
            parts.append(f"{values['time/examples_per_second']:.4g} examples/s")
            parts.append(f"data wait {100 * values['time/data_wait']:.0f} %")
            memory = values.get("time/device_memory_gib", values["time/memory_gib"])
            parts.append(f"{memory:.1f} GiB")
        return "  ".join([*parts, f"left {self._time_left(step)}"])

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        self._begun = self._begun or (step, now)
        done = step - self._begun[0]
        if step >= self._steps:
            return "0s"
        return duration((now - self._begun[1]) / done * (self._steps - step)) if done else "?"


def duration(seconds: float) -> str:
    """Seconds as "2d03h", "3h05m", "4m10s" or "12s"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"
