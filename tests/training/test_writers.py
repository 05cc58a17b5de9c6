# SPDX-License-Identifier: Apache-2.0
"""The files of figures: bit-equal floats, a clean cut after the restored step, events, and the progress line."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from vlp_jax.training import writers

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = {"time/examples_per_second": 1234.5, "time/data_wait": 0.034, "time/memory_gib": 1.26}


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir, steps, start=0):
    with writers.Writers(workdir, 10, start) as out:
        for step in steps:
            out.write(step, {"train/loss": np.float32(1 / step), "train/skipped_steps": 0, **TIMES})
            if step % 4 == 0:
                out.write(step, {"validation/itm/accuracy": step / 10})


def test_floats_keep_all_their_digits(tmp_path):
    with writers.Writers(tmp_path, 10) as out:
        out.write(1, {"train/loss": np.float32(0.1), "train/mlm": 1 / 3, "train/skipped_steps": 2})
    (line,) = lines_of(tmp_path)
    assert line == {
        "step": 1,
        "train/loss": float(np.float32(0.1)),
        "train/mlm": 1 / 3,
        "train/skipped_steps": 2,
    }
    assert list(line)[0] == "step"


def test_a_resumed_run_writes_the_same_file_as_an_undisturbed_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(whole, range(1, 11))
    run(broken, range(1, 8))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while writing
    run(broken, range(5, 11), start=4)
    assert lines_of(broken) == lines_of(whole)
    assert sum("validation/itm/accuracy" in line for line in lines_of(broken)) == 2
    run(broken, range(1, 11), start=0)  # killed before the first save
    assert lines_of(broken) == lines_of(whole)
    assert not list(broken.glob("*.tmp"))


def test_cut_leaves_a_file_alone_that_needs_none(tmp_path):
    run(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").stat()
    writers.cut(tmp_path / "metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    writers.cut(tmp_path / "absent.jsonl", 4)


def test_cut_drops_what_is_unreadable(tmp_path):
    good = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"step": "x"}\n\xff\xfe\0\0\nnull\n[]\n')
    writers.cut(tmp_path / "metrics.jsonl", 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_events_are_readable_and_purge_what_is_written_anew(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(3, 5), start=2)
    events = []
    for file in sorted((tmp_path / "tensorboard").glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:  # length, its checksum (4 bytes), the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    losses = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "train/loss"]
    assert sorted(step for step, _ in losses) == [1, 2, 3, 3, 4]
    np.testing.assert_allclose([v for s, v in losses if s == 4], 0.25)
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert sorted(starts) == [1, 3]


FULL = """
import resource, signal, sys
from pathlib import Path
from vlp_jax.training import writers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with writers.Writers(Path(sys.argv[1]), 1000) as writer:
    for step in range(1, 1001):
        writer.write(step, {"validation/x": 0.5})
"""


def test_a_full_disk_under_tensorboard_ends_the_run_and_does_not_hang_it(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 1
    assert f"File too large: '{tmp_path}'" in done.stderr.splitlines()[-1]


def test_progress_is_a_line_an_interval_off_a_terminal():
    stream = io.StringIO()
    console = writers.Console(10, 0, stream)
    values = {"train/loss": 2.34567, "train/mlm": 1.5, "train/lr": 1e-4, "train/skipped_steps": 3, **TIMES}
    console.write(5, values)
    console.write(5, {"validation/itm/accuracy": 0.5})
    console.write(10, values)
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("[##########..........] 5/10  loss 2.346  mlm 1.5  skipped 3  1234 examples/s")
    assert "data wait 3 %" in first and "1.3 GiB" in first and first.endswith("left ?") and "lr" not in first
    assert second == "step 5: validation/itm/accuracy 0.5"
    assert third.startswith("[####################] 10/10") and third.endswith("left 0s")


def test_progress_is_redrawn_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = writers.Console(100, 0, stream)
    for step in (1, 2):
        console.write(step, {"train/loss": 1.0, **{f"train/term_{n}": 1.0 for n in range(30)}})
    console.write(2, {"validation/x": 1.0})
    console.close()
    text = stream.getvalue()
    assert text.count("\r") == 2 and text.count("\n") == 2
    assert all(len(re.sub(r"\x1b\[K", "", part)) < 200 for part in text.split("\r"))


def test_time_left_comes_from_the_steps_seen(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(writers.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    console = writers.Console(100, 20, stream)
    console.write(30, {"train/loss": 1.0})
    console.write(40, {"train/loss": 1.0})  # ten steps in ten seconds, sixty to go
    assert stream.getvalue().splitlines()[-1].endswith("left 1m00s")


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12s"), (250, "4m10s"), (11_100, "3h05m"), (183_600, "2d03h"), (59.7, "1m00s")]
)
def test_durations(seconds, text):
    assert writers.duration(seconds) == text
