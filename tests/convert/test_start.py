# SPDX-License-Identifier: Apache-2.0
"""`config.init_from`: a run starts from checkpoints and files by the same engine, and says what stays fresh."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest

from tests.convert.files import config_of, original, parameters
from tests.examples import random_batch
from vlp_jax import systems
from vlp_jax.convert import start
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten, nest
from vlp_jax.types import UserError


def drawn(config, rules="dp", devices=1):
    """Initial parameters on a mesh."""
    config.parallel.rules = rules
    mesh = meshes.make_mesh(config.parallel, jax.devices()[:devices])
    system, batch = systems.get("vilt").build(config), random_batch(config, devices)
    make = lambda: system.init(jax.random.key(0), batch)[0]  # noqa: E731
    with shard.context(mesh, rules):
        return shard.concrete(make, shard.abstract(make, mesh, rules))


def begun(config, path, **how):
    """(what the run starts with by path, what was drawn)."""
    config.init_from = str(path)
    initial = drawn(config, **how)
    return dict(flatten(start.parameters(config, initial))), dict(flatten(initial))


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="vlp_jax")
    return caplog


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(checkpoint of ours with both pretraining heads, its parameters)."""
    folder, config = tmp_path_factory.mktemp("saved") / "made", config_of()
    params = parameters(config)
    checkpoint.write(folder, nest(params.items()), {"config": config.to_dict(), "finite": True}, {})
    return folder, params


def test_a_checkpoint_of_ours_starts_a_run(saved, told):
    found, _ = begun(config_of(), saved[0])
    for path, array in saved[1].items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert "fresh" not in told.text and "parameters from" in told.text


def test_fresh_parameters_keep_what_was_drawn_and_are_named(saved, told):
    config = config_of(objectives__itm=0.0, model__heads__answer=7)
    found, initial = begun(config, saved[0])
    for path in ("heads/answer/hidden/kernel", "heads/answer/out/bias"):
        np.testing.assert_array_equal(found[path], initial[path])
        assert f"fresh: {path} (no file has this head)" in told.text
    assert "not taken: heads/itm/dense/kernel (the config has no head itm)" in told.text
    np.testing.assert_array_equal(found["heads/mlm/dense/kernel"], saved[1]["heads/mlm/dense/kernel"])


def test_positions_take_the_sizes_of_the_run(saved, told):
    found, initial = begun(config_of(data__text_length=20, data__image_size=40), saved[0])
    assert found["patch_embed/position"].shape == (5, 5, 48)
    np.testing.assert_array_equal(found["text_embed/position"][:16], saved[1]["text_embed/position"])
    np.testing.assert_array_equal(found["text_embed/position"][16:], initial["text_embed/position"][16:])
    assert "resized: patch_embed/position from [3, 3, 48] to [5, 5, 48]" in told.text


def test_a_file_from_elsewhere_starts_a_sharded_run(tmp_path, told):
    params = original(tmp_path / "vilt.safetensors", config_of())
    found, initial = begun(config_of(), tmp_path / "vilt.safetensors", rules="fsdp", devices=4)
    for path, array in params.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)
        assert found[path].sharding == initial[path].sharding
    assert any(not leaf.sharding.is_fully_replicated for leaf in found.values())
    assert "vilt.safetensors (ViLT as released)" in told.text


def test_several_parts_are_joined_by_commas(saved, tmp_path):
    original(tmp_path / "vilt.safetensors", config_of())
    with pytest.raises(UserError, match="doubled     fusion/norm/bias"):
        begun(config_of(), f"{saved[0]}, {tmp_path / 'vilt.safetensors'}")


def test_another_number_of_heads_is_refused(saved):
    with pytest.raises(UserError, match=r"has 3 attention heads, but config.model.fusion.num_heads is 2"):
        begun(config_of(model__fusion__num_heads=2), saved[0])


def test_another_epsilon_is_said(saved, told):
    begun(config_of(model__fusion__eps=1e-5), saved[0])
    assert "was trained with model.fusion.eps 1e-06, this run has 1e-05" in told.text


def test_what_does_not_fit_is_one_report(saved):
    with pytest.raises(UserError) as error:
        begun(config_of(model__fusion__depth=2), saved[0])
    assert "mis-shaped  fusion/stack/layers/norm1/bias: [3, 48] in the file, [2, 48] here" in str(error.value)


def test_no_source_is_no_start():
    assert start.starter(config_of()) is None
