# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the conversion at toy size: its files hold the model, figures are what they are called, tables."""

import contextlib
import json
import os
import re
import resource

import numpy as np
import pytest

from benchmarks import convert as benchmark
from benchmarks import measure, results
from vlp_jax import cli
from vlp_jax.convert.sources import open_source
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten, nest

BEFORE = "# Results\n\n## Other\n\nwords\n"
SIZES = (64, 2, 50)


@pytest.fixture(autouse=True)
def idle(monkeypatch, tmp_path):
    """A machine without load, and a results file of its own."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(measure, "others_clock", lambda: None)
    monkeypatch.setattr(measure, "SETTLE", 0.0)
    (tmp_path / "RESULTS.md").write_text(BEFORE, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")


def run(*argv):
    return cli.run(benchmark.main, benchmark.define, usage=benchmark.__doc__, argv=argv)


@pytest.mark.parametrize("container", benchmark.CONTAINERS)
def test_files_hold_the_whole_model_in_the_originals_names(container, tmp_path):
    if container == "ckpt":
        pytest.importorskip("torch")
    file = tmp_path / f"vilt.{container}"
    benchmark.side_make(SIZES, str(file))
    with open_source(file) as source:
        assert source.tensors["transformer.blocks.1.attn.qkv.weight"].shape == (192, 64)
        assert source.tensors["text_embeddings.word_embeddings.weight"].shape == (50, 64)
        assert source.tensors["mlm_score.decoder.weight"].shape == (50, 64)
        assert all(tensor.dtype == np.float32 for tensor in source.tensors.values())
        assert source.read("itm_score.fc.weight").std() == pytest.approx(0.02, rel=0.3)
        weights = sum(tensor.nbytes for tensor in source.tensors.values())
    assert weights <= file.stat().st_size <= weights + 100_000
    target = tmp_path / "checkpoint"
    benchmark.convert(str(file), str(target), proof=False)
    written = dict(flatten(checkpoint.restore_params(target)))
    held = benchmark.filled(str(file))
    assert written.keys() == held.keys()
    assert all(np.array_equal(written[path], held[path]) for path in held)
    saved = tmp_path / "saved"
    benchmark.save(nest(held.items()), saved)
    assert sum(part.stat().st_size for part in saved.rglob("*")) > weights / 2


def test_the_released_size_is_half_a_gigabyte():
    shapes = benchmark.Drawn(benchmark.config(768, 12, benchmark.WORDS))._shapes
    numbers = sum(int(np.prod(shape)) for path, shape in shapes.items() if not path.endswith("mask_vector"))
    assert numbers == 135_660_092 and len(shapes) == 39


def test_memory_is_what_the_system_says_at_most():
    """Both figures are of the same counter; the kernel brings it up to date by batches of pages."""
    assert benchmark.most_resident() == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.02
    )


def test_rows_are_against_the_file_and_against_reading_and_saving(tmp_path):
    file = tmp_path / "vilt.ckpt"
    peaks = [{"imported": 10**9, "peak": 10**9 + above, "size": 10**9} for above in (15 * 10**8, 2 * 10**9)]
    assert benchmark.peak_row(file, peaks, False) == [
        "vilt.ckpt",
        "1.00",
        "no",
        "1.00",
        "1.75",
        "1.75",
        "1.50",
    ]
    timings = [
        measure.Timing(benchmark.OURS, (3.0, 6.0, 9.0), (4.0, 4.0, 4.0)),
        measure.Timing(benchmark.READ, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        measure.Timing(benchmark.SAVE, (2.0, 3.0, 3.0), (7.0, 7.0, 9.0)),
    ]
    rows = benchmark.wall_rows(file, timings)
    assert rows[0] == ["vilt.ckpt", "conversion", "3.00", "6.00", "4.00", "1.00", "1.50", "0.50"]
    assert len(benchmark.WALLS) == len(rows[1]) and rows[2][5:] == ["0.67", "0.75", "0.88"]


@pytest.mark.slow
def test_all_is_measured_printed_and_recorded(monkeypatch, capsys):
    """In this process; how a process of its own is asked is tested below."""
    monkeypatch.setattr(
        benchmark, "child", lambda kind, **order: json.loads(json.dumps(benchmark.SIDES[kind](**order)))
    )
    argv = ("--models=64x1,128x1", "--containers=safetensors", "--words=50", "--repeats=1", "--noproof")
    assert run(*argv, "--record") == 0
    shown = capsys.readouterr().out
    memory, seconds = (shown.split(f"\nConvert: {name}\n")[1] for name in ("memory", "time"))
    assert re.findall(r"^(vilt-\d+x\d).safetensors +0.00 +no +\d", memory, re.MULTILINE) == [
        "vilt-64x1",
        "vilt-128x1",
    ]
    for name in (benchmark.OURS, benchmark.READ, benchmark.SAVE):
        assert len(re.findall(rf"{name} +(?:\d+\.\d\d *){{6}}$", seconds, re.MULTILINE)) == 2
    recorded = results.RESULTS.read_text(encoding="utf-8")
    assert recorded.startswith(BEFORE) and recorded.count("| conversion |") == 2
    assert "1 repetitions" in recorded and "load 0.10 before" in recorded


@pytest.mark.slow
def test_a_process_of_its_own_answers_or_its_end_is_told(tmp_path, capfd):
    file = tmp_path / "vilt.safetensors"
    assert benchmark.child("make", sizes=SIZES, file=str(file)) == {} and file.stat().st_size > 100_000
    with pytest.raises(RuntimeError, match="'memory' ended with 1"):
        benchmark.child("memory", tiny=str(tmp_path / "absent"), file=str(file), proof=False)
    assert "There is no" in capfd.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--containers=safetensor", ("'safetensor'", "Did you mean 'safetensors'?", "ckpt")),
        ("--containers=", ("no ''",)),
        ("--models=", ("''", "768x12")),
        ("--models=768", ("'768'", "768x12")),
        ("--models=100x2", ("'100x2'", "multiple of 64")),
        ("--models=64x0", ("'64x0'",)),
        ("--words=0", ("words",)),
    ],
)
def test_wrong_flags_are_explained(argument, words, capsys):
    assert run(argument) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message


def test_a_busy_machine_stops_the_program_at_once(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.1, 0.1))
    assert run("--noproof", "--containers=safetensors") == 2
    assert "--loaded" in capsys.readouterr().err


def test_help_tells_all_flags(capsys):
    with contextlib.suppress(SystemExit):
        assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("models", "containers", "words", "proof", "repeats"))
