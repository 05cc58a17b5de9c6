# SPDX-License-Identifier: Apache-2.0
"""What watches a run from beside the loop: its speed and memory, signals that end it, a watchdog for hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED, HUNG, INTERRUPTED = 75, 77, 130
GIB = 2**30


class Meter:
    """Speed, share of time waiting for data, and memory, between two log lines."""

    def __init__(self) -> None:
        self._begin()

    def waited(self, seconds: float) -> None:
        """Counts one step, and how long it waited for its batch."""
        self._steps += 1
        self._waiting += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) is not training time."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._pauses += time.perf_counter() - begun

    def read(self, batch_size: int) -> dict[str, float]:
        """Returns the figures since the last reading as "time/...", and begins anew.

        Args:
            batch_size: examples a step, over all hosts.
        """
        seconds = max(time.perf_counter() - self._begun - self._pauses, 1e-9)
        figures = {
            "time/examples_per_second": self._steps * batch_size / seconds,
            "time/data_wait": self._waiting / seconds,  # a share
            "time/memory_gib": resident_bytes() / GIB,
        }
        stats = jax.local_devices()[0].memory_stats()  # None on CPU
        if stats and "bytes_in_use" in stats:
            figures["time/device_memory_gib"] = stats.get("peak_bytes_in_use", stats["bytes_in_use"]) / GIB
        self._begin()
        return figures

    def _begin(self) -> None:
        self._begun, self._steps, self._waiting, self._pauses = time.perf_counter(), 0, 0.0, 0.0


def resident_bytes() -> int:
    """Memory of this process: now, or at most so far where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Signals:
    """Within it, SIGTERM and the first Ctrl-C only ask the loop to stop; the second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self._code = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, meeting: bool) -> int:
        """The exit code that all processes stop with (75, 130), or 0 to go on.

        Args:
            meeting: whether all processes ask at this step; several can only agree when they do.
        """
        if jax.process_count() == 1:
            return self._code
        if not meeting:
            return 0
        return int(np.max(multihost_utils.process_allgather(np.int32(self._code))))

    def _received(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._code:
            raise KeyboardInterrupt
        self._code = self._code or (INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        # os.write, because the main thread may hold a lock of print or logging just now.
        again = " Ctrl-C again stops without saving." if number == signal.SIGINT else ""
        os.write(2, f"\nStopping after this step, saving first.{again}\n".encode())


class Watchdog:
    """Ends the process with 77 and the stacks of all threads when `feed` is not called for `seconds`; 0 = off."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fed = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self.feed()
        if self._seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def feed(self) -> None:
        """A step was taken."""
        self._fed = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 1.0)):
            if time.monotonic() - self._fed > self._seconds:
                message = (
                    f"No step for {self._seconds:g} seconds (config.train.watchdog). Stacks of all threads:\n"
                )
                os.write(2, message.encode())
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(HUNG)  # the main thread hangs and would never see an exception
