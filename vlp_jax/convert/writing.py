# SPDX-License-Identifier: Apache-2.0
"""Our parameters under the names of a file: the way back of engine.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vlp_jax.convert.engine import SHOWN
from vlp_jax.convert.ops import Shape
from vlp_jax.convert.tables import LAYER, Row, Table
from vlp_jax.types import UserError


def written_names(
    table: Table, shapes: Mapping[str, Shape], drop: str = r"(?!)"
) -> list[tuple[str, Row, int | None]]:
    """The way back: (name in the file, row, layer) of each tensor that a table writes for our parameters.

    Args:
        table: how the file names things.
        shapes: of our parameters by path.
        drop: regular expression on our paths that are left away.

    Raises:
        UserError: a parameter has no place in this layout, or the layout lacks one of ours; one sorted report.
    """
    kept = {path: shape for path, shape in shapes.items() if not re.search(drop, path)}
    result, covered, faults = [], set(), []
    for row in table.rows:
        there = [path for path in row.targets if path in kept]
        if not there:
            continue
        if len(there) < len(row.targets):
            lacking = ", ".join(set(row.targets) - set(there))
            faults.append(f"missing     {lacking}: {row.sources[0]} is made of it too")
            continue
        covered |= set(there)
        layers = range(kept[there[0]][0]) if LAYER in row.sources[0] else (None,)
        result += [(row.name(layer), row, layer) for layer in layers]
    faults += [f"no place    {path} {list(kept[path])}" for path in kept.keys() - covered]
    if faults:
        raise UserError(f"{table.name} cannot hold these parameters:\n" + "\n".join(sorted(faults)[:SHOWN]))
    return result


def written(row: Row, layer: int | None, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor of a file that a row makes of our parameters."""
    parts = [params[path] if layer is None else params[path][layer] for path in row.targets]
    return np.ascontiguousarray(row.op.inverse(parts, None))
