# SPDX-License-Identifier: Apache-2.0
"""A stack machine over pickle opcodes that rebuilds plain containers, numbers, text and descriptions of tensors.

Nothing is imported or called: every class and function of the file is a `Placeholder`, and the few in `CALLS` have
a fixed meaning here. Time and memory are bounded by the file's true size and by `OPERATIONS`.
Opcodes: the documentation of `pickletools`. Tensors: `torch/_utils.py` and `torch/_tensor.py` (PyTorch 2).
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import warnings
from collections.abc import Callable
from pickletools import opcodes
from typing import Any, BinaryIO

import numpy as np

from vlp_jax.convert.sources.disk import DTYPES, short

# A checkpoint of 1,000 tensors with its optimizer takes 50,000. An empty set, the largest object that one byte makes,
# has 216 bytes, so 3 million hold a hostile file below 0.7 GB and five seconds.
OPERATIONS = 3_000_000
RANK = 64  # torch's own limit
LARGEST = 1 << 60  # size, stride or offset; as keys, larger numbers can be made to have one hash


class Damaged(Exception):
    """The bytes are no pickle, or one that asks for what no file of weights needs; the text is a clause."""


class Placeholder:
    """A class, a function or an object of the file. It keeps its name, ignores what is done to it, does nothing."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __str__(self) -> str:
        return short(f"{self.module[:60]}.{self.name[:60]}").strip("'\"")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes of the container that tensors look at: which (`key`), from where in them, how many, of what type."""

    key: str
    dtype: np.dtype
    begin: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class View:
    """A strided tensor; offset and strides count elements of `dtype`, and all of it lies within its storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many elements of the storage lie between the first and the last of the tensor, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without a gap."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return True


