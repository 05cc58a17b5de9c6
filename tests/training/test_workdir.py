# SPDX-License-Identifier: Apache-2.0
"""A workdir is held by one process at a time and by one configuration for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import vilt
from vlp_jax.training import workdir
from vlp_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def changed(**values):
    config = vilt.get_config()
    config.train.update(steps=1000, batch_size=128)
    config.optimizer.lr = 1e-3
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def open_and_close(path, manifest="abc", **values):
    with workdir.open_workdir(path, changed(**values), manifest) as folder:
        return folder


def test_config_is_written_with_the_data_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = open_and_close("runs/one")
    assert folder == tmp_path / "runs" / "one"
    written = json.loads((folder / "config.json").read_text())
    assert written["optimizer"]["lr"] == 1e-3 and written["manifest_sha256"] == "abc"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.json"]


def test_a_restart_may_change_where_how_often_and_for_how_long(tmp_path):
    open_and_close(tmp_path)
    free = dict(
        parallel__rules="fsdp",
        parallel__mesh=(2, 2, 1),
        train__steps=2000,
        train__log_every=3,
        train__evaluate_every=7,
        train__watchdog=60,
        checkpoint__every=9,
        checkpoint__keep=5,
        evaluation__batch_size=8,
        data__threads=3,
        data__prefetch=1,
        data__dir="elsewhere",
        compilation_cache="",
    )
    open_and_close(tmp_path, **free)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 2000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer__lr": 2e-3}, ["optimizer.lr: 0.001 there, 0.002 given"]),
        ({"seed": 1, "train__batch_size": 64}, ["seed: 0 there, 1 given", "batch_size: 128 there, 64 given"]),
        ({"train__steps": 10}, ["train.steps: 1000 there, 10 given"]),
        ({"model__fusion__num_heads": 2}, ["model.fusion.num_heads: 4 there, 2 given"]),
        ({"data__text_length": 12}, ["data.text_length"]),
    ],
)
def test_any_other_difference_names_key_old_and_new(tmp_path, values, words):
    open_and_close(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        open_and_close(tmp_path, **values)
    for word in words:
        assert word in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before
    open_and_close(tmp_path)


def test_other_data_is_another_run(tmp_path):
    open_and_close(tmp_path)
    with pytest.raises(UserError, match="manifest_sha256: abc there, def given"):
        open_and_close(tmp_path, manifest="def")


def test_a_run_that_could_not_begin_does_not_keep_the_corrected_one_out(tmp_path):
    def fail(**values):
        with workdir.open_workdir(tmp_path, changed(**values), "abc"):
            raise UserError("config.train.accumulation 3 does not divide")

    with pytest.raises(UserError, match="divide"):
        fail(train__accumulation=3)
    assert not (tmp_path / "config.json").exists()
    open_and_close(tmp_path, train__accumulation=2)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="divide"):
        fail(train__accumulation=2)
    with pytest.raises(UserError, match="2 there, 3 given"):
        open_and_close(tmp_path, train__accumulation=3)


def test_absent_keys_are_named():
    assert workdir.differences({"a": {"b": 1}}, {"a": {"c": 2}}) == [
        ("a.b", 1, "absent"),
        ("a.c", "absent", 2),
    ]


def test_what_is_no_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file"):
        open_and_close(tmp_path / "file")
    with pytest.raises(UserError, match="a file"):
        open_and_close(tmp_path / "file" / "below")
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no config.json"):
        open_and_close(tmp_path / "old")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_and_close(tmp_path / "bad")


SECOND = """
import sys
from configs import vilt
from vlp_jax import cli
from vlp_jax.training import workdir

def main(flags, path):
    with workdir.open_workdir(path, vilt.get_config(), "abc"):
        print("inside")

sys.exit(cli.run(main, lambda flags: None, usage="", arguments=("PATH",)))
"""


def test_a_second_run_exits_2_and_names_the_first(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", SECOND, str(tmp_path)]
    with workdir.open_workdir(tmp_path, changed(), "abc"):
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert f"process {os.getpid()} on " in done.stderr and len(done.stderr.splitlines()) == 1
    assert open_and_close(tmp_path) == tmp_path
