# SPDX-License-Identifier: Apache-2.0
"""Prepared directories: what TFDS and our reader see, the same bytes however they were made, and nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from tests.data import raw
from vlp_jax.data import source, text
from vlp_jax.data.datasets import coco, scenes
from vlp_jax.data.preparation import assembly, shards, writer
from vlp_jax.types import UserError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(assembly, "SHARD_RECORDS", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return raw.coco(tmp_path_factory.mktemp("raw"), {"train2017": 8, "val2017": 4})


def prepare(folder, target, **changes):
    return writer.write(coco, folder, target, **{"workers": 1, **changes})


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "SHARD_RECORDS", 3)
        prepare(folder, target)
    return target


def test_manifest_states_what_is_there(undisturbed, folder):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert [shard["file"] for shard in train["shards"]] == [
        f"coco-train.array_record-{i:05d}-of-00003" for i in range(3)
    ]
    assert [shard["records"] for shard in train["shards"]] == [2, 3, 3]
    assert (train["records"], train["pairs"]) == (8, 16)
    parts = [one for split in manifest["splits"].values() for one in [*split["shards"], split["index"]]]
    for one in [*parts, *({**entry, "file": folder / entry["file"]} for entry in manifest["sources"])]:
        content = (undisturbed / one["file"]).read_bytes()
        assert (one["bytes"], one["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["vocabulary"]["sha256"] == contents(undisturbed)["vocabulary.model"]
    assert text.Vocabulary.load(undisturbed / "vocabulary.model").size == manifest["vocabulary"]["size"]
    named = {one["file"] for one in parts} | {
        "manifest.json",
        "dropped.jsonl",
        "vocabulary.model",
        "dataset_info.json",
        "features.json",
    }
    assert set(contents(undisturbed)) == named


def test_index_and_our_reader(undisturbed, folder):
    opened = source.Source(undisturbed, "train")
    with np.load(undisturbed / "train.index.npz") as index:
        assert {name: index[name].dtype for name in index} == shards.COLUMNS
        assert index["captions"].tolist() == [2] * 8
        assert len({*index["pixels"].tolist()}) == 8 and index["coco_id"].tolist() == [*range(1, 9)]
    for row, record in enumerate(opened.read([5, 0, 7])):
        key = [6, 1, 8][row]
        assert record["image"] == (folder / "train2017" / f"{key:012d}.jpg").read_bytes()
        assert record["captions"] == [f"Picture {key}, words 0.", f"Picture {key}, words 1."]


def test_tfds_reads_it(undisturbed, folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(undisturbed)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 8,
        "validation": 2,
        "test": 2,
    }
    data = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(data) == 8
    record = data[4]
    assert bytes(record["image"]) == (folder / "train2017" / "000000000005.jpg").read_bytes()
    assert [caption.decode() for caption in record["captions"]] == [
        "Picture 5, words 0.",
        "Picture 5, words 1.",
    ]
    assert (record["image_key"], record["image_name"].decode(), record["height"]) == (
        5,
        "000000000005.jpg",
        30,
    )
    assert builder.as_data_source("train")[4]["image"].shape == (30, 40, 3)


def test_second_run_says_that_all_is_there(undisturbed, folder):
    before = contents(undisturbed)
    manifest, fresh = prepare(folder, undisturbed)
    assert not fresh and manifest == json.loads((undisturbed / "manifest.json").read_text())
    assert contents(undisturbed) == before


@pytest.mark.slow
def test_same_bytes_from_several_processes(undisturbed, folder, tmp_path):
    prepare(folder, tmp_path, workers=2)
    assert contents(tmp_path) == contents(undisturbed)


def test_other_options_need_overwrite(folder, tmp_path):
    prepare(folder, tmp_path, options={"captions": 1})
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match="captions is 1, asked for 0. Choose another --target, or give --overwrite"
    ):
        prepare(folder, tmp_path)
    assert contents(tmp_path) == before
    manifest, fresh = prepare(folder, tmp_path, overwrite=True, options={"examples": 2})
    assert fresh and manifest["splits"]["train"]["pairs"] == 4
    assert sum(".array_record-" in name for name in contents(tmp_path)) == 3
    assert source.Source(tmp_path, "train").pairs == 4


def test_a_failed_overwrite_leaves_the_old_data(folder, tmp_path, monkeypatch):
    prepare(folder, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(coco, "listing", lambda *_, **__: iter([("train", coco.Dropped("a.jpg", "is bad"))]))
    with pytest.raises(UserError, match="is bad"):
        prepare(folder, tmp_path, options={"captions": 1}, overwrite=True)
    assert {name: one for name, one in contents(tmp_path).items() if "unfinished" not in name} == before


def test_changed_source_and_damage_are_named(tmp_path):
    folder = raw.coco(tmp_path / "raw", {"train2017": 4})
    target = tmp_path / "data"
    prepare(folder, target)
    path = folder / "annotations" / "captions_train2017.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"source files have changed \(annotations/captions_train2017.json\)"):
        prepare(folder, target)
    path.write_text(path.read_text()[:-1])
    os.truncate(target / "coco-train.array_record-00001-of-00002", 65536)
    with pytest.raises(
        UserError, match="coco-train.array_record-00001-of-00002 is missing or has a wrong size"
    ):
        prepare(folder, target)
    prepare(folder, target, overwrite=True)
    assert len(source.Source(target, "train").read(range(4))) == 4


def test_a_stopped_run_is_taken_up(undisturbed, folder, tmp_path, monkeypatch):
    whole, made = shards._write, []

    def stops(job, *rest):
        made.append(job.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(job, *rest)

    monkeypatch.setattr(shards, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(UserError, match="no readable manifest"):
        source.Source(tmp_path, "train")
    prepare(folder, tmp_path)
    third = "coco-train.array_record-00002-of-00003"
    assert made[2:4] == [third, third] and len(made) == 6
    assert contents(tmp_path) == contents(undisturbed)


def test_unfinished_work_of_other_options_is_not_used(undisturbed, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "_index", mock.Mock(side_effect=KeyError))
        with pytest.raises(KeyError):
            prepare(folder, tmp_path, options={"captions": 1})
    assert (tmp_path / "unfinished").is_dir()
    prepare(folder, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


def bad_source(folder, bad):
    """Ten training pictures, of which `bad` are none; one more was never there."""
    raw.coco(folder, {"train2017": 11})
    (folder / "train2017" / "000000000011.jpg").unlink()
    for number in range(1, bad + 1):
        (folder / "train2017" / f"{number:012d}.jpg").write_bytes(b"<!DOCTYPE html>")
    return folder


def test_what_is_bad_is_listed_and_counted(tmp_path):
    folder = bad_source(tmp_path / "raw", 2)
    with pytest.raises(UserError, match=r"2 of 11 .*/000000000001.jpg is an HTML page.*larger --max_bad"):
        prepare(folder, tmp_path / "data")
    with pytest.raises(UserError, match="000000000001.jpg cannot be used: is an HTML.*--on_bad=skip"):
        prepare(folder, tmp_path / "data", on_bad="error")
    with pytest.raises(UserError, match="--on_bad=skp is unknown. Did you mean 'skip'"):
        prepare(folder, tmp_path / "data", on_bad="skp")
    manifest, _ = prepare(folder, tmp_path / "data", max_bad=0.5)
    lines = [json.loads(line) for line in (tmp_path / "data/dropped.jsonl").read_text().splitlines()]
    assert [(one["split"], one["file"]) for one in lines] == [
        ("train", f"train2017/{number:012d}.jpg") for number in (1, 2, 11)
    ]
    assert manifest["dropped"]["count"] == 3 and sum(manifest["dropped"]["reasons"].values()) == 3
    train = manifest["splits"]["train"]
    assert (train["records"], train["listed"], train["alive"]) == (8, 11, 8 / 11)
    assert "dropped: 3 pictures (27.27%), listed in dropped.jsonl" in writer.summary(manifest)


def test_files_of_a_web_set_that_were_never_there_are_not_bad(tmp_path, monkeypatch):
    folder = bad_source(tmp_path / "raw", 0)
    whole = coco.listing

    def listing(*arguments, **options):
        for split, entry in whole(*arguments, **options):
            yield (
                split,
                dataclasses.replace(entry, missing=True) if isinstance(entry, coco.Dropped) else entry,
            )

    monkeypatch.setattr(coco, "listing", listing)
    manifest, _ = prepare(folder, tmp_path / "data", max_bad=0)
    assert manifest["splits"]["train"]["alive"] == 10 / 11


def vanish(job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_one_message(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "write_shard", vanish)
    with pytest.raises(UserError, match="2 worker processes was killed.*fewer --workers"):
        prepare(folder, tmp_path, workers=2)


@pytest.mark.slow
def test_a_killed_run_leaves_no_manifest_and_no_process(tmp_path, monkeypatch):
    """The real thing: SIGKILL while two processes write, then a second run, equal to one never disturbed."""
    options = {"train": 1500, "validation": 9, "test": 9}
    flags = [f"--{name}={number}" for name, number in options.items()]
    command = [sys.executable, "-m", "vlp_jax.prepare", "scenes", f"--target={tmp_path / 'a'}", *flags]
    first = subprocess.Popen([*command, "--workers=2"], start_new_session=True)
    while not (tmp_path / "a" / "unfinished").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "a" / "manifest.json").exists()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(first.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("workers outlive the run that started them")
    subprocess.run([*command, "--workers=1"], check=True)
    monkeypatch.undo()
    writer.write(scenes, "", tmp_path / "b", options=options, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_one_run_at_a_time(folder, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another run is preparing"):
        prepare(folder, tmp_path)
    os.close(handle)
    prepare(folder, tmp_path)


def test_very_many_sources_are_one_entry(folder, monkeypatch):
    paths = sorted((folder / "train2017").iterdir())
    monkeypatch.setattr(assembly, "MOST_SOURCES", 7)
    one = assembly.source_entries(paths, folder)
    assert one[0]["file"] == f"8 files, train2017/{paths[0].name} to train2017/{paths[-1].name}"
    assert one != assembly.source_entries([*paths, paths[0]], folder)
    assert assembly.source_entries(paths[:7], folder) == assembly.file_entries(paths[:7], folder)


def test_a_full_disk_is_an_error_of_the_place():
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as error, shards._record_writer(Path("/dev/full")) as append:
        for _ in range(2000):
            append(os.urandom(1000))
    assert error.value.errno == errno.ENOSPC


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(undisturbed, folder, tmp_path, monkeypatch):
    whole = shards._check_shard

    def full(path, records):
        if "validation" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(path, records)

    monkeypatch.setattr(shards, "_check_shard", full)
    with pytest.raises(
        UserError, match="No space left on device; .* MiB are free in .*finished parts are kept"
    ):
        prepare(folder, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(shards, "_check_shard", whole)
    prepare(folder, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


def test_a_shard_that_lost_records_is_an_error(folder, tmp_path, monkeypatch):
    whole = shards._check_shard
    monkeypatch.setattr(shards, "_check_shard", lambda path, records: whole(path, records + 1))
    with pytest.raises(UserError, match="2 records of 3 were written"):
        prepare(folder, tmp_path)


@pytest.mark.parametrize("inside", ["", "below"])
def test_target_in_the_way_of_a_file(folder, tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file. Choose another|cannot be written: Not a directory"):
        prepare(folder, tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_permission(folder, tmp_path, monkeypatch):
    """Simulated, because tests may run as root, who may write everywhere."""
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "data"))
    monkeypatch.setattr(writer, "_begin", mock.Mock(side_effect=denied))
    with pytest.raises(
        UserError, match="data cannot be written: Permission denied; .* choose another --target"
    ):
        prepare(folder, tmp_path / "data")


def test_other_files_in_the_target_stay(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prepare(folder, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["unfinished", "vocab.txt", "train.index.npz", "dataset_info.json"])
def test_what_others_have_put_there_is_not_touched(folder, tmp_path, name):
    theirs = tmp_path / "data" / name
    theirs.parent.mkdir()
    if name == "unfinished":
        theirs.mkdir()
        theirs = theirs / "novel.txt"
    theirs.write_text("mine")
    with pytest.raises(UserError, match=f"{name} is in the way"):
        prepare(folder, tmp_path / "data")
    assert theirs.read_text() == "mine"


def test_an_unfinished_folder_that_is_a_link_is_not_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="unfinished is in the way"):
        prepare(folder, tmp_path / "data")


@pytest.mark.parametrize("when", ["before the plan", "among the files", "before the end"])
def test_a_kill_while_installing_leaves_what_the_next_run_knows(
    undisturbed, folder, tmp_path, monkeypatch, when
):
    with monkeypatch.context() as patch:
        target = {"before the plan": "save", "among the files": "stored", "before the end": "shutil"}[when]
        broken = mock.Mock(side_effect=KeyboardInterrupt)
        if target == "shutil":
            patch.setattr(writer.shutil, "rmtree", broken)
        else:
            patch.setattr(writer, target, broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path)
    prepare(folder, tmp_path)
    made = contents(tmp_path)
    assert {name: one for name, one in made.items() if "unfinished/" not in name} == contents(undisturbed)


def test_leftovers_of_killed_workers_go(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "_index", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path)
        left = tmp_path / "unfinished" / "coco-train.array_record-00000-of-00003.123.tmp"
        left.write_bytes(b"half")
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("size", [0, 1, 10**10])
def test_impossible_sizes_of_a_vocabulary_are_refused_at_once(folder, tmp_path, size):
    with pytest.raises(UserError, match=f"--vocab_size={size} pieces cannot be trained. Possible: 16 to"):
        prepare(folder, tmp_path / "data", vocab_size=size)
    assert not (tmp_path / "data").exists()


def test_without_any_text_a_vocabulary_must_be_given(tmp_path):
    folder = raw.coco(tmp_path / "raw", {"train2017": 4}, captions=0)
    (folder / "annotations/captions_train2017.json").unlink()
    content = {"images": [{"id": 1, "file_name": f"{1:012d}.jpg"}], "annotations": [], "categories": []}
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no text that a vocabulary could be trained on. Give --vocab=FILE"):
        prepare(folder, tmp_path / "data")


def test_given_vocabulary(folder, tmp_path):
    text.train((f"word{i}" for i in range(9)), tmp_path / "mine.model", 100)
    manifest, _ = prepare(folder, tmp_path / "data", vocab=tmp_path / "mine.model")
    assert (tmp_path / "data" / "vocabulary.model").read_bytes() == (tmp_path / "mine.model").read_bytes()
    assert manifest["vocabulary"]["origin"] == manifest["vocabulary"]["sha256"]
    with pytest.raises(UserError, match="vocabulary .*nowhere.model cannot be read"):
        prepare(folder, tmp_path / "other", vocab=tmp_path / "nowhere.model")
    assert not (tmp_path / "other").exists()
