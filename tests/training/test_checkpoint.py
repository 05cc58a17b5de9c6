# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: equal after restore on any mesh, damage found and named, nothing half-written taken for real."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlp_jax.training import checkpoint
from vlp_jax.training.state import TrainState
from vlp_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
META = {"config": {"seed": 0, "shape": (1, 2)}, "finite": True}
ASSETS = {"vocab.txt": "[PAD]\n[UNK]\n", "model.bin": b"\x00\xff"}


def make_state(seed=0, devices=8, rows=16):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32), cut)  # noqa: E731
    params = {"body": {"kernel": draw(rows, 8), "bias": draw(rows)}}
    moments = {"m": {"body": {"kernel": draw(rows, 8)}}, "count": jax.device_put(jnp.int32(seed), whole)}
    return TrainState(
        step=jax.device_put(jnp.int32(seed), whole),
        params=params,
        opt_state=moments,
        ema={"body": {"kernel": draw(rows, 8)}},
        extra={},
        rng=jax.device_put(jax.random.key(seed), whole),
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def numbers(state):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(plain(x)) for x in jax.tree.leaves(state)]


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


def saved(directory, steps=(1,), metrics=None, **options):
    """Saves states whose seed is the step."""
    options = {"keep": 9, **options}
    keeper = checkpoint.Checkpointer(directory, **options)
    for step in steps:
        assert keeper.save(step, make_state(step), META, ASSETS, (metrics or {}).get(step, {}))
    keeper.close()
    return directory


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", (1, 2))


