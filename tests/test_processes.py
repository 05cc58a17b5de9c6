# SPDX-License-Identifier: Apache-2.0
"""`python -m vlp_jax.train` as two processes of two devices: one run, and one way to end whatever happens to one."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.test_train import arguments, lines
from vlp_jax import cli, evaluate
from vlp_jax.data import pipeline
from vlp_jax.parallel import processes
from vlp_jax.training.checkpoint import open_for_inference
from vlp_jax.types import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# What gloo's own code prints, from several threads piece by piece: lines of two ranks may lie in one another.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d"
)
SIX = (
    "--config.train.steps=6", "--config.train.evaluate_every=3", "--config.evaluation.train_examples=24",
    "--config.checkpoint.every=3", "--config.checkpoint.keep=5",
)  # fmt: skip

# `train`, but it notes the examples that it steps through, and may be late at the first step.
NOTING = """
import json, os, sys, time
from vlp_jax import cli, train
from vlp_jax.data import pipeline
from vlp_jax.parallel import processes
from vlp_jax.training import loop

batches, compiled = pipeline.batches, loop._compiled

def noted(*arguments, host, hosts, **more):
    with open(f"{os.environ['NOTES']}.{host}", "w", buffering=1) as file:
        for batch in batches(*arguments, host=host, hosts=hosts, **more):
            print(json.dumps(batch["example_id"].tolist()), file=file)
            yield batch

def late(*arguments):
    step = compiled(*arguments)
    time.sleep(float(os.environ["LATE"]))
    return step

pipeline.batches, loop._compiled = noted, late
processes.SILENCE = int(os.environ.get("SILENCE", processes.SILENCE))
sys.exit(cli.run(train.main, train.define, usage=train.__doc__))
"""

# Joins, and does BODY.
JOINING = """
import os, signal, sys, time
from ml_collections import ConfigDict
from vlp_jax import cli
from vlp_jax.parallel import processes
from vlp_jax.types import UserError

processes.PATIENCE, processes.SILENCE = int(os.environ["PATIENCE"]), 10

def main(flags):
    parallel = ConfigDict(dict(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2])))
    with processes.joined(parallel) as host:
        BODY

