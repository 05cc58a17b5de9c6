# SPDX-License-Identifier: Apache-2.0
"""Random batches of the right shapes, and small systems, for tests that need no data on disk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from configs import detr, vilt
from vlp_jax import systems
from vlp_jax.types import BOXES_LEFT_OUT


def vilt_config(**changes: object) -> ConfigDict:
    """A ViLT that compiles in seconds; `changes` are dotted keys with __ for the dot."""
    config = vilt.get_config("variant=tiny,smoke")
    config.model.width, config.model.fusion.num_heads, config.model.fusion.mlp_width = 32, 2, 64
    config.model.fusion.depth = 2
    config.data.text_length = 16
    return systems.get("vilt").resolve(changed(config, changes), {"vocab_size": 40})


def changed(config: ConfigDict, changes: Mapping[str, object]) -> ConfigDict:
    """Sets dotted keys, written with __ for the dot, in place."""
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


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


def detr_config(**changes: object) -> ConfigDict:
    """A DETR that compiles in seconds, four classes, pictures of 40 x 48 pixels; `changes` as in `vilt_config`."""
    config = detr.get_config("variant=tiny,smoke")
    config.model.width, config.model.object_queries.queries = 32, 6
    for stack in (config.model.encoder, config.model.decoder):
        stack.depth, stack.num_heads, stack.mlp_width = 2, 2, 64
    grid = config.model.grid_embed
    grid.depths, grid.widths, grid.stem_width = (1, 2), (16, 32), 8
    config.data.canvases, config.data.max_boxes = ((40, 48),), 5
    return systems.get("detr").resolve(changed(config, changes), {"classes": 4})


def random_detr_batch(
    config: ConfigDict, rows: int, seed: int = 0, size: tuple[int, int] = ()
) -> dict[str, np.ndarray]:
    """Pictures of all sizes on a canvas, of the last of the config or `size`, with 0, 1, ... boxes and then noise."""
    draw = np.random.default_rng(seed)
    height, width = size or config.data.canvases[-1]
    tall, wide = (draw.integers((n + 1) // 2, n + 1, rows) for n in (height, width))
    mask = (np.arange(height)[None, :, None] < tall[:, None, None]) & (
        np.arange(width)[None, None] < wide[:, None, None]
    )
    slots = config.data.max_boxes
    used = np.arange(slots)[None] < np.arange(rows)[:, None] % (slots + 1)
    sides = draw.uniform(0.1, 0.5, (rows, slots, 2))
    centers = draw.uniform(sides / 2, 1 - sides / 2)
    boxes = np.where(used[..., None], np.concatenate([centers, sides], -1), 0)
    labels = draw.integers(0, config.model.heads.classes, used.shape)
    return {
        "image": np.where(mask[..., None], draw.integers(0, 256, (*mask.shape, 3)), 0).astype(np.uint8),
        "image_mask": mask,
        "boxes": boxes.astype(np.float32),
        "box_labels": np.where(used, labels, -1).astype(np.int32),
        "box_mask": used,
        "boxes_left_out": draw.integers(0, 3, (rows, len(BOXES_LEFT_OUT))).astype(np.int32),
        "example_id": np.arange(rows, dtype=np.int32),
        "image_id": np.arange(rows, dtype=np.int32),
        "source_id": np.zeros(rows, np.int32),
    }
