# SPDX-License-Identifier: Apache-2.0
"""The learning rate against the schedules of transformers, which ViLT calls."""

from __future__ import annotations

import numpy as np
import pytest

from configs import common
from vlp_jax.training import schedule
from vlp_jax.types import UserError


def settings(**changes):
    optimizer = common.get_config().optimizer
    optimizer.update(changes)
    return optimizer


def rates(optimizer, steps, upto=None):
    return np.asarray(schedule.make(optimizer, steps)(np.arange(upto or steps + 1)))


def torch_rates(kind, lr, warmup, steps, **options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=steps, **options)
    values = []
    for _ in range(steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(values)


@pytest.mark.parametrize("end", [0.0, 1e-5])
@pytest.mark.parametrize("warmup", [0.1, 7.0])
def test_linear_equals_transformers(warmup, end):
    ours = rates(settings(lr=3e-4, warmup=warmup, end_lr=end), 70)
    theirs = torch_rates("polynomial_decay", 3e-4, 7, 70, lr_end=end, power=1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


def test_cosine_equals_transformers():
    ours = rates(settings(lr=3e-4, warmup=7.0, decay="cosine"), 70)
    theirs = torch_rates("cosine", 3e-4, 7, 70)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-12)


def test_constant_equals_transformers():
    ours = rates(settings(lr=3e-4, warmup=7.0, decay="constant"), 70)
    np.testing.assert_allclose(ours[:70], np.minimum(np.arange(70) / 7, 1) * 3e-4, rtol=1e-6)


@pytest.mark.parametrize("drops", [(0.5, 0.75), (20, 30)])
def test_steps_equal_pytorch(drops):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[20, 30], gamma=0.1)
    theirs = []
    for _ in range(41):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = rates(settings(lr=3e-4, warmup=0.0, decay="step", drops=drops), 40)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "changes", [dict(decay="step"), dict(drops=(0.5,)), dict(decay="step", drops=("soon",))]
)
def test_drops_that_do_not_fit_are_named(changes):
    with pytest.raises(UserError, match="config.optimizer.drops"):
        schedule.make(settings(**changes), 10)


def test_long_runs_keep_their_digits_and_the_end_is_held():
    steps = 200_000
    function = schedule.make(settings(lr=1e-4, warmup=2500.0), steps)
    step = np.array([0, 1, 2500, steps - 1, steps, steps + 5])
    expected = [0, 1e-4 / 2500, 1e-4, 1e-4 / (steps - 2500), 0, 0]
    np.testing.assert_allclose(np.asarray(function(step)), expected, rtol=1e-6)
    cosine = schedule.make(settings(lr=1e-4, warmup=0.0, decay="cosine", end_lr=1e-6), 10)
    np.testing.assert_allclose(float(cosine(12)), 1e-6, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert rates(settings(lr=1e-3, warmup=0.0), 10)[0] == np.float32(1e-3)
    assert rates(settings(lr=1e-3, warmup=10.0), 10)[10] == 0.0


@pytest.mark.parametrize("warmup", [11.0, -1.0])
def test_a_warmup_that_does_not_fit_is_named(warmup):
    with pytest.raises(UserError, match=r"warmup .* does not fit config.train.steps 10"):
        schedule.make(settings(warmup=warmup), 10)


def test_an_unknown_decay_names_the_closest():
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        schedule.make(settings(decay="cosin"), 10)
