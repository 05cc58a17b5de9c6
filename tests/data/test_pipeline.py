# SPDX-License-Identifier: Apache-2.0
"""Batches against the raw files: content, coverage, hosts, resuming, threads, errors and memory."""

import itertools
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import vilt
from tests.data import prepared
from vlp_jax.data import facts as data_facts
from vlp_jax.data import image, pipeline, spec, text
from vlp_jax.types import UserError

TRAIN, VALIDATION = 60, 23
SIZES = ((64, 64), (64, 112), (90, 64))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return prepared.write(folder, splits={"train": TRAIN, "validation": VALIDATION}, sizes=SIZES)


@pytest.fixture
def config(directory):
    config = vilt.get_config("variant=tiny")
    config.data.update(
        dir=str(directory), text_length=32, image_size=64, image_limit=112, patch_size=16, max_patches=0
    )
    config.train.batch_size = 16
    return config


def take(batches, count):
    return list(itertools.islice(batches, count))


def equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def pairs(records):
    return [(row, number) for row in range(records) for number in range(len(prepared.captions(row)))]


def test_rows_hold_what_the_files_hold(config, directory):
    vocabulary = text.Vocabulary.load(directory / "vocabulary.model")
    rule = image.layout(config.data)
    for batch in take(pipeline.batches(config), 3):
        spec.check(batch, spec.spec(config, 16))
        for row, pair in enumerate(batch["example_id"]):
            record, number = pairs(TRAIN)[pair]
            assert batch["image_id"][row] == record and batch["source_id"][row] == 0
            encoded = vocabulary.encode([prepared.captions(record)[number]], 32)
            expected = encoded | image.load(prepared.picture(record, *SIZES[record % 3]), rule)
            for key, value in expected.items():
                np.testing.assert_array_equal(batch[key][row], value[0], err_msg=key)
            labels, places = batch["mlm_labels"][row], batch["mlm_positions"][row]
            assert (labels >= 0).sum() == max(1, round(config.data.mask_rate * batch["text_mask"][row].sum()))
            np.testing.assert_array_equal(batch["text_ids"][row][places[labels >= 0]], labels[labels >= 0])


