# SPDX-License-Identifier: Apache-2.0
"""Reads a compiled program's text (HLO) into computations and instructions, and finds how often loops run."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

# Bytes of an element; 4-bit types are rounded up, what is not listed (token, opaque) has none.
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) ", re.MULTILINE)
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", re.MULTILINE)
_KNOWN_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Shape:
    """Type and logical size of one array; the padding of its tiles is not counted."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return self.size * (1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shapes` is the result, a tuple flattened."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str  # the text between the brackets
    attributes: str  # the text behind them
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions it reads."""
        return tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run, None where it gives none."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found and int(found[1]) >= 0 else None

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the model it comes from: "jit(step)/jvp(...)/fusion/stack/..."; "" if not said."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    def called(self, *attributes: str) -> tuple[str, ...]:
        """Names of the computations that `calls=`, `body=` and the like give."""
        names = []
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            names += _NAME.findall(found[1]) if found else []
        return tuple(names)


Computation = Mapping[str, Instruction]  # by name, in the order of the text


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: Mapping[str, Computation]
    entry: str
    sources: Mapping[int, str]  # stack frame -> file and function of this package that made the operation

    def source(self, instruction: Instruction) -> str:
        """ "training/optimizer.py update", or "" where the text does not say."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.sources.get(int(frame[1]), "") if frame else ""

    def trips(self, where: str, loop: Instruction) -> int | None:
        """How often the `while` instruction `loop` of computation `where` runs its body; None = cannot be told.

        From `known_trip_count` if the text has it; else the counter's start, step and bound are followed through
        the tuple that the loop carries.
        """
        known = _KNOWN_TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        compare, resolve = self._root(condition)
        if compare.opcode != "compare" or len(compare.operands) != 2:
            return None
        left, right = map(resolve, compare.operands)
        direction = re.search(r"direction=(\w+)", compare.attributes)[1]
        if left is None or right is None:
            return None
        if left[0] is None or not self._step(body, left[0]):  # the bound is on the left: turn it round
            left, right = right, left
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        start, step = self._start(where, loop, left[0]), self._step(body, left[0])
        bound = right if right[0] is None else self._invariant(where, loop, body, right)
        if start is None or bound is None or not step:
            return None
        return _count(start + left[1], bound[1], step, direction)

    def _invariant(
        self, where: str, loop: Instruction, body: str, form: tuple[int | None, int]
    ) -> tuple[None, int] | None:
        """The value of a carried element that the body hands on unchanged."""
        start = self._start(where, loop, form[0])
        return None if start is None or self._step(body, form[0]) != 0 else (None, start + form[1])

    def _start(self, where: str, loop: Instruction, index: int | None) -> int | None:
        source = self.computations[where].get(loop.operands[0])
        if index is None or source is None or source.opcode != "tuple" or index >= len(source.operands):
            return None
        form = self._linear(where, source.operands[index], None)
        return form[1] if form and form[0] is None else None

    def _step(self, body: str, index: int | None) -> int | None:
        root = next(i for i in self.computations[body].values() if i.root)
        if index is None or root.opcode != "tuple" or index >= len(root.operands):
            return None
        form = self._linear(body, root.operands[index], None)
        return form[1] if form and form[0] == index else None

    def _root(self, where: str, resolve: Callable | None = None) -> tuple[Instruction, Callable]:
        """The instruction that gives a computation's result, looked for inside fusions; and how its operands resolve."""
        root = next(i for i in self.computations[where].values() if i.root)

        def here(name: str) -> tuple[int | None, int] | None:
            return self._linear(where, name, resolve)

        if root.opcode == "fusion":
            outer = [here(name) for name in root.operands]
            return self._root(root.called("calls")[0], lambda number: outer[number])
        return root, here

    def _linear(self, where: str, name: str, parameter: Callable | None) -> tuple[int | None, int] | None:
        """A scalar integer as (element of the carried tuple or None, added constant); None = not of this form."""
        here = self.computations[where]
        found = here.get(name)
        if found is None:
            return None
        if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.arguments):
            return None, int(found.arguments)
        if found.opcode == "parameter" and parameter is not None:
            return parameter(int(found.arguments))
        if found.opcode in ("copy", "bitcast", "convert", "reshape"):
            return self._linear(where, found.operands[0], parameter)
        if found.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", found.attributes)[1])
            source = here.get(found.operands[0])
            if source is not None and source.opcode == "parameter" and parameter is None:
                return index, 0
            if source is not None and source.opcode == "tuple":
                return self._linear(where, source.operands[index], parameter)
        if found.opcode in ("add", "subtract"):
            forms = [self._linear(where, operand, parameter) for operand in found.operands]
            return _sum(*forms, sign=1 if found.opcode == "add" else -1)
        if found.opcode == "fusion":
            forms = [self._linear(where, operand, parameter) for operand in found.operands]
            (inside,) = found.called("calls")
            root = next(i for i in self.computations[inside].values() if i.root)
            return self._linear(inside, root.name, lambda number: forms[number])
        return None


