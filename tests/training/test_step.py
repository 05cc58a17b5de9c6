# SPDX-License-Identifier: Apache-2.0
"""One loss on every preset, mesh and accumulation; sharded as the table says; a non-finite step leaves no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples import random_batch, vilt_config
from vlp_jax import systems
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.state import initial_state, moving_average
from vlp_jax.training.step import make_train_step
from vlp_jax.types import Term

ROWS = 16


class Run:
    """A state on a mesh and its compiled step."""

    def __init__(self, config, devices=None):
        self.config = config
        self.system = systems.get("vilt").build(config)
        self.optimizer = optimizers.make(config.optimizer, 10)
        self.mesh = meshes.make_mesh(config.parallel, devices)
        self.preset = config.parallel.rules
        make = initial_state(config, self.system, self.optimizer, random_batch(config, ROWS))
        with shard.context(self.mesh, self.preset):
            self.target = shard.abstract(make, self.mesh, self.preset)
            self.state = shard.concrete(make, self.target)
        outputs = (shard.shardings(self.target), shard.replicated(self.mesh))
        step = make_train_step(config, self.system, self.optimizer)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        self.place = meshes.placer(self.mesh)

    def take(self, batch):
        with shard.context(self.mesh, self.preset):
            self.state, metrics = self.step(self.state, self.place(batch))
        return {k: float(v.mean() if isinstance(v, Term) else v) for k, v in metrics.items()}


def three_losses(config, devices=None):
    run = Run(config, devices)
    return run, [run.take(random_batch(config, ROWS, seed))["loss"] for seed in range(3)]


@functools.cache
def reference():
    return three_losses(vilt_config(objectives__mpp=0.5), jax.devices()[:1])[1]


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("dp", marks=pytest.mark.learn),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "fsdp_tp")),
    ],
)
def test_eight_devices_have_the_loss_of_one(preset):
    run, losses = three_losses(vilt_config(objectives__mpp=0.5, parallel__rules=preset))
    np.testing.assert_allclose(losses, reference(), rtol=1e-5)
    kernel = run.state.params["fusion"]["stack"]["layers"]["mlp"]["hidden"][
        "kernel"
    ]  # [depth, width, mlp_width]
    wanted = {"dp": (2, 32, 64), "fsdp": (2, 4, 64), "fsdp_tp": (2, 8, 32)}[preset]
    moment = run.state.opt_state["m"]["fusion"]["stack"]["layers"]["mlp"]["hidden"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == wanted
    assert moment.sharding == kernel.sharding


@pytest.mark.slow
def test_dropout_is_the_same_on_every_mesh():
    changes = dict(model__dropout=0.3)
    _, one = three_losses(vilt_config(**changes), jax.devices()[:1])
    _, eight = three_losses(vilt_config(parallel__rules="fsdp_tp", **changes))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert abs(one[0] - three_losses(vilt_config(), jax.devices()[:1])[1][0]) > 1e-3


@pytest.mark.slow
def test_accumulation_has_the_loss_and_gradient_of_the_whole_batch():
    batch = random_batch(vilt_config(), ROWS)
    whole, parts = (
        Run(vilt_config(), jax.devices()[:2]),
        Run(vilt_config(train__accumulation=4), jax.devices()[:2]),
    )
    one, four = whole.take(batch), parts.take(batch)
    assert one.keys() == four.keys()
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_non_finite_step_changes_nothing_but_the_step():
    run = Run(vilt_config(ema__decay=0.9), jax.devices()[:1])
    run.take(random_batch(run.config, ROWS))
    # A weight, not the batch, brings the infinity: pictures are bytes.
    params = jax.tree.map(lambda x: x, run.state.params)
    params["text_embed"]["position"] = params["text_embed"]["position"].at[0, 0].set(jnp.inf)
    before = jax.device_get((params, run.state.opt_state, run.state.ema))
    run.state = type(run.state)(2, params, run.state.opt_state, run.state.ema, {}, run.state.rng)
    metrics = run.take(random_batch(run.config, ROWS))
    assert metrics["skipped"] == 1 and int(run.state.step) == 3
    after = jax.device_get((run.state.params, run.state.opt_state, run.state.ema))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_moving_average_follows_the_named_parameters():
    run = Run(vilt_config(ema__decay=0.75, ema__parameters=("heads/itm/",)), jax.devices()[:1])
    old = np.asarray(run.state.ema["heads"]["itm"]["dense"]["kernel"])
    assert run.state.ema["heads"].keys() == {"itm"} and run.state.ema.keys() == {"heads"}
    run.take(random_batch(run.config, ROWS))
    run.take(random_batch(run.config, ROWS, 1))
    first = run.state.ema["heads"]["itm"]["dense"]["kernel"]
    assert not np.array_equal(first, old)
    new = np.asarray(run.state.params["heads"]["itm"]["dense"]["kernel"])
    again = Run(vilt_config(), jax.devices()[:1])
    again.take(random_batch(run.config, ROWS))
    middle = np.asarray(again.state.params["heads"]["itm"]["dense"]["kernel"])
    np.testing.assert_allclose(first, 0.75 * (0.75 * old + 0.25 * middle) + 0.25 * new, rtol=1e-5, atol=1e-8)


def test_averages_may_begin_with_other_parameters():
    drawn, given = {"a": {"b": jnp.zeros(2), "c": jnp.zeros(1)}}, {"a": {"b": jnp.ones(2), "c": jnp.ones(1)}}
    begun = moving_average({"a": {"b": drawn["a"]["b"]}}, given, decay=0.0)
    assert list(begun["a"]) == ["b"] and begun["a"]["b"] is not given["a"]["b"]
    np.testing.assert_array_equal(begun["a"]["b"], 1.0)


@pytest.mark.slow
def test_what_a_batch_is_made_of():
    run = Run(vilt_config(data__sources=("coco", "vg")), jax.devices()[:1])
    batch = random_batch(run.config, ROWS)
    batch["source_id"] = (np.arange(ROWS) % 4 == 2).astype(np.int32)
    metrics = run.take(batch)
    assert metrics["padding/text"] == pytest.approx(1 - batch["text_mask"].mean())
    assert metrics["padding/patch"] == pytest.approx(1 - batch["patch_mask"].mean())
    assert (metrics["share/coco"], metrics["share/vg"]) == (0.75, 0.25)
    labels = batch["mlm_labels"] >= 0
    coco, vg = (labels[batch["source_id"] == number].sum() for number in (0, 1))
    mixed = (metrics["mlm/coco"] * coco + metrics["mlm/vg"] * vg) / (coco + vg)
    assert mixed == pytest.approx(metrics["mlm"], rel=1e-5)
    assert metrics["mlm/coco"] != pytest.approx(metrics["mlm/vg"], rel=1e-5)
