# SPDX-License-Identifier: Apache-2.0
"""Flax's msgpack: nested maps with arrays as extension types, walked on the disk so that no array is read on the way.

Layout: https://github.com/msgpack/msgpack/blob/master/spec.md and flax/serialization.py (`_MsgpackExtType`, `_chunk`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from vlp_jax.convert.sources import Tensor, disk
from vlp_jax.convert.sources.disk import DTYPES

DEPTH = 64  # maps inside maps; a model has about ten
ITEMS = 100_000  # values in the file; a model has some hundreds, with its optimizer some thousands
KEY_LENGTH = 4 * disk.NAME_LENGTH  # bytes
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension types
CHUNKED = "__msgpack_chunked_array__"  # arrays over 1 GiB are a map of flat pieces

# First byte -> kind and the width of the length (or the number) that follows it. The ranges are in `_head`.
HEADS = {
    0xC0: ("nothing", 0),
    0xC2: ("false", 0),
    0xC3: ("true", 0),
    **{0xC4 + power: ("bin", 1 << power) for power in range(3)},
    **{0xC7 + power: ("ext", 1 << power) for power in range(3)},
    **{0xCA + power: ("float", 4 << power) for power in range(2)},
    **{0xCC + power: ("int", 1 << power) for power in range(4)},
    **{0xD0 + power: ("signed", 1 << power) for power in range(4)},
    **{0xD4 + power: ("fixext", 1 << power) for power in range(5)},
    **{0xD9 + power: ("str", 1 << power) for power in range(3)},
    **{0xDC + power: ("array", 2 << power) for power in range(2)},
    **{0xDE + power: ("map", 2 << power) for power in range(2)},
}


class Piece(NamedTuple):
    """An array's bytes on the disk."""

    tensor: Tensor
    offset: int


@dataclasses.dataclass(frozen=True)
class Other:
    """A value that is no array: what it is, and the number where it is a whole one."""

    kind: str
    number: int | None = None


