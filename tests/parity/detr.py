# SPDX-License-Identifier: Apache-2.0
"""Our side of DETR's parity: small configs, padded pictures of odd sizes, and the outputs that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from tests.examples import detr_config, random_detr_batch
from tests.parity.harness import Ours
from vlp_jax import systems
from vlp_jax.models.grid import grid_mask
from vlp_jax.systems.detr import Detr
from vlp_jax.types import Array

# Rows and columns of the canvas, then of each picture on it. No size is a multiple of a cell.
CANVASES = {"padded": (65, 97), "tall": (71, 33)}
PICTURES = {"padded": ((65, 97), (40, 97), (65, 31)), "tall": ((71, 33), (71, 20), (34, 33))}
ROWS_OF_TRAINING = 6


class Shown(Detr):
    """The system's network, which also returns what the encoder gives."""

    def __call__(self, image: Array, image_mask: Array) -> dict[str, Array]:
        features, positions, mask = self.grid_embed(image, image_mask)
        memory = self.encoder(features, positions, mask, train=False)
        queries = self.object_queries()
        content = jnp.zeros((image.shape[0], *queries.shape[1:]), memory.dtype)
        logits, boxes = self.heads(self.decoder(content, queries, memory, positions, mask, train=False))
        return {"features": features, "memory": memory, "logits": logits, "boxes": boxes}


def build(changes: Mapping[str, Any]) -> Ours:
    """A DETR of `changes` (see tests/examples.py)."""
    config = detr_config(**changes)
    module: nn.Module = Shown(FrozenConfigDict(config.model))

    def outputs(params: Any, batch: Mapping) -> dict[str, Any]:
        return module.apply({"params": params}, batch["image"], batch["image_mask"])

    def make(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
        return (
            random_detr_batch(config, ROWS_OF_TRAINING, seed)
            if kind == "pretraining"
            else pictures(config, kind)
        )

    system = systems.get("detr").build(config)
    return Ours(config, system, outputs, lambda batch: masks(config, batch), (*CANVASES, "pretraining"), make)


def pictures(config: ConfigDict, kind: str) -> dict[str, np.ndarray]:
    """Noise on canvases of CANVASES, cut to PICTURES."""
    batch = random_detr_batch(config, len(PICTURES[kind]), 1, CANVASES[kind])
    noise = np.random.default_rng(0).integers(0, 256, batch["image"].shape)
    for row, (tall, wide) in enumerate(PICTURES[kind]):
        batch["image_mask"][row] = False
        batch["image_mask"][row, :tall, :wide] = True
    batch["image"] = np.where(batch["image_mask"][..., None], noise, 0).astype(np.uint8)
    return batch


def masks(config: ConfigDict, batch: Mapping) -> dict[str, np.ndarray]:
    """The real cells of the encoder's output ("memory", "cells"); all queries, and all places of each stage."""
    grid, image = config.model.grid_embed, np.asarray(batch["image_mask"])
    found, sides = {}, [-(-side // 4) for side in image.shape[1:]]  # stem and pooling halve twice
    for stage in range(len(grid.depths)):
        sides = [-(-side // (2 if stage else 1)) for side in sides]
        found[f"stage{stage + 1}"] = np.ones((len(image), *sides), bool)
    cells = np.asarray(grid_mask(image, *sides)).reshape(len(image), -1)
    queries = np.ones((len(image), config.model.object_queries.queries), bool)
    return found | {"memory": cells, "cells": cells, "every cell": np.ones_like(cells), "queries": queries}
