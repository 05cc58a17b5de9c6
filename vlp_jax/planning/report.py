# SPDX-License-Identifier: Apache-2.0
"""A plan's figures as a table for people; the same figures go to --json for programs."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlp_jax import files
from vlp_jax.planning import chips
from vlp_jax.types import UserError

WIDTH = 22  # of the left column
Figures = Mapping[str, Any]


def table(figures: Figures) -> str:
    """The whole report, as far as there are figures."""
    parts = [_setting(figures), _model(figures), _memory(figures)]
    if "step_seconds" in figures:
        parts += [_time(figures), _slowest(figures), _collectives(figures), _unseen(figures)]
    elif figures.get("trouble"):
        trouble = f"unknown: the compiled program's text could not be read: {figures['trouble']}"
        cure = "jaxlib and libtpu do not fit each other: pip install -r requirements-tpu.txt"
        parts.append(iter([_row("time, collectives", trouble), _row("", cure)]))
    return "\n\n".join("\n".join(part) for part in parts)


def advice(figures: Figures) -> str:
    """The message for a step that does not fit: what is needed beside what there is, and what to change."""
    pairs, may = figures["pairs_per_chip"], figures["pairs_per_chip_that_may_fit"]
    needed, micro = figures["needed_bytes_per_device"], figures["micro_batches"]
    ways = []
    if 0 < may < pairs:
        parts = micro * 2 ** math.ceil(math.log2(pairs / may))
        ways += [f"--pairs_per_chip={may} (by proportion)", f"--config.train.accumulation={parts}"]
    if figures["rules"] == "dp" and figures["state_bytes_per_device"] > needed / 20:
        ways.append("--config.parallel.rules=fsdp")
    if figures["remat_switch"]:
        ways.append(f"--config.model.{figures['remat_switch']}=true")
    return (
        f"The step does not fit: it needs {_size(needed) if needed else 'more memory'}, a device of "
        f"{figures['topology']} has {_size(figures['available_bytes_per_device'])} for programs. "
        f"Try {', '.join([*ways, 'more chips'])}."
    )


def check_folders(*names: str) -> None:
    """Raises UserError where the folder of a file to be written is missing, before minutes are spent; "" is no file."""
    for name in filter(None, names):
        folder = Path(name).parent
        if not folder.is_dir():
            raise UserError(f"{name} cannot be written: there is no folder {folder}. Make it first.")


def save(figures: Figures, json_file: str, text: str, text_file: str) -> None:
    """Writes the figures as JSON and the compiled program's text, each where a file is named."""
    if json_file:
        files.save(Path(json_file), json.dumps(figures, indent=1))
    if text_file and text:
        files.save(Path(text_file), text)


def _setting(f: Figures) -> Iterator[str]:
    device = "chip" if f["devices"] == f["chips"] else "core (half a chip)"
    mesh = " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items())
    yield _row(
        "topology",
        f"{f['topology']}: {f['chips']:,} chips, {f['devices']:,} devices; one is a {device}",
    )
    yield _row(
        f"a {device}",
        f"{_size(f['hbm_bytes_per_device'])} HBM, {_size(f['usable_hbm_bytes_per_device'])} for programs; "
        f"peak {f['peak_flops_per_device'] / 1e12:.4g} TFLOP/s bfloat16",
    )
    yield _row(
        "run",
        f"{f['system']} {f['variant']}, {f['dtype']}, unroll {f['unroll']}, rules {f['rules']} ({mesh})",
    )
    yield _row(
        "batch",
        f"{f['batch_size']:,} pairs, {f['pairs_per_chip']:g} a chip, micro-batches {f['micro_batches']}",
    )
    assumed = ", ".join(f"{name} {value:,}" for name, value in f["assumed"].items())
    yield _row(
        "assumed", f"{assumed} (no data is read); clock {f['clock_hz_assumed'] / 1e9:.3f} GHz, at which the"
    )
    yield _row("", "multiply-add arrays reach the published peak")
    if "compiler" in f:
        yield _row(
            "compiled by", f"{f['compiler']}, in {f['compile_seconds']:.0f} s; no TPU has checked any of this"
        )


def _model(f: Figures) -> Iterator[str]:
    backbone = f["parameters_blocks_and_patch_projection"]
    part = f"; blocks and patch projection {backbone:,}" if backbone else ""
    yield _row("parameters", f"{f['parameters']:,}{part}")
    step, useful = f["flops_per_step"], f["useful_flops_per_step"]
    yield _row(
        "FLOPs a step", f"{step:.4g} computed, {useful:.4g} useful (tokens that only fill tiles left out)"
    )
    yield _row(
        "FLOPs a pair", f"{step / f['batch_size']:.4g} computed, {useful / f['batch_size']:.4g} useful"
    )
    yield _row(
        "", "products and convolutions of the loss, 2 a multiply-add, x 3; no credit for what is computed"
    )
    yield _row("", "again or for one-hot selections")