class MsgpackFile:
    """A reader of one `.msgpack` file of flax; names are the keys joined by "/"; see `Source`.

    Raises:
        UserError: the file is damaged, nested too deeply, or claims more than it holds.
    """

    container = "msgpack"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self.skipped: dict[str, str] = {}
        self._pieces: dict[str, tuple[Tensor, list[Piece]]] = {}
        self._items = 0
        self._file = disk.open_regular(path)
        try:
            self._end = disk.size_of(self._file)
            tree = self._value(DEPTH)
            if not isinstance(tree, dict):
                raise disk.damaged(path, "it holds no map of names to arrays")
            if self._file.tell() != self._end:
                raise disk.damaged(path, f"{self._end - self._file.tell()} bytes follow its end")
            for name, leaf in self._leaves(tree, ""):
                self._keep(name, leaf)
        except BaseException:
            self.close()
            raise
        self.tensors = {name: self._pieces[name][0] for name in sorted(self._pieces)}

    def _bytes(self, count: int) -> bytes:
        self._checked(count)
        content = self._file.read(count)
        if len(content) < count:
            raise disk.damaged(self.path, "it became shorter while it was read")
        return content

    def _head(self) -> tuple[str, int]:
        """The kind of the value at the file's position, and its length, number of members, or number."""
        first = self._bytes(1)[0]
        if first < 0x80 or first >= 0xE0:
            return "int", first if first < 0x80 else first - 256
        if first < 0xC0:
            kind = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
            return kind, first & (0x1F if kind == "str" else 0x0F)
        if first not in HEADS:
            raise disk.damaged(self.path, f"the byte {first:#x} at {self._file.tell() - 1} begins no value")
        kind, width = HEADS[first]
        if kind == "fixext":
            return "ext", width
        if kind == "float":
            self._bytes(width)
            return kind, 0
        number = int.from_bytes(self._bytes(width), "big", signed=kind == "signed")
        return ("int" if kind == "signed" else kind), number

    def _value(self, depth: int) -> Any:
        """The value at the file's position: a dict, a `Piece`, or an `Other`; arrays stay on the disk."""
        self._items += 1
        if depth == 0 or self._items > ITEMS:
            raise disk.damaged(self.path, f"it nests deeper than {DEPTH} or has more than {ITEMS} values")
        kind, count = self._head()
        if kind == "map":
            return self._map(count, depth)
        if kind == "array":
            self._checked(count)
            return {str(index): self._value(depth - 1) for index in range(count)}
        if kind == "ext":
            return self._extension(count)
        if kind in ("str", "bin"):
            self._checked(count)
            self._file.seek(count, 1)
            return Other("text" if kind == "str" else "bytes")
        return (
            Other("a number", count)
            if kind == "int"
            else Other("a number" if kind == "float" else "a switch or nothing")
        )

    def _checked(self, count: int) -> None:
        """Each member or byte that is claimed takes a byte or more."""
        if count > self._end - self._file.tell():
            raise disk.damaged(self.path, f"a value at {self._file.tell()} claims {count} members or bytes")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        self._checked(2 * count)
        members: dict[str, Any] = {}
        for _ in range(count):
            kind, length = self._head()
            if kind == "str" and length <= KEY_LENGTH:
                key = self._bytes(length).decode("utf-8", "replace")
            elif kind == "int":
                key = str(length)
            else:
                raise disk.damaged(self.path, f"a key before {self._file.tell()} is of kind {kind}, not text")
            if key in members:
                raise disk.damaged(self.path, f"the key {disk.short(key)} is there twice in one map")
            members[key] = self._value(depth - 1)
        return members

    def _extension(self, length: int) -> Piece | Other:
        """An array or a scalar of flax: (shape, name of the type, bytes) as msgpack inside the extension."""
        code = self._bytes(1)[0]
        self._checked(length)
        start, end = self._file.tell(), self._file.tell() + length
        if code == COMPLEX:
            self._file.seek(end)
            return Other("a number")
        if code not in (ARRAY, SCALAR):
            raise disk.damaged(
                self.path, f"the value at {start} is of the extension type {code}, which flax has not"
            )
        parts, three = self._head()
        rank_kind, rank = self._head()
        if (parts, three, rank_kind) != ("array", 3, "array") or rank > disk.RANK:
            raise disk.damaged(self.path, f"the array at {start} is broken")
        shape = [self._head() for _ in range(rank)]
        kind, width = self._head()
        name = self._bytes(width).decode("ascii", "replace") if kind in ("str", "bin") and width < 30 else ""
        dtype = DTYPES.get(name)
        if dtype is None or any(kind != "int" for kind, _ in shape):
            raise disk.damaged(
                self.path, f"the array at {start} is broken or of an unknown type {disk.short(name)}"
            )
        tensor = disk.checked_shape(self.path, f"the array at {start}", [count for _, count in shape], dtype)
        kind, size = self._head()
        offset = self._file.tell()
        # Text as bytes: what flax wrote before it set `use_bin_type`.
        if kind not in ("bin", "str") or size != tensor.nbytes or offset + size != end:
            raise disk.damaged(
                self.path,
                f"the array at {start} has shape {tensor.shape} and type {dtype}, which is {tensor.nbytes} bytes, and "
                f"{size} are set aside for it",
            )
        self._file.seek(end)
        return Piece(tensor, offset)

    def _leaves(self, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict) and CHUNKED not in value:
                yield from self._leaves(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}", value

    def _keep(self, name: str, leaf: Piece | Other | dict[str, Any]) -> None:
        """Notes where a leaf's bytes lie, or why it is skipped."""
        disk.checked_name(self.path, name)
        if name in self._pieces or name in self.skipped:
            raise disk.damaged(self.path, f"two arrays are called {disk.short(name)}")
        if isinstance(leaf, Other):
            self.skipped[name] = f"{leaf.kind}, no array"
        elif isinstance(leaf, Piece):
            self._pieces[name] = (leaf.tensor, [leaf])
        else:
            self._pieces[name] = self._chunked(name, leaf)

    def _chunked(self, name: str, leaf: dict[str, Any]) -> tuple[Tensor, list[Piece]]:
        """An array in flat pieces, each a key "0", "1", ... of its map."""
        lengths, pieces = (
            [part[str(index)] for index in range(len(part)) if str(index) in part]
            if isinstance(part, dict)
            else []
            for part in (leaf.get("shape"), leaf.get("chunks"))
        )
        whole = [piece for piece in pieces if isinstance(piece, Piece) and len(piece.tensor.shape) == 1]
        numbers = [length.number for length in lengths if isinstance(length, Other)]
        dtypes = {piece.tensor.dtype for piece in whole}
        if len(whole) != len(pieces) or len(numbers) != len(lengths) or len(dtypes) != 1:
            raise disk.damaged(self.path, f"the pieces of {disk.short(name)} are broken")
        tensor = disk.checked_shape(self.path, name, numbers, dtypes.pop())
        held = sum(piece.tensor.nbytes for piece in whole)
        if held != tensor.nbytes:
            raise disk.damaged(
                self.path, f"{disk.short(name)} needs {tensor.nbytes} bytes and its pieces have {held}"
            )
        return tensor, whole

    def read(self, name: str) -> np.ndarray:
        """One tensor, its pieces read straight into one array."""
        tensor, pieces = self._pieces[name]
        array = disk.empty(self.path, name, tensor)
        view = disk.octets(array)
        for piece in pieces:
            self._file.seek(piece.offset)
            disk.fill(self.path, self._file, view[: piece.tensor.nbytes])
            view = view[piece.tensor.nbytes :]
        return disk.checked_bool(self.path, name, array)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
