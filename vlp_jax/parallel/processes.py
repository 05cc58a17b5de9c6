# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: how they join, wait for each other, agree and end together; the compilation cache.

Whatever must happen before the first device is touched. The only place that knows JAX's coordination service.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# A barrier that is no collective has no public name in JAX.
from jax._src import distributed
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vlp_jax.types import Stop, UserError, exit_code

log = logging.getLogger(__name__)
cache_events: collections.Counter = collections.Counter()  # "hit" and "miss" since the start
_EVENTS = {"/jax/compilation_cache/cache_hits": "hit", "/jax/compilation_cache/cache_misses": "miss"}

PATIENCE = 300  # seconds from the first process to the last at the start
MEETING = 1800  # seconds from the first to the last later on; one that is silent is found before
LOOK = 1.0  # seconds between two signs of life, and between two looks at whether another process has failed
SILENCE = 90  # seconds without a sign of life; JAX aborts all processes without much of a message after 100
FAREWELL = 10  # seconds that a process which ends by a failure waits for the others to end by it too
# Keys of the service: number of a process -> a word that changes; number -> exit code and message; a meeting.
_ALIVE, _FAILED, _LEAVING = "vlp_jax/alive/", "vlp_jax/failed/", "vlp_jax/leaving"
# How a collective or a meeting fails when another process is gone; an error of our own reads otherwise.
_GONE = re.compile(r"gloo|connection|socket|barrier|heartbeat|unavailable|deadline", re.IGNORECASE)

_meetings: collections.Counter = collections.Counter()
_ending = threading.Lock()  # taken once, by the thread that ends this process


@contextlib.contextmanager
def joined(parallel: ConfigDict, compilation_cache: str = "") -> Iterator[dict[str, int]]:
    """Within it the `parallel.processes` processes are one run; gives {"host": mine, "hosts": all}.

    An exception that leaves it in one process ends all the others, within seconds, with the same message and exit
    code, whatever they wait for. When a process is killed the others end with 75 after `SILENCE` seconds at most;
    when it was process 0, which the service lives in, at once by an abort of JAX's own (134).

    Raises:
        UserError: no usable coordinator or number, or not all processes have come within `PATIENCE` seconds.
        Stop: 75, another process has gone without a word.
    """
    use_cache(compilation_cache)
    if parallel.processes <= 1:
        yield {"host": jax.process_index(), "hosts": jax.process_count()}
        return
    _join(parallel, _port(parallel))
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(over,), daemon=True, name="processes")
    watching.start()
    try:
        _greet()
        if jax.process_index() != 0:  # one console
            logging.getLogger("vlp_jax").setLevel(logging.WARNING)
        yield {"host": jax.process_index(), "hosts": jax.process_count()}
        meet("end")
    except BaseException as error:
        if isinstance(error, Stop) and _met("end"):  # all stop at one step
            raise
        found = _explained(error, over)
        _ending.acquire()
        _tell(found)
        atexit.register(_leave, exit_code(found))  # once the message is printed
        if found is error:
            raise
        raise found from error
    finally:
        over.set()
        watching.join(LOOK)


def meet(name: str) -> None:
    """Waits until all processes are here, for `MEETING` seconds at most; does nothing for a single one.

    Needed before whatever makes new connections between devices: gloo gives the processes 30 s for that, less than
    they may differ in compiling (inside an operation, once connected, it waited 400 s when tried). All processes
    must meet under the same names in the same order, a name from one thread.
    """
    if (client := distributed.global_state.client) is not None:
        _meetings[name] += 1
        client.wait_at_barrier(f"vlp_jax/{name}/{_meetings[name]}", MEETING * 1000)


def announced(name: str, value: str) -> str:
    """Returns what process 0 gives under this name, to all processes; a name is used once."""
    client = distributed.global_state.client
    if client is None:
        return value
    if jax.process_index() == 0:
        client.key_value_set(f"vlp_jax/{name}", value)
        return value
    return client.blocking_key_value_get(f"vlp_jax/{name}", MEETING * 1000)


def agree(settings: Mapping[str, Any]) -> None:
    """Compares settings, by dotted key, with those of process 0, and waits until all have done so.

    Raises:
        UserError: they differ; names each key with both values.
    """
    mine = json.dumps(settings, sort_keys=True)
    here, there = json.loads(mine), json.loads(announced("settings", mine))
    lines = [
        f"  {key}: {there.get(key, 'absent')} in process 0, {here.get(key, 'absent')} in process {jax.process_index()}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key, "absent") != there.get(key, "absent")
    ]
    if lines:
        raise UserError(
            "The processes of this run were started differently:\n"
            + "\n".join(lines)
            + "\nStart all of them with the same command but for config.parallel.process."
        )
    meet("settings")


def _port(parallel: ConfigDict) -> int:
    host, _, port = parallel.coordinator.rpartition(":")
    numbered = port.isdecimal() and 0 < int(port) < 2**16
    if host and numbered and 0 <= parallel.process < parallel.processes:
        return int(port)
    raise UserError(
        f"config.parallel.processes is {parallel.processes}, coordinator '{parallel.coordinator}' and process "
        f"{parallel.process}. Give every process the coordinator's host:port and a number of its own from 0 "
        f"to {parallel.processes - 1}."
    )


