# SPDX-License-Identifier: Apache-2.0
"""What every parity test does on PyTorch's side: random weights, outputs, layers, gradients, training steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from tests.parity.harness import Row

torch.set_num_threads(1)  # at these sizes more threads only wait for each other


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW and its schedule as a paper's code runs them; the defaults are those of transformers 4.2.1.

    `no_decay` are parts of parameter names; warm-up is linear from 0, the decay linear to 0 at `steps`.
    """

    lr: float
    warmup: int
    steps: int
    no_decay: tuple[str, ...]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    coefficients: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the terms of the loss
    eps_before_correction: bool = True  # added to sqrt(v), and only then v is corrected
    decay_last: bool = True  # of what Adam has moved; else of the parameter before, as torch.optim.AdamW does

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.lr * (self.steps - step) / (self.steps - self.warmup)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A network to compare with; `tests/parity/<name>.py:build(config, quiet)` makes one.

    `outputs` has the names and the layout of ours; `layers` pairs a module of the network (`{layer}` counts) with
    our module's path and a token stream of `Ours.masks`; `streams` brings what such a module returns into our layout.
    """

    net: nn.Module
    rows: Sequence[Row]
    outputs: Callable[[Mapping], dict[str, torch.Tensor]]
    fresh: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our path -> why it has no source
    layers: Sequence[tuple[str, str, str]] = ()
    streams: Mapping[str, Callable[[torch.Tensor, Mapping], torch.Tensor]] = dataclasses.field(
        default_factory=dict
    )
    recipe: Recipe | None = None
    idle: Sequence[str] = ()  # our paths whose true gradient is 0: in training they follow rounding alone


def randomise(net: nn.Module, quiet: str) -> None:
    """Draws all parameters far from their initial values: a swapped or forgotten tensor must show.

    What matches the regular expression `quiet` is drawn fifty times smaller. Let it hold what feeds the norms: a
    norm shows its epsilon only where the variance is small.
    """
    torch.manual_seed(0)
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in net.named_parameters():
        scale = name.rpartition(".")[0] in norms and name.endswith("weight")
        factor = 0.02 if quiet and re.search(quiet, name) else 1.0
        nn.init.normal_(parameter, factor if scale else 0.0, factor * (0.3 if scale else 0.1))


def tensors(net: nn.Module) -> dict[str, np.ndarray]:
    """All parameters by name, a shared one once, and what else is stored as real numbers: frozen statistics."""
    stored = {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    return {name: x.detach().numpy().copy() for name, x in {**dict(net.named_parameters()), **stored}.items()}


def outputs(oracle: Oracle, batch: Mapping) -> dict[str, np.ndarray]:
    """Outputs in our layout."""
    with torch.no_grad():
        return {name: value.numpy() for name, value in oracle.outputs(batch).items()}


def layers(oracle: Oracle, batch: Mapping) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Our path -> (module's name, what it returns, in our layout) for the modules in `oracle.layers`."""
    found: dict[str, list] = {ours: [] for _, ours, _ in oracle.layers}
    handles = []
    for source, ours, stream in oracle.layers:
        pattern = re.compile(re.escape(source).replace(r"\{layer\}", r"\d+"))
        for name, module in oracle.net.named_modules():
            if pattern.fullmatch(name):

                def keep(_, __, result, name=name, ours=ours, stream=stream):
                    value = result[0] if isinstance(result, tuple) else result
                    found[ours].append((name, oracle.streams[stream](value, batch).numpy()))

                handles.append(module.register_forward_hook(keep))
    outputs(oracle, batch)
    for handle in handles:
        handle.remove()
    return found


def gradients(oracle: Oracle, batch: Mapping, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradient of `sum of outputs x weights` by parameter name."""
    oracle.net.zero_grad()
    values = oracle.outputs(batch)
    sum((values[name] * torch.tensor(weight)).sum() for name, weight in weights.items()).backward()
    return {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy().copy()
        for name, p in oracle.net.named_parameters()
    }


def train(oracle: Oracle, recipe: Recipe, batches: Sequence[Mapping]) -> list[dict[str, float]]:
    """Takes the recipe's steps on `oracle.net` and returns the loss ("loss") and its terms before each."""
    parameters = dict(oracle.net.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    history = []
    for step, batch in enumerate(batches):
        oracle.net.zero_grad()
        terms = oracle.outputs(batch)
        loss = sum(recipe.coefficients[name] * term for name, term in terms.items())
        loss.backward()
        history.append({name: term.item() for name, term in {**terms, "loss": loss}.items()})
        with torch.no_grad():
            for name, p in parameters.items():
                if p.grad is not None:
                    _adamw(recipe, name, p, first[name], second[name], step)
    return history


def _adamw(recipe: Recipe, name: str, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int) -> None:
    """One update in place."""
    (b1, b2), rate = recipe.betas, recipe.rate(step)
    m += (1 - b1) * (p.grad - m)
    v += (1 - b2) * (p.grad**2 - v)
    mean, root = m / (1 - b1 ** (step + 1)), (1 - b2 ** (step + 1)) ** 0.5
    if recipe.eps_before_correction:
        change = rate * mean / ((v.sqrt() + recipe.eps) / root)
    else:
        change = rate * mean / (v.sqrt() / root + recipe.eps)
    spared = any(part in name for part in recipe.no_decay)
    kept = 1 - (0 if spared else rate * recipe.weight_decay)
    p.copy_((p - change) * kept if recipe.decay_last else p * kept - change)
