# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, counted from the model's own traced program, before any compiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from vlp_jax.systems.base import System
from vlp_jax.types import Params

# A product inside `jax.named_scope("select")` picks rows by a one-hot matrix; it stands for a gather: no credit.
SELECTION = "select"
TRAINING = 3  # forward once, backward twice; nothing for what is computed again


def step_flops(system: System, params: Params, batch: Any) -> int:
    """FLOPs of one training step on a batch: products and convolutions of the loss, 2 a multiply-add, times three.

    Args:
        params, batch: `ShapeDtypeStruct`s or arrays; nothing is computed.
    """

    def loss(params: Params, batch: Any) -> Any:
        key = jax.random.key(0)
        return system.loss(params, {}, system.prepare(batch, key), key).terms

    return TRAINING * flops(loss, params, batch)


def flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of the products and convolutions in a traced function; loops of unknown length count once."""
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if SELECTION in str(equation.source_info.name_stack).split("/"):
            continue
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(map(_of, _inside(params["branches"])))
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_of(inner) for value in params.values() for inner in _inside(value))
    return total


def _inside(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _inside(each)


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(kernel) // features
