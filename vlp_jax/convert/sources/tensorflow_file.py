# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's checkpoints (`X.index` beside `X.data-00000-of-00001`), read without TensorFlow.

TensorFlow's reader allocates by sizes that the index claims and ends the process when there is no such memory.
Layout: tensorflow/core/protobuf/tensor_bundle.proto, tensor_shape.proto and tensorflow/core/lib/io/table_format.txt.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from vlp_jax.convert.sources import Tensor, checksum, disk
from vlp_jax.convert.sources.disk import DTYPES
from vlp_jax.types import UserError

MAGIC = 0xDB4775248B80FB57  # last eight bytes of the index, little-endian
INDEX_LIMIT = 25_000_000  # bytes; BERT's has 20,000
SHARDS = 500
# By the numbers of tensorflow/core/framework/types.proto.
TYPES = {
    **{1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 8: "complex64", 9: "int64"},
    **{10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 22: "uint32", 23: "uint64"},
    **{24: "float8_e5m2", 25: "float8_e4m3fn"},
}
# Slots of TF1's and BERT's own optimizers, and counters.
OPTIMIZER = re.compile(
    r"(.*/)?(adam_[mv]|Adam(_\d+)?|Adafactor\w*|Momentum|RMSProp(_\d+)?|ExponentialMovingAverage|v[rc]"
    r"|global_step|beta[12]_power(_\d+)?|loss_scale)"
)


DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")


class Place(NamedTuple):
    """Where the index puts a tensor: which data file, where in it, and the checksum of its bytes."""

    shard: int
    offset: int
    checksum: int


class TensorflowFile:
    """A reader of one TensorFlow checkpoint, TF1's or TF2's; see `Source`.

    Args:
        path: the prefix `X`, or `X.index`, `X.meta` or a data file.

    Raises:
        UserError: a file is missing, damaged or misleading.
    """

    container = "TensorFlow checkpoint"

    def __init__(self, path: Path) -> None:
        self.path = path
        prefix = prefix_of(path)
        self._index = prefix.with_name(prefix.name + ".index")
        with disk.open_regular(self._index) as file:
            size = disk.size_of(file)
            if size > INDEX_LIMIT:
                raise disk.damaged(self._index, f"an index of {size} bytes is longer than any")
            content = disk.piece(self._index, file, 0, size)
        self.tensors: dict[str, Tensor] = {}
        self.skipped: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        shards = self._read_index(content)
        with contextlib.ExitStack() as stack:
            self.files = tuple(
                prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}") for shard in range(shards)
            )
            self._files = [stack.enter_context(disk.open_regular(file)) for file in self.files]
            for name, place in self._places.items():
                if place.shard >= shards or not self._holds(name, place):
                    raise disk.damaged(self._index, f"{disk.short(name)} lies outside the data files")
            self._stack = stack.pop_all()

    def _holds(self, name: str, place: Place) -> bool:
        return place.offset + self.tensors[name].nbytes <= disk.size_of(self._files[place.shard])

    def _read_index(self, content: bytes) -> int:
        """Fills in what each tensor is and where; returns the number of data files."""
        shards = 0
        try:
            for key, value in _table(self._index, content):
                fields = _fields(value)
                if key:
                    self._entry(disk.checked_name(self._index, key.decode("utf-8")), fields)
                    continue
                shards = _number(fields, 1)
                if not 0 < shards <= SHARDS or _number(fields, 2):
                    raise disk.damaged(
                        self._index, "it announces no data files, too many, or big-endian ones"
                    )
        except (
            ValueError,
            IndexError,
            TypeError,
        ) as error:  # short, a text where a number is needed, not UTF-8
            raise disk.damaged(self._index, f"its entries are broken ({disk.short(str(error))})") from error
        if not shards:
            raise disk.damaged(self._index, "it has no header")
        return shards

    def _entry(self, name: str, fields: dict[int, list[int | bytes]]) -> None:
        """Notes one entry of the index (`BundleEntryProto`)."""
        if name in self.tensors or name in self.skipped:
            raise disk.damaged(self._index, f"it has {disk.short(name)} twice")
        code = _number(fields, 1)
        if OPTIMIZER.fullmatch(name):
            self.skipped[name] = "the optimizer's"
        elif 7 in fields:
            self.skipped[name] = "a variable in parts, which no released model has"
        elif code not in TYPES:
            self.skipped[name] = "text" if code == 7 else f"of TensorFlow's type {code}, no number"
        else:
            shape = [_number(_fields(size), 1) for size in _fields(_bytes(fields, 2)).get(2, [])]
            tensor = disk.checked_shape(self._index, name, shape, DTYPES[TYPES[code]])
            if _number(fields, 5) != tensor.nbytes:
                raise disk.damaged(
                    self._index,
                    f"{disk.short(name)} has shape {tensor.shape} and type {tensor.dtype}, which is {tensor.nbytes} "
                    f"bytes, and {_number(fields, 5)} are set aside for it",
                )
            self.tensors[name] = tensor  # the table is sorted, by UTF-8 as Python sorts text
            self._places[name] = Place(_number(fields, 3), _number(fields, 4), _number(fields, 6))

    def read(self, name: str) -> np.ndarray:
        """One tensor, its bytes compared with their checksum."""
        place = self._places[name]
        path, file = self.files[place.shard], self._files[place.shard]
        array = disk.read_array(path, file, place.offset, name, self.tensors[name])
        if checksum.masked(checksum.crc32c(disk.octets(array))) != place.checksum:
            raise disk.damaged(path, f"the checksum of {disk.short(name)} does not hold")
        return array

    def close(self) -> None:
        """Closes the data files."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def prefix_of(path: Path) -> Path:
    """`X` of `X`, `X.index`, `X.meta` and `X.data-00000-of-00001`.

    Raises:
        UserError: there is no `X.index`.
    """
    name = DATA.sub("", re.sub(r"\.(index|meta)$", "", path.name))
    if not os.path.exists(path.with_name(name + ".index")):
        raise UserError(
            f"{path} belongs to a TensorFlow checkpoint, whose {name}.index is not beside it. A checkpoint is "
            f"{name}.index and {name}.data-00000-of-00001: get both, and name {path.with_name(name)}."
        )
    return path.with_name(name)


def _table(path: Path, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the (key, value) pairs of a sorted table, two levels of blocks."""
    if len(content) < 48 or int.from_bytes(content[-8:], "little") != MAGIC:
        raise disk.damaged(path, "it does not end like the index of a TensorFlow checkpoint")
    footer = content[-48:]
    position = 0
    for _ in range(3):  # the handle of an unused block, and the offset of the one that lists the blocks
        index_offset, position = _varint(footer, position)
    index_size, _ = _varint(footer, position)
    last = None
    for _, handle in _block(path, content, index_offset, index_size):
        offset, position = _varint(handle, 0)
        size, _ = _varint(handle, position)
        for key, value in _block(path, content, offset, size):
            if last is not None and key <= last:
                raise disk.damaged(path, f"its keys are not sorted at {disk.short(key)}")
            last = key
            yield key, value


