# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over logits: the core of mlm, itm and masked patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from vlp_jax.types import Array, Term


def cross_entropy(logits: Float[Array, "*batch class"], labels: Int[Array, "*batch"]) -> Term:
    """Sum of -log softmax(logits)[label] over labels >= 0, and how many those are; float32 throughout."""
    logits = logits.astype(jnp.float32)
    valid = labels >= 0
    # A comparison picks the label's logit: take_along_axis would scatter its gradient into [.., vocab].
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,)) == labels[..., None]
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return Term(jnp.sum(jnp.where(valid, losses, 0.0)), jnp.sum(valid, dtype=jnp.float32))


def by_source(
    logits: Float[Array, "batch *slot class"],
    labels: Int[Array, "batch *slot"],
    source_id: Int[Array, "batch"],
    sources: tuple[str, ...],
) -> dict[str, Term]:
    """Cross entropy of the rows of each source of a mixture, by its name; {} where there is only one."""
    if len(sources) < 2:
        return {}
    rows = source_id.reshape(-1, *[1] * (labels.ndim - 1))
    return {
        name: cross_entropy(logits, jnp.where(rows == number, labels, -1))
        for number, name in enumerate(sources)
    }


def accuracy(logits: Float[Array, "*batch class"], labels: Int[Array, "*batch"]) -> Term:
    """How many labels >= 0 have the highest logit (the first of equal ones), and how many there are."""
    valid = labels >= 0
    right = (jnp.argmax(logits, axis=-1) == labels) & valid
    return Term(jnp.sum(right, dtype=jnp.float32), jnp.sum(valid, dtype=jnp.float32))
