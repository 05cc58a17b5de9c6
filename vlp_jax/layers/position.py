# SPDX-License-Identifier: Apache-2.0
"""Positions in the plane: a learned grid resampled to that of each picture, or fixed sines of its own size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vlp_jax.types import Array


def linear_weights(
    index: Int[Array, "batch patch"], size: Int[Array, "batch"], grid: int
) -> Float[Array, "batch patch grid"]:
    """Weights of a learned row of `grid` entries for entry `index` of a row of `size`, corners aligned.

    Entry i lies at coordinate i (grid - 1) / (size - 1), and at 0 where size is 1: what
    `torch.nn.functional.interpolate(mode="bilinear", align_corners=True)` does along one axis.
    """
    step = (grid - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
    coordinate = index.astype(jnp.float32) * jnp.where(size > 1, step, 0.0)[:, None]
    return jnp.maximum(
        1.0 - jnp.abs(coordinate[..., None] - jnp.arange(grid, dtype=jnp.float32)[None, None]), 0.0
    )


def grid_positions(
    table: Float[Array, "rows columns width"],
    positions: Int[Array, "batch patch 2"],
    grid_size: Int[Array, "batch 2"],
) -> Float[Array, "batch patch width"]:
    """Position embedding of each patch: the learned grid, bilinearly resampled to the picture's own grid.

    One product with a sparse weight matrix: no gather, so that its gradient is no scatter.
    """
    rows, columns, width = table.shape
    weights = jnp.einsum(
        "bpr,bpc->bprc",
        linear_weights(positions[..., 0], grid_size[:, 0], rows),
        linear_weights(positions[..., 1], grid_size[:, 1], columns),
    )
    weights = weights.reshape(*positions.shape[:2], rows * columns)
    with jax.named_scope("select"):  # planning counts no model FLOPs here
        return jnp.matmul(weights, table.reshape(rows * columns, width), precision=jax.lax.Precision.HIGHEST)


def sine_positions(
    mask: Bool[Array, "batch rows columns"], width: int, temperature: float = 10000.0
) -> Float[Array, "batch rows columns width"]:
    """Fixed positions of the cells of padded pictures: sines and cosines of the row, then of the column.

    Real cells are counted along each axis, 1-based, and scaled so that the last one is at 2 pi: a position does not
    depend on how far a picture is padded. Half of `width` belongs to each axis; there, channels 2j and 2j + 1 are
    sine and cosine of the angle over temperature^(4j / width). float32 (DETR, models/position_encoding.py).
    """
    half = width // 2
    divisor = temperature ** (2.0 * (np.arange(half) // 2) / half)
    divisor = divisor.astype(np.float32).reshape(1, 1, 1, half)
    halves = []
    for axis in (1, 2):
        place = jnp.cumsum(mask, axis=axis, dtype=jnp.float32)
        last = jax.lax.slice_in_dim(place, place.shape[axis] - 1, place.shape[axis], axis=axis)
        angle = (2 * np.pi * place / (last + 1e-6))[..., None] / divisor
        halves.append(jnp.where(np.arange(half).reshape(1, 1, 1, half) % 2, jnp.cos(angle), jnp.sin(angle)))
    return jnp.concatenate(halves, axis=-1)
