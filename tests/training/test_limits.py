# SPDX-License-Identifier: Apache-2.0
"""Numbers that no run can have are refused by key, and those that the configs have are not."""

from __future__ import annotations

import pytest

from configs import vilt
from vlp_jax.training import limits
from vlp_jax.types import UserError


def changed(**values):
    config = vilt.get_config("variant=tiny")
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


@pytest.mark.parametrize("variant", vilt.VARIANTS)
@pytest.mark.parametrize("smoke", ["", ",smoke"])
def test_configs_are_within(variant, smoke):
    limits.check(vilt.get_config(f"variant={variant}{smoke}"))


@pytest.mark.parametrize(
    ("key", "value", "possible"),
    [
        ("train__steps", 0, "1 or more"),
        ("train__batch_size", -4, "1 or more"),
        ("train__accumulation", 0, "1 or more"),
        ("train__log_every", 0, "1 or more"),
        ("train__evaluate_every", -1, "0 or more"),
        ("checkpoint__every", -1, "0 or more"),
        ("checkpoint__keep", 0, "1 or more"),
        ("data__patch_size", 0, "1 or more"),
        ("data__prefetch", -2, "0 or more"),
        ("data__mask_rate", 0.0, "above 0 and below 1"),
        ("evaluation__mask_rate", 1.0, "above 0 and below 1"),
        ("evaluation__train_examples", -1, "0 or more"),
        ("evaluation__batch_size", 0, "1 or more"),
        ("evaluation__max_patches", -2, "-1 or more"),
        ("model__dropout", 1.0, "0 or more and below 1"),
        ("model__dropout", -0.5, "0 or more and below 1"),
        ("model__width", 0, "1 or more"),
        ("model__fusion__num_heads", -2, "1 or more"),
        ("model__fusion__depth", 0, "1 or more"),
        ("model__modalities", 1, "2 or more"),
        ("model__text_embed__length", -2, "-1 or more"),
        ("optimizer__lr", float("nan"), "0 or more"),
        ("optimizer__lr", float("inf"), "0 or more"),
        ("optimizer__b2", 1.0, "0 or more and below 1"),
        ("ema__decay", 1.5, "0 or more and below 1"),
        ("objectives__mlm", -1.0, "0 or more"),
        ("model__dtype", "float23", "Did you mean 'float32'? Possible: float32, bfloat16"),
    ],
)
def test_what_no_run_can_have_is_refused_by_key(key, value, possible):
    with pytest.raises(UserError) as error:
        limits.check(changed(**{key: value}))
    assert f"config.{key.replace('__', '.')} is " in str(error.value) and str(value) in str(error.value)
    assert possible in str(error.value)


def test_edges_are_possible():
    limits.check(
        changed(
            train__steps=1, train__batch_size=1, data__text_length=3, data__max_patches=1, model__dropout=0.99
        )
    )
    limits.check(
        changed(objectives__mlm=0.0, objectives__itm=0.0, evaluation__gallery=0, checkpoint__every=0)
    )


def test_a_run_needs_an_objective():
    with pytest.raises(UserError, match="objectives.mlm.* above 0"):
        limits.check(changed(objectives__mlm=0.0, objectives__itm=0.0, objectives__wpa=0.0))
