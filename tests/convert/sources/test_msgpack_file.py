# SPDX-License-Identifier: Apache-2.0
"""Flax's msgpack against flax, and every value that lies."""

from __future__ import annotations

import struct
import tracemalloc

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util

from tests.convert.sources import hostile_files as hostile
from vlp_jax.convert.sources import open_source

TYPES = (*hostile.REAL, *hostile.WHOLE)


def flat(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def test_what_flax_writes_is_read(tmp_path):
    tree = {
        "params": {"layer": hostile.arrays(*TYPES), "jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)},
        "scalar": np.float32(2.5),
        "many": {str(index): {"kernel": np.full(3, index)} for index in range(300)},
    }
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    hostile.assert_equal(tmp_path / "a.msgpack", flat(tree))
    restored = serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes())
    assert flat(restored).keys() == flat(tree).keys()


def test_what_is_no_array_is_skipped(tmp_path):
    tree = {
        "a": np.ones(2),
        "step": 3,
        "more": -70000,
        "lr": 0.5,
        "on": True,
        "no": None,
        "note": "hi",
        "c": 1j,
    }
    (tmp_path / "a").write_bytes(
        serialization.msgpack_serialize(tree | {"list": [np.zeros(1), 2], "bytes": b"x"})
    )
    with open_source(tmp_path / "a") as source:
        assert source.container == "msgpack" and list(source.tensors) == ["a", "list/0"]
        assert source.skipped.keys() == tree.keys() - {"a"} | {"list/1", "bytes"}
        assert source.skipped["step"] == "a number, no array" and source.skipped["note"] == "text, no array"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_arrays_in_pieces(tmp_path, monkeypatch, dtype):
    """As flax writes an array over 1 GiB, with its limit set low."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"a": {"big": np.arange(100).reshape(4, 25).astype(dtype), "small": np.ones(3, np.int32)}}
    content = serialization.msgpack_serialize(tree)
    assert b"__msgpack_chunked_array__" in content
    (tmp_path / "a").write_bytes(content)
    hostile.assert_equal(tmp_path / "a", flat(tree))


def packed(tree) -> bytes:
    return msgpack.packb(tree, strict_types=True)


def array(shape=(2,), dtype="float32", data=bytes(8), code=1, more=()) -> msgpack.ExtType:
    """Flax's form of an array, of any claim."""
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data, *more), use_bin_type=True))


def pieces(shape, chunks) -> dict:
    number = {str(index): length for index, length in enumerate(shape)}
    return {"__msgpack_chunked_array__": True, "shape": number, "chunks": chunks}


NESTED: dict = {}
for _ in range(200):
    NESTED = {"a": NESTED}
