# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices, and how a host's rows become one global batch on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vlp_jax.parallel.rules import BATCH, MESH_AXES, MESHES, rules
from vlp_jax.types import Array, UserError


def make_mesh(parallel: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices (default: all) out along data, fsdp and tensor; -1 takes what the others leave.

    The axes are Auto ones: Linen's logical constraints fail on the Explicit axes that are JAX's default.

    Raises:
        UserError: the shape does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(parallel, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_shape(parallel: ConfigDict, count: int) -> tuple[int, ...]:
    """How many of `count` devices lie along data, fsdp and tensor; -1 takes what the others leave.

    Raises:
        UserError: the shape does not fit the number of devices.
    """
    rules(parallel.rules)
    shape = tuple(parallel.mesh) or MESHES[parallel.rules]
    fixed = math.prod(n for n in shape if n != -1)
    if len(shape) != 3 or shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(
            f"config.parallel.mesh {shape} is not three sizes (data, fsdp, tensor) with at most one -1. "
            "Give three, for example (-1, 1, 1), or () for the preset's."
        )
    if fixed > count and not parallel.mesh:
        raise UserError(
            f"config.parallel.rules {parallel.rules!r} needs at least {fixed} devices, but there are {count}. "
            "Use 'dp', or more devices."
        )
    shape = tuple(count // fixed if n == -1 else n for n in shape)
    if math.prod(shape) != count:
        raise UserError(
            f"config.parallel.mesh {shape} needs {math.prod(shape)} devices along {MESH_AXES}, but there are "
            f"{count}. Choose sizes whose product is {count}."
        )
    return shape


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, whole along tensor."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch_size(name: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Checks that a global batch divides over the mesh, micro-batch by micro-batch.

    Raises:
        UserError: it does not; names the sizes that do.
    """
    rows = math.prod(mesh.shape[axis] for axis in BATCH) * accumulation
    if size % rows or size < 1:
        lower = size // rows * rows
        raise UserError(
            f"{name} {size} does not divide over the mesh: {rows} parts (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} x {accumulation} micro-batches). Take {lower or rows} or {lower + rows}."
        )


def placer(mesh: Mesh) -> Callable[[Mapping[str, np.ndarray]], dict[str, Array]]:
    """Returns the function that puts this host's rows of a batch on the mesh as one global batch."""
    sharding = batch_sharding(mesh)

    def place(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}

    return place
