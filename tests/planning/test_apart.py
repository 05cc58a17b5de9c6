# SPDX-License-Identifier: Apache-2.0
"""A process apart: answers, errors and crashes."""

from __future__ import annotations

import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from vlp_jax.planning import apart

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_an_answer_comes_back_and_the_stack_was_unlimited_there_only():
    before = resource.getrlimit(resource.RLIMIT_STACK)
    assert apart.call(math.hypot, 3, 4) == 5
    soft, hard = apart.call(resource.getrlimit, resource.RLIMIT_STACK)
    assert soft == hard and resource.getrlimit(resource.RLIMIT_STACK) == before


def test_an_error_comes_back_as_itself():
    with pytest.raises(ValueError, match="domain error|nonnegative") as caught:
        apart.call(math.sqrt, -1)
    assert "Traceback" in caught.value.__notes__[0]


@pytest.mark.parametrize("function, arguments, code", [(os.abort, (), -signal.SIGABRT), (os._exit, (3,), 3)])
def test_a_crash_is_named_by_its_code(function, arguments, code):
    with pytest.raises(apart.Crash) as caught:
        apart.call(function, *arguments)
    assert caught.value.code == code


def test_interrupting_the_parent_ends_both(tmp_path):
    script = "import time, sys; from vlp_jax.planning import apart\nif __name__ == '__main__': apart.call(time.sleep, 77.5)"
    (tmp_path / "waits.py").write_text(script, encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "waits.py"],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    time.sleep(2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(10) != 0