class Window:
    """Bytes [begin, end) of a file as a stream; no read asks the file for more, whatever a length claims."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self._file, self.position, self.end = file, begin, end
        file.seek(begin)

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        content = self._file.read(min(count, self.end - self.position))
        self.position += len(content)
        return content

    def readline(self) -> bytes:
        """Up to the next newline."""
        content = self._file.readline(self.end - self.position)
        self.position += len(content)
        return content


def load(stream: Window | bytes, persistent: Callable[[Any], Storage | Placeholder]) -> Any:
    """Reads one pickle of protocol 0 to 5; the window then stands behind it.

    Dicts (also ordered ones, whose attributes are dropped), lists, tuples, sets, text, bytes, numbers, bools and None
    come back as they are, a torch.Size as a tuple, a torch.dtype as numpy's, a tensor or parameter as a `View`, all
    else as a `Placeholder`. A key that is neither text, bytes, number nor None is replaced by a `Placeholder` as well:
    hashing a nested tuple of the file's making can take forever.

    Args:
        stream: where the pickle begins.
        persistent: what stands for a persistent id, which may be any object; raises `Damaged` for a wrong one.

    Raises:
        Damaged: it is truncated, damaged, too long, or describes a tensor that leaves its storage.
    """
    window = stream if isinstance(stream, Window) else Window(io.BytesIO(stream), 0, len(stream))
    machine = _Machine(window, persistent)
    try:
        return machine.run()
    except (
        LookupError,
        ValueError,
        OverflowError,
    ) as error:  # an empty stack, no such memo, what does not parse
        raise Damaged(f"its pickle is broken before byte {window.position} ({short(str(error))})") from error


class _Machine:
    """The stack, the marks in it, and the memo. Handlers are methods named as `pickletools` names the opcodes."""

    def __init__(self, window: Window, persistent: Callable[[Any], Any]) -> None:
        self.window, self.persistent = window, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.left = OPERATIONS

    def run(self) -> Any:
        while (code := self.window.read(1)) != b".":
            opcode = OPCODES.get(code)
            if opcode is None:
                raise Damaged(f"its pickle has {f'the operation {short(code)}' if code else 'no end'}")
            self.spend(1)
            read, handle = opcode
            handle(self) if read is None else handle(self, read(self.window))
        return self.stack.pop()

    def spend(self, count: int) -> None:
        """Charges operations; copies are charged by their items, else a small file could ask for endless ones."""
        self.left -= count
        if self.left < 0:
            raise Damaged(f"its pickle takes more than {OPERATIONS} operations")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        """Takes the last `count` values."""
        if len(self.stack) < count:
            raise Damaged("its pickle takes from an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def marked(self) -> list[Any]:
        """Takes what lies above the last mark."""
        if not self.marks:
            raise Damaged("its pickle takes a mark that was not set")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def call(self, function: Any, arguments: Any) -> None:
        """Pushes what stands for `function(*arguments)`, which is not called."""
        if not isinstance(function, Placeholder):
            raise Damaged("its pickle calls what is neither a class nor a function")
        result = None
        rule = CALLS.get((function.module, function.name))
        if rule and isinstance(arguments, tuple) and len(arguments) <= 16:
            for argument in arguments:
                if isinstance(argument, str):
                    self.spend(len(argument) >> 6)
                elif isinstance(argument, list | tuple | dict | set):
                    self.spend(len(argument))
            result = rule(arguments)
        self.push(Placeholder(function.module, function.name) if result is None else result)

    def fill(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(pairs) % 2:
            raise Damaged("its pickle sets items of what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        elif not isinstance(target, Placeholder):
            raise Damaged("its pickle adds to what is no list or set")

    def marked_dict(self) -> None:
        pairs = self.marked()
        self.push({})
        self.fill(pairs)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        if not 0 <= index < LARGEST:
            raise Damaged("its pickle memorises at a negative or huge index")
        self.memo[index] = self.stack[-1]

    def found(self, names: tuple[str, str]) -> None:
        module, name = names
        known = DTYPES.get(name) if module == "torch" else None
        self.push(Placeholder(module, name) if known is None else known)

    def stack_global(self) -> None:
        module, name = self.take(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("its pickle names a class by what is no text")
        self.found((module, name))

    def obj(self) -> None:
        items = self.marked()
        self.call(items[0], tuple(items[1:]))

    def build(self) -> None:
        self.stack.pop()
        # A dictionary's attributes (the `_metadata` of a state dict) are no entries; a placeholder has no state.
        if not isinstance(self.stack[-1], Placeholder | dict):
            raise Damaged("its pickle gives a state to what has none")

    def proto(self, version: int) -> None:
        if version > 5:
            raise Damaged(f"its pickle is of protocol {version}; 0 to 5 are known")

    def frame(self, length: int) -> None:
        if length > self.window.end - self.window.position:
            raise Damaged("its pickle has a frame that is longer than the file")


def _key(key: Any) -> Any:
    """A key that is quick to hash and to compare; anything else is replaced."""
    if (
        key is None
        or isinstance(key, str | bytes | float | Placeholder)
        or (isinstance(key, int) and -LARGEST < key < LARGEST)
    ):
        return key
    if isinstance(key, list | dict | set):
        raise Damaged(f"its pickle has a {type(key).__name__} for a key")
    return Placeholder("builtins", type(key).__name__)


def _line(window: Window) -> str:
    content = window.readline()
    if not content.endswith(b"\n"):
        raise Damaged("its pickle ends too early")
    return content[:-1].decode("utf-8")


def _quoted(window: Window) -> str:
    """Text of Python 2 in protocol 0: in quotes, with backslashes."""
    text = _line(window)
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        raise Damaged("its pickle has text without quotes")
    with warnings.catch_warnings():  # an unknown escape is a DeprecationWarning
        warnings.simplefilter("ignore")
        return codecs.escape_decode(text[1:-1].encode())[0].decode("latin-1")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any] | None:
    if not arguments:
        return {}
    pairs = arguments[0] if isinstance(arguments[0], list) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        return None
    return {_key(key): value for key, value in pairs}


def _set(arguments: tuple[Any, ...]) -> set[Any] | None:
    return set(map(_key, arguments[0])) if arguments and isinstance(arguments[0], list) else None


def _bytes(arguments: tuple[Any, ...]) -> bytes | None:
    """Protocols below 3 write bytes as text with the codes of the bytes."""
    texts = [argument for argument in arguments if isinstance(argument, str)]
    if texts[1:] in (["latin1"], ["latin-1"]):
        return texts[0].encode("latin-1")
    return b"" if not arguments else arguments[0] if isinstance(arguments[0], bytes) else None


def _counts(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > RANK:
        raise Damaged(f"a tensor's {what} is not a short sequence of numbers")
    return tuple(count(value, what) for value in values)


def count(value: Any, what: str) -> int:
    """The value, once it is a whole number from 0 to `LARGEST`; raises `Damaged` if it is not."""
    if type(value) is not int or not 0 <= value < LARGEST:
        raise Damaged(f"a tensor's {what} is negative, huge or no whole number")
    return value


def _tensor(arguments: tuple[Any, ...], dtype: Any = None) -> View | Placeholder:
    """`_rebuild_tensor(storage, offset, size, stride, ...)`; `dtype` where the storage has no type of its own."""
    if len(arguments) < 4:
        raise Damaged("a tensor has less than storage, offset, size and stride")
    storage, offset, size, stride = arguments[:4]
    if isinstance(storage, Placeholder) or isinstance(dtype, Placeholder):
        return dtype if isinstance(dtype, Placeholder) else storage
    if not isinstance(storage, Storage):
        raise Damaged("a tensor has no storage")
    dtype = storage.dtype if dtype is None else dtype
    if dtype.type is np.void:  # bytes of a type that numpy has not
        return Placeholder("torch", "quantized tensor")
    view = View(storage, dtype, count(offset, "offset"), _counts(size, "size"), _counts(stride, "stride"))
    if len(view.shape) != len(view.strides):
        raise Damaged(f"a tensor has {len(view.shape)} sizes and {len(view.strides)} strides")
    if view.span and (view.offset + view.span) * dtype.itemsize > storage.nbytes:
        raise Damaged(f"a tensor leaves its storage {short(storage.key)} of {storage.nbytes} bytes")
    return view


def _tensor_v2(arguments: tuple[Any, ...]) -> View | Placeholder:
    """`(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
    if len(arguments) > 6 and arguments[6]:  # lazily conjugated or negated: other numbers than those on disk
        return Placeholder("torch", "conjugated or negated view")
    return _tensor(arguments)


def _tensor_v3(arguments: tuple[Any, ...]) -> View | Placeholder:
    """`(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])`, over an untyped storage."""
    if len(arguments) < 7 or not isinstance(arguments[6], np.dtype | Placeholder):
        raise Damaged("a tensor has no type")
    return _tensor(arguments, arguments[6])


def _parameter(arguments: tuple[Any, ...]) -> View | Placeholder | None:
    return arguments[0] if arguments and isinstance(arguments[0], View | Placeholder) else None


REBUILDS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
PLAIN = (("torch", "Tensor"), ("torch._tensor", "Tensor"), ("torch.nn.parameter", "Parameter"))


def _from_type(arguments: tuple[Any, ...]) -> View | Placeholder | None:
    """`(rebuild, class, its arguments, state)`: a tensor with attributes, or of a subclass, which is not read."""
    if len(arguments) != 4 or not all(isinstance(argument, Placeholder) for argument in arguments[:2]):
        return None
    function, kind, inner, _ = arguments
    rule = REBUILDS.get((function.module, function.name))
    if rule is None or not isinstance(inner, tuple) or (kind.module, kind.name) not in PLAIN:
        return Placeholder(kind.module, kind.name)
    return rule(inner)


# In the module "builtins", or as Python 2 calls it, which protocols below 3 do as well.
BUILTINS = {
    **dict.fromkeys(("set", "frozenset"), _set),
    **dict.fromkeys(("bytes", "bytearray"), _bytes),
    "complex": lambda given: complex(*given) if [*map(type, given)] == [float, float] else None,
}
CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    **REBUILDS,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch.tensor", "_rebuild_from_type"): _from_type,
    ("torch", "Size"): lambda given: (
        tuple(given[0]) if given and isinstance(given[0], tuple | list) else None
    ),
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _bytes,
    **{(module, name): rule for module in ("builtins", "__builtin__") for name, rule in BUILTINS.items()},
}
EXTENSION = Placeholder("copyreg", "extension")  # a class by a number that only the writer knew
# What pushes its argument, and the rest that takes one line; all others are the machine's methods of the same name.
PUSHED = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(PUSHED, _Machine.push),
    "BYTEARRAY8": lambda machine, content: machine.push(bytes(content)),
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "EMPTY_SET": lambda machine: machine.push(set()),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "LIST": lambda machine: machine.push(machine.marked()),
    "TUPLE": lambda machine: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine: machine.push(tuple(machine.take(3))),
    "DICT": _Machine.marked_dict,
    "APPEND": lambda machine: machine.extend(machine.take(1)),
    "SETITEM": lambda machine: machine.fill(machine.take(2)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine: machine.extend(machine.marked())),
    "SETITEMS": lambda machine: machine.fill(machine.marked()),
    "FROZENSET": lambda machine: machine.push(frozenset(map(_key, machine.marked()))),
    "DUP": lambda machine: machine.push(machine.stack[-1]),
    "POP": lambda machine: machine.stack.pop() if machine.stack else machine.marked(),
    "POP_MARK": _Machine.marked,
    "MEMOIZE": lambda machine: machine.put(len(machine.memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])
    ),
    "GLOBAL": _Machine.found,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine: machine.call(*machine.take(2))),
    "NEWOBJ_EX": lambda machine: machine.call(*machine.take(3)[:2]),
    "INST": lambda machine, names: machine.call(Placeholder(*names), tuple(machine.marked())),
    "PERSID": lambda machine, name: machine.push(machine.persistent(name)),
    "BINPERSID": lambda machine: machine.push(machine.persistent(machine.stack.pop())),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda machine, _: machine.push(EXTENSION)),
}
# The standard readers of these undo escapes that Python 3 does not write, and refuse names beyond ASCII.
READERS = {
    **dict.fromkeys(("GLOBAL", "INST"), lambda window: (_line(window), _line(window))),
    **{"STRING": _quoted, "PERSID": _line},
}
# First byte -> what reads the argument, if there is one, and what is done. Buffers outside the file are unknown.
OPCODES = {
    opcode.code.encode("latin-1"): (
        READERS.get(opcode.name, opcode.arg.reader if opcode.arg else None),
        HANDLERS.get(opcode.name) or getattr(_Machine, opcode.name.lower()),
    )
    for opcode in opcodes
    if opcode.name not in ("STOP", "NEXT_BUFFER", "READONLY_BUFFER")
}
