# SPDX-License-Identifier: Apache-2.0
"""The corrupted views of masked modelling: which word pieces and which patches are hidden, and the answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt8

from vlp_jax.types import Array, Key


def corrupted_text(
    text_ids: Int[Array, "batch text"],
    mlm_positions: Int[Array, "batch mask"],
    mlm_inputs: Int[Array, "batch mask"],
    mlm_labels: Int[Array, "batch mask"],
) -> Int[Array, "batch text"]:
    """Puts `mlm_inputs` at `mlm_positions` where a label is >= 0.

    A comparison instead of a scatter: a handful of slots, and no serial write on a TPU.
    """
    places = jnp.arange(text_ids.shape[1])[None, :, None]
    here = (mlm_positions[:, None, :] == places) & (mlm_labels >= 0)[:, None, :]
    return jnp.where(jnp.any(here, -1), jnp.sum(jnp.where(here, mlm_inputs[:, None, :], 0), -1), text_ids)


def at_positions(
    features: Float[Array, "batch text width"], positions: Int[Array, "batch mask"]
) -> Float[Array, "batch mask width"]:
    """Features of the masked positions only: 6 of 40 need the vocabulary's logits.

    A product with one-hot rows is exact in any type (one term a row) and keeps its gradient a product.
    """
    with jax.named_scope("select"):  # planning counts no model FLOPs here
        onehot = (positions[..., None] == jnp.arange(features.shape[1])[None, None]).astype(features.dtype)
        return jnp.einsum("bkt,btd->bkd", onehot, features, precision=jax.lax.Precision.HIGHEST)


def patch_mask(key: Key, valid: Bool[Array, "batch patch"], rate: float = 0.15) -> tuple[Array, Array]:
    """Draws masked patches (ViLT's mpp): `(chosen, hidden)`, both `[batch, patch]`.

    Each valid patch is chosen with probability `rate`; of those four in five are hidden and the rest stay as they
    are (there is no random branch in the original, whatever its comment says).
    """
    choose, hide = jax.random.split(key)
    chosen = valid & (jax.random.uniform(choose, valid.shape) < rate)
    return chosen, chosen & (jax.random.uniform(hide, valid.shape) < 0.8)


def patch_color_bins(
    patches: UInt8[Array, "batch patch pixels"], chosen: Bool[Array, "batch patch"]
) -> Int[Array, "batch patch 3"]:
    """Mean red, green and blue of each patch as a bin of 256 (floor), -1 where the patch is not chosen."""
    pixels = patches.reshape(*patches.shape[:2], -1, 3).astype(jnp.int32)
    bins = jnp.sum(pixels, axis=2) // pixels.shape[2]
    return jnp.where(chosen[..., None], bins, -1)
