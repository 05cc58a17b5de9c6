# SPDX-License-Identifier: Apache-2.0
"""ViLT twice with the same weights on the same batch: our train step, and transformers' PyTorch ViLT.

Nothing is drawn: no dropout, and all patches are kept. Both take MLM + ITM, AdamW with the same groups, pictures of
several shapes. Two savings are ours alone: both views share one patch projection, and only masked pieces are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from ml_collections import ConfigDict
from torch.nn import functional
from transformers.models.vilt.modeling_vilt import ViltMLMHead

from benchmarks import vilt_batch
from tests.parity.harness import module
from tests.parity.vilt_transformers import BLOCKS, ROWS, set_epsilon, settings
from vlp_jax import systems
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.planning import work
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.paths import nest
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import make_train_step
from vlp_jax.types import Array, Params

TOLERANCE = 1e-4  # relative, of losses and gradient norms in float32
Placed = Mapping[str, Array]


class Ours:
    """Our train step and forward on one device; all its programs go on with one state."""

    def __init__(self, config: ConfigDict, task: vilt_batch.Task, params: Params) -> None:
        self.config, self.task = config, task
        self.mesh = meshes.make_mesh(config.parallel, jax.devices()[:1])
        self.place = meshes.placer(self.mesh)
        self.system = systems.get("vilt").build(config)
        self.optimizer = optimizers.make(config.optimizer, config.train.steps)
        with shard.context(self.mesh, config.parallel.rules):
            self.state = jax.jit(self._first_state)(jax.device_put(params, shard.replicated(self.mesh)))

    def batch(self) -> Placed:
        """The batch on the device, its patches newly cut from the pictures: what the host does for every step."""
        return self.place(self.task.batch())

    def flops(self, part: str) -> int:
        """Of a training step ("train") or of matching ("forward"), over the tokens that both sides compute."""
        config, batch = self._changed(1, ""), self.task.batch()
        config.model.token_multiple = 1
        system = systems.get("vilt").build(config)
        if part == "train":
            return work.step_flops(system, self.state.params, batch)
        return work.flops(system.predict["match"], self.state.params, batch)

    def train(self, unroll: int, dtype: str = "") -> Callable[[Placed], dict[str, Array]]:
        """Compiles the train step; the result takes a batch and returns its metrics, which may not be there yet."""
        config, batch = self._changed(unroll, dtype), self.batch()
        step = make_train_step(config, systems.get("vilt").build(config), self.optimizer)
        with shard.context(self.mesh, config.parallel.rules):
            compiled = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()

        def run(batch: Placed) -> dict[str, Array]:
            self.state, metrics = compiled(self.state, batch)
            return metrics

        return run

    def forward(self, unroll: int, dtype: str = "") -> Callable[[Placed], Array]:
        """Compiles matching; the result takes a batch and returns logits `[batch, 2]`."""
        config, batch = self._changed(unroll, dtype), self.batch()
        match = systems.get("vilt").build(config).predict["match"]
        with shard.context(self.mesh, config.parallel.rules):
            compiled = match.lower(self.state.params, batch).compile()
        return lambda batch: compiled(self.state.params, batch)["match_logits"]

    def pairs(self) -> dict[str, np.ndarray]:
        """The texts to be matched at the next step, as `System.prepare` draws them, and the answers."""
        key = jax.random.fold_in(jax.random.fold_in(self.state.rng, self.state.step), 0)
        with shard.context(self.mesh, self.config.parallel.rules):
            prepared = jax.jit(self.system.prepare)(self.batch(), key)
        return {name: np.asarray(prepared[name]) for name in ("pair_text_ids", "pair_text_mask", "matched")}

    def _first_state(self, params: Params) -> TrainState:
        moments, rng = self.optimizer.init(params), jax.random.key(self.config.seed)
        return TrainState(jnp.zeros((), jnp.int32), params, moments, {}, {}, rng)

    def _changed(self, unroll: int, dtype: str) -> ConfigDict:
        config = ConfigDict(self.config.to_dict())
        config.model.unroll = unroll
        config.model.dtype = dtype or config.model.dtype
        return config


class Peer(torch.nn.Module):
    """transformers' ViLT with the two heads of pretraining; its decoder is not tied, as in the original."""

    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        sizes, width = settings(config), config.model.width
        torch.manual_seed(0)
        self.vilt = transformers.ViltModel(sizes)
        self.mlm_score = ViltMLMHead(sizes)
        self.itm_score = torch.nn.Linear(width, 2)
        set_epsilon(self, BLOCKS, 1e-6)
        for name, parameter in self.named_parameters():
            if "norm" not in name.lower():
                # The usual 0.02 of width 768; a toy of smaller weights would hide its parts from `check_equal`.
                torch.nn.init.normal_(parameter, std=0.55 * width**-0.5)

    def forward(self, text: Mapping, image: Mapping) -> torch.Tensor:
        """Matching logits `[batch, 2]`."""
        return self.itm_score(self.vilt(**text, **image).pooler_output)

    def loss(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """MLM + ITM of what `tensors` gives, a pass each."""
        text, image = inputs["masked"], inputs["image"]
        tokens = self.vilt(**text, **image).last_hidden_state
        words = self.mlm_score(tokens[:, : text["input_ids"].shape[1]])
        mlm = functional.cross_entropy(words.float().flatten(0, 1), inputs["labels"].flatten())
        itm = functional.cross_entropy(self(inputs["pairs"], image).float(), inputs["matched"])
        return mlm + itm

    def params(self) -> Params:
        """The weights as our tree, by the table of the parity tests."""
        tensors = {name: x.detach().cpu().numpy() for name, x in self.state_dict().items()}
        found = {}
        for row in (*ROWS, *module("itm_score", "heads/itm/dense")):
            pieces = [row.op(tensors[name]) for _, name in row.sources(list(tensors))]
            # Copies: PyTorch's update would otherwise show through.
            found[row.ours] = np.stack(pieces) if "{layer}" in row.source else np.array(pieces[0])
        return nest(found.items())


class PeerTraining:
    """Updates of a `Peer`: AdamW in one fused pass, which is what transformers' Trainer takes by default."""

    def __init__(self, net: Peer, config: ConfigDict) -> None:
        self.net, o = net, config.optimizer
        groups: dict[float, list] = {o.weight_decay: [], 0.0: []}
        for name, parameter in net.named_parameters():
            decays = not (name.endswith("bias") or "norm" in name.lower())
            groups[o.weight_decay if decays else 0.0].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, fused=True,
        )  # fmt: skip

    def step(
        self, inputs: Mapping[str, Any], autocast: bool = False, loss: Callable | None = None
    ) -> torch.Tensor:
        """One update; `autocast` computes in bfloat16 where PyTorch holds that to be safe, `loss` may be compiled."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs["labels"].device.type, torch.bfloat16, enabled=autocast):
            value = (loss or self.net.loss)(inputs)
        value.backward()
        self.optimizer.step()
        return value.detach()


def tensors(task: vilt_batch.Task, pairs: Mapping[str, np.ndarray], device: str = "cpu") -> dict[str, Any]:
    """What `Peer.loss` takes: pictures padded as transformers' processor does, masked texts, pairs, answers."""
    ids, labels = task.masked_text()
    pixels, pixel_mask = task.padded_pictures()

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, dtype=None if x.dtype == np.float32 else torch.long, device=device)

    def text(ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
        ids = tensor(ids)
        return {"input_ids": ids, "attention_mask": tensor(mask), "token_type_ids": torch.zeros_like(ids)}

    return {
        "masked": text(ids, task.rest["text_mask"]),
        "pairs": text(pairs["pair_text_ids"], pairs["pair_text_mask"]),
        "image": {"pixel_values": tensor(pixels), "pixel_mask": tensor(pixel_mask)},
        "labels": tensor(labels),
        "matched": tensor(pairs["matched"]),
    }


def check_equal(
    ours: Ours, steps: Sequence[Callable[[Placed], Mapping]], peer: PeerTraining, device: str, bound: float
) -> str:
    """Takes an update on each side for each of our `steps`, and compares losses and gradient norms.

    A loss near its start hardly sees the picture; the norm of all gradients sees every part, and what follows the
    first update sees the optimizer.

    Returns:
        a line with the losses and the largest relative difference.

    Raises:
        RuntimeError: something differs by more than `bound`: the times would compare unequal work.
    """
    found, worst = [], 0.0
    for step in steps:
        inputs = tensors(ours.task, ours.pairs(), device)
        metrics, loss = step(ours.batch()), peer.step(inputs)
        # In float64: PyTorch's own float32 norm of these 135 million numbers is 6e-5 off.
        squares = [p.grad.double().square().sum() for p in peer.net.parameters() if p.grad is not None]
        for name, theirs in (("loss", float(loss)), ("grad_norm", float(sum(squares)) ** 0.5)):
            mine = float(metrics[name])
            found.append(f"{name} {mine:.6f} and {theirs:.6f}")
            worst = max(worst, abs(mine - theirs) / abs(theirs))
    line = f"both sides, an update between: {', '.join(found)}; apart by {worst:.1e}, allowed {bound:.0e}"
    if not worst <= bound:
        raise RuntimeError(f"The two sides do not do the same work; {line}.")
    return line
