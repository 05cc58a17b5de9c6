# SPDX-License-Identifier: Apache-2.0
"""DETR twice with the same weights on the same batch: our train step, and transformers' with its own loss in PyTorch.

Nothing is dropped. Both match and sum the losses of every decoder layer, freeze stem and first stage, clip to 0.1 and
take AdamW. The peer's auxiliary outputs normalise what the next layer reads, a flaw that costs it no time to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from ml_collections import ConfigDict

from configs import detr
from tests.parity.detr_transformers import BACKBONE, draw_backbone, pixels, rows, settings
from tests.parity.oracle import tensors
from vlp_jax import systems
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.paths import nest
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import make_train_step
from vlp_jax.types import BOXES_LEFT_OUT, Array, Params

# Relative, of loss and gradient norm before the first update. The peer's flaw is not seen there: its norms begin as
# 1 and 0, and to normalise twice is then to normalise once, but for epsilon.
TOLERANCE = 1e-3
FROZEN = (f"{BACKBONE}.embedder.", f"{BACKBONE}.encoder.stages.0.")


def make_config(variant: str, depth: int = 0) -> ConfigDict:
    """DETR `r50` or `tiny` in float32, without dropout; both with the released groups and a constant rate.

    `depth`: of encoder and decoder beside a narrow ResNet, to see that all of it runs; 0 = the variant's sizes.
    """
    config = detr.get_config(f"variant={variant}")
    released = detr.get_config("variant=r50").optimizer
    config.model.dtype, config.model.dropout = "float32", 0.0
    config.optimizer.frozen, config.optimizer.lr_multipliers = released.frozen, released.lr_multipliers
    config.optimizer.lr, config.optimizer.decay, config.optimizer.drops = 1e-4, "constant", ()
    if depth:
        config.model.encoder.depth = config.model.decoder.depth = depth
        config.model.grid_embed.depths, config.model.grid_embed.widths = (1, 2), (16, 32)
    return systems.get("detr").resolve(config, {"classes": 91 if variant == "r50" else 12})


def make_batch(config: ConfigDict, count: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Noise that fills its canvas, with 1 to 13 boxes: COCO's pictures have 7 in the mean."""
    draw = np.random.default_rng(0)
    slots = config.data.max_boxes
    used = np.arange(slots)[None] < draw.integers(1, min(slots, 13) + 1, (count, 1))
    sides = draw.uniform(0.05, 0.5, (count, slots, 2))
    boxes = np.concatenate([draw.uniform(sides / 2, 1 - sides / 2), sides], -1)
    labels = draw.integers(0, config.model.heads.classes, used.shape)
    number = np.arange(count, dtype=np.int32)
    return {
        "image": draw.integers(0, 256, (count, *size, 3), np.uint8),
        "image_mask": np.ones((count, *size), bool),
        "boxes": np.where(used[..., None], boxes, 0).astype(np.float32),
        "box_labels": np.where(used, labels, -1).astype(np.int32),
        "box_mask": used,
        "boxes_left_out": np.zeros((count, len(BOXES_LEFT_OUT)), np.int32),
        "example_id": number,
        "image_id": number,
        "source_id": np.zeros(count, np.int32),
    }


class Ours:
    """Our train step on one device; all its programs go on with one state."""

    def __init__(self, config: ConfigDict, batch: Mapping[str, np.ndarray], params: Params) -> None:
        self.config, self.host = config, batch
        self.mesh = meshes.make_mesh(config.parallel, jax.devices()[:1])
        self.place = meshes.placer(self.mesh)
        self.optimizer = optimizers.make(config.optimizer, config.train.steps)
        with shard.context(self.mesh, config.parallel.rules):
            self.state = jax.jit(self._first_state)(jax.device_put(params, shard.replicated(self.mesh)))

    def train(self, unroll: int) -> tuple[Callable[[], dict[str, Array]], float]:
        """Compiles the train step.

        Returns:
            what places the batch, takes the step and returns its metrics when it is done; and the compiler's count of
            FLOPs, without what it drops (gradients of frozen parts), of a loop one turn.
        """
        config = ConfigDict(self.config.to_dict())
        config.model.unroll = unroll
        step = make_train_step(config, systems.get("detr").build(config), self.optimizer)
        with shard.context(self.mesh, config.parallel.rules):
            compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.place(self.host)).compile()

        def run() -> dict[str, Array]:
            self.state, metrics = compiled(self.state, self.place(self.host))
            return jax.block_until_ready((metrics, self.state))[0]

        return run, compiled.cost_analysis()["flops"]

    def _first_state(self, params: Params) -> TrainState:
        moments, rng = self.optimizer.init(params), jax.random.key(self.config.seed)
        return TrainState(jnp.zeros((), jnp.int32), params, moments, {}, {}, rng)


class Peer:
    """transformers' DETR in training, its backbone released from the third stage on, as the original's."""

    def __init__(self, config: ConfigDict, batch: Mapping[str, np.ndarray]) -> None:
        torch.manual_seed(0)
        self.config, self.batch = config, batch
        self.net = transformers.DetrForObjectDetection(settings(config, auxiliary=True)).train()
        draw_backbone(self.net)
        groups: dict[float, list] = {1.0: [], 0.1: []}
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
            if parameter.requires_grad:
                groups[0.1 if name.startswith(BACKBONE) else 1.0].append(parameter)
        self.trained = [parameter for group in groups.values() for parameter in group]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": o.lr * rate} for rate, parameters in groups.items()],
            betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=True,
        )  # fmt: skip

    def step(self, channels_last: bool = False) -> dict[str, float]:
        """One update from uint8 pictures on; loss and gradient norm before it."""
        inputs = pixels(self.batch)
        if channels_last:
            inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.net(**inputs, labels=self._labels()).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_norm)
        self.optimizer.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    def _labels(self) -> list[dict[str, torch.Tensor]]:
        masked = zip(*(self.batch[key] for key in ("box_labels", "boxes", "box_mask")), strict=True)
        return [
            {"class_labels": torch.tensor(labels[mask]).long(), "boxes": torch.tensor(boxes[mask])}
            for labels, boxes, mask in masked
        ]

    def params(self) -> Params:
        """The weights as our tree, by the table of the parity tests."""
        stored, found = tensors(self.net), {}
        for row in rows(self.config):
            pieces = [row.op(stored[name]) for _, name in row.sources(list(stored))]
            found[row.ours] = np.stack(pieces) if "{layer}" in row.source else np.array(pieces[0])
        return nest(found.items())


def check_equal(ours: Mapping[str, Any], theirs: Mapping[str, float], bound: float = TOLERANCE) -> str:
    """Compares loss and gradient norm of a step from the same weights.

    Returns:
        a line with both, and the largest relative difference.

    Raises:
        RuntimeError: something differs by more than `bound`: the times would compare unequal work.
    """
    pairs = [(name, float(ours[name]), theirs[name]) for name in ("loss", "grad_norm")]
    worst = max(abs(mine - other) / abs(other) for _, mine, other in pairs)
    found = ", ".join(f"{name} {mine:.6f} and {other:.6f}" for name, mine, other in pairs)
    line = f"both sides, before the first update: {found}; apart by {worst:.1e}, allowed {bound:.0e}"
    if not worst <= bound:
        raise RuntimeError(f"The two sides do not do the same work; {line}.")
    return line
