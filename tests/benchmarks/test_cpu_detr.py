# SPDX-License-Identifier: Apache-2.0
"""The DETR benchmark at toy size: equal work is checked, a table comes out, wrong flags are explained."""

import os
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import cpu_detr, detr_pair, measure, results  # noqa: E402
from vlp_jax import cli  # noqa: E402

BEFORE = "# Results\n\n## Other\n\nwords\n"


@pytest.fixture(autouse=True)
def idle(monkeypatch, tmp_path):
    """A machine without load, one thread for PyTorch, and a results file of its own."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(measure, "others_clock", lambda: None)
    monkeypatch.setattr(measure, "product_rate", lambda: 1e11)
    (tmp_path / "RESULTS.md").write_text(BEFORE, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")


def run(*argv):
    argv = ["--toy", "--parts=tiny", "--repeats=1", *argv]
    return cli.run(cpu_detr.main, cpu_detr.define, usage=cpu_detr.__doc__, argv=argv)


@pytest.mark.learn
def test_a_table_is_printed_and_recorded(capsys):
    assert run("--record") == 0
    shown = capsys.readouterr().out
    assert float(re.search(r"apart by (\S+), allowed 1e-03", shown)[1]) < 1e-4
    recorded = results.RESULTS.read_text(encoding="utf-8")
    assert recorded.startswith(BEFORE) and recorded.count("| ours, ") == 2
    assert recorded.count("| transformers") == 2 and "load 0.10 before" in recorded


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--parts=tini", ("'tini'", "Did you mean 'tiny'?")),
        ("--sizes=2x320", ("'2x320'", "--sizes=2x320x384")),
        ("--sizes=0x320x384", ("'0x320x384'",)),
        ("--sizes=", ("--sizes",)),
    ],
)
def test_wrong_flags_are_explained(argument, words, capsys):
    assert run(argument) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message


def test_unequal_work_is_no_benchmark():
    same = {"loss": 1.0, "grad_norm": 2.0}
    assert "apart by" in detr_pair.check_equal(same, same)
    for name in same:
        with pytest.raises(RuntimeError, match="do not do the same work"):
            detr_pair.check_equal(same, same | {name: 1.9})
