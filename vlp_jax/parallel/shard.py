# SPDX-License-Identifier: Apache-2.0
"""From logical axis names to shardings: the only place that sees Linen's partition boxes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.parallel.rules import rules


@contextlib.contextmanager
def context(mesh: Mesh, preset: str) -> Iterator[None]:
    """Within it, compiled functions know the mesh and what logical axes mean."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(preset)):
        yield


def abstract(make: Callable[[], Any], mesh: Mesh, preset: str) -> Any:
    """Returns the result of `make()` as `ShapeDtypeStruct`s with shardings; allocates nothing.

    `make` takes no argument, so that not even a key need exist: it may run for a mesh that is only described.
    """
    with nn.logical_axis_rules(rules(preset)):
        boxed = jax.eval_shape(make)
        specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules(preset))
    plain = shapes(make)

    def join(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_fitting(sharding, leaf.shape))

    return jax.tree.map(join, plain, specs)


def concrete(make: Callable[[], Any], target: Any) -> Any:
    """Runs `make()` compiled, each array made where `target` (from `abstract`) wants it."""
    return jax.jit(lambda: nn.unbox(make()), out_shardings=shardings(target))()


def selected(make: Callable[[], Any], choose: Callable[[Any], Any]) -> Any:
    """Runs `choose(make())` compiled on the default device: what is not chosen is never computed."""
    return jax.jit(lambda: choose(nn.unbox(make())))()


def shapes(make: Callable[[], Any]) -> Any:
    """The result of `make()` as plain `ShapeDtypeStruct`s; allocates nothing."""
    return jax.eval_shape(lambda: nn.unbox(make()))


def shardings(target: Any) -> Any:
    """The shardings of a tree of `ShapeDtypeStruct`s or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, target)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Leaves an axis whole where the mesh does not divide it (a vocabulary of odd size)."""
    parts = []
    for size, axes in zip(shape, tuple(sharding.spec) + (None,) * len(shape), strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        ways = 1
        for name in names:
            ways *= sharding.mesh.shape[name]
        parts.append(axes if size % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))
