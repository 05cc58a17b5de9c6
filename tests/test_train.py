# SPDX-License-Identifier: Apache-2.0
"""`python -m vlp_jax.train` as a user runs it: killed, preempted, started twice, started wrongly."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import prepared
from vlp_jax import cli, train
from vlp_jax.training.checkpoint import open_for_inference

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
    "--config.model.width=32", "--config.model.fusion.depth=2", "--config.model.fusion.num_heads=2",
    "--config.model.fusion.mlp_width=64", "--config.train.batch_size=8", "--config.evaluation.batch_size=8",
    "--config.evaluation.train_examples=8",
)  # fmt: skip


def arguments(data, workdir, *more):
    base = [
        "--config=configs/vilt.py:variant=tiny,smoke",
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
    ]
    # The last one given stands, so that a test may change what is small.
    return [*base, *SMALL, "--config.compilation_cache=", *more]


def start(data, workdir, *more, devices=1):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "vlp_jax.train", *arguments(data, workdir, *more)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def wait_for(path, process, seconds=240):
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def lines(workdir, *prefixes):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or k.startswith(prefixes)} for line in found]


def in_process(capsys, *argv):
    """Runs the main here; returns exit code and what it said."""
    code = cli.run(train.main, train.define, usage=train.__doc__, argv=list(argv))
    return code, capsys.readouterr().err


@pytest.mark.slow
def test_killed_twice_and_undisturbed_runs_are_equal_to_the_bit(scenes_dir, tmp_path):
    more = (
        "--config.train.steps=300", "--config.train.log_every=7", "--config.checkpoint.every=40",
        "--config.train.evaluate_every=150", "--config.model.dropout=0.1", "--config.ema.decay=0.9",
    )  # fmt: skip
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    finish(start(scenes_dir, calm, *more))
    for sign in ("metrics.jsonl", "checkpoints/120/digests.0.json"):  # before the first save, and later
        process = start(scenes_dir, disturbed, *more)
        wait_for(disturbed / sign, process)
        process.kill()
        process.communicate()
    assert lines(disturbed, "train/")[-1]["step"] < 300
    errors = finish(start(scenes_dir, disturbed, *more))
    assert "resumed from step" in errors
    assert lines(disturbed, "train/", "validation/") == lines(calm, "train/", "validation/")
    one, other = (open_for_inference(folder)[0] for folder in (calm, disturbed))
    np.testing.assert_equal(one, other)


@pytest.mark.slow
def test_preempted_run_goes_on_and_on_other_devices(scenes_dir, tmp_path):
    run = tmp_path / "run"
    long = ("--config.train.steps=100000", "--config.checkpoint.every=100000", "--config.train.log_every=5")
    process = start(scenes_dir, run, *long)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert "Start the same command again" in finish(process, code=75)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    losses = {}
    for name, devices, rules in (("one", 1, "dp"), ("four", 4, "fsdp_tp")):
        shutil.copytree(run, tmp_path / name)
        more = (
            f"--config.train.steps={saved + 5}",
            "--config.train.log_every=1",
            f"--config.parallel.rules={rules}",
        )
        # Fewer steps than before would be another schedule, so the run is stopped where it was meant to end.
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["train"]["steps"] = saved + 5
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        finish(start(scenes_dir, tmp_path / name, *more, "--config.checkpoint.every=100000", devices=devices))
        losses[name] = [
            line["train/loss"] for line in lines(tmp_path / name, "train/loss")[-6:] if "train/loss" in line
        ]
    assert len(losses["one"]) >= 5
    np.testing.assert_allclose(losses["four"], losses["one"], rtol=1e-5)


@pytest.mark.slow
def test_two_runs_in_one_folder(scenes_dir, tmp_path, capsys):
    first = start(scenes_dir, tmp_path / "run", "--config.train.steps=100000")
    wait_for(tmp_path / "run/config.json", first)
    code, said = in_process(capsys, *arguments(scenes_dir, tmp_path / "run", "--config.train.steps=100000"))
    first.kill()
    first.communicate()
    assert code == 2 and f"in use by process {first.pid}" in said and "Traceback" not in said


@pytest.fixture(scope="module")
def finished(scenes_dir, tmp_path_factory):
    """A run of two steps with a checkpoint at each; copy it before you harm it."""
    run = tmp_path_factory.mktemp("train") / "run"
    assert cli.run(train.main, train.define, usage="", argv=arguments(scenes_dir, run)) == 0
    return run


def test_files_of_a_run(finished):
    assert {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= {
        p.name for p in finished.iterdir()
    }
    first = lines(finished, "train/", "time/")[0]
    wanted = {
        "train/loss",
        "train/mlm",
        "train/itm",
        "train/wpa",
        "train/lr",
        "train/grad_norm",
        "time/data_wait",
    }
    assert wanted <= first.keys()
    assert lines(finished, "validation/")[-1].keys() >= {"validation/itm/accuracy", "validation/mlm/accuracy"}
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["text_embed"]["vocab_size"] > 5
    params, meta, assets = open_for_inference(finished)
    assert meta["step"] == 2 and "vocabulary.model" in {pathlib.Path(a).name for a in assets.values()}
    assert set(params) == {"text_embed", "patch_embed", "fusion", "heads"}


def test_a_finished_run_says_so(finished, scenes_dir, capsys, caplog):
    before = (finished / "metrics.jsonl").read_bytes()
    code, _ = in_process(capsys, *arguments(scenes_dir, finished))
    assert code == 0 and "All 2 steps are done" in caplog.text
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["--config.optimizer.lrr=1"], "lr"),
        (["--config=configs/vilt.py:variant=tinny"], "tiny"),
        (["--config=vlit"], "Did you mean 'vilt'"),
        (["--workdir="], "--workdir"),
        (["--config.data.dir=/nowhere/at/all"], "python -m vlp_jax.prepare scenes"),
        (["--config.data.dir="], "config.data.dir"),
        (["--config.data.split=trian"], "train"),
        (["--config.data.image_size=70"], "not divisible by config.data.patch_size 16"),
        (["--config.model.text_embed.vocab_size=99"], "is 99, but"),
        (["--config.train.batch_size=12"], "Take 8 or 16"),
        (["--config.evaluation.batch_size=12"], "config.evaluation.batch_size 12"),
        (["--config.parallel.rules=ddp"], "Did you mean 'dp'"),
        (["--config.parallel.mesh=(3,1,1)"], "there are 8"),
        (["--config.system=vlit"], "Did you mean 'vilt'"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(scenes_dir, tmp_path, capsys, more, words):
    code, said = in_process(capsys, *arguments(scenes_dir, tmp_path / "run", *more))
    assert code == 2, said
    assert words in said and "Traceback" not in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_empty_data_directory_and_another_configuration(finished, scenes_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = in_process(capsys, *arguments(tmp_path / "empty", tmp_path / "run"))
    assert code == 2 and "prepare" in said and not (tmp_path / "run").exists()
    run = shutil.copytree(finished, tmp_path / "copy")
    before = (run / "config.json").read_bytes()
    code, said = in_process(capsys, *arguments(scenes_dir, run, "--config.optimizer.lr=0.5"))
    assert code == 2 and "optimizer.lr: 0.001 there, 0.5 given" in said
    assert (run / "config.json").read_bytes() == before


def test_a_changed_checkpoint_byte_is_named(finished, scenes_dir, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    victim = max(
        (p for p in (run / "checkpoints/2/params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, said = in_process(capsys, *arguments(scenes_dir, run, "--config.train.steps=3"))
    assert code == 2 and victim.name in said and "Traceback" not in said


def test_a_folder_that_may_not_be_written_or_is_a_file(scenes_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, said = in_process(capsys, *arguments(scenes_dir, tmp_path / "file"))
    assert code == 2 and "Traceback" not in said
    code, said = in_process(capsys, *arguments(scenes_dir, "/proc/run"))
    assert code == 2 and "Traceback" not in said


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_no_checkpoint(scenes_dir, tmp_path):
    # A limit on the size of files stands in for a full disk: the same road from the failed write to the message.
    command = " ".join([sys.executable, "-m", "vlp_jax.train", *arguments(scenes_dir, tmp_path / "run")])
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 40; {command}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*/digests*"))


@pytest.mark.slow
def test_a_mixture_in_buckets_goes_on_to_the_bit(tmp_path, capsys, caplog):
    one = prepared.write(tmp_path / "one", splits={"train": 40, "validation": 8}, sizes=((64, 64), (64, 112)))
    two = prepared.write(
        tmp_path / "two", splits={"train": 8, "validation": 8}, sizes=((112, 64),), name="other",
        vocabulary=one / "vocabulary.model",
    )  # fmt: skip
    more = (
        "--config.train.steps=8", "--config.checkpoint.every=4", "--config.checkpoint.keep=5",
        "--config.data.max_patches=0", "--config.data.buckets=(16,24)", "--config.data.image_limit=96",
    )  # fmt: skip
    given = arguments(f"one={one}:3,two={two}:1", tmp_path / "calm", *more)
    assert in_process(capsys, *given)[0] == 0
    said = caplog.text
    assert said.count("train step compiled") == 2, said
    assert "data one: 40 pictures, 79 pairs of train, 100.00% of the source alive; two: 8 pictures" in said
    shutil.copytree(tmp_path / "calm", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/8")
    assert in_process(capsys, *(word.replace("calm", "again") for word in given))[0] == 0
    assert "resumed from step 4" in caplog.text
    assert lines(tmp_path / "again", "train/") == lines(tmp_path / "calm", "train/")
    values = [line for line in lines(tmp_path / "calm", "train/") if "train/loss" in line]
    named = {f"train/{what}/{name}" for what in ("mlm", "itm", "share") for name in ("one", "two")}
    assert named <= {key for line in values for key in line}
    assert min(line["train/padding/patch"] for line in values) == 0.0
    shares = [line["train/share/two"] for line in values]
    assert 0.05 < sum(shares) / len(shares) < 0.5
    kept = {path.name for path in (tmp_path / "calm/checkpoints/8/assets").iterdir()}
    assert kept == {"one.manifest.json", "two.manifest.json", "vocabulary.model"}