def test_every_pair_once_an_epoch(config):
    total = len(pairs(TRAIN))
    assert total == 120
    seen = np.concatenate([batch["example_id"] for batch in take(pipeline.batches(config), 15)])
    for epoch in (seen[:total], seen[total:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(total))
    assert (seen[:total] != seen[total:]).any()


def test_pictures_as_index(config):
    config.data.index = "pictures"
    config.train.batch_size = 20
    batches = take(pipeline.batches(config), 60)
    records = np.concatenate([batch["image_id"] for batch in batches]).reshape(20, TRAIN)
    np.testing.assert_array_equal(np.sort(records, 1), np.tile(np.arange(TRAIN), (20, 1)))
    shown = np.concatenate([batch["example_id"] for batch in batches])
    assert len(set(shown.tolist())) == len(pairs(TRAIN))  # all captions get their turn
    assert all(pairs(TRAIN)[pair][0] == record for pair, record in zip(shown, records.ravel(), strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_are_one(config, hosts):
    config.data.max_patches = 20  # so that patches are drawn
    whole = take(pipeline.batches(config), 4)
    parts = [take(pipeline.batches(config, host=host, hosts=hosts), 4) for host in range(hosts)]
    together = [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    equal(whole, together)


@pytest.mark.parametrize("start", [1, 7, 11])
def test_resume_at_any_step(config, start):
    config.data.max_patches = 20
    equal(take(pipeline.batches(config), 14)[start:], take(pipeline.batches(config, start=start), 14 - start))


def test_far_step(config):
    batch = next(pipeline.batches(config, start=10**9))
    assert batch["example_id"].min() >= 0


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 4)])
def test_threads_change_nothing(config, threads, prefetch):
    whole = take(pipeline.batches(config), 6)
    config.data.threads, config.data.prefetch = threads, prefetch
    equal(whole, take(pipeline.batches(config), 6))


def test_seed_changes_order_and_masks(config):
    first = next(pipeline.batches(config))
    config.seed = 1
    assert (next(pipeline.batches(config))["example_id"] != first["example_id"]).any()


def test_dropped_patches(config):
    config.data.max_patches = 20
    batch = next(pipeline.batches(config))
    assert batch["patches"].shape == (16, 20, 768)
    wide = (batch["grid_size"] == [4, 7]).all(1)
    assert wide.any() and batch["patch_mask"][wide].all()
    for row in np.flatnonzero(wide):
        places = batch["patch_positions"][row]
        assert len({tuple(place) for place in places.tolist()}) == 20


def test_mixture(config, directory, tmp_path):
    other = prepared.write(
        tmp_path / "other", splits={"train": 9}, vocabulary=directory / "vocabulary.model", name="other"
    )
    config.data.dir = f"tiny={directory}:3,other={other}:1"
    config.train.batch_size = 512
    batches = take(pipeline.batches(config), 8)  # one block of the order
    source = np.concatenate([batch["source_id"] for batch in batches])
    example = np.concatenate([batch["example_id"] for batch in batches])
    assert abs((source == 1).mean() - 0.25) < 0.001
    assert set(example[source == 1].tolist()) == set(range(len(pairs(9))))
    assert set(example[source == 0].tolist()) == set(range(len(pairs(TRAIN))))
    facts = data_facts.collect(config)
    assert [one["weight"] for one in facts["sources"].values()] == [3, 1]
    assert len(facts["manifest_sha256"]) == 64


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_is_one_pass(config, hosts):
    total = len(pairs(VALIDATION))
    parts = [
        list(pipeline.evaluation_batches(config, split="validation", batch_size=16, host=host, hosts=hosts))
        for host in range(hosts)
    ]
    batches = [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    shown = np.concatenate([batch["example_id"] for batch in batches])
    assert len(batches) == -(-total // 16) and total % 16
    np.testing.assert_array_equal(np.sort(shown[:total]), np.arange(total))
    assert (shown[total:] == -1).all()
    last = batches[-1]
    padding = last["example_id"] < 0
    for key in ("image_id", "source_id", "mlm_labels"):
        assert (last[key][padding] == -1).all() and (last[key][~padding] >= 0).any()
    assert last["text_mask"][padding].any(1).all() and last["patch_mask"][padding].any(1).all()
    spec.check(last, spec.spec(pipeline.evaluation_config(config), 16))


def test_evaluation_is_the_same_every_time(config):
    config.data.max_patches = 20

    def by_pair(batch_size, examples=0):
        rows = {}
        for batch in pipeline.evaluation_batches(
            config, split="validation", batch_size=batch_size, examples=examples
        ):
            for row, pair in enumerate(batch["example_id"].tolist()):
                if pair >= 0:
                    rows[pair] = {key: batch[key][row] for key in batch}
        return rows

    first = by_pair(16)
    config.seed = 9
    for again in (by_pair(11), by_pair(5, examples=7)):
        for pair, row in again.items():
            for key, value in row.items():
                np.testing.assert_array_equal(value, first[pair][key], err_msg=key)
    assert len(by_pair(5, examples=7)) == 7
    # Two captions of a picture see the same patches of it.
    assert pairs(VALIDATION)[1][0] == pairs(VALIDATION)[2][0] == 1
    np.testing.assert_array_equal(first[1]["patches"], first[2]["patches"])


def test_evaluation_of_a_mixture(config, directory, tmp_path):
    other = prepared.write(
        tmp_path / "other", splits={"validation": 5}, vocabulary=directory / "vocabulary.model", name="other"
    )
    config.data.dir = f"tiny={directory}:3,other={other}:1"
    rows = [
        (source, example)
        for batch in pipeline.evaluation_batches(config, split="validation", batch_size=8)
        for source, example in zip(batch["source_id"].tolist(), batch["example_id"].tolist(), strict=True)
    ]
    expected = [(0, pair) for pair in range(len(pairs(VALIDATION)))] + [
        (1, pair) for pair in range(len(pairs(5)))
    ]
    assert sorted(row for row in rows if row[0] >= 0) == expected


def test_facts(config, directory):
    facts = data_facts.collect(config)
    vocabulary = text.Vocabulary.load(directory / "vocabulary.model")
    assert facts["vocab_size"] == vocabulary.size and facts["mask_id"] == vocabulary.mask
    assert {vocabulary.word(piece) for piece in facts["visual_ids"]} == set(prepared.COLOURS)
    assert facts["sources"]["tiny"]["splits"]["validation"] == {
        "records": VALIDATION, "pairs": len(pairs(VALIDATION)), "alive": 1.0,
    }  # fmt: skip
    assert json.loads(json.dumps(facts)) == facts


def test_a_stream_that_is_let_go_of_says_nothing(config, capfd):
    for _ in range(3):
        next(pipeline.batches(config))
        time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_record_is_named(config, directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    shard = sorted(copy.glob("*train*record*"))[1]
    content = bytearray(shard.read_bytes())
    content[8000] ^= 1
    shard.write_bytes(content)
    config.data.dir = str(copy)
    with pytest.raises(UserError, match=rf"record \d+ of {shard} is damaged: .*chunk at \d+"):
        take(pipeline.batches(config), 8)


def test_a_picture_that_does_not_decode_is_named(config, directory, tmp_path):
    def pictures(row, height, width):
        content = prepared.picture(row, height, width)
        return content if row != 7 else content[:300]

    broken = prepared.write(tmp_path / "broken", splits={"train": 20}, pictures=pictures)
    config.data.dir = str(broken)
    with pytest.raises(UserError, match=r"picture in record 7 of .*00000-of-00002 .*cannot be decoded"):
        take(pipeline.batches(config), 20)


def test_a_picture_of_another_size_than_stated_is_named(config, directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    index = copy / "train.index.npz"
    with np.load(index) as arrays:
        columns = dict(arrays)
    columns["width"][3] += 9
    np.savez(index, **columns)
    config.data.dir = str(copy)
    with pytest.raises(
        UserError, match=r"picture in record 3 of .* has 64 x 64 pixels; the index states 64 x 73"
    ):
        take(pipeline.batches(config), 20)


def test_bad_requests_are_refused_at_once(config, directory, tmp_path):
    def refused(words, **changes):
        for key, value in changes.items():
            setattr(config.data, key, value)
        with pytest.raises(UserError) as error:
            pipeline.batches(config)
        assert all(word in str(error.value) for word in words), str(error.value)

    with pytest.raises(UserError, match=r"train\.batch_size=16 .* 3 hosts\. Possible near it: 15"):
        pipeline.batches(config, hosts=3)
    with pytest.raises(UserError, match=r"evaluation\.batch_size=0"):
        pipeline.evaluation_batches(config, split="train", batch_size=0)
    with pytest.raises(UserError, match="Possible: train, validation"):
        pipeline.batches(config, split="test")
    refused(["'picture'", "Did you mean 'pictures'"], index="picture")
    refused(["image_size=64", "patch_size=24"], index="pairs", patch_size=24)
    refused(["text_length=2"], patch_size=16, text_length=2)
    refused(["does not exist", "vlp_jax.prepare"], text_length=32, dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="vlp_jax.prepare"):
        data_facts.collect(config)
    copy = shutil.copytree(directory, tmp_path / "copy")
    text.train(["another text"], copy / "vocabulary.model", 100)
    refused(["is not the one that the manifest", "sha256"], dir=str(copy))


def test_spec_check(config):
    batch = next(pipeline.batches(config))
    expected = spec.spec(config, 16)
    with pytest.raises(ValueError, match="keys"):
        spec.check({key: batch[key] for key in batch if key != "patches"}, expected)
    with pytest.raises(ValueError, match="text_ids is int64"):
        spec.check(batch | {"text_ids": batch["text_ids"].astype(np.int64)}, expected)


@pytest.mark.slow
def test_the_process_ends_quietly_with_running_pipelines(directory):
    program = (
        "from configs import vilt; from vlp_jax.data import pipeline\n"
        f"config = vilt.get_config(); config.data.dir = {str(directory)!r}; config.train.batch_size = 4\n"
        "a = pipeline.batches(config); b = pipeline.batches(config); next(a); next(a); print('done')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
