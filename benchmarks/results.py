# SPDX-License-Identifier: Apache-2.0
"""What is written of a measurement: where and when it was taken, and its rows in RESULTS.md."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from vlp_jax.files import save
from vlp_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
# What changes speed from outside.
ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS")


def commit() -> str:
    """The short commit of the working tree, " dirty" where files differ from it; "unknown" outside a clone."""
    shown = _git("rev-parse", "--short", "HEAD")
    if not shown:
        return "unknown"
    # Rows that were recorded before this one change no program.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/RESULTS.md")
    return f"{shown} dirty" if changed else shown


def machine() -> str:
    """CPU, cores that this process may use, memory, accelerator, and what of `ENVIRONMENT` is set."""
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    except OSError:
        pass
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    given = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if os.environ.get(name)]
    return ", ".join([model, f"{len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB, {accelerator()}", *given])


def accelerator() -> str:
    """Number and kind of the devices that JAX computes on, or "no accelerator"."""
    devices = jax.devices()
    return "no accelerator" if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}"


def versions(*packages: str) -> str:
    """Installed versions, "jax 0.10.2, torch 2.13.0"."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


@dataclasses.dataclass(frozen=True)
class Section:
    """A measurement that is done: its heading in RESULTS.md, what was measured where, and its table."""

    heading: str
    settings: str
    rows: Sequence[Sequence[str]]


def section(
    heading: str, what: str, load: object, packages: Sequence[str], rows: Sequence[Sequence[str]]
) -> Section:
    """Puts a measurement together with machine, load and versions, and prints it."""
    settings = f"{what}; {machine()}; {load}; {versions(*packages)}"
    print(f"\n{heading}\n{settings}\n\n{aligned(rows)}", flush=True)
    return Section(heading, settings, rows)


def append(sections: Sequence[Section]) -> None:
    """Adds dated rows of all sections to RESULTS.md, each at the end of its heading, made where it is not there.

    The file is replaced by one rename: a reader or a kill meets all of them or none.
    """
    now, state = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"), commit()
    text = RESULTS.read_text(encoding="utf-8")
    for each in sections:
        head, *body = each.rows
        lines = [["date (UTC)", "commit", *head], ["---"] * (len(head) + 2)]
        lines += [[now, state, *row] for row in body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = inserted(text, each.heading, f"{each.settings}\n\n{table}\n")
    save(RESULTS, text)


def check_there() -> None:
    """Raises UserError where there is no RESULTS.md to append to."""
    if not RESULTS.is_file():
        raise UserError(
            f"--record: {RESULTS} is not there. Benchmarks are recorded in a clone; run there, or leave --record out."
        )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the console: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def inserted(text: str, heading: str, block: str) -> str:
    """`text` with `block` as the last paragraphs of the section `## heading`."""
    found = re.search(rf"^## {re.escape(heading)}[ \t]*$", text, re.MULTILINE)
    if found is None:
        return f"{text.rstrip()}\n\n## {heading}\n\n{block}"
    following = re.search(r"^## ", text[found.end() :], re.MULTILINE)
    end = found.end() + following.start() if following else len(text)
    rest = f"\n{text[end:]}" if text[end:] else ""
    return f"{text[:end].rstrip()}\n\n{block}{rest}"


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
