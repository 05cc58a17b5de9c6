# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what is taken, what each mistake says, and which code comes back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.types import Stop, UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def define(flags: absl_flags.FlagValues) -> None:
    cli.define_config(flags)
    absl_flags.DEFINE_string("workdir", "", "folder of the run", flag_values=flags)
    absl_flags.DEFINE_integer("number", 3, "a number", flag_values=flags)


def call(*argv, arguments=()):
    """Runs the command line and returns (exit code, flags seen by main, positional arguments)."""
    seen = []
    code = cli.run(lambda *a: seen.append(a), define, usage="python -m x", arguments=arguments, argv=argv)
    return code, seen[0][0] if seen else None, seen[0][1:] if seen else ()


def config_of(*argv):
    code, flags, _ = call(*argv)
    assert code == 0
    return flags.config


def test_config_by_name_by_path_and_from_another_folder(tmp_path, monkeypatch):
    assert config_of("--config=vilt:variant=small").model.width == 384
    monkeypatch.chdir(tmp_path)
    assert config_of("--config=vilt:variant=small").model.width == 384
    assert config_of("--config=configs/vilt.py:variant=b32").model.width == 768
    assert config_of(f"--config={REPOSITORY}/configs/vilt.py").variant == "tiny"
    (tmp_path / "mine.py").write_text(
        "from configs import vilt\ndef get_config():\n  c = vilt.get_config()\n  c.seed = 7\n  return c\n"
    )
    assert config_of("--config=mine.py").seed == 7


def test_overrides_of_every_type_in_any_order():
    config = config_of(
        "--config.train.steps=1e5",
        "--config.train.batch_size",
        "64",
        "--config=vilt",
        "--config.parallel.mesh=(4,2,1)",
        "--config.optimizer.lr=1",
        "--config.optimizer.no_decay=()",
        '--config.optimizer.lr_multipliers=(("head/", 10.0),)',
        "--noconfig.checkpoint.asynchronous",
        "--config.data.dir=coco=A:1,vg=B:2",
        "--config.seed=-1",
    )
    assert config.train.steps == 100_000 and type(config.train.steps) is int
    assert config.train.batch_size == 64
    assert config.parallel.mesh == (4, 2, 1)
    assert config.optimizer.lr == 1.0 and type(config.optimizer.lr) is float
    assert config.optimizer.no_decay == ()
    assert config.optimizer.lr_multipliers == (("head/", 10.0),)
    assert config.checkpoint.asynchronous is False
    assert config.data.dir == "coco=A:1,vg=B:2"
    assert config.seed == -1
    assert config_of("--config=vilt", "--config.parallel.mesh=4,2,1").parallel.mesh == (4, 2, 1)
    with pytest.raises(AttributeError):
        config.new_key = 1


def test_flags_and_arguments_mix():
    code, flags, values = call("data", "--workdir=W", "DIR", "--number", "5", arguments=("WHAT", "WHERE"))
    assert (code, flags.workdir, flags.number, values) == (0, "W", 5, ("data", "DIR"))
    assert not flags.config
    assert call("--config=vilt", "--help")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=vilt", "--config.train.stepz=4"], ["train.stepz", "Did you mean 'steps'", "batch_size"]),
        (["--config=vilt", "--config.steps=4"], ["config.train.steps"]),
        (["--config=vilt", "--config.trian.steps=4"], ["'trian'", "Did you mean 'config.train.steps'"]),
        (["--config=vilt", "--config.seed.x=4"], ["config.seed", "no keys below"]),
        (["--config=vilt", "--config.train=4"], ["group", "steps"]),
        (["--config=vilt", "--config.train.steps=abc"], ["abc", "whole number"]),
        (["--config=vilt", "--config.train.steps=2.5"], ["2.5", "whole number"]),
        (["--config=vilt", "--config.optimizer.lr=fast"], ["fast", "a number"]),
        (["--config=vilt", "--config.checkpoint.asynchronous=maybe"], ["maybe", "true or false"]),
        (["--config=vilt:variant=tinny"], ["tinny", "Did you mean 'tiny'", "b32"]),
        (["--config=vilt:size=tiny"], ["size", "variant"]),
        (["--config=vlit"], ["Did you mean 'vilt'", "configs/vlit.py"]),
        (["--config=no/such.py"], ["no/such.py"]),
        (["--config"], ["--config has no value"]),
        (["--config.seed=3"], ["--config=NAME", "vilt"]),
        (["--workdri=a"], ["--workdri", "Did you mean 'workdir'", "--number"]),
        (["--number=a"], ["--number", "whole number"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(argv, words, capsys):
    code, flags, _ = call(*argv)
    output = capsys.readouterr()
    assert code == 2 and flags is None
    assert output.out == "" and "Traceback" not in output.err
    assert len(output.err.strip().splitlines()) == 1
    for word in words:
        assert word in output.err


def test_a_broken_config_file_is_named_with_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n  return 1 / 0\n")
    assert call(f"--config={path}")[0] == 2
    assert "broken.py, line 2" in capsys.readouterr().err


def test_require_names_the_missing_flag(capsys):
    def main(flags):
        cli.require(flags, "config", "workdir")

    assert cli.run(main, define, usage="x", argv=[]) == 2
    assert "--config is missing" in capsys.readouterr().err
    assert cli.run(main, define, usage="x", argv=["--config=vilt"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (UserError("wrong, given, do"), 2, False),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 2, False),
        (PermissionError(errno.EACCES, "Permission denied", "/closed"), 2, False),
        (OSError(errno.EROFS, "Read-only file system"), 2, False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, False),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/run/metrics.jsonl"), 2, False),
        (FileExistsError(errno.EEXIST, "File exists", "/run/checkpoints"), 2, False),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone"), 1, True),
        (ValueError("ours"), 1, True),
        (Stop(75, "Preempted, saved."), 75, False),
        (Stop(77, "Hung."), 77, False),
        (Stop(130, "Stopped, saved."), 130, False),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_exit_codes(error, code, traceback, capsys):
    def main(flags):
        raise error

    assert cli.run(main, define, usage="x", argv=[]) == code
    output = capsys.readouterr()
    assert output.out == "" and output.err.strip()
    assert ("Traceback" in output.err) == traceback


def test_help_of_a_process_is_on_stdout_and_importing_defines_no_flag(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom absl import flags\nfrom vlp_jax import cli\n"
        "assert 'config' not in flags.FLAGS\n"
        "sys.exit(cli.run(print, cli.define_config, usage='python -m program'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(program), "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "python -m program" in done.stdout and "--config" in done.stdout and "vilt" in done.stdout
