# SPDX-License-Identifier: Apache-2.0
"""Which example stands at which position: pure functions of (seed, position), so a run resumes by its step.

Position = step x global batch + row in the batch. No state, no shuffle buffer, O(1) at any position, the same
on any number of hosts. Integers only, so the order does not depend on versions of numpy or tensorflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlp_jax.types import UserError

BLOCK = 4096  # positions that hold every source of a mixture in its exact share
ROUNDS = 4  # double Feistel rounds
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCKS, _ROWS, _DRAWS, _SPREAD = range(4)  # what a key is for


@np.errstate(over="ignore")
def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes integers (broadcast against each other) to uint64; the last step of splitmix64 for each part."""
    state = np.uint64(0)
    for part in parts:
        part = (
            np.uint64(part & 0xFFFFFFFFFFFFFFFF)
            if isinstance(part, int)
            else np.asarray(part).astype(np.uint64)
        )
        state = _scramble((state ^ part) + np.uint64(_GOLDEN))
    return state


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """As `mix`, but float64 in [0, 1)."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@np.errstate(over="ignore")
def _scramble(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A permutation of range(size), drawn by `key`, at the places `index`.

    A Feistel network over the next power of two, walked on until the value is below `size` (two steps on
    average at most), which keeps it a bijection for any size.

    Args:
        index: int64 [n] in [0, size).
        size: number of things.
        key: uint64 [n] or scalar, one for each permutation.

    Returns:
        int64 [n].
    """
    value = np.asarray(index).astype(np.uint64)
    key = np.broadcast_to(np.asarray(key, np.uint64), value.shape)
    bits = max(2, (size - 1).bit_length())
    value = _feistel(value, bits, key)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], bits, key[outside])
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


@np.errstate(over="ignore")
def _feistel(value: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low = bits // 2
    high = bits - low
    left, right = value >> np.uint64(low), value & np.uint64((1 << low) - 1)
    for round_ in range(ROUNDS):
        key = key + np.uint64(_GOLDEN)
        left = left ^ (_scramble(key ^ right) >> np.uint64(64 - high))
        right = right ^ (_scramble(key ^ left ^ np.uint64((round_ + 1) << 40)) >> np.uint64(64 - low))
    return (left << np.uint64(low)) | right


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Splits a block among sources by largest remainder; none gets nothing.

    Returns:
        int64 [sources] that sums to BLOCK.

    Raises:
        UserError: a weight that is not positive, or too many sources.
    """
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise UserError(
            f"The weights of the data sources are {list(weights)}. All must be above 0; leave a source out."
        )
    if len(shares) > BLOCK // 2:
        raise UserError(
            f"{len(shares)} data sources were given; at most {BLOCK // 2} fit a mixture. Join some."
        )
    shares = shares / shares.sum() * (BLOCK - len(shares))
    whole = np.floor(shares).astype(np.int64)
    left = BLOCK - len(shares) - whole.sum()
    whole[np.argsort(whole - shares, kind="stable")[:left]] += 1
    return whole + 1


def order(
    seed: int, positions: np.ndarray, sizes: Sequence[int], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Says which row of which source stands at each position, endlessly.

    A source alone is walked through one permutation an epoch. In a mixture each block of 4,096 positions
    holds fixed numbers of each source in shuffled places, so a source's own position has a closed form.

    Args:
        seed: of the run.
        positions: int64 [n], global.
        sizes: rows of each source.
        weights: share of each source among the examples.

    Returns:
        source, epoch, row (int64 [n]; epoch is the source's own) and draw (uint32 [n]: a number for the
        position's stateless choices).
    """
    positions = np.asarray(positions, np.int64)
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) == 1:
        source, place = np.zeros_like(positions), positions
    else:
        counts = quotas(weights)
        block, slot = np.divmod(positions, BLOCK)
        slot = permute(slot, BLOCK, mix(seed, _BLOCKS, block))
        ends = np.cumsum(counts)
        source = np.searchsorted(ends, slot, side="right")
        place = block * counts[source] + slot - (ends - counts)[source]
    epoch, index = np.divmod(place, sizes[source])
    key = mix(seed, _ROWS, source, epoch)
    row = np.empty_like(index)
    for number in np.unique(source):
        chosen = source == number
        row[chosen] = permute(index[chosen], int(sizes[number]), key[chosen])
    draw = (mix(seed, _DRAWS, positions) >> np.uint64(32)).astype(np.uint32)
    return source, epoch, row, draw


def spread(size: int, examples: int) -> np.ndarray:
    """Rows for an evaluation: `examples` of `size` (0 = all), evenly spaced, in a fixed shuffled order.

    Shuffled, because the captions of one picture lie side by side, and negatives need other pictures.

    Returns:
        int64 [min(examples or size, size)], all different.
    """
    count = min(examples or size, size)
    if not count:
        return np.zeros(0, np.int64)
    return permute(np.arange(count), count, mix(_SPREAD)) * size // count
