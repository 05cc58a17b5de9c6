# SPDX-License-Identifier: Apache-2.0
"""Random batches of the right shapes, and small systems, for tests that need no data on disk."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from configs import vilt
from vlp_jax import systems


def vilt_config(**changes: object) -> ConfigDict:
    """A ViLT that compiles in seconds; `changes` are dotted keys with __ for the dot."""
    config = vilt.get_config("variant=tiny,smoke")
    config.model.width, config.model.fusion.num_heads, config.model.fusion.mlp_width = 32, 2, 64
    config.model.fusion.depth = 2
    config.data.text_length = 16
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return systems.get("vilt").resolve(config, {"vocab_size": 40})


def random_batch(config: ConfigDict, rows: int, seed: int = 0, slots: int = 12) -> dict[str, np.ndarray]:
    """A batch with texts of all lengths, pictures of several grids, unused mask slots, two rows a picture."""
    draw = np.random.default_rng(seed)
    length, patch = config.data.text_length, config.data.patch_size
    masks = max(1, round(config.data.mask_rate * length))
    lengths = draw.integers(3, length + 1, rows)
    text_mask = np.arange(length)[None] < lengths[:, None]
    text_ids = np.where(text_mask, draw.integers(5, 40, (rows, length)), 0)
    text_ids[:, 0] = 2
    text_ids[np.arange(rows), lengths - 1] = 3
    grid = np.stack([draw.integers(1, 4, rows), draw.integers(1, 5, rows)], -1)
    place = np.arange(slots)[None].repeat(rows, 0)
    used = np.minimum(draw.integers(0, masks + 1, rows), lengths - 2)
    slot = np.arange(masks)[None]
    return {
        "text_ids": text_ids.astype(np.int32),
        "text_mask": text_mask,
        "patches": draw.integers(0, 256, (rows, slots, 3 * patch**2)).astype(np.uint8),
        "patch_positions": np.stack(np.divmod(place, grid[:, 1:]), -1).astype(np.int32),
        "patch_mask": place < grid.prod(-1, keepdims=True),
        "grid_size": grid.astype(np.int32),
        "mlm_positions": np.where(slot < used[:, None], slot + 1, 0).astype(np.int32),
        "mlm_inputs": np.where(slot < used[:, None], 4, 0).astype(np.int32),
        "mlm_labels": np.where(slot < used[:, None], draw.integers(5, 40, (rows, masks)), -1).astype(
            np.int32
        ),
        "example_id": np.arange(rows, dtype=np.int32),
        "image_id": (np.arange(rows) // 2).astype(np.int32),
        "source_id": np.zeros(rows, np.int32),
    }
