# SPDX-License-Identifier: Apache-2.0
"""Numpy's npz against numpy, and zip files and headers that lie."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.convert.sources import hostile_files as hostile
from tests.convert.sources.hostile_files import npy, zipped
from vlp_jax.convert.sources import open_source

SAVE = {"stored": np.savez, "deflated": np.savez_compressed}
TYPES = ("float64", "float32", "float16", *hostile.WHOLE)


@pytest.mark.parametrize("save", SAVE)
def test_what_numpy_writes_is_read(tmp_path, save):
    arrays = hostile.arrays(*TYPES)
    arrays |= {"complex": np.ones(2, np.complex64), "a": np.ones(2), "a.b": np.ones(3), "v:0": np.ones(1)}
    wide = {
        "fortran": np.asfortranarray(arrays["block.0/a.b"]),
        "big": np.arange(6, dtype=">i4").reshape(2, 3).T,
    }
    SAVE[save](tmp_path / "a.npz", **arrays, **wide)
    arrays["fortran"] = np.ascontiguousarray(wide["fortran"])
    arrays["big"] = np.ascontiguousarray(wide["big"], "<i4")
    hostile.assert_equal(tmp_path / "a.npz", arrays)
    with open_source(tmp_path / "a.npz") as source:
        assert source.container == "npz" and not source.skipped


def test_the_64_bit_form(tmp_path, monkeypatch):
    """What a file over 4 GiB or of over 65,535 entries has, with the limits of Python's writer set low."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    arrays = hostile.arrays("float32", "int64")
    np.savez(tmp_path / "a.npz", **arrays)
    assert b"PK\6\6" in (tmp_path / "a.npz").read_bytes()
    hostile.assert_equal(tmp_path / "a.npz", arrays)


def test_bfloat16_as_numpy_writes_it(tmp_path):
    """Numpy has no name for it and writes two bytes of kind V, as in the released AugReg files."""
    arrays = hostile.arrays("bfloat16")
    np.savez(tmp_path / "a.npz", **arrays)
    hostile.assert_equal(tmp_path / "a.npz", arrays)


class Bomb:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_weight_is_skipped_and_never_run(tmp_path):
    made = {
        "objects": np.array([Bomb(tmp_path / "burst")], dtype=object),
        "text": np.array(["cat"]),
        "ascii": np.array([b"cat"]),
        "when": np.array(["2020-01-01"], "M8[D]"),
        "record": np.zeros(2, [("x", "<f4"), ("y", "<i4")]),
        "bytes": np.zeros(2, "V7"),
    }
    np.savez(tmp_path / "a.npz", weight=np.ones(3, np.float32), **made)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("readme.txt", "hello")
        file.writestr("evil.pkl", pickle.dumps(Bomb(tmp_path / "burst")))
    with open_source(tmp_path / "a.npz") as source:
        assert list(source.tensors) == ["weight"] and source.skipped.keys() == made.keys() | {
            "readme.txt",
            "evil.pkl",
        }
        assert source.skipped["objects"] == "pickled objects, never read"
        source.read("weight")
    np.savez(tmp_path / "b.npz", objects=made["objects"])
    hostile.refused(tmp_path / "b.npz", "holds no tensors. It holds: 'objects' .pickled objects, never read")
    assert not (tmp_path / "burst").exists()


def one(content: bytes, **fields) -> bytes:
    return zipped({"name": "a.npy", "content": content, **fields})


