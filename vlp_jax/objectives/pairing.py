# SPDX-License-Identifier: Apache-2.0
"""Image-text matching: which rows of the global batch exchange their texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from vlp_jax.types import Array, Key


def exchange(
    key: Key,
    image_id: Int[Array, "batch"],
    source_id: Int[Array, "batch"],
    valid: Bool[Array, "batch"],
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """Draws the pairs of image-text matching: `(partner, matched)`.

    Exactly half of the valid rows (rounded up) become negative: they take the text of `partner`, drawn uniformly
    among the valid rows of another picture. `matched` is 1, 0, or -1 for rows that are not valid. A row without
    such a partner stays positive. The original draws from the whole data set instead and may draw the row's own
    picture.

    The rows are sorted by picture, so that "all but mine" is a range with one gap and the draw costs
    O(batch log batch) instead of a `[batch, batch]` matrix of random numbers.
    """
    batch = image_id.shape[0]
    pick, turn = jax.random.split(key)
    order = jnp.lexsort((image_id, source_id, ~valid))
    image, source, live = image_id[order], source_id[order], valid[order]
    new = (image[1:] != image[:-1]) | (source[1:] != source[:-1]) | (live[1:] != live[:-1])
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    start = jnp.searchsorted(group, group, side="left").astype(jnp.int32)
    size = jnp.searchsorted(group, group, side="right").astype(jnp.int32) - start

    total = jnp.sum(valid, dtype=jnp.int32)
    others = jnp.where(live, total - size, 0)
    draw = jax.random.randint(pick, (batch,), 0, jnp.maximum(others, 1))
    chosen = order[jnp.where(draw >= start, draw + size, draw) % batch]

    # Rows that have a partner come first in a random order; the first half of the valid rows turn negative.
    rank = jnp.argsort(jnp.argsort(jnp.where(others > 0, jax.random.uniform(turn, (batch,)), 2.0)))
    negative = (others > 0) & (rank < total - total // 2)
    identity = jnp.arange(batch, dtype=jnp.int32)
    partner = jnp.zeros_like(identity).at[order].set(jnp.where(negative, chosen, order).astype(jnp.int32))
    matched = jnp.zeros_like(identity).at[order].set(1 - negative.astype(jnp.int32))
    return partner, jnp.where(valid, matched, -1)
