# SPDX-License-Identifier: Apache-2.0
"""CRC-32C (Castagnoli), as TensorFlow's checkpoints carry it: some hundred megabytes a second by numpy alone.

A long text is cut into rows whose sums advance together, two bytes at a time. The rows' sums are then folded pairwise:
the sum of `a + b` is the sum of `a` moved on by the length of `b`, exclusive-or the sum of `b`. RFC 3720, appendix B.4.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected
ROW = 512  # bytes; fewer rows fold quicker, shorter ones advance quicker


@functools.cache
def _table(bits: int) -> np.ndarray:
    """What `bits` zero bits make of each sum that has no more than its lowest `bits`."""
    table = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


def _advance(sums: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Each sum moved on by two bytes of its own."""
    return _table(16).take(sums.astype(np.uint16) ^ pairs) ^ sums >> 16  # the cast keeps the lowest 16 bits


@functools.cache
def _mover(doublings: int) -> np.ndarray:
    """What ROW * 2**doublings zero bytes make of a sum, for each of its four bytes: uint32[4, 256]."""
    one_byte = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    if doublings:
        half = _mover(doublings - 1)
        return _move(_move(one_byte, half), half)
    for _ in range(ROW // 2):
        one_byte = _advance(one_byte, np.uint16(0))
    return one_byte


def _move(sums: np.ndarray, mover: np.ndarray) -> np.ndarray:
    parts = [mover[place].take(sums >> np.uint32(8 * place) & 0xFF) for place in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


def crc32c(content: bytes | memoryview) -> int:
    """The CRC-32C of some bytes."""
    octets = np.frombuffer(content, np.uint8)
    count = len(octets) // ROW
    total = 0xFFFFFFFF
    # A power of two of rows at a time folds without a remainder.
    while count:
        doublings = min(count.bit_length() - 1, 11)  # 1 MiB, which a cache holds
        rows = octets[: ROW << doublings].view("<u2").reshape(-1, ROW // 2)
        sums = np.zeros(len(rows), np.uint32)
        sums[0] = total
        for pairs in np.ascontiguousarray(rows.T):
            sums = _advance(sums, pairs)
        for level in range(doublings):
            sums = _move(sums[0::2], _mover(level)) ^ sums[1::2]
        total = int(sums[0])
        octets = octets[ROW << doublings :]
        count = len(octets) // ROW
    table = _table(8).tolist()
    for octet in octets.tolist():
        total = table[(total ^ octet) & 0xFF] ^ total >> 8
    return total ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """TensorFlow's form of a stored checksum, turned and moved so that a sum over sums differs."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