def _sum(left: tuple | None, right: tuple | None, sign: int) -> tuple[int | None, int] | None:
    if left is None or right is None or (right[0] is not None and (left[0] is not None or sign < 0)):
        return None
    return (left[0] if right[0] is None else right[0]), left[1] + sign * right[1]


def _count(start: int, bound: int, step: int, direction: str) -> int | None:
    if direction in ("LE", "GE"):  # i <= n is i < n + 1
        bound += 1 if direction == "LE" else -1
    if direction == "NE":
        direction = "LT" if step > 0 else "GT"
    if direction == "EQ":
        return None
    rises = direction in ("LT", "LE")
    if (start >= bound) if rises else (start <= bound):
        return 0
    return math.ceil((bound - start) / step) if rises == (step > 0) else None


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`.

    Raises:
        ValueError: no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in _lines(text):
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):  # behind it may stand the name of another core
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no compiled program")
    return Module(computations, entry, _sources(text))


def _sources(text: str) -> dict[int, str]:
    """Innermost file and function of this package for each stack frame of the tables at the head of the text."""
    head = text[: max(text.find("\n%"), text.find("\nENTRY"), 0)]
    names = {
        title: dict(re.findall(r'^(\d+) "(.*)"$', part, re.MULTILINE))
        for title, part in re.findall(r"^(FileNames|FunctionNames)\n((?:.+\n)*)", head, re.MULTILINE)
    }
    places = {
        number: (names["FileNames"].get(file, ""), names["FunctionNames"].get(function, ""))
        for number, file, function in _LOCATION.findall(head)
    }
    found: dict[int, str] = {}
    for number, location, parent in _FRAME.findall(head):
        file, function = places.get(location, ("", ""))
        if "/vlp_jax/" in file:
            named = [part for part in function.split(".") if not part.startswith("<")]
            found[int(number)] = f"{file.rpartition('/vlp_jax/')[2]} {named[-1] if named else ''}".rstrip()
        elif parent and int(parent) - 1 in found:  # a parent's number is written one too high; 1 is none
            found[int(number)] = found[int(parent) - 1]
    return found


def total_cycles(text: str) -> int:
    """The sum of all estimates in the text, each once: what a walk must reach when nothing is lost."""
    return sum(max(0, int(cycles)) for cycles in _CYCLES.findall(text))


def _lines(text: str) -> Iterator[str]:
    """Physical lines, joined where a quoted string (a kernel's payload) goes on in the next one."""
    held = ""
    for line in text.splitlines():
        held = f"{held}\n{line}" if held else line
        if '"' not in held or re.sub(r"\\.", "", held).count('"') % 2 == 0:
            yield held.rstrip()
            held = ""
    if held:
        yield held


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, stop)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    shapes = tuple(
        Shape(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(line[start:stop])
    )
    arguments, attributes = line[opcode.end() : close - 1], line[close:]
    return Instruction(head[2], opcode[1], shapes, arguments, attributes, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for place in re.finditer(r"[()]", line[start:]):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return start + place.end()
    raise ValueError(f"a bracket does not close: {line[:120]}")