def _block(path: Path, content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the pairs of a block; each key is written as what differs from the one before it."""
    end = offset + size
    if end + 5 > len(content) or size < 8:
        raise disk.damaged(path, f"a block of {size} bytes at {offset} is not in it")
    if content[end]:
        raise disk.damaged(path, "it is compressed, which TensorFlow's checkpoints are not")
    if checksum.masked(checksum.crc32c(content[offset : end + 1])) != int.from_bytes(
        content[end + 1 : end + 5], "little"
    ):
        raise disk.damaged(path, f"the checksum of the block at {offset} does not hold")
    limit = end - 4 - 4 * int.from_bytes(content[end - 4 : end], "little")  # then the restart points
    if limit < offset:
        raise disk.damaged(path, f"the block at {offset} is broken")
    key, position = b"", offset
    while position < limit:
        shared, position = _varint(content, position)
        fresh, position = _varint(content, position)
        length, position = _varint(content, position)
        if shared > len(key) or shared + fresh > 4 * disk.NAME_LENGTH or position + fresh + length > limit:
            raise disk.damaged(path, f"the block at {offset} is broken")
        key = key[:shared] + content[position : position + fresh]
        position += fresh
        yield key, content[position : position + length]
        position += length


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, lowest first; and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number of more than 64 bits")


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer by number: whole numbers, or bytes for text and messages."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == 0:
            value, position = _varint(message, position)
        else:
            if tag & 7 == 2:
                length, position = _varint(message, position)
            else:
                length = {1: 8, 5: 4}.get(tag & 7, len(message))  # other kinds are long out of use: "cut off"
            value = message[position : position + length]
            if len(value) < length:
                raise ValueError("a field is cut off")
            position += length
            value = value if tag & 7 == 2 else int.from_bytes(value, "little")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if isinstance(value, bytes):
        raise ValueError(f"field {field} is no number")
    return value


def _bytes(fields: dict[int, list[int | bytes]], field: int) -> bytes:
    value = fields.get(field, [b""])[-1]
    if isinstance(value, int):
        raise ValueError(f"field {field} is no message")
    return value
