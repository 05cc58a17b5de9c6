# SPDX-License-Identifier: Apache-2.0
"""`python -m vlp_jax.plan` as a user meets it; the compiling tests need libtpu and no TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from vlp_jax import cli, plan

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TINY = ("--config=configs/vilt.py:variant=tiny,smoke", "--topology=v5e:2x4", "--pairs_per_chip=2")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="could not import 'libtpu'"
)


def call(*argv: str) -> int:
    return cli.run(plan.main, plan.define, usage=plan.__doc__, argv=argv)


def run(*argv: str, code: int = 0, timeout: int = 600, **environment: str) -> tuple[str, str]:
    """Standard output and error of the program in a process of its own."""
    # The fast lane's switch would make the compiled program another one.
    variables = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"} | environment
    command = [sys.executable, "-m", "vlp_jax.plan", *argv]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_what_needs_no_compiler(capsys, tmp_path):
    assert call(*TINY, "--compile=false", f"--json={tmp_path}/plan.json", f"--hlo={tmp_path}/step.txt") == 0
    printed = capsys.readouterr().out
    for part in ("v5e:2x4: 8 chips", "16 pairs, 2 a chip", "vocab_size 30,522", "parameters", "FLOPs a pair"):
        assert part in printed, printed
    assert "MFU" not in printed and not (tmp_path / "step.txt").exists()
    figures = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert figures["batch_size"] == 16 and "fits" not in figures


@pytest.mark.parametrize(
    "changes, parts",
    [
        (["--topology=v5e:3x3"], ["v5e:2x4", "Possible: 1x1"]),
        (["--topology="], ["--topology is missing"]),
        (["--pairs_per_chip=0"], ["config.train.batch_size 4 does not divide", "8"]),
        (["--config.train.accumulation=3"], ["does not divide", "24"]),
        (["--config.parallel.mesh=(3,1,1)"], ["3 devices", "there are 8"]),
        (["--config.parallel.rules=fdsp"], ["Did you mean 'fsdp'?"]),
        (["--config.model.fusion.num_heads=3"], ["not divisible"]),
        (["--pairs_per_chip=-1"], ["--pairs_per_chip", "from 0"]),
        (["--topologi=v5e:2x2"], ["Did you mean 'topology'?"]),
        (["--json=no/such/place.json"], ["no/such/place.json", "no folder"]),
    ],
)
def test_mistakes_end_with_2_and_say_what_is_possible(changes, parts, capsys):
    assert call(*TINY, "--compile=false", *changes) == 2
    printed = capsys.readouterr()
    assert not printed.out
    for part in parts:
        assert part in printed.err, printed.err


def test_without_libtpu_the_message_says_what_to_install(capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else there(name, *a)
    )
    assert call(*TINY) == 2
    printed = capsys.readouterr()
    assert "pip install -r requirements-tpu.txt" in printed.err and "--compile=false" in printed.err
    assert (REPOSITORY / "requirements-tpu.txt").is_file()


@pytest.mark.slow
@needs_libtpu
def test_the_real_step_is_compiled_without_a_tpu(tmp_path):
    run(*TINY, f"--json={tmp_path}/plan.json", f"--hlo={tmp_path}/step.txt")
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    memory, state = found["memory_bytes_per_device"], found["state_bytes_per_device"]
    held = state + found["batch_bytes_per_device"]
    assert found["fits"] and held <= memory["arguments"] < 1.1 * held + 2**20
    assert memory["results"] < 2**20, "the state is not written over the old one"
    assert 0 < found["mfu_useful"] <= found["mfu_computed"] < 1 and not found["trouble"]
    # Forward and backward over four scanned layers, and the transport of the word-patch alignment.
    trips = [loop["trips"] for loop in found["loops"]]
    assert None not in trips and trips.count(4) == 2 and 50 in trips
    sums = {}
    for row in found["collectives"]:
        sums[row["contents"]] = sums.get(row["contents"], 0) + row["bytes"]
    # Under dp each gradient is summed once, in float32 here.
    assert sums["weights or gradients"] == pytest.approx(4 * found["parameters"], rel=0.01)
    assert "all-reduce" in (tmp_path / "step.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_libtpu
def test_fsdp_holds_less_and_gathers(tmp_path):
    printed, errors = run(*TINY, "--config.parallel.rules=fsdp", f"--json={tmp_path}/plan.json")
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert found["memory_bytes_per_device"]["arguments"] < 0.5 * 12 * found["parameters"]
    gathered = [row for row in found["collectives"] if row["kind"] == "all-gather"]
    assert any(row["contents"] == "weights or gradients" for row in gathered), printed
    assert "compiled in" in errors


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_a_report_and_advice():
    printed, errors = run(*TINY, "--pairs_per_chip=40000", code=2)
    assert "DOES NOT FIT" in printed and "of 15.75 GiB" in printed
    assert "--pairs_per_chip=" in errors and "Traceback" not in errors


@pytest.mark.learn
@needs_libtpu
def test_vilt_b32_on_a_pod_is_what_the_readme_says(tmp_path):
    argv = ["--config=configs/vilt.py:variant=b32", "--topology=v5e:16x16", "--pairs_per_chip=16"]
    run(*argv, f"--json={tmp_path}/plan.json", timeout=3000)
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    memory = found["memory_bytes_per_device"]
    assert memory["arguments"] + memory["temporaries"] + memory["results"] <= 9 * 2**30
    assert 0.40 <= found["mfu_computed"] < 1 and found["mfu_useful"] >= 0.38
    assert not [row for row in found["collectives"] if row["contents"] == "activations"], found["collectives"]
