# SPDX-License-Identifier: Apache-2.0
"""Compiles the train step that a run would take for TPU devices that are only described, by libtpu, on any Linux machine."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.parallel.rules import MESH_AXES
from vlp_jax.planning import apart, chips
from vlp_jax.systems.base import System
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.state import initial_state
from vlp_jax.training.step import make_train_step
from vlp_jax.types import Batch, UserError

# Without these libtpu asks a metadata server who it is, complains about the answer, and locks out a second process.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MEMORY = re.compile(
    r"total memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
    r"|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
)


class OutOfMemory(Exception):
    """The step does not fit; `needed` and `available` are bytes a device, 0 where the compiler does not say."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = _MEMORY.search(message)
        parts = [part for part in found.groups() if part] if found else []
        sizes = [float(number) * _UNITS[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)]
        self.needed, self.available = sizes or (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program."""

    seconds: float  # that compiling took
    memory: Mapping[str, int]  # bytes: arguments, temporaries, results (not written over arguments)
    text: str  # "" where it could not be had
    trouble: str  # why not


def described_mesh(parallel: ConfigDict, count: int) -> AbstractMesh:
    """The mesh of a run on `count` devices, without devices.

    Raises:
        UserError: the shape does not fit the number of devices.
    """
    shape = meshes.mesh_shape(parallel, count)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def target(config: ConfigDict, system: System, spec: Batch, mesh: Mesh | AbstractMesh) -> Any:
    """The train state as `ShapeDtypeStruct`s with shardings, as the loop makes it."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    example = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in spec.items()}
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    make = initial_state(config, system, optimizer, example)
    return shard.abstract(make, mesh, config.parallel.rules)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded `ShapeDtypeStruct`s."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        size = leaf.dtype.itemsize
        for n in shape:
            size *= n
        return size

    return sum(map(one, jax.tree.leaves(tree)))


def compile_step(config: ConfigDict, module: ModuleType, spec: Batch, where: chips.Slice) -> Compiled:
    """Lowers and compiles the step as training/loop.py does, for a described slice; touches no TPU.

    Args:
        config: resolved.
        module: the system's, for `build(config)`.

    Raises:
        OutOfMemory: the step does not fit on the chip.
        UserError: libtpu is not installed, does not know the slice, or crashes.
    """
    return call(where, _compile_step, config.to_dict(), module.__name__, spec, where)


def call(where: chips.Slice, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, computed in a process of its own, in which it may compile for `where`.

    Raises:
        UserError: libtpu is not installed or crashes.
        What the function raises.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler, libtpu, is not installed; it comes for Linux on x86-64 only. "
            "Run: pip install -r requirements-tpu.txt, or give --compile=false for what is known without it."
        )
    try:
        return apart.call(function, *arguments)
    except apart.Crash as crash:
        raise UserError(
            f"libtpu {version()} crashed while it compiled for {where.name} (exit code {crash.code}). That is a fault "
            "of the compiler; its message stands above. Try another topology, batch or preset, or another libtpu "
            "(requirements-tpu.txt pins the one that fits this jax)."
        ) from crash


def _compile_step(values: dict[str, Any], module: str, spec: Batch, where: chips.Slice) -> Compiled:
    """`compile_step` within its own process."""
    config = ConfigDict(values)
    system = importlib.import_module(module).build(config)
    mesh = meshes.make_mesh(config.parallel, devices(where))
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    state = target(config, system, spec, mesh)
    sharding = meshes.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in spec.items()}
    step = jax.jit(
        make_train_step(config, system, optimizer),
        donate_argnums=0,
        out_shardings=(shard.shardings(state), shard.replicated(mesh)),
    )
    with shard.context(mesh, config.parallel.rules):
        return compiled(step.lower(state, batch))


def devices(where: chips.Slice) -> Sequence[jax.Device]:
    """The devices of a slice, only described; to be called within `call`.

    Raises:
        UserError: libtpu does not know the slice.
    """
    jax.config.update("jax_platforms", "cpu")
    # A plan compiles anew, so that its time is true and the cache of runs stays small.
    jax.config.update("jax_enable_compilation_cache", False)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = dict(where.generation.options)
    if where.name.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(
            f"--topology={where.name}: libtpu {version()} cannot describe it: {_first(error)} "
            "Take another slice, or install what requirements-tpu.txt pins."
        ) from error


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles what was lowered for described devices.

    Raises:
        OutOfMemory: it does not fit.
    """
    begun = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(str(error)) from error
        raise
    seconds = time.perf_counter() - begun
    sizes = program.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    }
    try:
        return Compiled(seconds, memory, program.as_text() or "", "")
    except jax.errors.JaxRuntimeError as error:
        # Seen with libtpu 0.0.51 under jaxlib 0.10.2: "async-update instruction should have 1 operands".
        return Compiled(seconds, memory, "", _first(error))


def version() -> str:
    """The installed libtpu."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
