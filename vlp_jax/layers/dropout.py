# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask is arithmetic on the element's place, so that it fuses into the products around it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.types import Array, Key

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[Array, Array], first: Array, second: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), the generator behind `jax.random`.

    Elementwise on two counters of like shape (uint32): each device makes its own part of the bits, which the
    primitive of `jax.random` leaves to the partitioner.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    first, second = first + schedule[0], second + schedule[1]
    for group in range(5):
        for shift in ROTATIONS[group % 2]:
            first = first + second
            second = (second << jnp.uint32(shift)) | (second >> jnp.uint32(32 - shift))
            second = first ^ second
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return first, second


def uniform_bits(key: Key, shape: tuple[int, ...]) -> Array:
    """Uniform uint32 numbers of `shape`: 64 bits of Threefry a row, mixed with the place in the last axis.

    The mixing (two multiplications, as in the finaliser of MurmurHash3, constants by C. Wellons' search for the
    least bias) costs a tenth of a Threefry call. With a whole call an element dropout took a third of a block's
    time on a TPU; the numbers only decide what to drop, so a row's quality does not need more.
    """
    words = [word.reshape((1,) * len(shape)) for word in jax.random.key_data(key)]
    row = jnp.zeros((1,) * len(shape), jnp.uint32)
    for axis in range(len(shape) - 1):
        place = jax.lax.broadcasted_iota(jnp.uint32, (*shape[:-1], 1), axis)
        row = row * jnp.uint32(shape[axis]) + place
    first, second = threefry((words[0], words[1]), row, jnp.zeros_like(row))
    x = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) * jnp.uint32(0x9E3779B9) + first
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D) + second
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def keep_mask(key: Key, rate: float | Array, shape: tuple[int, ...]) -> Array:
    """Draws a mask of `shape`: False, with probability `rate` (0 <= rate < 1, a number or traced), means dropped."""
    threshold = jnp.asarray(rate, jnp.float32) * 4294967296.0
    return uniform_bits(key, shape) >= threshold.astype(jnp.uint32)


class Dropout(nn.Module):
    """Dropout at training, the identity otherwise; a rate that is the Python number 0 costs nothing."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[...]` to `[...]`; needs the rng stream "dropout" when `train`."""
        if not train or self.rate == 0:
            return x
        keep = keep_mask(self.make_rng("dropout"), self.rate, x.shape)
        # Scaled in float32: 1 / 0.9 in bfloat16 is 0.16 % too small, and it compounds from layer to layer.
        return jnp.where(keep, x.astype(jnp.float32) * (1.0 / (1.0 - self.rate)), 0.0).astype(x.dtype)
