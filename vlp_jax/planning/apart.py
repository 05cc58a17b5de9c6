# SPDX-License-Identifier: Apache-2.0
"""Runs foreign code in a process of its own, so that its crash is a message and Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class Crash(Exception):
    """The process died without an answer; `code` is its exit code, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, computed in a fresh Python; all of it must be picklable.

    Raises:
        Crash: the process ended otherwise.
        What the function raises.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    try:
        with _unlimited_stack():
            child.start()
        theirs.close()
        good, result = ours.recv()
    except EOFError:
        child.join()
        raise Crash(child.exitcode) from None
    finally:
        if child.pid is not None:
            child.kill()
            child.join()
    if not good:
        raise result
    return result


def _answer(to: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    # Ctrl-C reaches parent and child; the parent has the last word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        to.send((True, function(*arguments)))
    except Exception as error:
        error.add_note(traceback.format_exc())  # the trace itself cannot be sent
        to.send((False, error))


@contextlib.contextmanager
def _unlimited_stack() -> Iterator[None]:
    """What is started meanwhile has no limit to its stack.

    Under the usual 8 MiB, libtpu 0.0.42.1 overflows its stack at some programs for v6e. It must be so from the
    start of the process: later is too late.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
