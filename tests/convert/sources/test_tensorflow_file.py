# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's checkpoints against TensorFlow, and every index that lies."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.convert.sources import hostile_files as hostile
from tests.convert.sources.hostile_files import message, shape_message, table, table_block, varint
from vlp_jax.convert.sources import checksum, open_source
from vlp_jax.types import UserError

TYPES = (*hostile.REAL, *hostile.WHOLE)


def save(prefix, arrays, **strings):
    """By the operation that TF1's Saver calls, which takes any names."""
    import tensorflow as tf

    texts = {name: tf.constant(text) for name, text in strings.items()}
    values = {name: tf.constant(array) for name, array in arrays.items()} | texts
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint `x` of TensorFlow's making, and its arrays."""
    folder = tmp_path_factory.mktemp("saved")
    arrays = hostile.arrays(*TYPES)
    arrays |= {
        f"bert/encoder/layer_{index}/kernel": np.full((7, 9), index, np.float32) for index in range(200)
    }
    slots = {
        "bert/a/adam_m": np.ones(3),
        "bert/a/adam_v": np.ones(3),
        "global_step": np.int64(5),
        "b/Adam_1": np.ones(2),
    }
    save(folder / "x", arrays | slots, graph="text")
    (folder / "x.meta").write_bytes(b"a graph")
    return folder, arrays


@pytest.mark.parametrize("name", ["x", "x.index", "x.meta", "x.data-00000-of-00001"])
def test_what_tensorflow_writes_is_read(saved, name):
    folder, arrays = saved
    hostile.assert_equal(folder / name, arrays)
    with open_source(folder / name) as source:
        assert source.container == "TensorFlow checkpoint"
        assert source.files == (folder / "x.data-00000-of-00001",)
        optimizer = ("bert/a/adam_m", "bert/a/adam_v", "global_step", "b/Adam_1")
        assert source.skipped == dict.fromkeys(optimizer, "the optimizer's") | {"graph": "text"}


def test_the_folder_of_one_checkpoint(saved):
    hostile.assert_equal(*saved)


def test_parts_joined_by_tensorflow(tmp_path):
    """A checkpoint of several data files, as several hosts write it."""
    import tensorflow as tf

    arrays = [{"a": np.ones(3, np.float32)}, {"b": np.arange(4, dtype=np.int32)}]
    for index, part in enumerate(arrays):
        save(tmp_path / f"part{index}", part)
    parts = [str(tmp_path / f"part{index}") for index in range(2)]
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "x"))
    assert (tmp_path / "x.data-00001-of-00002").exists()
    hostile.assert_equal(tmp_path / "x", arrays[0] | arrays[1])


def test_the_checksum():
    """The check value of the published list, and an independent step by step sum."""
    assert checksum.crc32c(b"123456789") == 0xE3069283
    content = np.random.default_rng(0).bytes(5001)

    def plain(content: bytes) -> int:
        total = 0xFFFFFFFF
        for byte in content:
            total ^= byte
            for _ in range(8):
                total = total >> 1 ^ 0x82F63B78 * (total & 1)
        return total ^ 0xFFFFFFFF

    for length in (0, 1, 511, 512, 513, 1535, 5001):
        assert checksum.crc32c(content[:length]) == plain(content[:length]), length


