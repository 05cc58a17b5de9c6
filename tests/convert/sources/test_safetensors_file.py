# SPDX-License-Identifier: Apache-2.0
"""Safetensors against the reference library both ways, and every header that lies."""

from __future__ import annotations

import json
import os
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.sources import hostile_files as hostile
from tests.convert.sources.hostile_files import safetensors, tensor
from vlp_jax.convert.sources import open_source, safetensors_file
from vlp_jax.types import UserError

TYPES = (*hostile.REAL, *hostile.WHOLE)


def test_the_library_reads_what_is_written(tmp_path):
    """Checked by type and bits through torch, which knows bfloat16 and float8."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    arrays = hostile.arrays(*TYPES) | {"transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T}
    arrays["big"] = np.arange(4, dtype=">f4")
    safetensors_file.write(tmp_path / "a.safetensors", arrays, {"format": "pt", "note": "ä"})
    found = library.load_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        assert tuple(found[name].shape) == array.shape and str(found[name].dtype) == f"torch.{native.dtype}"
        assert found[name].flatten().view(torch.uint8).numpy().tobytes() == native.tobytes(), name
    with library.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}


def test_what_the_library_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    arrays = hostile.arrays(*TYPES)
    tensors = {
        name: torch.frombuffer(bytearray(array.tobytes()), dtype=getattr(torch, str(array.dtype))).reshape(
            array.shape
        )
        for name, array in arrays.items()
        if array.size
    } | {"none": torch.zeros(0, 4)}
    library.save_file(tensors, tmp_path / "weights", metadata={"format": "pt"})
    hostile.assert_equal(tmp_path / "weights", arrays)
    with open_source(tmp_path / "weights") as source:
        assert source.container == "safetensors" and not source.skipped


def test_own_round_trip_and_alignment(tmp_path):
    arrays = hostile.arrays(*TYPES)
    safetensors_file.write(tmp_path / "a", arrays)
    hostile.assert_equal(tmp_path / "a", arrays)
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % arrays[name].dtype.itemsize == 0, name
    assert os.listdir(tmp_path) == ["a"]


class Lazy(dict):
    """Arrays that are made when they are asked for."""

    def __getitem__(self, name):
        return np.full((250, 1000), int(name), np.float32)


class Interrupted(Lazy):
    """Its last array is interrupted when it is asked for the second time, halfway through the file."""

    asked = 0

    def __getitem__(self, name):
        self.asked += name == "2"
        if self.asked == 2:
            raise KeyboardInterrupt
        return super().__getitem__(name)


def test_writing_holds_one_array_and_leaves_all_or_nothing(tmp_path):
    tracemalloc.start()
    safetensors_file.write(tmp_path / "a", Lazy.fromkeys(str(index) for index in range(20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6  # of 20 MB
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        safetensors_file.write(tmp_path / "a", Interrupted.fromkeys("012"))
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == before


def test_what_cannot_be_written():
    for arrays in (
        {"a": np.array(["text"])},
        {"a": np.zeros(2, np.complex128)},
        {"__metadata__": np.zeros(2)},
    ):
        with pytest.raises(ValueError, match="no place"):
            safetensors_file.write(None, arrays)


def test_one_tensor_of_memory_at_a_time(tmp_path):
    arrays = {f"layer.{index}": np.full((250, 1000), index, np.float32) for index in range(20)}
    safetensors_file.write(tmp_path / "a", arrays)
    del arrays
    tracemalloc.start()
    with open_source(tmp_path / "a") as source:
        assert sum(float(source.read(name)[0, 0]) for name in source.tensors) == sum(range(20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6  # of 20 MB: the one being read and the one before it


FOUR = bytes(8)
ENDLESS = b'{"a":' * 100_000
HEADERS = {
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON"),
    "nested": (ENDLESS, b"", "not JSON"),
    "brackets": (b'{"a":' + b"[" * 200_000, b"", "not JSON"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", b"", "not JSON"),
    "entry": ({"a": 1}, b"", "describes 'a' by 1"),
    "entry null": ({"a": None}, b"", "describes 'a' by None"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, FOUR, "describes 'a'"),
    "strange key": ({"a": tensor([2], [0, 8]) | {"more": 1}}, FOUR, "describes 'a'"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}',
        bytes(4),
        "the key 'a' twice",
    ),
    "twice inside": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "twice",
    ),
    "unknown type": ({"a": tensor([2], [0, 8], "F4")}, FOUR, "of type 'F4'; known are F64"),
    "type list": ({"a": tensor([2], [0, 8], ["F32"])}, FOUR, "of type"),
    "lying shape": ({"a": tensor([3], [0, 8])}, FOUR, "which is 12 bytes, and 8"),
    "huge": ({"a": tensor([2**60], [0, 2**62])}, FOUR, "has the shape"),
    "huge product": ({"a": tensor([2**40, 2**40], [0, 8])}, FOUR, "has the shape"),
    "huge with none": ({"a": tensor([0, 2**63], [0, 0])}, b"", "has the shape"),
    "big claim": ({"a": tensor([2**33], [0, 2**35])}, FOUR, "take 34359738368 bytes and 8 follow"),
    "negative": ({"a": tensor([-2, -1], [0, 8])}, FOUR, r"has the shape \(-2, -1\)"),
    "float": ({"a": tensor([2.0], [0, 8])}, FOUR, "has the shape"),
    "bool": ({"a": tensor([True, 2], [0, 8])}, FOUR, "has the shape"),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), "has the shape"),
    "shape text": ({"a": tensor("2", [0, 8])}, FOUR, "has the shape"),
    "rank": ({"a": tensor([1] * 65, [0, 4])}, bytes(4), "has the shape"),
    "offsets": ({"a": tensor([2], [8, 0])}, FOUR, "lies at"),
    "offsets negative": ({"a": tensor([2], [-8, 0])}, FOUR, "lies at"),
    "offsets three": ({"a": tensor([2], [0, 8, 8])}, FOUR, "lies at"),
    "offsets float": ({"a": tensor([2], [0.0, 8.0])}, FOUR, "lies at"),
    "overlap": ({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, bytes(12), "overlaps"),
    "same bytes": ({"a": tensor([2], [0, 8]), "b": tensor([2], [0, 8])}, FOUR, "overlaps"),
    "hole": ({"a": tensor([1], [0, 4]), "b": tensor([1], [8, 12])}, bytes(12), "hole"),
    "hole first": ({"a": tensor([1], [4, 8])}, FOUR, "hole"),
    "trailing": ({"a": tensor([2], [0, 8])}, bytes(9), "take 8 bytes and 9 follow"),
    "truncated": ({"a": tensor([2], [0, 8])}, bytes(7), "take 8 bytes and 7 follow"),
    "no tensors": ({}, b"", "holds no tensors"),
    "notes only": ({"__metadata__": {"format": "pt"}}, b"", "holds no tensors"),
    "long name": ({"a" * 2000: tensor([2], [0, 8])}, FOUR, "a tensor is called"),
    "control name": ({"a\x1b[2J": tensor([2], [0, 8])}, FOUR, "a tensor is called"),
    "surrogate name": (
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "a tensor is",
    ),
    "bool of two": ({"a": tensor([2], [0, 2], "BOOL")}, b"\1\2", "a byte above 1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path, case):
    header, data, pattern = HEADERS[case]
    hostile.refused_content(tmp_path / "a.safetensors", safetensors(header, data), pattern)


@pytest.mark.parametrize("length", [100_000_001, 2**62, 2**64 - 1, 25_000_001])
def test_a_header_longer_than_any(tmp_path, length):
    hostile.refused_content(tmp_path / "a", safetensors({}, length=length), f"claims {length} bytes")


def test_a_header_past_the_end(tmp_path):
    hostile.refused_content(
        tmp_path / "a", safetensors({}, length=1000), "bytes 8 to 1008 are needed and it has 10"
    )


def test_a_list_is_no_header(tmp_path):
    (tmp_path / "a").write_bytes(safetensors([]))
    with pytest.raises(UserError, match="not a JSON object"):
        safetensors_file.SafetensorsFile(tmp_path / "a")


def test_cut_and_flipped(tmp_path):
    safetensors_file.write(tmp_path / "a", hostile.arrays("float32", "bfloat16", "bool_"))
    refused, read = hostile.stands(tmp_path / "a", (tmp_path / "a").read_bytes())
    assert refused > 600 and read > 20  # a flip among the values is no concern of the format


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    safetensors_file.write(tmp_path / "a", {"a": np.zeros(100_000, jnp.bfloat16)})
    with open_source(tmp_path / "a") as source:
        os.truncate(tmp_path / "a", 1000)
        with pytest.raises(UserError, match="it has 1000"):
            source.read("a")
