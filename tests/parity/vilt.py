# SPDX-License-Identifier: Apache-2.0
"""Our side of ViLT's parity: small configs, batches of odd pictures, and the outputs that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tests.examples import vilt_config
from tests.parity.harness import Ours
from vlp_jax import systems
from vlp_jax.objectives import masking
from vlp_jax.objectives.classification import cross_entropy

VOCABULARY = 40
TEXT = ("text_ids", "mlm_positions", "mlm_inputs", "mlm_labels")
# Rows and columns of patches: one row, one column, one patch, larger and smaller than the learned grid.
GRIDS = {
    "padded": ((1, 5), (4, 3), (1, 1), (2, 7), (5, 1)),
    "unpadded": ((3, 5),) * 5,
    # An odd number of rows, so that the signed term of word-patch alignment does not cancel.
    "pretraining": ((1, 5), (4, 3), (2, 2), (2, 7), (5, 1), (3, 3), (3, 5)),
}
SLOTS, PIECES, MASKS = 15, 13, 3


def build(changes: Mapping[str, Any]) -> Ours:
    """A ViLT of `changes` (see tests/examples.py)."""
    config = vilt_config(**changes)
    system = systems.get("vilt").build(config)
    prepare = jax.jit(system.prepare)

    def outputs(params: Any, batch: Mapping) -> dict[str, Any]:
        text = {**batch, "text_ids": masking.corrupted_text(*(batch[name] for name in TEXT))}
        features = {
            **system.predict["encode_text"](params, text),
            **system.predict["encode_image"](params, batch),
        }
        fused = system.predict["fuse"](params, features)
        logits = system.predict["fill"](params, batch)["logits"]
        mlm = cross_entropy(logits, batch["mlm_labels"]).mean()
        return {name: fused[name] for name in ("text", "image", "pooled")} | {"logits": logits, "mlm": mlm}

    def make(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
        batch = _batch(config, kind, seed)
        return (
            batch if kind != "pretraining" else jax.tree.map(np.asarray, prepare(batch, jax.random.key(seed)))
        )

    return Ours(config, system, outputs, masks, tuple(GRIDS), make)


def masks(batch: Mapping) -> dict[str, np.ndarray]:
    """The real tokens of each output and of the whole sequence ("tokens")."""
    text, patches = np.asarray(batch["text_mask"]), np.asarray(batch["patch_mask"])
    image = np.concatenate([np.ones_like(patches[:, :1]), patches], 1)
    chosen = np.asarray(batch["mlm_labels"]) >= 0
    return {"text": text, "image": image, "tokens": np.concatenate([text, image], 1), "logits": chosen}


def _batch(config: ConfigDict, kind: str, seed: int) -> dict[str, np.ndarray]:
    """Texts of all lengths (all whole in "unpadded") and pictures of GRIDS, their patches in a random order."""
    draw = np.random.default_rng(seed)
    grid = draw.permutation(GRIDS[kind])
    rows = len(grid)
    lengths = np.full(rows, PIECES) if kind == "unpadded" else draw.integers(4, PIECES + 1, rows)
    text_mask = np.arange(PIECES)[None] < lengths[:, None]
    text_ids = np.where(text_mask, draw.integers(5, VOCABULARY, (rows, PIECES)), 0)
    text_ids[:, 0], text_ids[np.arange(rows), lengths - 1] = 2, 3

    order = np.stack([draw.permutation(SLOTS) for _ in range(rows)])
    patch_mask = order < grid.prod(-1, keepdims=True)
    if kind == "pretraining":
        # As if more patches had been there than may be taken: some places of the picture are left out.
        patch_mask &= (draw.random(order.shape) < 0.8) | (order == 0)
    chosen = np.arange(MASKS)[None] < draw.integers(1, 3, (rows, 1))
    inputs = draw.choice([4, 4, 17], chosen.shape)
    inputs[0, 0] = 0  # an id that replaces a word may be that of padding, whose row learns nothing from it
    return {
        "text_ids": text_ids.astype(np.int32),
        "text_mask": text_mask,
        "patches": draw.integers(0, 256, (rows, SLOTS, 3 * config.data.patch_size**2)).astype(np.uint8),
        "patch_positions": np.stack(np.divmod(order, grid[:, 1:]), -1).astype(np.int32),
        "patch_mask": patch_mask,
        "grid_size": grid.astype(np.int32),
        "mlm_positions": np.where(chosen, 1 + np.arange(MASKS), 0).astype(np.int32),
        "mlm_inputs": np.where(chosen, inputs, 0).astype(np.int32),
        "mlm_labels": np.where(chosen, draw.integers(5, VOCABULARY, chosen.shape), -1).astype(np.int32),
        "example_id": np.arange(rows, dtype=np.int32),
        "image_id": (np.arange(rows) // 2).astype(np.int32),
        "source_id": np.zeros(rows, np.int32),
    }