def test_damaged_values_are_found(tmp_path):
    save(tmp_path / "x", {"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)})
    data = tmp_path / "x.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    with open_source(tmp_path / "x") as source:
        source.read("a")
        with pytest.raises(UserError, match="x.data-00000-of-00001 cannot be read: the checksum of 'b'"):
            source.read("b")


FOUR = np.arange(2, dtype=np.float32).tobytes()
SUM = checksum.masked(checksum.crc32c(FOUR))
HEADER = {b"": message({1: 1})}


def entry(shape=None, size=8, dtype=1, shard=0, offset=0, total=SUM, **more) -> bytes:
    """BundleEntryProto of any claim."""
    shape = shape_message(2) if shape is None else shape
    fields = {1: dtype, 2: shape, 3: shard, 4: offset, 5: size, 6: total}
    return message(fields | {int(field[1:]): value for field, value in more.items()})


LIES = {
    "shape": (table(HEADER | {b"a": entry(shape_message(3))}), "which is 12 bytes, and 8"),
    "size": (table(HEADER | {b"a": entry(size=2**40)}), "which is 8 bytes, and 1099511627776"),
    "both": (table(HEADER | {b"a": entry(shape_message(2**40), 2**42)}), "lies outside the data files"),
    "huge": (table(HEADER | {b"a": entry(shape_message(2**62))}), "has the shape"),
    "product": (table(HEADER | {b"a": entry(shape_message(2**40, 2**40))}), "has the shape"),
    "negative": (table(HEADER | {b"a": entry(shape_message(-1))}), "has the shape"),
    "rank": (table(HEADER | {b"a": entry(shape_message(*[1] * 70))}), "has the shape"),
    "offset": (table(HEADER | {b"a": entry(offset=2**63)}), "lies outside"),
    "offset near": (table(HEADER | {b"a": entry(offset=1)}), "lies outside"),
    "shard": (table(HEADER | {b"a": entry(shard=1)}), "lies outside"),
    "checksum": (table(HEADER | {b"a": entry(total=1)}), "the checksum of 'a'"),
    "type": (table(HEADER | {b"a": entry(dtype=99)}), "holds no tensors.*TensorFlow's type 99"),
    "parts": (table(HEADER | {b"a": entry(f7=b"")}), "holds no tensors.*a variable in parts"),
    "shape number": (table(HEADER | {b"a": message({1: 1, 2: 5})}), "entries are broken"),
    "size bytes": (table(HEADER | {b"a": entry() + message({5: b"x"})}), "entries are broken"),
    "wire": (table(HEADER | {b"a": b"\x0f"}), "entries are broken"),
    "cut": (table(HEADER | {b"a": b"\x12\x7f"}), "entries are broken"),
    "cut number": (table(HEADER | {b"a": b"\x08\x80"}), "entries are broken"),
    "long number": (table(HEADER | {b"a": b"\x08" + b"\xff" * 20}), "entries are broken"),
    "no header": (table({b"a": entry()}), "no header"),
    "no shards": (table({b"": b"", b"a": entry()}), "no data files"),
    "shards": (table({b"": message({1: 2**31})}), "too many"),
    "more shards": (table({b"": message({1: 2}), b"a": entry()}), "There is no .*data-00000-of-00002"),
    "big-endian": (table({b"": message({1: 1, 2: 1})}), "big-endian"),
    "order": (table(HEADER | {b"b": entry(), b"a": entry()}), "not sorted at b'a'"),
    "not UTF-8": (table(HEADER | {b"\xff": entry()}), "entries are broken"),
    "control name": (table(HEADER | {b"a\x1b": entry()}), "a tensor is called"),
    "long name": (table(HEADER | {b"a" * 5000: entry()}), "is broken"),
    "block size": (table(HEADER, handle=varint(0) + varint(2**62)), "a block of 4611686018427387904 bytes"),
    "block offset": (table(HEADER, handle=varint(2**62) + varint(100)), "a block of 100 bytes"),
    "block handle": (table(HEADER, handle=b"\xff"), "entries are broken"),
    "index size": (table(HEADER, index=varint(0) + varint(2**62)), "a block of 4611686018427387904 bytes"),
    "index size none": (table(HEADER, index=varint(0) + varint(0)), "a block of 0 bytes"),
    "no magic": (b"x" * 100, "does not end like"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", LIES)
def test_an_index_that_lies(tmp_path, case):
    index, pattern = LIES[case]
    (tmp_path / "x.data-00000-of-00001").write_bytes(FOUR)
    (tmp_path / "x.index").write_bytes(index)
    hostile.refused(tmp_path / "x", pattern)


def test_the_maker_makes_what_tensorflow_reads(tmp_path):
    """The hostile files differ from right ones by their one lie."""
    import tensorflow as tf

    (tmp_path / "x.data-00000-of-00001").write_bytes(FOUR)
    (tmp_path / "x.index").write_bytes(table(HEADER | {b"a": entry()}))
    assert tf.train.load_checkpoint(str(tmp_path / "x")).get_tensor("a").tolist() == [0, 1]
    hostile.assert_equal(tmp_path / "x", {"a": np.arange(2, dtype=np.float32)})


def test_restart_points_and_shared_keys_that_lie(tmp_path):
    """Blocks whose checksum holds: more restart points than bytes, and a key that shares more than there is."""
    (tmp_path / "x.data-00000-of-00001").write_bytes(FOUR)
    good = table(HEADER | {b"a": entry()})
    for body in (
        b"\0\0\0" + b"\xff" * 4,
        varint(9) + varint(1) + varint(0) + b"a" + bytes(4) + b"\1\0\0\0",
        varint(0) + varint(1) + varint(2**40) + b"a" + bytes(4) + b"\1\0\0\0",
    ):
        block = body.rjust(8, b"\0") + b"\0"
        block += checksum.masked(checksum.crc32c(block)).to_bytes(4, "little")
        blocks = table_block([(b"\xff", varint(0) + varint(len(block) - 5))])
        footer = varint(0) * 2 + varint(len(block)) + varint(len(blocks) - 5)
        (tmp_path / "x.index").write_bytes(block + blocks + footer.ljust(40, b"\0") + good[-8:])
        hostile.refused(tmp_path / "x", "is broken|no header|no data files|not sorted")


def test_files_that_are_missing(tmp_path):
    save(tmp_path / "x", {"a": np.ones(3)})
    os.rename(tmp_path / "x.data-00000-of-00001", tmp_path / "away")
    hostile.refused(tmp_path / "x", "There is no .*x.data-00000-of-00001")
    os.rename(tmp_path / "x.index", tmp_path / "x.data-00000-of-00001")
    hostile.refused(tmp_path / "x.data-00000-of-00001", "whose x.index is not beside it")


def test_cut_and_flipped(tmp_path):
    save(tmp_path / "x", {"a": np.ones((2, 3), np.float32), "b": np.ones(2)})
    # No checksum covers the padding of the index's last 48 bytes, and nothing else is without one.
    for file, harmless in (("x.index", 160), ("x.data-00000-of-00001", 0)):
        refused, read = hostile.stands(tmp_path / file, (tmp_path / file).read_bytes(), tmp_path / "x")
        assert refused >= 240 and read <= harmless, file