def _memory(f: Figures) -> Iterator[str]:
    state, batch = _size(f["state_bytes_per_device"]), _size(f["batch_bytes_per_device"])
    yield _row(
        "memory a device", f"state {state}, batch {batch} (from the shapes, without the padding of tiles)"
    )
    if "memory_bytes_per_device" in f:
        memory = f["memory_bytes_per_device"]
        for name in ("arguments", "temporaries", "results"):
            note = ", not written over arguments" if name == "results" else ""
            yield _row("", f"{name:12}{_size(memory[name]):>12}{note}")
        usable = _size(f["usable_hbm_bytes_per_device"])
        verdict = f"fits, {_size(memory['free'])} free" if f["fits"] else f"{_size(-memory['free'])} too much"
        yield _row("", f"{'total':12}{_size(memory['total']):>12} of {usable}: {verdict}")
    elif "needed_bytes_per_device" in f:
        needed, available = f["needed_bytes_per_device"], f["available_bytes_per_device"]
        yield _row("", f"needed {_size(needed)} of {_size(available)}: DOES NOT FIT")
        yield _row("", f["message"])


def _time(f: Figures) -> Iterator[str]:
    # Where a loop's length is unknown it is counted once: time is a lower bound, all rates are upper ones.
    least, most = ("at least ", "at most ") if f["loops_of_unknown_length"] else ("", "")
    yield _row(
        "estimated step",
        f"{least}{f['step_seconds'] * 1e3:.2f} ms, without collectives ({f['cycles']:,} cycles)",
    )
    yield _row("estimated MFU", f"{most}{f['mfu_computed']:.3f} computed, {most}{f['mfu_useful']:.3f} useful")
    yield _row("pairs a second", f"{most}{f['pairs_per_second']:,.0f} on all chips")
    exchange = f["collective_seconds_at_least"]
    both = f["step_seconds"] + exchange
    yield _row(
        "collectives",
        f"at least {exchange * 1e3:.2f} ms if nothing hid them, at the published rate of all links;",
    )
    yield _row("", f"then MFU {f['mfu_useful'] * f['step_seconds'] / both:.3f} useful")
    loops = [f"{loop['place']} x {'?' if loop['trips'] is None else loop['trips']}" for loop in f["loops"]]
    yield from _wrapped("loops, trips a step", loops)


def _slowest(f: Figures) -> Iterator[str]:
    yield _row("slowest parts", "share of the estimated time, by module path")
    for group in f["slowest"]:
        yield _row("", f"{group['share']:6.1%}  {group['direction']:9} {group['path'] or '(no name)'}")


def _collectives(f: Figures) -> Iterator[str]:
    yield _row(
        "collectives",
        f"{'kind':20}{'runs':>6}{'a step and chip':>17}  {'type':10} contents (by type and size)",
    )
    for row in f["collectives"]:
        line = f"{row['kind']:20}{row['count']:6}{_size(row['bytes']):>17}  {row['dtype'][:10]:10} {row['contents']}"
        yield _row("", line)
        if row["contents"] == "activations":
            yield _row("", f"{'':20}  {_short(row['where'])}")
    moved = sum(row["bytes"] for row in f["collectives"] if row["contents"] == "activations")
    yield _row("", f"activations moved between chips: {_size(moved) if moved else 'none'}")


def _unseen(f: Figures) -> Iterator[str]:
    kinds = [f"{kind} {runs:,}" for kind, runs in f["without_estimate"].items()]
    yield from _wrapped("not in the estimate", kinds)
    yield _row(
        "", "(runs a step); nor whether copies and collectives overlap with products, nor input, nor hosts"
    )


def _wrapped(name: str, words: list[str]) -> Iterator[str]:
    """Words in as many lines as they need."""
    for line in textwrap.wrap(", ".join(words) or "none", 100, break_long_words=False):
        yield _row(name, line)
        name = ""


def _row(name: str, value: str) -> str:
    return f"{name:{WIDTH}}{value}".rstrip()


def _size(number: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, size in (("GiB", chips.GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def _short(op_name: str) -> str:
    return op_name if len(op_name) <= 90 else "..." + op_name[-87:]
