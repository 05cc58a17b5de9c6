# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the global step: warm-up from 0, then linear, cosine, constant or in steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.types import Array, UserError, closest

DECAYS = ("linear", "cosine", "constant", "step")


def make(optimizer: ConfigDict, steps: int) -> Callable[[Array], Array]:
    """Returns `schedule(step) -> lr`, float32; step 0 is the first update, as in PyTorch's LambdaLR.

    Follows `get_polynomial_decay_schedule_with_warmup` (power 1) and `get_cosine_schedule_with_warmup` of
    transformers 4.2.1, which ViLT calls; the cosine ends at `end_lr` too, and stays there after the end. "step" is
    PyTorch's MultiStepLR with a factor of 0.1, which DETR has; `end_lr` means nothing there.

    Raises:
        UserError: unknown decay, a warm-up that is negative or longer than the run, drops without "step" or the
            other way round.
    """
    peak, end = float(optimizer.lr), float(optimizer.end_lr)
    if optimizer.decay not in DECAYS:
        raise UserError(
            f"unknown config.optimizer.decay '{optimizer.decay}'.{closest(optimizer.decay, DECAYS)} "
            f"Possible: {', '.join(DECAYS)}."
        )
    if not 0 <= optimizer.warmup <= steps:
        raise UserError(
            f"config.optimizer.warmup {optimizer.warmup:g} does not fit config.train.steps {steps}. Give a "
            f"share of the steps below 1, or a number of steps up to {steps}."
        )
    if (optimizer.decay == "step") != bool(optimizer.drops):
        raise UserError(
            f"config.optimizer.decay is '{optimizer.decay}' and config.optimizer.drops {tuple(optimizer.drops)}: the "
            "drops belong to 'step' and to nothing else. Give both, for example step and (0.67,), or neither."
        )
    if not all(isinstance(when, int | float) and 0 < when < math.inf for when in optimizer.drops):
        raise UserError(
            f"config.optimizer.drops {tuple(optimizer.drops)} are not all numbers above 0. Give steps, or shares of "
            "the run below 1, for example (0.67,)."
        )
    drops = [int(steps * when if when < 1 else when) for when in optimizer.drops]
    warmup = int(steps * optimizer.warmup if optimizer.warmup < 1 else optimizer.warmup)
    length = max(steps - warmup, 1)

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.int32)
        rising = step.astype(jnp.float32) / max(warmup, 1) * peak
        # Counted from the end, where the rate is small and 1 - progress would lose its digits in float32.
        remaining = jnp.clip(steps - step, 0, length).astype(jnp.float32) / length
        if optimizer.decay == "cosine":
            remaining = jnp.sin(0.5 * math.pi * remaining) ** 2
        if optimizer.decay == "constant":
            remaining = jnp.ones_like(remaining)
        if optimizer.decay == "step":
            passed = sum((step >= drop).astype(jnp.float32) for drop in drops)
            return jnp.where(step < warmup, rising, peak * 0.1**passed)
        return jnp.where(step < warmup, rising, end + (peak - end) * remaining)

    return schedule
