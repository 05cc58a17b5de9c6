# SPDX-License-Identifier: Apache-2.0
"""Names of a file matched with our parameters, both sides checked before a tensor is read.

`recognise` finds the table of a file, `match` says what each of its tensors becomes, `check` compares that with
the parameters that a model has; then `Plan.fill` reads, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.convert.ops import Shape
from vlp_jax.convert.sources import Source
from vlp_jax.convert.tables import LAYER, Row, Table
from vlp_jax.types import UserError

STRIPE = 64  # numbers of a row that are copied at a time
SHOWN = 40  # lines of a report in an error
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
)  # put before every name by those who wrap a model before saving it


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of one file on its way: what it becomes, and where among stacked layers it goes."""

    row: Row
    layer: int | None
    names: tuple[str, ...]  # in the file; the first is read, the others must be equal to it
    shapes: tuple[Shape, ...]  # of what it becomes, in the order of `row.targets`


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one file gives: its pieces by our path, what is dropped and why, and what was wrong."""

    source: Source
    table: Table
    pieces: tuple[Piece, ...]
    dropped: Mapping[str, str]
    faults: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape by our path, layers stacked."""
        found: dict[str, Shape] = {}
        for piece in self.pieces:
            for path, shape in zip(piece.row.targets, piece.shapes, strict=True):
                stack = found.get(path, (0,))[0] + 1
                found[path] = shape if piece.layer is None else (stack, *shape)
        return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model's parameters and where each comes from."""

    readings: tuple[Reading, ...]
    wanted: Mapping[str, Shape]
    fresh: Mapping[str, str]  # our path -> why it keeps its initial value
    resized: Mapping[str, tuple[Shape, Shape]]  # our path -> shape in the file, wanted shape
    copied: Mapping[str, str]  # our path -> why it is a copy
    unused: Mapping[str, str]  # our path -> why what the files have for it is not wanted

    def fill(
        self,
        drawn: Mapping[str, np.ndarray],
        resize: Callable[[str, np.ndarray, Shape, np.ndarray], np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Reads every tensor that is wanted, one after the other, into float32 arrays by our path.

        Args:
            drawn: initial values of the paths in `resized`.
            resize: (path, array in the file's shape, wanted shape, drawn array) -> array of the wanted shape.

        Raises:
            UserError: a file is damaged, or two tensors that must be equal are not.
        """
        filled: dict[str, np.ndarray] = {}
        for reading in self.readings:
            shapes = reading.shapes
            for piece in reading.pieces:
                if not any(path in self.wanted for path in piece.row.targets):
                    continue
                parts = piece.row.op.forward(_read(reading, piece))
                for path, part in zip(piece.row.targets, parts, strict=True):
                    if path not in self.wanted:
                        continue
                    if piece.layer is None and part.dtype == np.float32 and part.flags.c_contiguous:
                        filled[path] = part
                    else:
                        if path not in filled:
                            filled[path] = _aligned(shapes[path])
                        _copy(part, filled[path] if piece.layer is None else filled[path][piece.layer])
                    _finite(
                        reading, piece, filled[path] if piece.layer is None else filled[path][piece.layer]
                    )
        for path, (_, wanted) in self.resized.items():
            filled[path] = resize(path, filled[path], wanted, drawn[path])
        return filled


def _finite(reading: Reading, piece: Piece, array: np.ndarray) -> None:
    """Refuses what is no number: the sum of an array that holds one is none either."""
    if not np.isfinite(np.sum(array, dtype=np.float64)):
        raise UserError(
            f"{reading.source.path}: {piece.names[0]} holds values that are infinite or no numbers in float32. The file "
            "is damaged, or the training that wrote it had diverged. Take another one."
        )


def _aligned(shape: Shape) -> np.ndarray:
    """An empty float32 array that begins where JAX wants it (64 bytes), which then uses it without a copy."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)


def _copy(part: np.ndarray, target: np.ndarray) -> None:
    """Copies by stripes where the axes are turned round: numpy walks down whole columns, 4 times as slow."""
    if part.flags.c_contiguous:
        target[...] = part
        return
    for start in range(0, target.shape[-1], STRIPE):
        target[..., start : start + STRIPE] = part[..., start : start + STRIPE]


def _read(reading: Reading, piece: Piece) -> np.ndarray:
    first, *others = piece.names
    tensor = reading.source.read(first)
    for name in others:
        if not np.array_equal(tensor, reading.source.read(name)):
            raise UserError(
                f"{reading.source.path}: {first} and {name} are two names of one tensor, but they differ. Which one "
                "the model uses cannot be known. Save the file again without one of the two."
            )
    return tensor


def recognise(source: Source, tables: Sequence[Table]) -> Table:
    """The table whose marks are all among the names of a file.

    Raises:
        UserError: none is; names the layouts and what the file has instead.
    """
    fitting = []
    for table in tables:
        names = _names(source, table)
        shapes = {name: source.tensors[original].shape for name, original in names.items()}
        if table.fits(shapes) and all(
            any(_pattern(mark).fullmatch(name) for name in names) for mark in table.marks
        ):
            fitting.append((sum(_belongs(table, name) for name in names), table))
    if fitting:
        table = max(fitting, key=lambda entry: entry[0])[1]
        _check_fit(source, table)
        return table
    shown = ", ".join(list(source.tensors)[:4]) or "no tensor at all"
    possible = "\n".join(f"  {table.name}: {' and '.join(table.marks)}" for table in tables)
    raise UserError(
        f"{source.path} ({source.container}, {len(source.tensors)} tensors: {shown}, ...) has none of the layouts "
        f"that are known, each told by its names:\n{possible}\nGive a file of one of them."
    )


def _check_fit(source: Source, table: Table) -> None:
    shapes = {name: source.tensors[original].shape for name, original in _names(source, table).items()}
    if why := table.unfit(shapes):
        raise UserError(f"{source.path} (read as: {table.name}): {why}")


def match(source: Source, table: Table) -> Reading:
    """Matches every name of a file with a row or a drop of its table; nothing is read."""
    names, dropped, faults = _names(source, table), {}, []
    found: dict[tuple[int, int | None], dict[int, str]] = {}
    for name, original in names.items():
        places = list(_places(table, name))
        reason = _reason(table.drop, name)
        if len(places) + (reason is not None) > 1:
            faults.append(
                f"doubled     {original}: {len(places)} rows of the table and {reason or 'no drop'}"
            )
        elif places:
            row, layer, other = places[0]
            found.setdefault((row, layer), {})[other] = original
        elif reason is not None:
            dropped[original] = reason
        else:
            shape = list(source.tensors[original].shape)
            faults.append(f"unexpected  {original} {shape}: {table.name} has no such tensor")
    pieces = []
    for (row, layer), candidates in sorted(found.items(), key=lambda entry: (entry[0][0], entry[0][1] or 0)):
        ordered = tuple(candidates[index] for index in sorted(candidates))
        piece = _piece(source, table.rows[row], layer, ordered, faults)
        pieces += [piece] if piece else []
    taken = {path for piece in pieces for path in piece.row.targets}
    for copy in table.copies:
        if (
            copy.when in names
            and not taken & set(copy.row.targets)
            and (original := _original(names, copy.row))
        ):
            piece = _piece(source, copy.row, None, (original,), faults)
            pieces += [piece] if piece else []
    faults += _uneven(source, pieces)
    return Reading(source, table, tuple(pieces), dropped, tuple(faults))


def check(
    readings: Sequence[Reading], wanted: Mapping[str, Shape], heads: str, resizable: Mapping[str, str]
) -> Plan:
    """Compares what the files give with what a model has.

    Args:
        readings: of each file.
        wanted: shape by our path.
        heads: regular expression that finds the name of a head in a path; a head may be fresh, or unused, as a whole.
        resizable: paths that may have another shape in a file.

    Raises:
        UserError: one sorted report of all that is missing, unexpected, doubled, or of another shape or type.
    """
    faults = [f"{line} ({one.source.path})" for one in readings for line in one.faults]
    given: dict[str, Shape] = {}
    for reading in readings:
        for path, shape in reading.shapes.items():
            if path in given:
                names = " and ".join(str(one.source.path) for one in readings if path in one.shapes)
                faults.append(f"doubled     {path}: in {names}")
            given[path] = shape
    resized = {}
    for path in given.keys() & wanted.keys():
        old, new = given[path], wanted[path]
        if old == new:
            continue
        if path in resizable and _fixed(resizable[path], old) == _fixed(resizable[path], new):
            resized[path] = old, new
        else:
            faults.append(f"mis-shaped  {path}: {list(old)} in the file, {list(new)} here")
    fresh, missing = _not_given(readings, given, wanted, heads)
    unused, unexpected = _not_wanted(given, wanted, heads)
    if faults := faults + missing + unexpected:
        _refuse(readings, faults)
    copies = {
        path: copy.because
        for one in readings
        for copy in one.table.copies
        for path in copy.row.targets
        if path in wanted and any(piece.row is copy.row for piece in one.pieces)
    }
    return Plan(tuple(readings), wanted, dict(sorted(fresh.items())), resized, copies, unused)


def _fixed(way: str, shape: Shape) -> Shape:
    """The axes that a way of resizing leaves as they are."""
    return shape[:-1] if way == "answers" else shape[2:] if way == "grid" else shape[1:]


def _not_given(
    readings: Sequence[Reading], given: Mapping[str, Shape], wanted: Mapping[str, Shape], heads: str
) -> tuple[dict[str, str], list[str]]:
    """Of what no file holds: (what may keep its initial value -> why, faults)."""
    fresh, faults = {}, []
    begun = {_group(heads, path) for path in given} - {""}  # heads of which something is there
    for path in wanted.keys() - given.keys():
        group = _group(heads, path)
        # One table may only say of another's parts that they are not its own.
        reasons = [_reason(one.table.fresh, path) for one in readings]
        reason = reasons[0] if all(reasons) else "no file has this head" if group else None
        if reason and group not in begun:
            fresh[path] = reason
        else:
            faults.append(f"missing     {path} {list(wanted[path])}: {_where(readings, path)}")
    return fresh, faults


def _not_wanted(
    given: Mapping[str, Shape], wanted: Mapping[str, Shape], heads: str
) -> tuple[dict[str, str], list[str]]:
    """Of what the files hold beyond the model: (what is left unread -> why, faults)."""
    unused, faults = {}, []
    there = {_group(heads, path) for path in wanted}
    for path in given.keys() - wanted.keys():
        group = _group(heads, path)
        if group and group not in there:
            unused[path] = f"the config has no head {group}"
        else:
            faults.append(f"unexpected  {path} {list(given[path])}: this model has no such parameter")
    return unused, faults


def unwrapped(source: Source) -> dict[str, str]:
    """Name without the prefix that a wrapper has put before all of them -> name in the file."""
    names = source.tensors
    wrapper = next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), "")
    return {name.removeprefix(wrapper): name for name in names}


def _names(source: Source, table: Table) -> dict[str, str]:
    """Name as the table's rows have it -> name in the file."""
    result = {}
    for name, original in unwrapped(source).items():
        for pattern, replacement in table.spellings:
            name = re.sub(pattern, replacement, name)
        if table.prefix and not _belongs(table, name) and _belongs(table, table.prefix + name):
            name = table.prefix + name
        result[name if name not in result else original] = original
    return result


def _belongs(table: Table, name: str) -> bool:
    return _reason(table.drop, name) is not None or next(_places(table, name), None) is not None


def _places(table: Table, name: str) -> Any:
    """Yields (row number, layer, which of the row's names) for each row that has this name."""
    for number, row in enumerate(table.rows):
        for other, template in enumerate(row.sources):
            if match := _pattern(template).fullmatch(name):
                layer = int(match[1]) - row.first if match.groups() else None
                if layer is None or layer >= 0:
                    yield number, layer, other


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(re.escape(LAYER), r"(0|[1-9]\d{0,3})"))