FOUR = {"name": "b.npy", "content": npy()}
HEADERS = {
    "no array": (one(b"nothing at all"), "no numpy array"),
    "version": (one(b"\x93NUMPY\7\0" + bytes(100)), "no numpy array"),
    "short": (one(b"\x93NU"), "bytes too few"),
    "header length": (
        one(b"\x93NUMPY\2\0" + struct.pack("<L", 2**31) + bytes(100)),
        "claims 2147483648 bytes",
    ),
    "header cut": (one(npy()[:40]), "bytes too few"),
    "code": (one(npy(shape="(__import__('os').mkdir('x'),)")), "the header of 'a' is"),
    "lying shape": (one(npy(shape="(3,)")), "which is 12 bytes, and its entry claims 8"),
    "huge": (one(npy(shape="(4611686018427387904,)")), "has the shape"),
    "huger": (one(npy(shape="(" + "9" * 5000 + ",)")), "has the shape"),
    "negative": (one(npy(shape="(-2,)")), "the header of 'a' is"),
    "number": (one(npy(shape="(2, 1 1,)")), "has the shape"),
    "nested": (one(npy(shape="(" * 3000)), "the header of 'a' is"),
    "type": (one(npy(descr="'<f3'")), "of type"),
    "type code": (one(npy(descr="'<z4'")), "of type"),
    "type empty": (one(npy(descr="''")), "holds no tensors"),
    "bool of two": (one(npy(descr="'|b1'", data=b"\1\2")), "a byte above 1"),
    "trailing": (one(npy(data=bytes(9))), "which is 8 bytes, and its entry claims 9"),
    "checksum": (one(npy(), checksum=1), "checksum of the entry 'a.npy'"),
    "checksum deflated": (one(npy(), checksum=1, method=8), "checksum"),
}
ZIPS = {
    "encrypted": (one(npy(), flags=1), "is encrypted"),
    "strongly": (one(npy(), flags=0x41), "is encrypted"),
    "bzip2": (one(npy(), method=12), "packed by method 12"),
    "unlike sizes": (one(npy(), size=5000), "claims 5000 bytes"),
    "ratio": (one(npy(), method=8, size=10**9), "claims 1000000000 bytes"),
    "deflated less": (
        one(npy(shape="(250,)", data=bytes(8)), method=8, size=len(npy(shape="(250,)", data=bytes(1000)))),
        "unpacks to less",
    ),
    "deflated noise": (one(npy(), method=8, packed=b"\xff" * 60), "does not unpack"),
    "traversal": (zipped({"name": "../a.npy", "content": npy()}), "leaves the folder"),
    "inner traversal": (zipped({"name": "x/../../a.npy", "content": npy()}), "leaves the folder"),
    "absolute": (zipped({"name": "/etc/a.npy", "content": npy()}), "leaves the folder"),
    "backslash": (zipped({"name": "..\\a.npy", "content": npy()}), "leaves the folder"),
    "null": (zipped({"name": "a\0.npy", "content": npy()}), "leaves the folder"),
    "twice": (zipped(FOUR, FOUR), "two entries called 'b.npy'"),
    "other name": (one(npy(), other_name="b.npy"), "is called b'b.npy' at its place"),
    "overlap": (zipped(FOUR, {"name": "a.npy", "content": npy(), "offset": 3}), "overlaps the one before it"),
    "same place": (zipped(FOUR, {"name": "a.npy", "content": npy(), "offset": 0}), "overlaps|broken|called"),
    "past the list": (one(npy(), packed_size=500, size=500), "broken"),
    "offset": (one(npy(), offset=2**31), "are needed"),
    "offset 64": (one(npy(), offset=0xFFFFFFFF), "the entry 'a.npy' is broken"),
    "wide": (one(npy(), offset=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 2**63)), "are needed"),
    "extra cut": (one(npy(), offset=0xFFFFFFFF, extra=struct.pack("<2HL", 1, 8, 2**31)), "is broken"),
    "count": (zipped(FOUR, count=7), "announces 7 entries and lists 1"),
    "list start": (zipped(FOUR, start=2**31), "claims bytes"),
    "list length": (zipped(FOUR, length=2**31), "claims bytes"),
    "list 64": (zipped(FOUR, length=0xFFFFFFFF), "are needed"),
    "no entries": (zipped(), "neither PyTorch"),
    "other things": (zipped({"name": "model.ckpt.index", "content": b"x"}), "holds: 'model.ckpt.index'"),
}


@pytest.mark.parametrize("case", [*HEADERS, *ZIPS])
def test_what_lies(tmp_path, case):
    content, pattern = (HEADERS | ZIPS)[case]
    hostile.refused_content(tmp_path / "a.npz", content, pattern)


def test_the_maker_makes_what_numpy_reads(tmp_path):
    """The hostile files differ from right ones by their one lie."""
    (tmp_path / "a.npz").write_bytes(zipped({"name": "a.npy", "content": npy(), "method": 8}, FOUR))
    with np.load(tmp_path / "a.npz") as file:
        assert file["a"].tolist() == file["b"].tolist() == [0, 0]
    hostile.assert_equal(tmp_path / "a.npz", {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})


def test_a_bomb_is_inflated_no_further_than_its_header_says(tmp_path):
    bomb = one(npy(data=bytes(200_000_000)), method=8)
    assert len(bomb) < 1_000_000
    hostile.refused_content(tmp_path / "a.npz", bomb, "which is 8 bytes, and its entry claims 200000000")
    # The same with the true size left out: what is behind the eighth byte is never inflated.
    hidden = one(npy(data=bytes(200_000_000)), method=8, size=len(npy()))
    hostile.refused_content(tmp_path / "b.npz", hidden, "checksum")


def test_a_list_of_entries_without_end(tmp_path):
    entry = b"PK\1\2" + struct.pack("<2H4H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    listing = entry * 600_000
    end = struct.pack("<4H2LH", 0, 0, 0xFFFE, 0xFFFE, len(listing), 4, 0)
    hostile.refused_content(
        tmp_path / "a.npz", b"PK\3\4" + listing + b"PK\5\6" + end, "more than is ever needed"
    )


@pytest.mark.parametrize("save", SAVE)
def test_one_tensor_of_memory_at_a_time(tmp_path, save):
    SAVE[save](
        tmp_path / "a.npz", **{str(index): np.full((500, 500), index, np.float32) for index in range(12)}
    )
    tracemalloc.start()
    with open_source(tmp_path / "a.npz") as source:
        assert sum(float(source.read(name)[0, 0]) for name in source.tensors) == sum(range(12))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 1e6 + 3.5e6  # of 12 MB; pieces of 1 MiB in and out of the inflater


@pytest.mark.parametrize("save", SAVE)
def test_cut_and_flipped(tmp_path, save):
    content = io.BytesIO()
    SAVE[save](content, a=np.ones((2, 3), np.float32), b=np.asfortranarray(np.eye(2)))
    refused, read = hostile.stands(tmp_path / "a.npz", content.getvalue())
    assert refused > 600 and read > 20  # dates and the like are no concern
