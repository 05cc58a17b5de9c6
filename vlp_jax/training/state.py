# SPDX-License-Identifier: Apache-2.0
"""Everything that a run carries from step to step, and how it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.systems.base import System
from vlp_jax.training.paths import flatten, matches, nest
from vlp_jax.types import Array, Batch, Extra, Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run; `rng` is the run's base key, from which each step derives its own."""

    step: Array  # int32 [], steps taken
    params: Params
    opt_state: Any
    ema: Params  # moving averages of the parameters that config.ema names; {} when off
    extra: Extra
    rng: Key


def initial_state(
    config: ConfigDict, system: System, optimizer: Any, batch: Batch
) -> Callable[[], TrainState]:
    """Returns the function that makes step 0; call it under `eval_shape` or `jit` (parallel/shard.py)."""

    def make() -> TrainState:
        init, rng = jax.random.split(jax.random.key(config.seed))
        zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}
        params, extra = system.init(init, zeros)
        ema = averaged(params, config.ema.parameters) if config.ema.decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, extra, rng)

    return make


def averaged(params: Params, patterns: tuple[str, ...]) -> Params:
    """The part of a parameter tree whose paths ("a/b/kernel") match one of the regular expressions."""
    return nest((path, leaf) for path, leaf in flatten(params) if matches(patterns, path))


def moving_average(ema: Params, params: Params, decay: float) -> Params:
    """`decay * ema + (1 - decay) * params` on the leaves that `ema` has."""
    return {
        name: moving_average(old, params[name], decay)
        if isinstance(old, Mapping)
        else decay * old + (1.0 - decay) * params[name]
        for name, old in ema.items()
    }
