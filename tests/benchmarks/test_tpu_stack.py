# SPDX-License-Identifier: Apache-2.0
"""The estimate of a stack of layers: a small one compiles, and a loop costs more than none."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="could not import 'libtpu'")
def test_a_row_comes_out_and_unrolling_pays():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    times = []
    for unroll in (1, 2):
        command = [sys.executable, "-m", "benchmarks.tpu_stack", "--depth=2", "--batch=2", "--tokens=17"]
        done = subprocess.run(
            [*command, f"--unroll={unroll}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "32 tokens computed" in done.stdout
        milliseconds, computed, useful = re.findall(r"0\.\d{3}", done.stdout.splitlines()[-1])[:3]
        assert 0 < float(useful) < float(computed) < 1
        times.append(float(milliseconds))
    assert times[1] < times[0]
