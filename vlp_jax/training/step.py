# SPDX-License-Identifier: Apache-2.0
"""One optimizer step as a pure function of state and global batch: the only place where losses are summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.systems.base import System
from vlp_jax.training.state import TrainState, moving_average
from vlp_jax.types import Array, Batch, Extra, Key, LossOut, Params, Term

PADDED = ("text_mask", "patch_mask", "image_mask", "box_mask")  # what is real of the padded parts of a batch

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array | Term]]]


def make_train_step(config: ConfigDict, system: System, optimizer: Any) -> Step:
    """Returns `step(state, batch) -> (state, metrics)`; metrics by name, without "train/": float32 scalars, and Terms.

    Total loss = sum over the terms of coefficient x (sum over the global batch) / max(count, 1), whatever the
    number of micro-batches and devices. A step whose loss or gradient is not finite leaves parameters, moments,
    averages and extra as they were and sets `skipped` to 1; the step number advances.
    """
    coefficients = {name: value for name, value in config.objectives.items() if value}
    accumulate = config.train.accumulation > 1

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array | Term]]:
        rng = jax.random.fold_in(state.rng, state.step)
        batch = system.prepare(batch, jax.random.fold_in(rng, 0))
        extra = {**state.extra, "ema": state.ema} if state.ema else state.extra
        gradient = _accumulated if accumulate else _whole
        grads, out = gradient(
            system, coefficients, config.train.accumulation, state.params, extra, batch, rng
        )
        total = sum(coefficients[name] * term.mean() for name, term in out.terms.items())

        params, opt_state, info = optimizer.update(
            grads, state.opt_state, state.params, state.step, jnp.isfinite(total)
        )
        finite = info.pop("finite")
        ema = moving_average(state.ema, params, config.ema.decay)
        new_extra = {name: value for name, value in out.extra.items() if name != "ema"}
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (ema, new_extra), (state.ema, state.extra)
        )
        metrics = {"loss": total, "skipped": 1.0 - finite.astype(jnp.float32), **info}
        metrics |= _composition(batch, config.data.sources)
        metrics |= {name: term.mean() for name, term in out.terms.items()} | dict(out.metrics)
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=kept[0])
        return dataclasses.replace(new, extra=kept[1]), metrics

    return step


def _composition(batch: Batch, sources: tuple[str, ...]) -> dict[str, Array]:
    """What the batch is made of: the share of positions that are padding, and of each source of a mixture."""
    real = {key.removesuffix("_mask"): value for key, value in batch.items() if key in PADDED}
    shares = {f"padding/{name}": 1.0 - jnp.mean(mask, dtype=jnp.float32) for name, mask in real.items()}
    if len(sources) > 1:
        for number, name in enumerate(sources):
            shares[f"share/{name}"] = jnp.mean(batch["source_id"] == number, dtype=jnp.float32)
    return shares


def _whole(
    system: System, coefficients: Mapping, _: int, params: Params, extra: Extra, batch: Batch, rng: Key
) -> tuple[Params, LossOut]:
    """Gradient and result of the batch in one piece."""

    def total(params: Params) -> tuple[Array, LossOut]:
        out = system.loss(params, extra, batch, jax.random.fold_in(rng, 1))
        return sum(coefficients[name] * term.mean() for name, term in out.terms.items()), out

    return jax.grad(total, has_aux=True)(params)


def _accumulated(
    system: System, coefficients: Mapping, parts: int, params: Params, extra: Extra, batch: Batch, rng: Key
) -> tuple[Params, LossOut]:
    """Gradient and result of the batch in `parts` micro-batches, one after the other.

    The counts of the whole batch are needed before the first gradient. They depend on the batch alone, so a first
    pass that returns nothing else costs nothing: the compiler drops the rest of it.
    """
    # Micro-batch k takes rows k, k + parts, ...: each stays spread over all devices.
    micro = {k: jnp.swapaxes(v.reshape(-1, parts, *v.shape[1:]), 0, 1) for k, v in batch.items()}
    keys = jax.vmap(lambda k: jax.random.fold_in(rng, k + 1))(jnp.arange(parts))

    def count(_: None, xs: tuple) -> tuple[None, dict[str, Array]]:
        out = system.loss(params, extra, *xs)
        return None, {name: term.count for name, term in out.terms.items()}

    _, counts = jax.lax.scan(count, None, (micro, keys))
    counts = {name: jnp.maximum(jnp.sum(c), 1.0) for name, c in counts.items()}

    def one(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        grads, sums, extra = carry

        def total(params: Params) -> tuple[Array, LossOut]:
            out = system.loss(params, extra, *xs)
            return sum(coefficients[n] * term.sum / counts[n] for n, term in out.terms.items()), out

        new, out = jax.grad(total, has_aux=True)(params)
        added = jax.tree.map(jnp.add, (grads, sums), (new, (out.terms, out.metrics)))
        return (*added, {**extra, **out.extra}), None

    shapes = jax.eval_shape(lambda: system.loss(params, extra, *jax.tree.map(lambda x: x[0], (micro, keys))))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, (shapes.terms, shapes.metrics)))
    (grads, (terms, metrics), extra), _ = jax.lax.scan(one, (*zeros, extra), (micro, keys))
    return grads, LossOut(terms, metrics, extra)
