# SPDX-License-Identifier: Apache-2.0
"""Dropout from 16 random bits an element, with a rate that may be traced."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.types import Array, Key


def dropout(x: Array, rate: float | Array, key: Key) -> Array:
    """Zeroes elements with probability `rate`, rounded to 1/65536, and rescales so that the mean stays exact.

    Two elements share one 32-bit draw: half the generator's work of `jax.random.bernoulli`, which is what
    dropout costs on a TPU.
    """
    threshold = jnp.round(jnp.asarray(rate, jnp.float32) * 65536.0)
    keep = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32) >= threshold
    scale = (1.0 / (1.0 - threshold / 65536.0)).astype(x.dtype)
    return jnp.where(keep, x * scale, jnp.zeros((), x.dtype))


class Dropout(nn.Module):
    """Dropout at training, the identity otherwise; a rate that is the Python number 0 costs nothing."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[...]` to `[...]`; needs the rng stream "dropout" when `train`."""
        if not train or self.rate == 0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))