LIES = {
    "depth": (packed(NESTED), "nests deeper"),
    "depth bomb": (b"\x81\xa1a" * 100_000, "nests deeper"),
    "depth of lists": (b"\x81\xa1a" + b"\x91" * 100_000, "nests deeper"),
    "many": (b"\x81\xa1a\xdd" + struct.pack(">L", 120_000) + b"\xc0" * 120_000, "more than 100000"),
    "map": (b"\xdf" + b"\xff" * 4 + bytes(20), "claims 8589934590"),
    "list": (b"\x81\xa1a\xdd" + b"\xff" * 4, "claims 4294967295"),
    "text": (b"\x81\xa1a\xdb" + b"\xff" * 4, "claims 4294967295"),
    "bytes": (b"\x81\xa1a\xc6" + b"\xff" * 4, "claims 4294967295"),
    "extension": (b"\x81\xa1a\xc9" + b"\xff" * 4 + b"\1", "claims 4294967295"),
    "key": (b"\x81\xdb" + b"\xff" * 4 + bytes(20), "a key before"),
    "key bytes": (packed({b"a": 1}), "of kind bin"),
    "key list": (b"\x81\x91\1\1", "of kind array"),
    "byte of no value": (b"\x81\xa1a\xc1", "0xc1"),
    "trailing": (packed({"a": array()}) + b"\0", "1 bytes follow"),
    "two maps": (packed({"a": array()}) * 2, "follow its end"),
    "twice": (b"\x82" + packed({"a": array()})[1:] * 2, "the key 'a' is there twice"),
    "twice by path": (packed({"a/b": array(), "a": {"b": array()}}), "two arrays are called 'a/b'"),
    "number key": (b"\x82" + packed({"1": array()})[1:] + b"\1\1", "the key '1' is there twice"),
    "extension type": (packed({"a": array(code=9)}), "extension type 9"),
    "extension of time": (packed({"a": msgpack.Timestamp(1, 2)}), "extension type 255"),
    "shape": (packed({"a": array((3,))}), "which is 12 bytes, and 8"),
    "huge": (packed({"a": array((2**62,))}), "has the shape"),
    "huge product": (packed({"a": array((2**40, 2**40))}), "has the shape"),
    "negative": (packed({"a": array((-2, -1))}), "has the shape"),
    "float": (packed({"a": array((2.0,))}), "broken"),
    "shape text": (packed({"a": array("ab")}), "broken"),
    "rank": (packed({"a": array((1,) * 40)}), "broken"),
    "rank claim": (packed({"a": msgpack.ExtType(1, b"\x93\xdd\xff\xff\xff\xff")}), "broken"),
    "type": (packed({"a": array(dtype="float33")}), "unknown type 'float33'"),
    "object": (packed({"a": array(dtype="object")}), "unknown type 'object'"),
    "type number": (packed({"a": array(dtype=3)}), "unknown type"),
    "type long": (packed({"a": array(dtype="f" * 500)}), "unknown type"),
    "data text": (packed({"a": array(data=3)}), "set aside"),
    "four parts": (packed({"a": array(more=(1,))}), "is broken"),
    "one part": (packed({"a": msgpack.ExtType(1, b"\x91\x91\1")}), "is broken"),
    "empty": (packed({"a": msgpack.ExtType(1, b"")}), "claims 1 members or bytes"),
    "bool of two": (packed({"a": array((2,), "bool", b"\1\2")}), "a byte above 1"),
    "scalar's size": (packed({"a": array((), code=3)}), "which is 4 bytes, and 8"),
    "no array": (packed({"a": 1}), "holds no tensors. It holds: 'a' .a number"),
    "no member": (packed({}), "holds no tensors"),
    "pieces few": (
        packed({"a": pieces((5,), {"0": array(), "1": array()})}),
        "needs 20 bytes and its pieces have 16",
    ),
    "pieces huge": (packed({"a": pieces((2**62,), {"0": array()})}), "has the shape"),
    "pieces negative": (packed({"a": pieces((-4, -1), {"0": array(), "1": array()})}), "has the shape"),
    "pieces of types": (packed({"a": pieces((4,), {"0": array(), "1": array(dtype="int32")})}), "are broken"),
    "pieces flat": (packed({"a": pieces((4,), {"0": array((1, 2))})}), "are broken"),
    "pieces none": (packed({"a": pieces((4,), {})}), "are broken"),
    "pieces missing": (packed({"a": pieces((4,), {"0": array(), "2": array()})}), "needs 16 bytes"),
    "pieces no map": (packed({"a": {"__msgpack_chunked_array__": True, "shape": 3}}), "are broken"),
    "pieces of numbers": (packed({"a": pieces(("x",), {"0": 3})}), "are broken"),
    "pieces in pieces": (packed({"a": pieces((4,), {"0": pieces((4,), {})})}), "are broken"),
    "control name": (packed({"a\x1b": array()}), "a tensor is called"),
    "long name": (packed({"a" * 900: {"b" * 900: array()}}), "a tensor is called"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_lies(tmp_path, case):
    content, pattern = LIES[case]
    (tmp_path / "a.msgpack").write_bytes(content)
    hostile.refused(tmp_path / "a.msgpack", pattern, megabytes=30 if case == "many" else 4)


def test_one_tensor_of_memory_at_a_time(tmp_path):
    arrays = {str(index): np.full((500, 500), index, np.float32) for index in range(12)}
    (tmp_path / "a").write_bytes(serialization.to_bytes(arrays))
    del arrays
    tracemalloc.start()
    with open_source(tmp_path / "a") as source:
        assert sum(float(source.read(name)[0, 0]) for name in source.tensors) == sum(range(12))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6  # of 12 MB


def test_cut_and_flipped(tmp_path):
    tree = {"a": {"b": np.ones((2, 3), np.float32), "c": np.ones(2, jnp.bfloat16)}, "step": 3}
    refused, read = hostile.stands(tmp_path / "a", serialization.to_bytes(tree), flips=800)
    assert refused > 400 and read > 20