sys.exit(cli.run(main, lambda flags: None, usage="", argv=[]))
"""


STARTED = []


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def launch(command, devices=2, **variables):
    environment = {name: value for name, value in os.environ.items() if "_proxy" not in name.lower()}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **variables}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    STARTED.append(subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment, **pipes))
    return STARTED[-1]


@pytest.fixture(scope="module", autouse=True)
def nothing_runs_on():
    yield
    for process in STARTED:
        process.kill()


def train_two(program, data, workdir, *more, own=((), ()), late=("0", "0"), **variables):
    """Starts both processes; `own` are arguments and `late` seconds of each."""
    address = f"--config.parallel.coordinator=localhost:{free_port()}"
    both = [*arguments(data, workdir, *more), address, "--config.parallel.processes=2"]
    return [
        launch(
            [*program, *both, f"--config.parallel.process={i}", *own[i]],
            NOTES=f"{workdir}.seen",
            LATE=late[i],
            **variables,
        )
        for i in range(2)
    ]


def train_one(data, workdir, devices, *more):
    return launch(["-m", "vlp_jax.train", *arguments(data, workdir, *more)], devices)


def join_two(*bodies, address=None, patience="60"):
    """Starts those processes that have something to do."""
    address = address or f"localhost:{free_port()}"
    programs = [JOINING.replace("BODY", body) for body in bodies]
    return [
        launch(["-c", program, address, str(i)], PATIENCE=patience)
        for i, program in enumerate(programs)
        if bodies[i]
    ]


def ended(running, seconds=300):
    """Waits for processes and returns (exit code, standard output, standard error) of each."""
    said = [process.communicate(timeout=seconds) for process in running]
    return [(process.returncode, *words) for process, words in zip(running, said, strict=True)]


def ended_well(running):
    for code, _, errors in (results := ended(running)):
        assert code == 0, errors
    return results


def wait_for(path, running, seconds=240):
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert all(process.poll() is None for process in running), [p.stderr.read() for p in running]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(scenes_dir, tmp_path_factory):
    """The same six steps by two processes, by one with four devices and by one with one; and what each said."""
    base = tmp_path_factory.mktemp("runs")
    started = {
        # Gloo allows 30 s from the first to the last when devices connect.
        "two": train_two(["-c", NOTING], scenes_dir, base / "two", *SIX, late=("0", "35")),
        "four": [train_one(scenes_dir, base / "four", 4, *SIX)],
        "one": [train_one(scenes_dir, base / "one", 1, *SIX)],
    }
    return base, {name: ended_well(running) for name, running in started.items()}


@pytest.mark.slow
def test_losses_are_those_of_one_process(runs):
    base, _ = runs
    two = lines(base / "two", "train/", "validation/")
    assert [line["step"] for line in two] == [1, 2, 3, 3, 4, 5, 6, 6]
    for other in ("four", "one"):
        for line, wanted in zip(two, lines(base / other, "train/", "validation/"), strict=True):
            assert line.keys() == wanted.keys()
            for name, value in wanted.items():
                # float32 at 6.7 has steps of 4.8e-7; wpa lies at 0 and is the difference of larger numbers.
                np.testing.assert_allclose(
                    line[name], value, rtol=1e-6, atol=1e-6 * ("wpa" in name), err_msg=name
                )


@pytest.mark.slow
def test_both_together_see_the_examples_of_one(runs):
    base, _ = runs
    config = ConfigDict(json.loads((base / "two/config.json").read_text()))
    seen = [
        [json.loads(line) for line in (base / f"two.seen.{host}").read_text().splitlines()] for host in (0, 1)
    ]
    wanted = pipeline.batches(config, split=config.data.split)
    assert [first + second for first, second in zip(*seen, strict=True)] == [
        next(wanted)["example_id"].tolist() for _ in range(6)
    ]


@pytest.mark.slow
def test_one_console_and_one_set_of_files(runs):
    base, said = runs
    (_, words, errors), (_, other_words, other_errors) = said["two"]
    assert other_errors == ""
    assert not GLOO.sub("", words + other_words).strip()
    assert [errors.count(f"{step}/6") for step in range(1, 7)] == [1] * 6
    assert errors.count("validation/") == 6 and errors.count("train step compiled") == 1
    assert {path.name for path in (base / "two").iterdir()} == {
        path.name for path in (base / "four").iterdir()
    }
    assert len(list((base / "two/tensorboard").iterdir())) == 1
    assert {path.name for path in (base / "two/checkpoints").iterdir()} == {"3", "6"}
    assert len(list((base / "two/checkpoints/6").glob("digests.*.json"))) == 2


@pytest.mark.slow
def test_a_checkpoint_of_two_goes_on_as_one_and_the_other_way_round(runs, scenes_dir, tmp_path):
    base, _ = runs
    for name in ("two", "four"):
        shutil.copytree(base / name, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/6")
    as_one = train_one(scenes_dir, tmp_path / "two", 1, *SIX)
    as_two = train_two(["-m", "vlp_jax.train"], scenes_dir, tmp_path / "four", *SIX)
    for _, _, errors in ended_well([as_one, as_two[0]]):
        assert "resumed from step 3" in errors
    ended_well(as_two[1:])
    wanted = lines(base / "two", "train/loss")
    for name in ("two", "four"):
        for line, other in zip(lines(tmp_path / name, "train/loss"), wanted, strict=True):
            np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-6)


@pytest.mark.slow
def test_one_process_reads_and_scores_the_checkpoint_of_two(runs, tmp_path, capsys):
    base, _ = runs
    for path in ("two", "two/checkpoints/3"):
        params, meta, assets = open_for_inference(base / path)
        reference = open_for_inference(base / path.replace("two", "four"))[0]
        for name, value in dict(_leaves(params)).items():
            np.testing.assert_allclose(value, dict(_leaves(reference))[name], atol=1e-6, err_msg=name)
        assert meta["step"] == (6 if path == "two" else 3) and "vocabulary.model" in assets
    argv = [f"--workdir={base / 'two'}", f"--target={tmp_path}"]
    code = cli.run(evaluate.main, evaluate.define, usage=evaluate.__doc__, argv=argv)
    assert code == 0, capsys.readouterr().err
    assert {"mlm/accuracy", "itm/accuracy"} <= json.loads((tmp_path / "evaluation.json").read_text()).keys()


def _leaves(tree, path=""):
    for name, value in tree.items():
        yield from (
            _leaves(value, f"{path}/{name}") if isinstance(value, dict) else [(f"{path}/{name}", value)]
        )


LONG = ("--config.train.steps=100000", "--config.checkpoint.every=100000", "--config.train.log_every=3")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # these runs are ended before they have done much


@pytest.mark.slow
def test_sigterm_to_one_saves_and_stops_both(scenes_dir, tmp_path):
    running = train_two(["-m", "vlp_jax.train"], scenes_dir, tmp_path / "run", *LONG, **QUICK)
    wait_for(tmp_path / "run/metrics.jsonl", running)
    running[1].send_signal(signal.SIGTERM)
    results = ended(running, 120)
    assert [code for code, _, _ in results] == [75, 75], results
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert all(f"Saved at step {saved.name} " in errors for _, _, errors in results)
    assert len(list(saved.glob("digests.*.json"))) == 2


@pytest.mark.slow
def test_a_killed_process_does_not_leave_the_other_hanging(scenes_dir, tmp_path):
    running = train_two(["-c", NOTING], scenes_dir, tmp_path / "run", *LONG, SILENCE="20", **QUICK)
    wait_for(tmp_path / "run/metrics.jsonl", running)
    running[1].kill()
    (code, _, errors), _ = ended(running, 90)
    assert code == 75, errors
    assert "lost another process" in errors or "Process 1 has not been heard of for 20 s" in errors
    assert "start all of them again" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_different_configurations_stop_both_and_leave_nothing(scenes_dir, tmp_path):
    different = ((), ("--config.optimizer.lr=0.5",))
    results = ended(train_two(["-m", "vlp_jax.train"], scenes_dir, tmp_path / "run", own=different), 120)
    for code, _, errors in results:
        assert code == 2 and "Traceback" not in errors
        assert "optimizer.lr: 0.001 in process 0, 0.5 in process 1" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.learn
def test_killed_while_waiting():
    for victim, codes in ((1, (75,)), (0, (75, -signal.SIGABRT))):  # process 0 takes JAX's service with it
        bodies = ["processes.meet('never')"] * 2
        bodies[victim] = "os.kill(os.getpid(), signal.SIGKILL)"
        results = ended(join_two(*bodies), 60)
        assert results[1 - victim][0] in codes, results
        assert "another" in results[1 - victim][2] or "not been heard of" in results[1 - victim][2]


@pytest.mark.slow
def test_who_waits_in_vain_is_told_where():
    port = free_port()
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        running = [
            *join_two("", "pass", address=f"localhost:{port}", patience="4"),
            *join_two("pass", "", patience="4"),
            *join_two("pass", "", address=f"localhost:{taken}", patience="4"),
        ]
        absent, alone, second = ended(running, 60)
    assert absent[0] == 2 and f"localhost:{port}, where nothing answers (Connection refused)" in absent[2]
    assert alone[0] == 2 and "Process 0 of 2 has waited 4 s for the others" in alone[2]
    assert second[0] == 2 and f"cannot listen on port {taken}" in second[2]
    assert not any("Traceback" in errors for _, _, errors in (absent, alone, second))


@pytest.mark.slow
def test_the_fault_of_one_ends_both_with_its_message():
    begun = time.monotonic()
    results = ended(join_two("time.sleep(60)", "raise UserError('The disk is full.')"), 60)
    assert time.monotonic() - begun < 45
    assert [code for code, _, _ in results] == [2, 2]
    assert (
        results[0][2] == "\nProcess 1 has ended: The disk is full.\n"
        and results[1][2] == "The disk is full.\n"
    )


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:abc", ":4000", "localhost:0", "localhost:70000"]
)
def test_an_address_that_is_none(address):
    wanted = ConfigDict(dict(coordinator=address, processes=2, process=1))
    with pytest.raises(UserError, match="host:port"), processes.joined(wanted):
        pass
