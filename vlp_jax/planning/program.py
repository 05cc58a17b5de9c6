# SPDX-License-Identifier: Apache-2.0
"""What a compiled TPU program does in one step: estimated cycles with loop trips, collectives, what has no estimate.

found = program.read(compiled.as_text())
found.cycles / 1.5e9, program.by_path(found, depth=6)
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from vlp_jax.planning import hlo

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
COLLECTIVES += ("collective-broadcast", "ragged-all-to-all")
# No work, or none of their own.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "domain",
}
_FREE |= {"replica-id", "while", "call", "conditional", "opt-barrier", "add-dependency", "async-start"}
_FREE |= {"async-update", "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
_FREE |= {"PrepareAsyncCallStart", "PrepareAsyncCallDone"}
# Inside a fusion without estimate these say what it is.
_TELLING = ("scatter", "gather", "rng-bit-generator", "sort", "custom-call", "convolution", "reduce", "copy")
# Components of an op_name that are no module.
_PLUMBING = {
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "remat",
    "pjit",
    "jvp",
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that runs `runs` times a step; `cycles` (of one run) is None where the compiler gives none."""

    name: str
    kind: str
    op_name: str
    source: str  # file and function of this package, "" where the text does not say
    cycles: int | None
    runs: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between chips. `bytes` of one run and chip: the larger of what goes in and what comes out."""

    kind: str
    shapes: tuple[hlo.Shape, ...]  # of the larger side
    group: int  # chips that take part together; 0 = not said
    op_name: str
    runs: int

    @property
    def bytes(self) -> int:
        """Bytes of one run."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def dtypes(self) -> str:
        """Element types, "bf16" or "f32+s32"."""
        return "+".join(sorted({shape.dtype for shape in self.shapes}))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop; `trips` is None where they cannot be told (then 1 is counted)."""

    name: str
    op_name: str
    source: str
    trips: int | None
    cycles: int  # of one trip


@dataclasses.dataclass(frozen=True)
class Program:
    """A step of one chip."""

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    missed_cycles: int  # estimates in the text that the walk did not reach; not 0 is an error of the walk

    @property
    def cycles(self) -> int:
        """The sum of all estimates, times trips; a lower bound where a loop's trips are unknown."""
        return sum(op.cycles * op.runs for op in self.operations if op.cycles is not None)


def read(text: str) -> Program:
    """Walks a program's text from its entry, through loops, calls and branches (the dearest branch counts)."""
    module = hlo.parse(text)
    walk = _Walk(module)
    operations = walk.computation(module.entry, 1)
    # A collective that runs behind products stands, whole, in several fusions: its start counts. The channel alone
    # is no key: the compiler's combiner gives one number to several collectives.
    started = {_pieces(channel, c) for channel, is_start, c in walk.collectives if is_start}
    found = [c for channel, start, c in walk.collectives if start or _pieces(channel, c) not in started]
    reached = sum(i.cycles for i in walk.reached.values() if i.cycles is not None)
    missed = hlo.total_cycles(text) - reached
    return Program(tuple(operations), tuple(found), tuple(walk.loops), missed)


