# SPDX-License-Identifier: Apache-2.0
"""Gathers a plan's figures: what follows from the config alone, and what the TPU compiler adds."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from vlp_jax.parallel import mesh as meshes
from vlp_jax.planning import chips, compilation, exchange, program, work
from vlp_jax.training.paths import flatten
from vlp_jax.types import Batch

log = logging.getLogger(__name__)

# What a run takes from its data and a plan supposes. 30522: the pieces of BERT's uncased vocabulary; 91: COCO's raw ids.
ASSUMED = {"vocab_size": 30522, "pad_id": 0, "classes": 91}
# The part whose size is published as a model's (87.4 million for ViLT-B/32).
BACKBONE = re.compile(r"(^|/)stack/|(^|/)patch_embed/projection/")
GROUPS, COMPONENTS = 10, 5  # rows of the time table, and components of a module path


def facts(config: ConfigDict) -> dict[str, int]:
    """`ASSUMED`, where config.model leaves a field of that name at -1; else what it says."""
    known = {}
    for path, value in flatten(config.model.to_dict()):
        name = path.rpartition("/")[2]
        if name in ASSUMED and value != -1:
            known[name] = value
    return {**ASSUMED, **known}


def analytic(config: ConfigDict, module: ModuleType, spec: Batch, where: chips.Slice) -> dict[str, Any]:
    """What needs no compiler: sizes, FLOPs, and the bytes that state and batch take on each device.

    Args:
        config: resolved.
        module: the system's, for `build(config)`.
        spec: shapes and types of the global batch.

    Raises:
        UserError: the mesh does not fit the slice, or the batch does not divide over the mesh.
    """
    mesh = compilation.described_mesh(config.parallel, where.devices)
    size, accumulation = config.train.batch_size, config.train.accumulation
    meshes.check_batch_size("config.train.batch_size", size, mesh, accumulation)
    system = module.build(config)
    state = compilation.target(config, system, spec, mesh)
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(state.params)}
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in spec.items()}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params)
    switches = (
        path for path, on in flatten(config.model.to_dict(), ".") if path.endswith("remat") and not on
    )
    return {
        "topology": where.name,
        "chips": where.chips,
        "devices": where.devices,
        "peak_flops_per_device": where.generation.peak,
        "clock_hz_assumed": where.generation.clock,
        "hbm_bytes_per_device": where.generation.hbm,
        "usable_hbm_bytes_per_device": where.generation.usable_hbm,
        "assumed": facts(config),
        "system": config.system,
        "variant": config.variant,
        "rules": config.parallel.rules,
        "mesh": dict(mesh.shape),
        "dtype": config.model.dtype,
        "unroll": config.model.unroll,
        "remat_switch": next(switches, ""),
        "batch_size": size,
        "micro_batches": accumulation,
        "pairs_per_chip": size / where.chips,
        "parameters": sum(sizes.values()),
        "parameters_blocks_and_patch_projection": sum(
            n for path, n in sizes.items() if BACKBONE.search(path)
        ),
        "flops_per_step": work.step_flops(system, params, batch),
        "useful_flops_per_step": work.step_flops(module.build(_unpadded(config)), params, batch),
        "state_bytes_per_device": compilation.bytes_per_device(state),
        "batch_bytes_per_device": _rows(spec, mesh),
        "parameter_sizes": sorted(exchange.parameter_sizes(params, mesh.shape)),
    }


def add_compiled(
    figures: dict[str, Any], config: ConfigDict, module: ModuleType, spec: Batch, where: chips.Slice
) -> str:
    """Compiles the step and adds memory, and from the program's text time and collectives; returns the text.

    A step that does not fit is no error here: `figures["fits"]` is then False.

    Raises:
        UserError: libtpu is missing, does not know the slice, or crashes.
        RuntimeError: the estimate is faster than the chip can be, or the walk lost part of the program: our error.
    """
    version = compilation.version()
    log.info("compiling the step for %s by libtpu %s; a large model takes minutes ...", where.name, version)
    try:
        compiled = compilation.compile_step(config, module, spec, where)
    except compilation.OutOfMemory as error:
        _add_out_of_memory(figures, error)
        return ""
    log.info("compiled in %.1f s", compiled.seconds)
    total = sum(compiled.memory.values())
    usable = where.generation.usable_hbm
    figures["memory_bytes_per_device"] = {**compiled.memory, "total": total, "free": usable - total}
    figures["fits"] = total <= usable
    figures["compile_seconds"], figures["trouble"] = compiled.seconds, compiled.trouble
    figures["compiler"] = f"jax {jax.__version__}, libtpu {version}"
    if compiled.text:
        _add_program(figures, program.read(compiled.text), where)
    return compiled.text


def _add_program(figures: dict[str, Any], found: program.Program, where: chips.Slice) -> None:
    if found.missed_cycles:
        raise RuntimeError(f"the walk over the compiled program lost {found.missed_cycles} estimated cycles")
    figures |= _time(figures, found, where)
    figures["collectives"] = exchange.table(found.collectives, frozenset(figures["parameter_sizes"]))
    figures["collective_seconds_at_least"] = exchange.least_seconds(found.collectives, where.generation.links)
    figures["without_estimate"] = program.unestimated(found)


def _add_out_of_memory(figures: dict[str, Any], error: compilation.OutOfMemory) -> None:
    """What the compiler says when the step does not fit, and how many pairs a chip might."""
    available = error.available or figures["usable_hbm_bytes_per_device"]
    held = figures["state_bytes_per_device"]
    figures["fits"] = False
    figures["needed_bytes_per_device"], figures["available_bytes_per_device"] = error.needed, available
    figures["message"] = str(error).splitlines()[0]
    figures["pairs_per_chip_that_may_fit"] = 0
    if error.needed > held:  # what is not state grows with the pairs
        share = (available - held) / (error.needed - held)
        figures["pairs_per_chip_that_may_fit"] = max(0, math.floor(figures["pairs_per_chip"] * share))


def _time(figures: Mapping[str, Any], found: program.Program, where: chips.Slice) -> dict[str, Any]:
    seconds = found.cycles / where.generation.clock
    capacity = seconds * where.generation.peak * where.devices
    computed, useful = (figures[name] / capacity for name in ("flops_per_step", "useful_flops_per_step"))
    loops = [{"place": program.place(loop)[1], "trips": loop.trips} for loop in found.loops]
    unknown = sum(loop["trips"] is None for loop in loops)
    if computed > 1 and not unknown:
        raise RuntimeError(
            f"estimated MFU {computed:.3f} is over 1: {figures['flops_per_step']:.4g} FLOPs in {seconds:.4g} s "
            "are more than the chips can do, so FLOPs, clock or trip counts are counted wrong"
        )
    groups = program.by_path(found, COMPONENTS)
    return {
        "cycles": found.cycles,
        "step_seconds": seconds,
        "mfu_computed": computed,
        "mfu_useful": useful,
        "pairs_per_second": figures["batch_size"] / seconds,
        "loops": loops,
        "loops_of_unknown_length": unknown,
        "slowest": [
            {"direction": direction, "path": path, "share": cycles / found.cycles}
            for (direction, path), cycles in list(groups.items())[:GROUPS]
        ],
    }


def _unpadded(config: ConfigDict) -> ConfigDict:
    """The same config without tokens that only fill tiles, for counting useful work."""
    plain = ConfigDict(config.to_dict())
    if "token_multiple" in plain.model:
        plain.model.token_multiple = 1
    return plain


def _rows(spec: Batch, mesh: AbstractMesh) -> int:
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in spec.values()) // rows
