# SPDX-License-Identifier: Apache-2.0
"""Makers of weight files, right and wrong, byte by byte, and the checks that every reader must stand."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

# The readers are imported here, so that no test of memory counts the first import of one.
from vlp_jax.convert.sources import (  # noqa: F401
    checksum,
    msgpack_file,
    numpy_file,
    open_source,
    recognition,
    safetensors_file,
    sharded,
    tensorflow_file,
    torch_file,
)
from vlp_jax.types import UserError

REAL = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
WHOLE = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool_")


def arrays(*types: str) -> dict[str, np.ndarray]:
    """One array a type, and odd shapes: a scalar, no elements, one row."""
    rng = np.random.default_rng(7)
    made = {name: rng.normal(size=(3, 5)).astype(getattr(jnp, name)) for name in types if name in REAL}
    made |= {name: rng.integers(0, 2, (2, 3)).astype(getattr(jnp, name)) for name in types if name in WHOLE}
    made["scalar"] = np.array(1.5, np.float32)
    made["none"] = np.zeros((0, 4), np.float32)
    made["block.0/a.b"] = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    return made


def assert_equal(path: Path, expected: dict[str, np.ndarray]) -> None:
    """The opened file has exactly these arrays: names sorted, type, shape and bits, each array its own and C-ordered."""
    with open_source(path) as source:
        assert list(source.tensors) == sorted(expected)
        for name, array in expected.items():
            found = source.read(name)
            assert (source.tensors[name].shape, source.tensors[name].dtype) == (array.shape, array.dtype), (
                name
            )
            assert (found.shape, found.dtype, found.tobytes()) == (
                array.shape,
                array.dtype,
                array.tobytes(),
            ), name
            assert found.flags.c_contiguous and found.flags.writeable
        assert all(file.is_file() for file in source.files)
    source.close()


def read_all(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


def refused(path: Path, pattern: str, megabytes: float = 4) -> None:
    """Opening and reading everything ends in a `UserError` that names the file, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=pattern) as caught:
            read_all(path)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path.parent) in message and len(message) < 2000 and message.isprintable(), message
    assert peak < megabytes, f"{peak:.0f} MB"


def refused_content(path: Path, content: bytes, pattern: str) -> None:
    """`refused` for a file with this content."""
    path.write_bytes(content)
    refused(path, pattern)


def cut_and_flipped(content: bytes, flips: int) -> Iterator[bytes]:
    """All prefixes of a file, and the file with a few bytes changed, by a fixed seed."""
    for length in range(len(content)):
        yield content[:length]
    rng = np.random.default_rng(11)
    for _ in range(flips):
        changed = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[position] ^= int(rng.integers(1, 256))
        yield bytes(changed)


def stands(path: Path, content: bytes, opened: Path | None = None, flips: int = 400) -> tuple[int, int]:
    """Every damaged copy is refused by `UserError` or read; returns how many were refused and read."""
    counts = [0, 0]
    for damaged in cut_and_flipped(content, flips):
        path.write_bytes(damaged)
        try:
            read_all(opened or path)
            counts[1] += 1
        except UserError as error:
            assert str(path.parent) in str(error)
            counts[0] += 1
    path.write_bytes(content)
    read_all(opened or path)  # the whole file was right all along
    return counts[0], counts[1]


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, text or JSON, whose length may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any, span: Any, dtype: Any = "F32") -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def npy(descr: str = "'<f4'", shape: str = "(2,)", data: bytes = bytes(8), fortran: str = "False") -> bytes:
    """A `.npy` array whose header says anything."""
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def deflated(content: bytes) -> bytes:
    """Packed as zip files have it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def zipped(
    *entries: dict[str, Any], count: int | None = None, start: int | None = None, length: int | None = None
) -> bytes:
    """A zip file of entries {name, content, and any field that shall be wrong}."""
    body, listing = b"", b""
    for entry in entries:
        content = entry["content"]
        method = entry.get("method", 0)
        packed = entry.get("packed", deflated(content) if method == 8 else content)
        fields = (
            entry.get("flags", 0),
            method,
            0,
            0,
            entry.get("checksum", zlib.crc32(content)),
            entry.get("packed_size", len(packed)),
            entry.get("size", len(content)),
        )
        name, extra = entry["name"].encode(), entry.get("extra", b"")
        offset = entry.get("offset", len(body))
        body += b"PK\3\4" + struct.pack("<H4H3L2H", 20, *fields, len(name), 0)
        body += entry.get("other_name", entry["name"]).encode() + packed
        listing += b"PK\1\2" + struct.pack(
            "<2H4H3L5H2L", 20, 20, *fields, len(name), len(extra), 0, 0, 0, 0, offset
        )
        listing += name + extra
    total = len(entries) if count is None else count
    begin = len(body) if start is None else start
    size = len(listing) if length is None else length
    return body + listing + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, total, total, size, begin, 0)


def varint(number: int) -> bytes:
    """A whole number as protocol buffers and TensorFlow's tables write it."""
    found = b""
    while number >= 0x80:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def message(fields: dict[int, int | bytes]) -> bytes:
    """A protocol buffer; a field 6 is four bytes wide, as the checksum of an entry."""
    content = b""
    for field, value in fields.items():
        if isinstance(value, bytes):
            content += varint(field << 3 | 2) + varint(len(value)) + value
        elif field == 6:
            content += varint(field << 3 | 5) + struct.pack("<L", value)
        else:
            content += varint(field << 3) + varint(value)
    return content


def shape_message(*lengths: int) -> bytes:
    """TensorShapeProto."""
    return b"".join(message({2: message({1: length % 2**64})}) for length in lengths)


def table_block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A block of a table without shared keys, its one restart point, its kind and its checksum."""
    body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
    body += struct.pack("<2L", 0, 1) + b"\0"
    return body + struct.pack("<L", checksum.masked(checksum.crc32c(body)))


def table(entries: dict[bytes, bytes], handle: bytes | None = None, index: bytes | None = None) -> bytes:
    """The index of a TensorFlow checkpoint; the handles of its blocks may be lies."""
    data = table_block(list(entries.items()))
    blocks = table_block([(b"\xff", handle or varint(0) + varint(len(data) - 5))])
    footer = varint(0) + varint(0) + (index or varint(len(data)) + varint(len(blocks) - 5))
    return data + blocks + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
