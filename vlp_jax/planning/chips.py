# SPDX-License-Identifier: Apache-2.0
"""The TPU generations and slices that can be planned for, with the published numbers of their chips.

Sources: the pages "TPU v4" ... "TPU7x" of Google's Cloud TPU documentation, read 2026; `units` and `usable_hbm` were
seen in libtpu 0.0.42.1 and 0.0.51.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vlp_jax.types import UserError, closest

GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CUBES = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip; all numbers are of one JAX device, which is a chip unless `devices` says otherwise."""

    peak: float  # published bfloat16 FLOP/s
    units: int  # 128 x 128 multiply-add arrays, as the compiler's estimate of a 16384^3 product counts them
    hbm: float  # published bytes
    usable_hbm: float  # bytes that the compiler plans with
    links: float  # published bytes/s between chips, both directions of all links together
    slices: tuple[str, ...]  # usual shapes
    largest: int  # chips of the largest slice; 3-D slices are any multiples of 4 up to it
    devices: int = 1  # JAX devices a chip
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what libtpu needs besides the name

    @property
    def clock(self) -> float:
        """Cycles a second that make `units` reach the published peak."""
        return self.peak / (self.units * 128 * 128 * 2)


GENERATIONS = {
    # Without "megacore" the two cores of a v4 chip are two devices.
    "v4": Generation(
        275e12, 8, 32 * GIB, 30.75 * GIB, 300e9, (*_SMALL, *_CUBES), 4096,
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Generation(197e12, 4, 16 * GIB, 15.75 * GIB, 400e9, _FLAT, 256),
    "v5p": Generation(459e12, 8, 95 * GIB, 95.74 * GIB, 1200e9, (*_SMALL, *_CUBES, "16x16x24"), 6144),
    "v6e": Generation(918e12, 16, 32 * GIB, 31.25 * GIB, 800e9, _FLAT, 256),
    # Each of the two cores of a chip is a device of its own.
    "tpu7x": Generation(
        2307e12 / 2, 16, 96 * GIB, 94.75 * GIB, 1200e9 / 2, (*_SMALL, *_CUBES, "16x16x24"), 9216, devices=2
    ),
}  # fmt: skip


OTHER_NAMES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "ironwood": "tpu7x",
    "v7x": "tpu7x",
    "v7": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together and wired to each other."""

    name: str  # "v5e:16x16"
    generation: Generation
    chips: int

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return self.chips * self.generation.devices


def find(name: str) -> Slice:
    """Looks a slice up by "GENERATION:SHAPE".

    Raises:
        UserError: no such slice; lists what there is and names the closest by chips.
    """
    kind, _, shape = name.strip().partition(":")
    if kind not in GENERATIONS:
        raise UserError(
            f"--topology={name}: unknown TPU '{kind}'.{_meant(kind)} Possible: {', '.join(GENERATIONS)}, each with a "
            "shape. Give for example --topology=v5e:16x16."
        )
    generation = GENERATIONS[kind]
    dims = tuple(int(n) for n in re.findall(r"\d+", shape))
    if shape not in generation.slices and not _cubes(shape, dims, generation):
        more = ", and multiples of 4 along each axis" if "4x4x4" in generation.slices else ""
        raise UserError(
            f"--topology={name}: there is no {kind} slice '{shape}'. Did you mean '{kind}:{_nearest(dims, generation)}'? "
            f"Possible: {', '.join(generation.slices)}{more} (at most {generation.largest} chips). Take one of these."
        )
    return Slice(f"{kind}:{shape}", generation, math.prod(dims))


def _meant(kind: str) -> str:
    """A hint for a misspelt generation, a trade name or an accelerator type such as v5litepod-256."""
    word, _, number = kind.lower().partition("-")
    known = word if word in GENERATIONS else OTHER_NAMES.get(word)
    if known is None or not number.isdigit():
        return f" Did you mean '{known}'?" if known else closest(word, GENERATIONS)
    generation = GENERATIONS[known]
    # The number counts cores where a chip has two.
    chips = int(number) // (2 if "4x4x4" in generation.slices else 1)
    return f" Did you mean '{known}:{_nearest((chips,), generation)}'?"


def _cubes(shape: str, dims: tuple[int, ...], generation: Generation) -> bool:
    """Whether a 3-D slice is made of whole 4 x 4 x 4 cubes, its axes in rising order."""
    if "4x4x4" not in generation.slices or shape != "x".join(map(str, dims)) or len(dims) != 3:
        return False
    whole = all(n % 4 == 0 and n for n in dims) and list(dims) == sorted(dims)
    return whole and math.prod(dims) <= generation.largest


def _nearest(dims: tuple[int, ...], generation: Generation) -> str:
    """The usual shape whose number of chips is closest, by ratio; the largest one without dims."""
    chips = max(1, math.prod(dims)) if dims else generation.largest

    def distance(shape: str) -> float:
        return abs(math.log(math.prod(map(int, shape.split("x"))) / chips))

    return min(generation.slices, key=distance)
