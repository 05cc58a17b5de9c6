# SPDX-License-Identifier: Apache-2.0
"""AdamW as the originals run it: decay exclusions, learning-rate multipliers, frozen parameters and clipping.

Groups are regular expressions on parameter paths "a/b/kernel". Frozen parameters have no moments at all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlp_jax.training import schedule
from vlp_jax.training.paths import flatten, matches, nest
from vlp_jax.types import Array, Params, UserError, closest

PLACEMENTS = ("uncorrected", "corrected")
OptState = dict[str, Any]  # {"count": int32, "m": moments, "v": moments}, float32, nested like the parameters


@dataclasses.dataclass(frozen=True)
class Group:
    """How one parameter is updated."""

    decayed: bool
    multiplier: float
    frozen: bool


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with its groups; `make` builds it."""

    config: ConfigDict
    schedule: Callable[[Array], Array]

    def group(self, path: str) -> Group:
        """The group of the parameter at "a/b/kernel"."""
        factors = (
            float(factor) for pattern, factor in self.config.lr_multipliers if re.search(pattern, path)
        )
        decayed = self.config.weight_decay > 0 and not matches(self.config.no_decay, path)
        return Group(decayed, next(factors, 1.0), matches(self.config.frozen, path))

    def init(self, params: Params) -> OptState:
        """Zero moments for all but frozen parameters; partition boxes around parameters are kept."""
        zeros = [
            (path, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), leaf))
            for path, leaf in flatten(params)
            if not self.group(path).frozen
        ]
        return {"count": jnp.zeros((), jnp.int32), "m": nest(zeros), "v": nest(zeros)}

    def update(
        self, grads: Params, opt_state: OptState, params: Params, step: Array, finite: Array | bool = True
    ) -> tuple[Params, OptState, dict[str, Array]]:
        """One step on plain (unboxed) trees; without `finite` losses and gradients it leaves all as it was.

        The learning rate follows the global `step`; bias correction follows `count`, the number of updates
        that were really taken, so that a skipped step does not disturb it.

        Returns:
            new parameters, new state, and {"lr", "grad_norm" (before clipping, without frozen parameters),
            "finite" (whether the step was taken)}.
        """
        config = self.config
        m, v = dict(flatten(opt_state["m"])), dict(flatten(opt_state["v"]))
        grads = {path: g.astype(jnp.float32) for path, g in flatten(grads) if path in m}
        lr, count, norm = self.schedule(step), opt_state["count"] + 1, optax.tree.norm(grads)
        if config.clip_norm > 0:
            # As torch.nn.utils.clip_grad_norm_, small constant included.
            scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
            grads = {path: g * scale for path, g in grads.items()}
        finite = jnp.isfinite(norm) & finite
        # Chosen here and not at the end: the update then reads the moments that are kept, and old and new moments
        # never exist side by side (a copy of both, and half of the time of this function on a CPU).
        keep = functools.partial(jnp.where, finite)
        m = {path: keep(config.b1 * m[path] + (1 - config.b1) * g, m[path]) for path, g in grads.items()}
        v = {
            path: keep(config.b2 * v[path] + (1 - config.b2) * jnp.square(g), v[path])
            for path, g in grads.items()
        }
        new = []
        for path, param in flatten(params):
            group = self.group(path)
            if not group.frozen:
                decay = config.weight_decay if group.decayed else 0.0
                adam = _adam(config, m[path], v[path], count)
                param = keep(_apply(config, param, lr * group.multiplier, adam, decay), param)
            new.append((path, param))
        state = {"count": keep(count, opt_state["count"]), "m": nest(m.items()), "v": nest(v.items())}
        return nest(new), state, {"lr": lr, "grad_norm": norm, "finite": finite}

    def describe(self, params: Params) -> str:
        """A table for the log: tensors and numbers a group, and how many tensors each pattern matches."""
        sizes = {
            path: sum(math.prod(x.shape) for x in jax.tree.leaves(leaf)) for path, leaf in flatten(params)
        }
        groups = {path: self.group(path) for path in sizes}
        kinds = {
            "decayed": lambda group: group.decayed and not group.frozen,
            "not decayed": lambda group: not group.decayed and not group.frozen,
            "lr multiplied": lambda group: group.multiplier != 1 and not group.frozen,
            "frozen": lambda group: group.frozen,
        }
        lines = []
        for kind, belongs in kinds.items():
            paths = [path for path, group in groups.items() if belongs(group)]
            lines.append(f"{kind:14}{len(paths):6} tensors {sum(sizes[path] for path in paths):14,} numbers")
        for key, pattern in _patterns(self.config):
            count = sum(bool(re.search(pattern, path)) for path in sizes)
            lines.append(f"{key} {pattern!r} matches {count} tensors")
        return "\n".join(lines)


def make(config: ConfigDict, steps: int) -> Optimizer:
    """Builds the optimizer of `config.optimizer` for a run of `steps`.

    Raises:
        UserError: an invalid regular expression, an unknown eps placement or decay, a warm-up too long.
    """
    if config.eps_placement not in PLACEMENTS:
        raise UserError(
            f"unknown config.optimizer.eps_placement '{config.eps_placement}'."
            f"{closest(config.eps_placement, PLACEMENTS)} Possible: {', '.join(PLACEMENTS)}."
        )
    for pair in config.lr_multipliers:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], int | float):
            raise UserError(
                f"config.optimizer.lr_multipliers holds {pair!r}; possible: (regular expression, factor). "
                """Give --config.optimizer.lr_multipliers='(("head/", 10.0),)'."""
            )
    for key, pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"config.optimizer.{key} holds {pattern!r}, no regular expression: {error}. "
                "Give Python's syntax, matched anywhere in a path such as 'fusion/layers/mlp/out/kernel'."
            ) from error
    return Optimizer(config, schedule.make(config, steps))


def _adam(config: ConfigDict, m: Array, v: Array, count: Array) -> Array:
    """The Adam direction; "uncorrected" adds eps to sqrt(v) before bias correction (transformers 4.2.1)."""
    correction1, correction2 = _correction(config.b1, count), jnp.sqrt(_correction(config.b2, count))
    if config.eps_placement == "uncorrected":
        return correction2 / correction1 * m / (jnp.sqrt(v) + config.eps)
    return m / correction1 / (jnp.sqrt(v) / correction2 + config.eps)


def _apply(config: ConfigDict, param: Array, lr: Array, adam: Array, decay: float) -> Array:
    value = param.astype(jnp.float32)
    if config.eps_placement == "uncorrected":
        value = value - lr * adam
        value = value - lr * decay * value  # transformers 4.2.1 decays what Adam has moved
    else:
        value = value * (1 - lr * decay) - lr * adam  # torch.optim.AdamW decays first
    return value.astype(param.dtype)


def _correction(beta: float, count: Array) -> Array:
    """1 - beta ** count, without the cancellation that costs float32 five digits at the first steps."""
    if beta == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(count.astype(jnp.float32) * math.log(beta))


def _patterns(config: ConfigDict) -> Iterator[tuple[str, str]]:
    for key in ("no_decay", "lr_multipliers", "frozen"):
        for entry in config[key]:
            yield key, entry[0] if key == "lr_multipliers" else entry