def _reason(table: Mapping[str, str], name: str) -> str | None:
    return next((why for pattern, why in table.items() if re.fullmatch(pattern, name)), None)


def _group(heads: str, path: str) -> str:
    found = re.match(heads, path)
    return found[1] if found else ""


def _original(names: Mapping[str, str], row: Row) -> str | None:
    return next((names[name] for name in row.sources if name in names), None)


def _piece(
    source: Source, row: Row, layer: int | None, names: tuple[str, ...], faults: list[str]
) -> Piece | None:
    shape, dtype = source.tensors[names[0]].shape, source.tensors[names[0]].dtype
    if dtype.kind in "biuc":  # bfloat16 and the like are none of these
        faults.append(
            f"mis-typed   {names[0]} {dtype}: weights are floating-point numbers; quantized ones are not read"
        )
        return None
    try:
        return Piece(row, layer, names, row.op.shapes(shape))
    except ValueError as error:
        faults.append(f"mis-shaped  {names[0]} {list(shape)}: {error}; wanted {row.op.axes}")
        return None


def _uneven(source: Source, pieces: Sequence[Piece]) -> list[str]:
    """What is wrong with stacks: layers that are missing, or unlike the first."""
    faults = []
    rows, depths = {}, {}
    for piece in pieces:
        if piece.layer is not None:
            rows[id(piece.row)] = piece.row
            depths[piece.row.stack] = max(depths.get(piece.row.stack, 0), piece.layer + 1)
    for key, row in rows.items():
        layers = {piece.layer: piece for piece in pieces if id(piece.row) == key}
        for layer in sorted(set(range(depths[row.stack])) - layers.keys())[:3]:
            faults.append(f"missing     {row.name(layer)}: other layers have it")
        first = min(layers)
        for piece in layers.values():
            if piece.shapes != layers[first].shapes:
                here, there = (
                    source.tensors[piece.names[0]].shape,
                    source.tensors[layers[first].names[0]].shape,
                )
                faults.append(
                    f"mis-shaped  {piece.names[0]} {list(here)}: layer {row.first + first} has {list(there)}"
                )
    return faults


def _where(readings: Sequence[Reading], path: str) -> str:
    """The name that each file would have for one of our paths, and why it may have been left out."""
    found = []
    for one in readings:
        for row in one.table.rows:
            if path in row.targets:
                skipped = [
                    f"{name}: {why}"
                    for name, why in one.source.skipped.items()
                    if _pattern(row.sources[0]).fullmatch(name)
                ]
                found.append(
                    f"no {row.sources[0]} in {one.source.path}" + "".join(f" ({s})" for s in skipped[:1])
                )
    return "; ".join(found) or "no layout of the given files holds it"


def _refuse(readings: Sequence[Reading], faults: list[str]) -> None:
    files = ", ".join(f"{one.source.path} (read as: {one.table.name})" for one in readings)
    more = f"\n... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise UserError(
        f"{files} does not fit in {len(faults)} places:\n" + "\n".join(sorted(faults)[:SHOWN]) + more
        + "\nGive a file that is whole, or a config of the right sizes with --config."
    )  # fmt: skip
