# SPDX-License-Identifier: Apache-2.0
"""What must happen before the first device is touched: joining the other processes, the cache of compiled programs."""

from __future__ import annotations

import collections
import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vlp_jax.types import UserError

log = logging.getLogger(__name__)
cache_events: collections.Counter = collections.Counter()  # "hit" and "miss" since the start
_EVENTS = {"/jax/compilation_cache/cache_hits": "hit", "/jax/compilation_cache/cache_misses": "miss"}


def start(parallel: ConfigDict, compilation_cache: str) -> dict[str, int]:
    """Joins `parallel.processes` processes and sets the cache up; returns {"host": mine, "hosts": all}.

    Raises:
        UserError: several processes without a coordinator, a process number out of range, or no answer.
    """
    if compilation_cache:
        _use_cache(Path(compilation_cache).expanduser())
    if parallel.processes > 1:
        if not parallel.coordinator or not 0 <= parallel.process < parallel.processes:
            raise UserError(
                f"config.parallel.processes is {parallel.processes}, coordinator '{parallel.coordinator}' and process "
                f"{parallel.process}. Give every process the coordinator's host:port and a number of its own from 0 "
                f"to {parallel.processes - 1}."
            )
        try:
            jax.distributed.initialize(parallel.coordinator, parallel.processes, parallel.process)
        except RuntimeError as error:
            raise UserError(
                f"process {parallel.process} cannot join {parallel.coordinator}: {error}. "
                "Check that process 0 runs there and that the port is open."
            ) from error
    return {"host": jax.process_index(), "hosts": jax.process_count()}


def _use_cache(folder: Path) -> None:
    """Keeps compiled programs in `folder` and counts whether one was found there; without the folder, does without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("no compilation cache: %s cannot be made (%s)", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs compile faster than they are read back.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.monitoring.register_event_listener(_count)


def cache_result(before: collections.Counter) -> str:
    """What the compilation cache has answered since `before`, a copy of `cache_events`: hit, miss or off."""
    new = cache_events - before
    return "hit" if new["hit"] and not new["miss"] else "miss" if new["miss"] else "off"


def _count(event: str, **_: object) -> None:
    if event in _EVENTS:
        cache_events[_EVENTS[event]] += 1
