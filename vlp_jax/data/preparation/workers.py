# SPDX-License-Identifier: Apache-2.0
"""Work spread over processes that end with their parent, and the progress bar that shows it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from vlp_jax.types import UserError


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Callable[[Callable, list], Iterator]]:
    """Gives `each(function, jobs)`: function(job) in the order of jobs, in this process or in several.

    Args:
        workers: 0 = one a core, 1 = none besides this one.

    Raises:
        UserError: a worker was killed.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield map
        return
    # Spawned, not forked: tensorflow and jax have threads that a fork would not take along.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield executor.map
    except BrokenProcessPool as error:
        raise UserError(
            f"One of {workers} worker processes was killed, most often for want of memory. Give fewer --workers and "
            "start again: finished parts are kept."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker ends without a word on Ctrl-C, and when the process that started it is gone."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def progress(total: int, unit: str, what: str):
    """A progress bar with rate and time left, on standard error where somebody looks at it."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=what, disable=None)