def _join(parallel: ConfigDict, port: int) -> None:
    """Connects to the coordination service, which process 0 starts, and waits until all have come."""
    if parallel.process == 0:
        _check_free(port)
    # It would swallow SIGTERM, which is for training/hooks.py.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                parallel.coordinator,
                parallel.processes,
                parallel.process,
                cluster_detection_method="deactivate",  # the config says it all
                initialization_timeout=2 * PATIENCE,
            )
        except Exception as error:
            failures.append(error)

    # In a thread, because JAX aborts the process when its own time is over, and lets no Ctrl-C through before.
    thread = threading.Thread(target=join, daemon=True, name="join")
    try:
        thread.start()
        thread.join(PATIENCE)
        if failures:
            raise failures[0]
        if not thread.is_alive():
            return
        last = parallel.processes - 1
        raise UserError(
            f"Process {parallel.process} of {parallel.processes} has waited {PATIENCE} s for the others at "
            f"config.parallel.coordinator {parallel.coordinator}{_answer(parallel, port)}. Start process 0 on the "
            f"machine that this names, with a port that the others reach, and all within {PATIENCE} s: each with the "
            f"same config.parallel.coordinator and processes and a config.parallel.process of its own from 0 to {last}."
        )
    except BaseException as error:
        atexit.register(_leave, exit_code(error), alone=True)
        raise


def _check_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen on port {port} of config.parallel.coordinator: {os.strerror(error.errno)}. End what "
            "uses it, perhaps an earlier run or a second process 0, or take another port for all processes."
        ) from error


def _answer(parallel: ConfigDict, port: int) -> str:
    """How the coordinator looks from here."""
    if parallel.process == 0:
        return ""
    try:
        socket.create_connection(
            (parallel.coordinator.rpartition(":")[0].strip("[]"), port), timeout=5
        ).close()
    except OSError as error:
        return f", where nothing answers ({error.strerror or error})"
    return ", which answers"


def _greet() -> None:
    """Makes the connections between hosts that gathering needs, while no process is ahead."""
    jax.devices()  # waits for the devices of all
    meet("devices")
    multihost_utils.sync_global_devices("greeting")


def _met(name: str) -> bool:
    try:
        meet(name)
    except Exception:
        return False
    return True


def _explained(error: BaseException, over: threading.Event) -> BaseException:
    """A `Stop` that says what has happened when another process is gone; else the error itself."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not _GONE.search(str(error)):
        return error
    over.wait(3 * LOOK)  # if the other one has said why, `_watch` ends this process with it
    reason = str(error).splitlines()[0]
    return _lost(f"Process {distributed.global_state.process_id} has lost another process: {reason}")


def _tell(error: BaseException) -> None:
    """Leaves exit code and message where the others look."""
    client, me = distributed.global_state.client, distributed.global_state.process_id
    message = str(error) if isinstance(error, UserError | Stop) else f"{type(error).__name__} {error}".strip()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a service that is gone tells nobody
        client.key_value_set(f"{_FAILED}{me}", json.dumps([exit_code(error), message]))


def _watch(over: threading.Event) -> None:
    """Gives signs of life, and ends this process when another one has failed: the main thread may wait for ever."""
    client, me = distributed.global_state.client, distributed.global_state.process_id
    heard = dict.fromkeys(map(str, range(distributed.global_state.num_processes)), ("", time.monotonic()))
    while not over.wait(LOOK):
        # When the service is gone JAX ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_ALIVE}{me}", str(time.time_ns()), allow_overwrite=True)
            failed = client.key_value_dir_get(_FAILED)
            if failed and not over.is_set():
                _ending.acquire()
                number, (code, message) = failed[0][0].rpartition("/")[2], json.loads(failed[0][1])
                print(f"\nProcess {number} has ended: {message}", file=sys.stderr)
                _leave(code)
            silent = _silent(heard, client.key_value_dir_get(_ALIVE)) if me == 0 else ""
            if silent and not over.is_set():
                _ending.acquire()
                lost = _lost(f"Process {silent} has not been heard of for {SILENCE} s.")
                print(f"\n{lost}", file=sys.stderr)
                _tell(lost)
                _leave(lost.code)


def _silent(heard: dict[str, tuple[str, float]], words: list[tuple[str, str]]) -> str:
    """The processes whose sign of life is too old; `heard` keeps the last of each, and when it was new."""
    now = time.monotonic()
    for key, word in words:
        number = key.rpartition("/")[2]
        if heard[number][0] != word:
            heard[number] = word, now
    return ", ".join(number for number, (_, when) in heard.items() if now - when > SILENCE)


def _lost(what: str) -> Stop:
    return Stop(
        os.EX_TEMPFAIL,
        f"{what}\nSee how the other processes of this run have ended. Then start all of them again: they go on from "
        "the newest complete checkpoint.",
    )


def _leave(code: int, alone: bool = False) -> None:
    """Ends this process, and not as JAX does: it would wait 300 s for the others and then abort.

    Unless `alone`, all leave together, process 0 last: without its service JAX would abort the others.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not alone:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            distributed.global_state.client.wait_at_barrier(_LEAVING, FAREWELL * 1000)
        time.sleep(2.0 if distributed.global_state.process_id == 0 else 0.0)
    os._exit(code)


def use_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, "" = nowhere, and counts whether one was found there."""
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("no compilation cache: %s cannot be made (%s)", path, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
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