class _Walk:
    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        self.collectives: list[tuple[str, bool, Collective]] = []  # channel, is a start, what
        self.loops: list[Loop] = []
        self.reached: dict[tuple[str, str], hlo.Instruction] = {}

    def computation(self, where: str, runs: int) -> list[Operation]:
        """All operations of one computation and of what it calls."""
        found = []
        for instruction in self.module.computations[where].values():
            self.reached[where, instruction.name] = instruction
            found += self._instruction(where, instruction, runs)
            if instruction.opcode != "call":  # what a reduction does to two numbers is part of the reduction
                self._note(instruction.called("to_apply"))
        return found

    def _note(self, names: tuple[str, ...]) -> None:
        for where in names:
            self.reached |= {(where, i.name): i for i in self.module.computations[where].values()}

    def _instruction(self, where: str, instruction: hlo.Instruction, runs: int) -> list[Operation]:
        opcode = instruction.opcode
        if opcode == "while":
            return self._loop(where, instruction, runs)
        if opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [self.computation(name, runs) for name in instruction.called(*names)]
            return max(branches, key=_cycles, default=[])
        if opcode == "call" or (opcode.endswith("-start") and not _collective(opcode)):
            called = instruction.called("to_apply", "calls", "called_computations")
            inside = [operation for name in called for operation in self.computation(name, runs)]
            if called:
                return _aside(inside) if "async_execution_thread=" in instruction.attributes else inside
        kind = opcode
        if opcode == "fusion":
            kind = self._inside(instruction, runs)
        elif opcode == "custom-call":
            kind = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
        elif _collective(opcode):
            self._exchange(where, instruction, runs)
            kind = _collective(opcode)
        idle = (
            kind in _FREE or opcode.endswith("-done") or all(shape.size <= 1 for shape in instruction.shapes)
        )
        if idle and instruction.cycles is None:
            return []
        source = self.module.source(instruction)
        return [Operation(instruction.name, kind, instruction.op_name, source, instruction.cycles, runs)]

    def _loop(self, where: str, instruction: hlo.Instruction, runs: int) -> list[Operation]:
        trips = self.module.trips(where, instruction)
        times = 1 if trips is None else trips
        inside = [
            operation
            for name in instruction.called("condition", "body")
            for operation in self.computation(name, runs * times)
        ]
        cycles = _cycles(inside) // max(runs * times, 1)
        source = self.module.source(instruction)
        self.loops.append(Loop(instruction.name, instruction.op_name, source, trips, cycles))
        return inside

    def _inside(self, fusion: hlo.Instruction, runs: int) -> str:
        """Notes the collectives in a fusion; returns what kind of fusion it is."""
        names, opcodes, exchanges = list(fusion.called("calls")), set(), 0
        for where in names:  # grows: fusions lie in fusions
            for instruction in self.module.computations[where].values():
                opcodes.add(instruction.opcode)
                if instruction.opcode == "fusion":
                    names += instruction.called("calls")
                if _collective(instruction.opcode):
                    self._exchange(where, instruction, runs, fusion)
                    exchanges += 1
        if exchanges and fusion.cycles is None:
            return "async-done" if fusion.name.startswith("async-collective-done") else "collective fusion"
        telling = next((opcode for opcode in _TELLING if opcode in opcodes), None)
        return f"{telling} fusion" if telling and fusion.cycles is None else "fusion"

    def _exchange(
        self, where: str, instruction: hlo.Instruction, runs: int, fusion: hlo.Instruction | None = None
    ) -> None:
        here = self.module.computations[where]
        kind = _collective(instruction.opcode)
        inputs = [shape for name in instruction.operands if name in here for shape in here[name].shapes]
        outputs = list(instruction.shapes)
        if instruction.opcode.endswith(
            "-start"
        ):  # its result lists the inputs, the outputs and what the chip notes
            outputs = [shape for shape in outputs if shape.dims or shape.dtype != "u32"]
            outputs = outputs[len(inputs) :] or outputs
        if fusion is not None and where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU's form: all-reduce and slice in one fusion
        larger = max(inputs, outputs, key=lambda shapes: sum(shape.bytes for shape in shapes))
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        is_start = any('"AsyncCollectiveStart"' in i.attributes for i in here.values())
        op_name = instruction.op_name or (fusion.op_name if fusion else "")
        found = Collective(kind, tuple(larger), _group(instruction.attributes), op_name, runs)
        self.collectives.append((channel[1] if channel else "", is_start, found))


def by_path(found: Program, depth: int = 0) -> dict[tuple[str, str], int]:
    """Cycles a step by (direction, place), most first; `depth` cuts module paths to so many components, 0 = none."""
    table: collections.Counter = collections.Counter()
    for operation in found.operations:
        if operation.cycles is not None:
            table[place(operation, depth)] += operation.cycles * operation.runs
    return dict(table.most_common())


def place(of: Operation | Loop, depth: int = 0) -> tuple[str, str]:
    """Direction and module path of an operation; outside the modules, the file and function that it comes from."""
    direction, path = module_path(of.op_name)
    return direction, "/".join(path.split("/")[:depth] if depth else [path]) or of.source or "(no name)"


def module_path(op_name: str) -> tuple[str, str]:
    """Splits "jit(step)/transpose(jvp(A.b))/c/while/body/d/dot_general" into ("backward", "c/d").

    The direction is forward, backward or "" (optimizer, preparation). Names of plumbing, of functions that JAX
    compiles apart and of a model's methods ("A.b") are left out, and the last component, the primitive.
    """
    direction = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    parts: list[str] = []
    for part in op_name.split("/")[:-1]:
        name = re.sub(r"^(?:[a-z_]+\()+", "", part).rstrip(")")
        if (
            name
            and "jit(" not in part
            and "->" not in name
            and name not in _PLUMBING
            and name not in parts[-1:]
        ):
            parts.append(name)
    modules = [part for part in parts if not re.fullmatch(r"[A-Z]\w*\.\w+", part)]
    return direction, "/".join(modules or parts)


def unestimated(found: Program) -> dict[str, int]:
    """Runs a step of each kind of operation to which the compiler gives no cycles, most first."""
    table: collections.Counter = collections.Counter()
    for operation in found.operations:
        if operation.cycles is None and operation.kind != "async-done":
            table[operation.kind] += operation.runs
    return dict(table.most_common())


def _aside(operations: list[Operation]) -> list[Operation]:
    """Work of another core (SparseCore) of the chip: its cycles are no part of this core's time."""
    return [dataclasses.replace(o, kind=f"{o.kind} on another core", cycles=None) for o in operations]


def _cycles(operations: list[Operation]) -> int:
    return sum(op.cycles * op.runs for op in operations if op.cycles is not None)


def _pieces(channel: str, collective: Collective) -> tuple:
    return channel, collective.kind, collective.shapes


def _collective(opcode: str) -> str:
    """The kind without "-start", or "" for all else (also for "-done", which would count twice)."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _group(attributes: str) -> int:
    """How many chips exchange together: from mesh['x'=8,'y'=2] {'x'}, [2,8]<=[16] or {{0,1},{2,3}}."""
    found = re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes)
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]) if axis in sizes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(found[1].split(",")) if found else 0
