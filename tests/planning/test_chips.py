# SPDX-License-Identifier: Apache-2.0
"""Slices by name, and the numbers of their chips."""

from __future__ import annotations

import math

import pytest

from vlp_jax.planning import chips
from vlp_jax.types import UserError


@pytest.mark.parametrize(
    "name, number, devices",
    [("v5e:16x16", 256, 256), ("v4:4x4x4", 64, 64), ("tpu7x:4x4x4", 64, 128), ("v5p:16x16x24", 6144, 6144),
     ("v5p:4x8x12", 384, 384), ("v6e:1x1", 1, 1)],
)  # fmt: skip
def test_slices(name, number, devices):
    found = chips.find(name)
    assert (found.name, found.chips, found.devices) == (name, number, devices)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("v5e:3x3", "v5e:2x4"),
        ("v5e:16x17", "v5e:16x16"),
        ("v5e:32x32", "v5e:16x16"),
        ("v5e", "v5e:16x16"),
        ("v5e:", "v5e:16x16"),
        ("v5e:0x0", "v5e:1x1"),
        ("v5e:4X4", "v5e:4x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5e-64", "v5e:8x8"),
        ("v4-128", "v4:4x4x4"),
        ("v7x:4x4x4", "tpu7x"),
        ("v5:2x2", "v5"),
        ("v5p:3x3x3", "v5p:2x4x4"),
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v5p:32x32x32", "v5p:16x16x24"),
        ("v5p:4x4x4x4", "v5p:4x8x8"),
        ("v5p:04x4x4", "v5p:4x4x4"),
    ],
)
def test_what_there_is_not_names_the_closest_and_the_list(name, hint):
    with pytest.raises(UserError, match="Possible: ") as caught:
        chips.find(name)
    assert f"Did you mean '{hint}" in str(caught.value) and f"--topology={name}:" in str(caught.value)


def test_every_usual_slice_can_be_found_and_is_no_larger_than_the_largest():
    for kind, generation in chips.GENERATIONS.items():
        for shape in generation.slices:
            assert (
                chips.find(f"{kind}:{shape}").chips
                == math.prod(map(int, shape.split("x")))
                <= generation.largest
            )


def test_the_clock_comes_out_as_published_where_it_is():
    # Jouppi et al. 2023, "TPU v4", table 4: 1050 MHz.
    assert chips.GENERATIONS["v4"].clock == pytest.approx(1.05e9, rel=0.002)