@pytest.fixture
def copied(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def keeper_of(directory, **options):
    return checkpoint.Checkpointer(directory, **{"keep": 9, **options})


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_restored_state_is_equal_on_any_number_of_devices(two_steps, devices):
    wanted = abstract(make_state(0, devices))
    state, meta = keeper_of(two_steps).restore(wanted)
    assert_equal(state, make_state(2))
    assert state.params["body"]["kernel"].sharding == wanted.params["body"]["kernel"].sharding
    assert state.rng.dtype == make_state().rng.dtype
    assert meta["config"] == {"seed": 0, "shape": [1, 2]} and meta["step"] == 2
    state, _ = keeper_of(two_steps).restore(wanted, step=1)
    assert_equal(state, make_state(1))


def test_a_process_with_one_device_restores_what_eight_wrote(two_steps, tmp_path):
    program = (
        "import sys, jax, numpy as np\nfrom vlp_jax.training import checkpoint\n"
        "params, meta, assets = checkpoint.open_for_inference(sys.argv[1])\n"
        "assert jax.device_count() == 1\nnp.save(sys.argv[2], params['body']['kernel'])\n"
    )
    target = tmp_path / "kernel.npy"
    done = subprocess.run(
        [sys.executable, "-c", program, str(two_steps), str(target)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    np.testing.assert_array_equal(np.load(target), make_state(2).params["body"]["kernel"])


def test_a_complete_step_is_left_alone(tmp_path):
    keeper = keeper_of(tmp_path)
    assert keeper.save(10, make_state(10), META, {}, {})
    assert not keeper.save(10, make_state(11), META, {}, {})
    keeper.close()
    assert keeper_of(tmp_path).latest() == 10
    assert_equal(keeper_of(tmp_path).restore(abstract(make_state()))[0], make_state(10))


def test_what_is_saved_is_not_what_later_steps_make_of_it(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    keeper, params = keeper_of(tmp_path), {"w": jnp.zeros((512, 512))}
    state = TrainState(jnp.int32(0), params, {}, {}, {}, jax.random.key(0))
    for number in range(4):
        keeper.save(number, state, META, {}, {})
        for _ in range(20):
            params = step(params)
        state = TrainState(jnp.int32(number + 1), params, {}, {}, {}, jax.random.key(0))
    keeper.close()
    for number in range(4):
        found = checkpoint.restore_params(tmp_path / str(number))["w"]
        np.testing.assert_array_equal(found, 20.0 * number)


def test_every_flipped_byte_is_found_and_its_file_named(copied):
    files = sorted(p for p in (copied / "2").rglob("*") if p.is_file())
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        if not content:
            continue
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(UserError) as error:
            keeper_of(copied).restore(abstract(make_state()))
        if not file.name.startswith("digests."):
            assert f"{file.relative_to(copied / '2')}" in str(error.value)
            assert "go back to step 1" in str(error.value)
        file.write_bytes(content)
    assert_equal(keeper_of(copied).restore(abstract(make_state()))[0], make_state(2))


def test_a_missing_file_is_named(copied):
    file = next((copied / "2" / "params" / "d").iterdir())
    file.unlink()
    with pytest.raises(UserError, match=rf"params/d/{file.name} \(part of params\) is missing"):
        keeper_of(copied).restore(abstract(make_state()))
    with pytest.raises(UserError, match="is missing"):
        checkpoint.open_for_inference(copied)
    assert_equal(keeper_of(copied).restore(abstract(make_state()), step=1)[0], make_state(1))


def test_a_step_without_digests_is_no_candidate_and_is_written_anew(copied):
    (copied / "2" / "digests.0.json").unlink()
    (copied / "3.orbax-checkpoint-tmp").mkdir()
    keeper = keeper_of(copied)
    assert keeper.latest() == 1
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.restore_params(copied / "2")
    assert keeper.save(2, make_state(2), META, {}, {})
    keeper.close()
    assert sorted(path.name for path in copied.iterdir()) == ["1", "2"]
    assert_equal(keeper_of(copied).restore(abstract(make_state()))[0], make_state(2))
    listing = copied / "2" / "digests.0.json"
    listing.write_text(json.dumps({**json.loads(listing.read_text()), "processes": 2}))
    assert keeper_of(copied).latest() == 1


def test_the_newest_finite_and_the_best_stay(tmp_path):
    keeper = keeper_of(tmp_path, keep=2, best="itm/accuracy", asynchronous=False)
    for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.9, float("nan"), 0.1]):
        meta = {**META, "finite": step < 3}
        keeper.save(step, make_state(step), meta, {}, {"itm/accuracy": accuracy})
    keeper.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [1, 2, 4, 5]
    assert keeper_of(tmp_path).latest() == 5
    np.testing.assert_array_equal(
        checkpoint.restore_params(tmp_path)["body"]["bias"], make_state(2).params["body"]["bias"]
    )


def test_open_for_inference_takes_a_workdir_its_checkpoints_or_a_step(two_steps, tmp_path):
    for path in (two_steps, two_steps.parent, two_steps / "2", str(two_steps / "2")):
        params, meta, assets = checkpoint.open_for_inference(path)
        assert type(params["body"]["kernel"]) is np.ndarray
        np.testing.assert_array_equal(params["body"]["kernel"], make_state(2).params["body"]["kernel"])
        assert meta["step"] == 2
        assert {name: file.read_bytes() for name, file in assets.items()} == {
            "vocab.txt": b"[PAD]\n[UNK]\n",
            "model.bin": b"\x00\xff",
        }
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.open_for_inference(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.open_for_inference(tmp_path / "gone")


def test_parameters_alone_are_written_whatever_their_layout(tmp_path):
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    params = {"a": {"kernel": array.T, "scale": np.float32(2.5)}, "b": array.astype(np.float16)[:, ::2]}
    checkpoint.write(tmp_path / "made", params, META, {"vocab.txt": "[PAD]"})
    found, meta, assets = checkpoint.open_for_inference(tmp_path / "made")
    np.testing.assert_array_equal(found["a"]["kernel"], array.T)
    np.testing.assert_array_equal(found["b"], array[:, ::2])
    assert found["a"]["scale"] == 2.5 and found["b"].dtype == np.float16
    assert assets["vocab.txt"].read_text() == "[PAD]" and meta["config"]["shape"] == [1, 2]


def test_averages_stand_in_for_the_parameters_that_have_them(tmp_path):
    keeper = keeper_of(tmp_path)
    keeper.save(1, make_state(1), META, {}, {})
    keeper.save(2, dataclasses.replace(make_state(2), ema={}), META, {}, {})
    keeper.close()
    params, meta, _ = checkpoint.open_for_inference(tmp_path / "1", averages=True)
    np.testing.assert_array_equal(params["body"]["kernel"], make_state(1).ema["body"]["kernel"])
    np.testing.assert_array_equal(params["body"]["bias"], make_state(1).params["body"]["bias"])
    assert meta["averages"] and not checkpoint.open_for_inference(tmp_path / "1")[1]["averages"]
    with pytest.raises(UserError, match="holds no moving averages"):
        checkpoint.open_for_inference(tmp_path, averages=True)


def test_parameters_of_another_shape_are_reported_on_both_sides(two_steps):
    wanted = abstract(make_state(0, rows=8)).params
    wanted["head"] = {"kernel": wanted["body"].pop("bias")}
    state = dataclasses.replace(abstract(make_state(0, rows=8)), params=wanted)
    with pytest.raises(UserError) as error:
        keeper_of(two_steps).restore(state)
    assert "missing head/kernel (8,)" in str(error.value)
    assert "unexpected body/bias (16,)" in str(error.value)
    assert "shape of body/kernel: (16, 8), wanted (8, 8)" in str(error.value)
    placed = keeper_of(two_steps).restore(abstract(make_state(0, devices=4)))[0].params
    assert len(placed["body"]["kernel"].sharding.device_set) == 4


def test_ema_that_was_not_saved_is_named(tmp_path):
    state = make_state()
    keeper = keeper_of(tmp_path)
    keeper.save(0, TrainState(state.step, state.params, {}, {}, {}, state.rng), META, {}, {})
    keeper.close()
    assert not (tmp_path / "0" / "ema").exists()
    with pytest.raises(UserError, match="has no ema"):
        keeper_of(tmp_path).restore(abstract(state))


ENVIRONMENT_FAILS = """
import os, resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from vlp_jax import cli
from vlp_jax.training import checkpoint
from vlp_jax.training.state import TrainState

def state(rows):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 100)), jnp.float32)
    many = {f"w{n}": values + n for n in range(20)}  # writes that fail after the first one has failed
    return TrainState(jnp.int32(0), many, {"m": many}, {}, {}, jax.random.key(0))

def main(flags, kind, directory):
    keeper = checkpoint.Checkpointer(directory, keep=1, asynchronous=kind != "permission")
    keeper.save(1, state(10), {}, {}, {})
    keeper.wait()
    if kind == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    else:
        Path(directory).chmod(0o555)
        if os.getuid() == 0:
            os.setuid(65534)
    keeper.save(2, state(1000), {}, {}, {})
    keeper.check()
    keeper.wait()

sys.exit(cli.run(main, lambda flags: None, usage="", arguments=("KIND", "DIRECTORY")))
"""


@pytest.mark.parametrize(("kind", "words"), [("full", "File too large"), ("permission", "Permission denied")])
def test_a_full_disk_and_a_closed_folder_are_one_message(kind, words, tmp_path):
    for folder in (tmp_path, *(parent for parent in tmp_path.parents if "pytest-of-" in str(parent))):
        folder.chmod(0o755)
    directory = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT_FAILS, kind, str(directory)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    directory.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr and "Complete steps there: 1" in done.stderr
    assert [path.name for path in directory.iterdir()] == ["1"]
    checkpoint.open_for_inference(directory)
