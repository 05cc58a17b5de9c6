# SPDX-License-Identifier: Apache-2.0
"""What the loop, the evaluation and the conversion know of a system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlp_jax.types import Array, Batch, Extra, Key, LossOut, Params, UserError

Predict = Callable[..., Mapping[str, Array]]  # (params, batch, rng=None, **static) -> {name: array}


class System(Protocol):
    """A pretraining system as a value; `Functions` is the usual way to make one."""

    predict: Mapping[str, Predict]

    def init(self, rng: Key, batch: Batch) -> tuple[Params, Extra]:
        """Draws parameters and extra state; called under `eval_shape` or `jit` only, by parallel/shard.py."""

    def prepare(self, batch: Batch, rng: Key) -> Batch:
        """Draws what concerns the global batch, before it is cut into micro-batches.

        A system with `predict["match"]` adds `matched` (1, 0, -1 = padding) and, as `pair_*`, the texts to match:
        evaluation exchanges texts by it, and learns from `pair_example_id` where each came from.
        """

    def loss(self, params: Params, extra: Extra, batch: Batch, rng: Key) -> LossOut:
        """Terms and metrics of one micro-batch, at training."""


@dataclasses.dataclass(frozen=True)
class Functions:
    """A system put together from plain functions."""

    init: Callable[[Key, Batch], tuple[Params, Extra]]
    prepare: Callable[[Batch, Key], Batch]
    loss: Callable[[Params, Extra, Batch, Key], LossOut]
    predict: Mapping[str, Predict]


def interleave(views: list[Array]) -> Array:
    """Joins views `[batch, ...]` row by row into `[batch x views, ...]`.

    Concatenating two sharded batches costs four permutes; stacking them on a new second axis costs nothing.
    """
    stacked = jnp.stack(views, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def part(x: Array, index: int, views: int) -> Array:
    """The rows of view `index` in what `interleave` joined."""
    return x.reshape(-1, views, *x.shape[1:])[:, index]


def interleave_features(views: list[Mapping[str, Array]]) -> dict[str, Array]:
    """`interleave` of each key of views that share their keys."""
    return {key: interleave([view[key] for view in views]) for key in views[0]}


def fill_unknown(config: ConfigDict, facts: Mapping[str, Any], wanted: Mapping[str, str]) -> ConfigDict:
    """Returns a copy of `config` whose fields of value -1 come from `facts`; `wanted` maps field to fact.

    Raises:
        UserError: a field that is set differs from what the data or the checkpoint says (both are named), or a
            fact is needed and not there.
    """
    config = ConfigDict(config.to_dict())
    for field, fact in wanted.items():
        *parents, name = field.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        known = facts.get(fact, -1)
        if node[name] == -1 and known == -1:
            raise UserError(f"config.{field} is -1 and the data does not say its {fact}. Set config.{field}.")
        if node[name] == -1:
            node[name] = known
        elif known not in (-1, node[name]):
            raise UserError(
                f"config.{field} is {node[name]}, but the data has {fact} {known}. "
                f"Leave config.{field} at -1, or use the data that fits."
            )
    return config


def needs_inputs(config: ConfigDict, *parts: str) -> None:
    """Checks that a batch has what a system reads.

    Raises:
        UserError: one of the parts is not in `config.data.inputs`.
    """
    given = tuple(config.data.inputs)
    if missing := [part for part in parts if part not in given]:
        raise UserError(
            f"config.data.inputs={given} lacks {' and '.join(missing)}: the system {config.system} reads "
            f"{', '.join(parts)}. Put it in."
        )


def whole_patches(config: ConfigDict) -> None:
    """Checks that a picture is a whole number of patches.

    Raises:
        UserError: it is not.
    """
    size, patch = config.data.image_size, config.data.patch_size
    if size % patch:
        raise UserError(
            f"config.data.image_size {size} is not divisible by config.data.patch_size {patch}. "
            f"Take {size // patch * patch or patch} or {(size // patch + 1) * patch}."
        )


def whole_heads(config: ConfigDict, *stacks: str) -> None:
    """Checks that the width is a multiple of the attention heads of the named parts of `config.model`.

    Raises:
        UserError: of one it is not.
    """
    width = config.model.width
    for stack in stacks:
        heads = config.model[stack].num_heads
        if heads < 1 or width % heads:
            possible = [n for n in range(1, width + 1) if width % n == 0 and n <= 64]
            raise UserError(
                f"config.model.width {width} is not divisible by config.model.{stack}.num_heads {heads}. Possible "
                f"heads: {possible}. Change one of the two."
            )


def switch_on_heads(config: ConfigDict, pooled: tuple[str, ...]) -> None:
    """Switches on the head of each active objective that has one, in place.

    Raises:
        UserError: one of the heads named in `pooled` is wanted without the pooler that it reads.
    """
    heads = config.model.heads
    for name, coefficient in config.objectives.items():
        if coefficient and name in heads:
            heads[name] = True
    if not heads.pooler and (given := [name for name in pooled if heads[name]]):
        raise UserError(
            f"config.model.heads.pooler is off, but the heads {', '.join(given)} read what it gives. Switch it on, "
            "or these off (config.model.heads, config.objectives)."
        )


def jitted(functions: Mapping[str, Predict], static: Mapping[str, tuple[str, ...]]) -> dict[str, Predict]:
    """Compiles predict functions once; `static` names the keyword arguments that choose a program."""
    return {name: jax.jit(f, static_argnames=static.get(name, ())) for name, f in functions.items()}
