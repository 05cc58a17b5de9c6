# SPDX-License-Identifier: Apache-2.0
"""Plan and proof of a conversion as text, JSON and one self-contained HTML page."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.convert.exporting import Export
from vlp_jax.convert.importing import Import
from vlp_jax.convert.proof.lines import BOUND, Line, Proof
from vlp_jax.files import save
from vlp_jax.types import UserError

SUFFIXES = (".html", ".json")
Table = tuple[str, Sequence[Sequence[str]]]  # headline, rows


def check(target: str, overwrite: bool = False, sources: Sequence[str] = ()) -> Path | None:
    """Where the report goes; None where none is wanted.

    Raises:
        UserError: another suffix than .html or .json, no folder to write to, or a file that is there already.
    """
    if not target:
        return None
    path = Path(target).expanduser().absolute()
    if path.suffix not in SUFFIXES or path.is_dir():
        raise UserError(f"--report={target} is no report's name. Possible: FILE{' or FILE'.join(SUFFIXES)}.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(
            f"--report={target}: {path.parent} is no folder that may be written to. Give another place."
        )
    beside = {Path(source).expanduser().absolute() for source in sources}
    if path.exists() and (
        not overwrite or beside & {path, path.parent} or path.parent in {b.parent for b in beside}
    ):
        raise UserError(f"--report={target} exists and is left as it is. Give another name.")
    return path


def plan_tables(conversion: Import) -> list[Table]:
    """What is read, what is set and why, and what is not as it was in the file."""
    plan = conversion.plan
    sources = [
        (
            str(one.source.path),
            one.source.container,
            f"{len(one.source.tensors)} tensors",
            f"read as: {one.table.name}",
        )
        for one in plan.readings
    ]
    settings = [(setting.key, str(setting.value), setting.origin) for setting in conversion.settings]
    dropped = [(name, why) for one in plan.readings for name, why in one.dropped.items()]
    resized = [
        (path, f"{list(old)} -> {list(new)}", _way(conversion, path))
        for path, (old, new) in sorted(plan.resized.items())
    ]
    return [
        ("sources", sources),
        ("settings", settings),
        ("dropped", _grouped(dropped)),
        ("fresh", _grouped(list(plan.fresh.items()))),
        ("unused", _grouped(list(plan.unused.items()))),
        ("copied", sorted(plan.copied.items())),
        ("resized", resized),
        ("notes", [(note,) for note in conversion.notes]),
        ("parameters", [(f"{sum(map(math.prod, plan.wanted.values())):,} in {len(plan.wanted)} arrays",)]),
    ]


def export_tables(export: Export) -> list[Table]:
    """What is written under which names, and what a user should know."""
    count = sum(array.size for array in export.params.values())
    written = f"{len(export.tensors)} tensors, {count:,} numbers"
    return [
        ("source", [(str(export.source), export.config.system)]),
        ("written as", [(export.class_name or export.table.name, written)]),
        ("files", [(name, f"{len(content)} bytes") for name, content in sorted(export.files.items())]),
        ("notes", [(note,) for note in export.notes]),
    ]


def proof_tables(proof: Proof) -> list[Table]:
    """Each part that was compared, and what could not be."""
    lines = [
        (
            one.part,
            f"{one.distance:.2e}",
            f"{one.largest:.3g}",
            _verdict(one),
            one.source,
        )
        for one in proof.lines
    ]
    head = ("part", "largest difference", "largest value", f"within {BOUND:g} of it", "source")
    rows = [head, *lines]
    if len({one.source for one in proof.lines}) == 1:
        rows = [row[:-1] for row in rows]
    return [("proof", rows), ("not compared", sorted(proof.left_out.items()))]


def _verdict(line: Line) -> str:
    if not line.good:
        return "DIFFERENT"
    return "equal" if line.bound == BOUND else f"equal (within {line.bound:g})"


def text(tables: Sequence[Table]) -> str:
    """The tables that are not empty, in columns."""
    blocks = []
    for headline, rows in tables:
        if rows:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
            blocks.append("\n".join([headline, *lines]))
    return "\n".join(blocks)


def write(path: Path, title: str, tables: Sequence[Table], proof: Proof | None) -> None:
    """Writes the report by the suffix of its name.

    Raises:
        UserError: it cannot be written.
    """
    try:
        save(path, _as_json(tables, proof) if path.suffix == ".json" else _as_html(title, tables, proof))
    except OSError as error:
        raise UserError(
            f"--report={path} cannot be written: {error.strerror}. Give another place."
        ) from error


def _as_html(title: str, tables: Sequence[Table], proof: Proof | None) -> str:
    tables = [*tables, *(proof_tables(proof) if proof else [("proof", [("was not run",)])])]
    blocks = [
        f"<h2>{html.escape(headline)}</h2><table>"
        + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        + "</table>"
        for headline, rows in tables
        if rows
    ]
    style = (
        "body{font:15px/1.45 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.1rem 1.2rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}"
        "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{''.join(blocks)}</html>\n"
    )


def _as_json(tables: Sequence[Table], proof: Proof | None) -> str:
    content: dict[str, Any] = {headline: [list(row) for row in rows] for headline, rows in tables}
    content["proof"] = None
    if proof:
        parts = [
            {"source": one.source, "part": one.part, "distance": _finite(one.distance), "largest": _finite(one.largest), "equal": one.good}
            for one in proof.lines
        ]  # fmt: skip
        content["proof"] = {
            "bound": BOUND,
            "equal": proof.good,
            "parts": parts,
            "not compared": dict(proof.left_out),
        }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _finite(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


def _way(conversion: Import, path: str) -> str:
    way = conversion.resizing[path]
    return f"{conversion.position_resize} interpolation" if way == "grid" else way


def _grouped(rows: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """One row a reason: how many, the first of them, the reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in rows:
        reasons.setdefault(why, []).append(name)
    return [
        (str(len(names)), names[0] + (", ..." if len(names) > 1 else ""), why)
        for why, names in reasons.items()
    ]
