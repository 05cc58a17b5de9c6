# SPDX-License-Identifier: Apache-2.0
"""What every parity test does on our side: parameters from a table, outputs, layers, gradients, training steps.

Knows neither a system nor PyTorch: tensors of the other side come as numpy arrays by their names there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.layers import trace
from vlp_jax.systems.base import System
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.paths import flatten, nest
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import make_train_step
from vlp_jax.types import Term

# As in the fast lane. What users run is compared too, by the training steps.
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
Outputs = Callable[[Any, Mapping], dict[str, Any]]  # (parameters, batch) -> {name: array}


@dataclasses.dataclass(frozen=True)
class Ours:
    """A system of ours with what parity asks of it; `tests/parity/<system>.py:build(changes)` makes one."""

    config: ConfigDict
    system: System
    outputs: Outputs  # differentiable; [batch, token, ...] as the batch lays tokens out
    masks: Callable[[Mapping], dict[str, np.ndarray]]  # stream or output -> which [batch, token] are real
    kinds: tuple[str, ...]  # of batches, the padded one first; "pretraining" ones are prepared
    batch: Callable[..., dict[str, np.ndarray]]  # (kind, seed)

    def terms(self, params: Any, batch: Mapping) -> dict[str, Any]:
        """The terms of the loss of a prepared batch, without dropout."""
        out = self.system.loss(params, {}, batch, jax.random.key(0))
        return {name: term.mean() for name, term in out.terms.items()}


# Operations of a table: what the other side stores -> what we store.


def same(x: np.ndarray) -> np.ndarray:
    """Stored alike."""
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """PyTorch's `[out, in]` to `[in, out]`."""
    return x.T


def convolution(x: np.ndarray) -> np.ndarray:
    """PyTorch's `[out, in, rows, columns]` to `[rows, columns, in, out]`."""
    return x.transpose(2, 3, 1, 0)


def patch_kernel(x: np.ndarray) -> np.ndarray:
    """A convolution `[out, 3, p, p]` to `[p p 3, out]`: our patches are flat in row, column, channel order."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def third(index: int, then: Callable = same) -> Callable:
    """Query, key or value (0, 1, 2) of a fused tensor, whose first axis is cut in three."""
    return lambda x: then(np.split(x, 3)[index])


def first_position(x: np.ndarray) -> np.ndarray:
    """The class token's row of `[1, 1 + rows x columns, width]`."""
    return x[0, 0]


def grid_positions(x: np.ndarray) -> np.ndarray:
    """The other rows, `[rows, columns, width]` of a square grid."""
    side = math.isqrt(x.shape[1] - 1)
    return x[0, 1:].reshape(side, side, -1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a parameter table; `{layer}` in `source` runs over the layers that our array stacks, from `first`."""

    source: str
    ours: str
    op: Callable[[np.ndarray], np.ndarray] = same
    first: int = 0

    def sources(self, names: Sequence[str]) -> list[tuple[int | None, str]]:
        """(layer of our array or None, name) of each tensor that this row reads."""
        if "{layer}" not in self.source:
            return [(None, self.source)] if self.source in names else []
        pattern = re.compile(re.escape(self.source).replace(r"\{layer\}", r"(\d+)"))
        numbered = ((int(found[1]), name) for name in names if (found := pattern.fullmatch(name)))
        return sorted((layer - self.first, name) for layer, name in numbered if layer >= self.first)


def module(source: str, ours: str, op: Callable = linear) -> tuple[Row, Row]:
    """The two rows of a projection (weight, bias) or, with `op=same`, of a norm."""
    weight = "scale" if op is same else "kernel"
    return Row(f"{source}.weight", f"{ours}/{weight}", op), Row(f"{source}.bias", f"{ours}/bias")


def shapes(ours: Ours) -> dict[str, tuple[int, ...]]:
    """Our parameters' shapes by path; the batch for it is of the first kind."""
    batch = ours.batch(ours.kinds[0], 0)
    tree = jax.eval_shape(lambda: ours.system.init(jax.random.key(0), batch)[0])
    return {path: leaf.shape for path, leaf in flatten(nn.unbox(tree))}


def drawn(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random parameters by path, far from their initial values; variances are above 0."""
    draw = np.random.default_rng(0)
    made = {
        path: draw.normal(*((1.0, 0.3) if path.endswith("scale") else (0.0, 0.1)), shape).astype(np.float32)
        for path, shape in sorted(wanted.items())
    }
    return {path: np.abs(x) + 0.5 if path.endswith("variance") else x for path, x in made.items()}


def parameters(
    ours: Ours, rows: Sequence[Row], fresh: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Our parameter tree from the other side's tensors; `fresh` (path -> reason) is drawn, far from its start.

    Raises:
        AssertionError: one sorted report of everything that is missing, left over, doubled or of another shape.
    """
    wanted = shapes(ours)
    made: dict[str, np.ndarray] = {}
    read: dict[str, int] = dict.fromkeys(tensors, 0)
    faults = []
    for row in rows:
        found = row.sources(list(tensors))
        pieces = [row.op(tensors[name]) for _, name in found]
        for (_, name), piece in zip(found, pieces, strict=True):
            read[name] += piece.size
        if not found or row.ours in made:
            faults.append(f"{row.ours}: {'doubled' if found else f'no tensor is called {row.source}'}")
        else:
            made[row.ours] = np.stack(pieces) if "{layer}" in row.source else pieces[0]
    made |= drawn({path: wanted.get(path, ()) for path in fresh})
    faults += [f"{path}: in no row" for path in wanted.keys() - made.keys()]
    faults += [f"{path}: we have no such parameter" for path in made.keys() - wanted.keys()]
    faults += [
        f"{path}: shape {made[path].shape}, not {wanted[path]}"
        for path in made.keys() & wanted.keys()
        if made[path].shape != wanted[path]
    ]
    faults += [
        f"{n}: {read[n]} of its {x.size} numbers are read" for n, x in tensors.items() if read[n] != x.size
    ]
    assert not faults, "the table does not fit:\n" + "\n".join(sorted(faults))
    return nest((path, np.ascontiguousarray(value)) for path, value in made.items())


def outputs(function: Outputs, params: Any, batch: Mapping) -> dict[str, np.ndarray]:
    """Runs `function` compiled, in full float32 on any device."""
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK_TO_COMPILE)(params, batch))


