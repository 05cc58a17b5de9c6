# SPDX-License-Identifier: Apache-2.0
"""Reading records at random, and what is said when a directory, a shard or a byte is wrong."""

import json
import shutil

import numpy as np
import pytest

from tests.data import prepared
from vlp_jax.data.record import parse
from vlp_jax.data.source import Source, open_sources, parse_spec
from vlp_jax.types import UserError

RECORDS = 37


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return prepared.write(
        tmp_path_factory.mktemp("data") / "tiny", splits={"train": RECORDS, "test": 4, "none": 0}
    )


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def shards(directory):
    return sorted(directory.glob("tiny-train.array_record*"))


def change_manifest(directory, change):
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_every_record_comes_back(original):
    source = Source(original, "train")
    assert len(source) == RECORDS
    rows = np.random.default_rng(0).permutation(RECORDS)
    for row, record in zip(rows.tolist(), source.read(rows), strict=True):
        assert record["image"] == prepared.picture(row)
        assert record["captions"] == prepared.captions(row)
        assert record["image_name"] == f"{row}.jpg" and record["image_key"] == row + 10**10
        assert (record["height"], record["width"]) == (64, 64)
    assert [record["image_key"] - 10**10 for record in source.read([3, 3, 36, 0])] == [3, 3, 36, 0]
    assert source.read([]) == []


def test_pairs(original):
    source = Source(original, "train")
    expected = [(row, number) for row in range(RECORDS) for number in range(len(prepared.captions(row)))]
    assert source.pairs == len(expected)
    record, caption = source.locate(np.arange(source.pairs))
    assert list(zip(record.tolist(), caption.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(source.pair(record, caption), np.arange(source.pairs))


def test_tfds_reads_the_same_bytes_as_examples():
    """The light parser against TFDS's own decoder."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image_name": tfds.features.Text(),
            "image_key": np.int64,
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "height": np.int32,
            "width": np.int32,
        }
    )
    contents = prepared.encode(
        image=prepared.picture(5),
        image_name="é.jpg",
        image_key=2**40,
        captions=["a", "b ü"],
        height=64,
        width=64,
    )
    theirs = features.deserialize_example(contents)
    ours = parse(contents)
    assert ours["captions"] == [line.decode() for line in theirs["captions"].numpy()]
    assert ours["image_name"] == theirs["image_name"].numpy().decode()
    assert ours["image_key"] == theirs["image_key"].numpy() == 2**40
    assert parse(contents, ("captions",)) == {"captions": ["a", "b ü"]}


@pytest.mark.parametrize("offset", [1500, 21_000, 39_000])
def test_flipped_byte_names_shard_record_and_offset(directory, offset):
    shard = shards(directory)[1]
    content = bytearray(shard.read_bytes())
    content[offset] ^= 4
    shard.write_bytes(content)
    source = Source(directory, "train")
    good = bad = 0
    for number in range(RECORDS):
        try:
            assert source.read([number])[0]["image"] == prepared.picture(number)
            good += 1
        except UserError as error:
            bad += 1
            message = str(error)
            inside = number - RECORDS // 2
            assert f"record {inside} of {shard}" in message and "chunk at" in message and "again" in message
            with pytest.raises(UserError, match=f"record {inside} of"):
                source.read([0, RECORDS - 1, number, 1])
    assert (good, bad) == (RECORDS - 1, 1)


@pytest.mark.parametrize("damage", ["truncate", "shrink", "delete", "swap"])
def test_damaged_shards_are_found_before_a_record_is_used(directory, damage):
    shard, other = shards(directory)
    content = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(content[:-65536])
        expected = f"{len(content) - 65536} bytes; the manifest states {len(content)}"
    elif damage == "shrink":  # right size, no records: what a cut and zero-filled copy looks like
        shard.write_bytes(content[:5000] + bytes(len(content) - 5000))
        expected = "holds 0 records; the manifest states"
    elif damage == "delete":
        shard.unlink()
        expected = "is missing"
    else:
        change_manifest(
            directory, lambda manifest: manifest["splits"]["train"]["shards"][0].update(records=3)
        )
        expected = "states 37 records, its shards"
    with pytest.raises(UserError) as error:
        Source(directory, "train").read([RECORDS - 1, 0])
    assert expected in str(error.value)
    assert (shard.name if damage != "swap" else "manifest.json") in str(error.value)


def test_damaged_index(directory):
    path = directory / "train.index.npz"
    np.savez(path, captions=np.ones(3, np.uint16), height=np.ones(3, np.uint16), width=np.ones(3, np.uint16))
    with pytest.raises(UserError, match=r"train\.index\.npz is uint16\[3\]; the manifest states 37 records"):
        Source(directory, "train")
    for content in (b"", b"PK\x03\x04nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train\.index\.npz cannot be read"):
            Source(directory, "train")


def test_bad_directories(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    for name, words in (("missing", "does not exist"), ("empty", "is empty")):
        with pytest.raises(UserError) as error:
            Source(tmp_path / name, "train")
        assert words in str(error.value)
        assert f"python -m vlp_jax.prepare scenes --target={tmp_path / name}" in str(error.value)
    with pytest.raises(UserError, match="is not a directory"):
        Source(directory / "manifest.json", "train")
    (directory / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be used"):
        Source(directory, "train")
    (directory / "manifest.json").write_text('{"splits": {"train": {"records": 1}}}')
    with pytest.raises(UserError, match="KeyError: 'shards'"):
        Source(directory, "train")
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        Source(directory, "train")


def test_bad_splits(original):
    with pytest.raises(
        UserError, match=r"'trian' .* does not exist\. Did you mean 'train'\? Possible: train, test"
    ):
        Source(original, "trian")
    with pytest.raises(UserError, match="'none' .* is empty.*Possible: train, test"):
        Source(original, "none")


def test_mixtures(original, directory, tmp_path):
    assert [(name, len(source), weight) for name, source, weight in open_sources(str(original), "test")] == [
        ("tiny", 4, 0.0)
    ]
    mixed = open_sources(f"a={original}:1, b={directory}:2.5", "train")
    assert [(name, source.directory, weight) for name, source, weight in mixed] == [
        ("a", original, 1.0), ("b", directory, 2.5),
    ]  # fmt: skip
    assert [weight for _, _, weight in parse_spec(f"a={original},b={directory}")] == [0, 0]
    for bad in (f"a={original}:1,b={directory}", f"a={original},b={directory}:2"):
        with pytest.raises(UserError, match="gives a weight to some sources only"):
            parse_spec(bad)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"the weight of .* is {weight}.* above 0"):
            parse_spec(f"a={original}:{weight}")
    for bad in (
        f"../a={original}:1",
        f"a/b={original}",
        f"a={original}:x",
        f"={original}:1",
        "a=:1",
        f"a={original}:1,",
    ):
        with pytest.raises(UserError, match="not name=directory:weight"):
            parse_spec(bad)
    with pytest.raises(UserError, match="twice: a, a"):
        parse_spec(f"a={original}:1,a={directory}:1")
    with pytest.raises(UserError, match="config.data.dir is empty.*vlp_jax.prepare"):
        parse_spec("")
    odd = prepared.write(
        tmp_path / "x=1", splits={"train": 3}, shards=1, vocabulary=original / "vocabulary.model"
    )
    assert len(open_sources(str(odd), "train")[0][1]) == 3
    change_manifest(directory, lambda manifest: manifest["vocabulary"].update(sha256="0"))
    with pytest.raises(UserError, match="need one vocabulary"):
        open_sources(f"a={original}:1,b={directory}:2", "train")
