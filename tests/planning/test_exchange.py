# SPDX-License-Identifier: Apache-2.0
"""What collectives carry, and the least time they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.planning import exchange
from vlp_jax.planning.hlo import Shape
from vlp_jax.planning.program import Collective

PARAMS = {
    "stack": {"kernel": jax.ShapeDtypeStruct((12, 768, 3072), jnp.float32)},
    "word": jax.ShapeDtypeStruct((30522, 768), jnp.float32),
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def sizes(**mesh: int) -> frozenset[int]:
    return exchange.parameter_sizes(PARAMS, {"data": 4, "fsdp": 1, "tensor": 1} | mesh)


@pytest.mark.parametrize(
    "dtype, dims, op_name, expected",
    [
        ("bf16", (12, 768, 3072), "", "weights or gradients"),
        ("bf16", (1, 3072, 768), "", "weights or gradients"),  # one layer, transposed
        ("f32", (30522, 768), "", "weights or gradients"),
        ("f32", (30522, 96), "", "activations"),  # a piece that no device of this mesh holds
        ("bf16", (16, 241, 768), "", "activations"),
        ("bf16", (16, 241, 768), "state.params['word']", "weights or gradients"),
        ("s32", (4096, 40), "", "integers and masks"),
        ("pred", (4096, 40), "", "integers and masks"),
        ("u8", (16, 200, 3072), "", "integers and masks"),
        ("f32", (), "", "scalars"),
        ("f32", (1, 1), "", "scalars"),
    ],
)
def test_contents(dtype, dims, op_name, expected):
    assert exchange.contents(Shape(dtype, dims), op_name, sizes()) == expected


def test_devices_parts_are_weights():
    assert exchange.contents(Shape("f32", (30522, 96)), "", sizes(fsdp=8)) == "weights or gradients"
    assert exchange.contents(Shape("f32", (30522, 48)), "", sizes(fsdp=8, tensor=2)) == "weights or gradients"


def test_one_exchange_of_several_arrays_is_split_by_what_they_are():
    shapes = (Shape("f32", (30522, 768)), Shape("f32", (2, 5)), Shape("f32", ()))
    found = [
        Collective("all-reduce", shapes, 256, "a/add", 1),
        Collective("all-reduce", (Shape("f32", (3, 5)),), 256, "b/add", 12),
    ]
    rows = {row["contents"]: row for row in exchange.table(found, sizes())}
    assert rows["weights or gradients"]["bytes"] == 30522 * 768 * 4
    assert rows["activations"]["bytes"] == 4 * (2 * 5 + 12 * 3 * 5) and rows["activations"]["count"] == 13
    assert rows["activations"]["where"] == "b/add" and rows["scalars"]["bytes"] == 4
    assert sum(row["bytes"] for row in rows.values()) == sum(each.runs * each.bytes for each in found)


def test_least_time_is_the_published_all_reduce_rate():
    # Cloud TPU v5e: 51.2 TB/s for a pod of 256 chips, which is 200 GB/s that each chip sends, of 400 both ways.
    gradient = Collective("all-reduce", (Shape("bf16", (100_000_000,)),), 256, "", 1)
    assert exchange.least_seconds([gradient], 400e9) == pytest.approx(2 * 255 / 256 * 2e8 / 200e9)
    shapes = (Shape("bf16", (100_000_000,)),)
    gathered, permuted = (
        Collective(kind, shapes, 256, "", 3) for kind in ("all-gather", "collective-permute")
    )
    assert exchange.least_seconds([gathered], 400e9) == pytest.approx(3 * 255 / 256 * 2e8 / 200e9)
    assert exchange.least_seconds([permuted], 400e9) == pytest.approx(3 * 2e8 / 200e9)
    alone = Collective("all-reduce", shapes, 1, "", 1)
    assert exchange.least_seconds([alone], 400e9) == 0