def layers(ours: Ours, params: Any, batch: Mapping, paths: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """What the modules at `paths` return, call by call: the layers of a scanned stack come one by one.

    `ours` must be fresh: a program that is compiled already calls no module any more.
    """
    with jax.default_matmul_precision("highest"):
        return trace.outputs(lambda: ours.outputs(params, batch), paths)[1]


def projections(
    function: Outputs, params: Any, batch: Mapping, masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For each output what it is multiplied with before all is summed to one number: noise on real tokens."""
    draw, result = np.random.default_rng(1), {}
    for name, leaf in sorted(jax.eval_shape(function, params, batch).items()):
        weight = (
            draw.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape)) if leaf.shape else np.ones(())
        )
        if name in masks:
            weight = weight * masks[name].reshape(masks[name].shape + (1,) * (len(leaf.shape) - 2))
        result[name] = weight.astype(np.float32)
    return result


def gradients(
    function: Outputs, params: Any, batch: Mapping, weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradient of `sum of outputs x weights` by our paths, and the outputs as differentiation computes them."""

    def total(params: Any) -> Any:
        out = function(params, batch)
        return sum(jnp.sum(out[name] * weight) for name, weight in weights.items()), out

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK_TO_COMPILE)
        found, out = jax.tree.map(np.asarray, gradient(params))
    return dict(flatten(found)), out


def by_source(
    rows: Sequence[Row], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (name, ours, theirs in our layout) for each tensor of the other side."""
    for row in rows:
        for layer, name in row.sources(list(theirs)):
            own = ours[row.ours] if layer is None else ours[row.ours][layer]
            yield (name if row.op in (same, linear) else f"{name} -> {row.ours}"), own, row.op(theirs[name])


def train(
    ours: Ours, params: Any, batches: Sequence[Mapping], look: Callable[[Any, Mapping], object] | None = None
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Takes our own training steps on prepared batches: the metrics of each, and the last parameters by path.

    `look` is called with parameters and batch before each step.
    """
    config = ours.config
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    # Both sides get what was drawn once, outside.
    system = dataclasses.replace(ours.system, prepare=lambda batch, rng: batch)
    step = jax.jit(make_train_step(config, system, optimizer))
    params = jax.tree.map(jnp.array, params)
    start = jnp.zeros((), jnp.int32)
    state = TrainState(start, params, optimizer.init(params), {}, {}, jax.random.key(0))
    history = []
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            if look:
                look(state.params, batch)
            state, metrics = step(state, batch)
            values = {k: v.mean() if isinstance(v, Term) else v for k, v in metrics.items()}
            history.append({name: float(value) for name, value in values.items()})
    return history, dict(flatten(jax.tree.map(np.asarray, state.params)))
