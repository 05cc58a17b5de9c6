# SPDX-License-Identifier: Apache-2.0
"""What the collectives of a step carry, and the least time that the chip's links need for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from vlp_jax.planning.hlo import Shape
from vlp_jax.planning.program import Collective

CONTENTS = ("weights or gradients", "activations", "integers and masks", "scalars")
# Share of its bytes that each chip of n sends, by the best known algorithm on a ring.
_SENT = {"all-reduce": 2.0, "collective-permute": 1.0}


def parameter_sizes(params: Any, mesh: Mapping[str, int]) -> frozenset[int]:
    """How many elements a parameter, one layer of it, or a device's part of either can have."""
    parts = {1, mesh["fsdp"], mesh["tensor"], mesh["fsdp"] * mesh["tensor"]}
    sizes = set()
    for leaf in jax.tree.leaves(params):
        whole = {math.prod(leaf.shape), math.prod(leaf.shape[1:])}
        sizes |= {size // part for size in whole for part in parts if size % part == 0}
    return frozenset(sizes - {0, 1})


def contents(shape: Shape, op_name: str, sizes: frozenset[int]) -> str:
    """What an array of a collective is, one of `CONTENTS`.

    Decided by type and size: no activation should have exactly as many elements as a parameter, a layer of it or a
    device's part. What the compiler names after the state ("state.params[...]") is no activation either.
    """
    if shape.size <= 1:
        return "scalars"
    if not shape.dtype.startswith(("f", "bf", "c")):
        return "integers and masks"
    if shape.size in sizes or op_name.startswith("state."):
        return "weights or gradients"
    return "activations"


def table(found: Iterable[Collective], sizes: frozenset[int]) -> list[dict[str, Any]]:
    """Collectives summed by kind, element type and contents, most bytes first.

    Each row: kind, dtype, contents, count (exchanges a step that carry it), bytes (a step and chip), where (op_name
    of the largest). An exchange of several arrays is split by what they are.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    largest: dict[tuple, int] = {}
    for each in found:
        split: dict[tuple, int] = {}
        for shape in each.shapes:
            key = (each.kind, shape.dtype, contents(shape, each.op_name, sizes))
            split[key] = split.get(key, 0) + shape.bytes
        for key, carried in split.items():
            start = dict(kind=key[0], dtype=key[1], contents=key[2], count=0, bytes=0, where="")
            row = rows.setdefault(key, start)
            row["count"] += each.runs
            row["bytes"] += each.runs * carried
            if carried >= largest.get(key, 0):
                largest[key], row["where"] = carried, each.op_name
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def least_seconds(found: Iterable[Collective], links: float) -> float:
    """Seconds a step if every link of a chip carried data all the time at the published rate.

    Args:
        links: bytes/s of a device, both directions together; a chip sends with half of it.
    """
    seconds = 0.0
    for each in found:
        share = _SENT.get(each.kind, 1.0)
        if each.group and each.kind != "collective-permute":
            share *= (each.group - 1) / each.group
        seconds += each.runs * each.bytes * share / (links / 2)
    return seconds
