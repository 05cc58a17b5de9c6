# SPDX-License-Identifier: Apache-2.0
"""Speed, signals and the watchdog, the last two in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlp_jax.training import hooks

REPOSITORY = Path(__file__).resolve().parents[2]


def start(program):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)


def test_meter_counts_steps_waits_and_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: now[0])
    meter = hooks.Meter()
    for _ in range(4):
        now[0] += 2.0
        meter.waited(0.5)
    with meter.paused():
        now[0] += 100.0
    figures = meter.read(batch_size=32)
    assert figures["time/examples_per_second"] == 4 * 32 / 8
    assert figures["time/data_wait"] == 0.25
    now[0] += 1.0
    meter.waited(0.0)
    assert meter.read(32)["time/examples_per_second"] == 32


def test_resident_memory_grows_with_what_is_held():
    before = hooks.resident_bytes()
    held = np.ones(64 * 2**20, np.uint8)
    assert held.nbytes / 2 < hooks.resident_bytes() - before < held.nbytes * 2


STOPPING = """
import sys, time
from vlp_jax import cli
from vlp_jax.training.hooks import Signals
from vlp_jax.types import Stop

def main(flags):
    with Signals() as signals:
        print("ready", flush=True)
        for step in range(1000):
            time.sleep(0.02)
            if code := signals.agreed(False):
                raise Stop(code, f"Saved at step {step}.")

sys.exit(cli.run(main, lambda flags: None, usage=""))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_the_loop_save_and_leave(number, code):
    process = start(STOPPING)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "saving first" in errors and "Saved at step" in errors and "Traceback" not in errors


def test_the_second_ctrl_c_does_not_wait(capfd):
    with hooks.Signals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert signals.agreed(True) == 130
        assert "Ctrl-C again" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with hooks.Signals() as signals:
        assert signals.agreed(True) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.agreed(True) == 75
    assert signal.getsignal(signal.SIGTERM) is before


WATCHED = """
import time
from vlp_jax.training.hooks import Watchdog

def a_hanging_step():
    time.sleep(60)

with Watchdog(1.0) as watchdog:
    for _ in range(8):
        time.sleep(0.25)
        watchdog.feed()
    print("fed", flush=True)
    a_hanging_step()
"""


def test_a_hang_dumps_stacks_and_exits_77():
    process = start(WATCHED)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 77 and out == "fed\n"
    assert "No step for 1 seconds" in errors and "a_hanging_step" in errors


def test_a_watchdog_of_0_seconds_is_off():
    with hooks.Watchdog(0) as watchdog:
        watchdog.feed()
        time.sleep(0.05)
