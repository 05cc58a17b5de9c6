# SPDX-License-Identifier: Apache-2.0
"""Both ViLT benchmarks at toy size: equal work is checked, tables come out, rows are recorded whole or not at all."""

import os
import re
from contextlib import nullcontext

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import cpu_vilt, gpu_vilt, measure, results, vilt_batch, vilt_pair  # noqa: E402
from vlp_jax import cli  # noqa: E402

BEFORE = "# Results\n\n## Other\n\nwords\n"


@pytest.fixture(autouse=True)
def idle(monkeypatch, tmp_path):
    """A machine without load, one thread for PyTorch, and a results file of its own."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    # Threads that wait for each other crawl where tests run side by side.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(measure, "others_clock", lambda: None)
    monkeypatch.setattr(measure, "product_rate", lambda: 1e11)
    (tmp_path / "RESULTS.md").write_text(BEFORE, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")


def run(module, *argv):
    return cli.run(module.main, module.define, usage=module.__doc__, argv=["--toy", "--repeats=1", *argv])


def rows(text):
    """Program -> its numbers, of a table for the console."""
    found = re.findall(
        r"^((?:ours|transformers)[\w ,.]*?)  +((?:[\d.,]+ *)+(?:unknown)?)$", text, re.MULTILINE
    )
    return {name: numbers.replace(",", "").split() for name, numbers in found}


@pytest.mark.learn
def test_cpu_prints_tables_and_records_rows(capsys):
    assert run(cpu_vilt, "--batch=2", "--record") == 0
    shown = capsys.readouterr().out
    apart = float(re.search(r"apart by (\S+), allowed 1e-04", shown)[1])
    assert apart < 1e-5
    recorded = results.RESULTS.read_text(encoding="utf-8")
    assert recorded.startswith(BEFORE)
    for part, peers in (("train", 2), ("forward", 3)):
        heading = f"CPU: ViLT against transformers, {part}"
        table = rows(shown.split(heading)[1].split("\nCPU:")[0])
        ours, theirs = (sum(name.startswith(side) for name in table) for side in ("ours", "transformers"))
        assert (ours, theirs) == (3, peers)
        assert table[cpu_vilt.BASELINE][3:] == ["1.00"] * 3
        assert all(float(number) > 0 for numbers in table.values() for number in numbers[:3])
        kept = recorded.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert [line.split(" | ")[2] for line in kept.splitlines() if line.startswith("| 20")] == list(table)
        assert "1 cores" in kept and "load 0.10 before" in kept and "torch 2" in kept


@pytest.mark.learn
def test_gpu_program_runs_at_toy_size(capsys):
    assert run(gpu_vilt, "--batches=2,3", "--steps=2", "--nocompile", "--record") == 0
    shown = capsys.readouterr().out
    tables = [rows(part) for part in shown.split("GPU: ViLT")[1:]]
    assert [list(table) for table in tables] == [["ours", "transformers autocast"]] * 2
    assert all(
        len(numbers) == 8 and numbers[-1] == "unknown" for table in tables for numbers in table.values()
    )
    recorded = results.RESULTS.read_text(encoding="utf-8")
    assert recorded.count("| ours |") == 2 and recorded.count("## GPU") == 1 and "MFU" in recorded


def test_rates_follow_from_time_tokens_and_flops():
    timing = measure.Timing("ours", (0.5, 0.25), (1.0, 1.0))
    table = measure.table([timing], "ours")
    assert gpu_vilt.with_rates(table, [timing], 1000, 10**12, 8e12)[1][-2:] == ["4,000", "0.500"]
    assert gpu_vilt.with_rates(table, [timing], 1000, 10**12, None)[1][-1] == "unknown"
    names = {
        "1 x NVIDIA H100 80GB HBM3": 989e12,
        "1 x NVIDIA H100 PCIe": 756e12,
        "8 x NVIDIA A100-SXM4-40GB": 312e12,
        "1 x NVIDIA L40S": 362e12,
        "1 x NVIDIA L4": 121e12,
        "1 x Quadro": None,
    }
    assert {name: gpu_vilt.peak(name) for name in names} == names


def test_gpu_program_needs_a_gpu(capsys):
    assert cli.run(gpu_vilt.main, gpu_vilt.define, usage="", argv=[]) == 2
    message = capsys.readouterr().err
    assert "needs a GPU" in message and "JAX has 'cpu'" in message and "--toy" in message


@pytest.mark.parametrize(
    "module, argument, words",
    [
        (cpu_vilt, "--parts=trian", ("'trian'", "Did you mean 'train'?")),
        (cpu_vilt, "--parts=", ("no ''", "train, forward")),
        (gpu_vilt, "--batches=", ("''", "--batches=64,256")),
        (cpu_vilt, "--batch=1", ("--batch", "from 2")),
        (gpu_vilt, "--batches=64,many", ("'many'", "--batches=64,256")),
    ],
)
def test_wrong_flags_are_explained(module, argument, words, capsys):
    assert run(module, argument) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message


def test_an_interrupted_run_records_nothing(monkeypatch, capsys):
    # Our programs are not what is looked at here, and take long to compile.
    for name in ("train", "forward"):
        monkeypatch.setattr(vilt_pair.Ours, name, lambda *_: len)
    monkeypatch.setattr(vilt_pair, "check_equal", lambda *_: "not checked")
    real, calls = measure.compare, []

    def second_time_interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure, "compare", second_time_interrupted)
    assert run(cpu_vilt, "--batch=2", "--record") == 130
    assert "CPU: ViLT against transformers, train" in capsys.readouterr().out
    assert results.RESULTS.read_text(encoding="utf-8") == BEFORE


def test_a_busy_machine_stops_the_program_at_once(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.1, 0.1))
    for module in (cpu_vilt, gpu_vilt):
        assert run(module, "--record") == 2
        assert "--loaded" in capsys.readouterr().err
    assert results.RESULTS.read_text(encoding="utf-8") == BEFORE


@pytest.mark.slow
def test_unequal_work_is_no_benchmark():
    config = vilt_batch.make_config("tiny", "float32")
    task = vilt_batch.make_task(config, 2)
    step = None
    for fault in ("", "weights", "patches", "optimizer"):
        net = vilt_pair.Peer(config)
        mine = vilt_pair.Ours(config, task, net.params())
        if step is None:
            ours, step = mine, mine.train(1)
        ours.state = mine.state
        peer = vilt_pair.PeerTraining(net, config)
        placed = mine.batch()
        if fault == "weights":
            net.vilt.pooler.dense.weight.data *= 1.1
        if fault == "patches":
            placed["patches"] = placed["patches"].at[:, :4].set(0)
        if fault == "optimizer":
            peer.optimizer.param_groups[0]["lr"] *= 3
        ours.batch = lambda placed=placed: placed
        expected = pytest.raises(RuntimeError, match="do not do the same work") if fault else nullcontext()
        with expected:
            vilt_pair.check_equal(ours, [step, step], peer, "cpu", vilt_pair.TOLERANCE)


def test_patches_and_padded_pictures_are_the_same_pixels():
    config = vilt_batch.make_config("tiny", "float32")
    task = vilt_batch.make_task(config, 4)
    batch, (pixels, mask) = task.batch(), task.padded_pictures()
    assert len({picture.shape for picture in task.pictures}) > 1
    for row in range(4):
        for slot in np.flatnonzero(batch["patch_mask"][row]):
            top, left = batch["patch_positions"][row, slot] * task.patch
            cell = pixels[row, :, top : top + task.patch, left : left + task.patch].transpose(1, 2, 0)
            np.testing.assert_allclose(cell.ravel(), batch["patches"][row, slot] / 127.5 - 1, atol=1e-6)
    assert mask.sum() == batch["patch_mask"].sum() * task.patch**2
    assert not batch["patches"][~batch["patch_mask"]].any()
