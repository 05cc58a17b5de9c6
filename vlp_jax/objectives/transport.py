# SPDX-License-Identifier: Apache-2.0
"""Word-patch alignment by optimal transport (ViLT section 3.2, from UNITER; IPOT: Xie et al., UAI 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vlp_jax.types import Array, Term


def cosine_cost(
    text: Float[Array, "batch text width"],
    image: Float[Array, "batch patch width"],
    text_mask: Bool[Array, "batch text"],
    image_mask: Bool[Array, "batch patch"],
) -> Float[Array, "batch text patch"]:
    """`1 - cos(text, image)` in float32, norms clamped at 1e-5, 0 where either side is not real."""

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        # The clamp inside the root: the gradient of a bare norm at 0 is NaN.
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-10))

    cosine = jnp.einsum("btd,bpd->btp", unit(text), unit(image), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(text_mask[:, :, None] & image_mask[:, None, :], 1.0 - cosine, 0.0)


def transport_plan(
    cost: Float[Array, "batch text patch"],
    text_mask: Bool[Array, "batch text"],
    image_mask: Bool[Array, "batch patch"],
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Float[Array, "batch text patch"]:
    """The transport plan between uniform masses on the real tokens of both sides, by inexact proximal points.

    Rows sum to 1 / (number of words), columns to 1 / (number of patches), up to convergence; masked entries are 0,
    and so is a whole plan with an empty side. No gradient flows through it.
    """
    cost = jax.lax.stop_gradient(cost.astype(jnp.float32))
    real = text_mask[:, :, None] & image_mask[:, None, :]
    words = jnp.sum(text_mask, -1, dtype=jnp.float32)[:, None]
    patches = jnp.sum(image_mask, -1, dtype=jnp.float32)[:, None]
    kernel = jnp.where(real, jnp.exp(-cost / beta), 0.0)
    # A padded entry gets a denominator of 1e4 (as the original), which its zero row multiplies to nothing.
    word_pad = jnp.where(text_mask, 0.0, 1e4)
    patch_pad = jnp.where(image_mask, 0.0, 1e4)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        plan, sigma = carry
        q = kernel * plan
        delta = 1.0 / (patches * jnp.einsum("btp,bt->bp", q, sigma) + patch_pad)
        sigma = 1.0 / (words * jnp.einsum("btp,bp->bt", q, delta) + word_pad)
        return sigma[:, :, None] * q * delta[:, None, :], sigma

    sigma = jnp.where(text_mask, 1.0 / jnp.maximum(words, 1.0), 0.0)
    plan, _ = jax.lax.fori_loop(0, iterations, step, (jnp.where(real, 1.0, 0.0), sigma))
    return jnp.where(real, plan, 0.0)


def alignable_text(text_mask: Bool[Array, "batch text"]) -> Bool[Array, "batch text"]:
    """Real tokens without the first ([CLS]) and the last one ([SEP])."""
    last = jnp.sum(text_mask, axis=-1, keepdims=True) - 1
    place = jnp.arange(text_mask.shape[-1])[None]
    return text_mask & (place > 0) & (place != last)


def word_patch_alignment(
    text: Float[Array, "batch text width"],
    image: Float[Array, "batch patch width"],
    text_mask: Bool[Array, "batch text"],
    image_mask: Bool[Array, "batch patch"],
    matched: Int[Array, "batch"],
) -> Term:
    """Transport distance, added for matched pairs and subtracted for others; its mean may be negative.

    The masks say what takes part (no [CLS], [SEP] or class token). The gradient flows through the cost only.
    """
    cost = cosine_cost(text, image, text_mask, image_mask)
    distance = jnp.sum(cost * transport_plan(cost, text_mask, image_mask), axis=(1, 2))
    sign = jnp.where(matched == 1, 1.0, jnp.where(matched == 0, -1.0, 0.0))
    return Term(jnp.sum(sign * distance), jnp.sum(matched >= 0, dtype=jnp.float32))
