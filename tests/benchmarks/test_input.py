# SPDX-License-Identifier: Apache-2.0
"""The input benchmark at toy size: the peer does the same work, clocks and memory are right, tables are recorded."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from benchmarks import input as benchmark  # noqa: E402
from benchmarks import input_data, input_peer, input_prepare, input_side, measure, results  # noqa: E402
from tests.data import prepared  # noqa: E402
from vlp_jax import cli  # noqa: E402
from vlp_jax.data import image  # noqa: E402
from vlp_jax.data.source import Source  # noqa: E402
from vlp_jax.types import UserError  # noqa: E402

BEFORE = "# Results\n\n## Other\n\nwords\n"
RULE = image.Layout(384, 639, 32, 228)


@pytest.fixture(autouse=True)
def idle(monkeypatch, tmp_path):
    """A machine without load, and a results file of its own."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(measure, "others_clock", lambda: None)
    (tmp_path / "RESULTS.md").write_text(BEFORE, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen drawn pictures and their table."""
    folder = tmp_path_factory.mktemp("pictures") / "raw"
    input_data.photographs(folder, 16, [])
    return folder


def run(*argv):
    argv = ["--repeats=1", "--photographs=nowhere", *argv]
    return cli.run(benchmark.main, benchmark.define, usage=benchmark.__doc__, argv=argv)


def table(shown, heading):
    """Program -> its numbers, of the table for the console below a heading."""
    part = shown.split(f"\nInput: {heading}\n")[1].split("\nInput: ")[0]
    found = re.findall(r"^(\S[\w ,]*?)  +((?:-?[\d.]+ *)+)$", part, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


@pytest.mark.learn
def test_pictures_and_scaling_are_measured_and_recorded(capfd):
    assert run("--parts=pictures,scaling", "--pictures=16", "--record") == 0
    shown = capfd.readouterr().out
    like, published, scaling = (
        table(shown, heading)
        for heading in ("pictures", "pictures against the recipe as published", "one core and two")
    )
    assert list(like) == ["ours", "PIL, 1 worker", "PIL, 2 workers"]
    assert list(published) == ["ours", "PIL as published, 1 worker", "PIL as published, 2 workers"]
    assert list(scaling) == ["one core", "two cores"] and scaling["one core"][3:] == [1.0] * 3
    for rows in (like, published, scaling):
        assert all(len(row) == 6 and min(row) > 0 for row in rows.values())
        assert all(row[0] < 2000 and row[2] < 2000 for row in rows.values())  # what no core can do
    assert float(re.search(r"on average ([\d.]+) levels apart", shown)[1]) < 1.0
    recorded = results.RESULTS.read_text(encoding="utf-8")
    assert recorded.startswith(BEFORE) and recorded.count("## Input: pictures\n") == 1
    assert "16 JPEGs drawn" in recorded and "load 0.10 before" in recorded and recorded.count("| ours |") >= 2


@pytest.mark.learn
def test_first_batch_and_memory_are_measured(capfd):
    assert run("--parts=first,memory", "--pairs=5000", "--batch=8", "--batches=60") == 0
    shown = capfd.readouterr().out
    rows = table(shown, "first batch")
    assert list(rows) == ["one shape", "buckets"] and rows["one shape"][3:] == [1.0] * 3
    assert all(0 < row[0] < 60 for row in rows.values()) and "start=625 x 8 of 5,120 pairs" in shown
    slope, after, end, speed, _ = table(shown, "memory")["ours"]
    assert 50 < after < 5000 and 50 < end < 5000 and speed > 0 and abs(slope) < 2**23
    assert results.RESULTS.read_text(encoding="utf-8") == BEFORE


@pytest.mark.learn
def test_prepare_is_measured(capfd):
    assert run("--parts=prepare", "--sizes=4,8") == 0
    rows = table(capfd.readouterr().out, "prepare")
    assert list(rows) == [input_prepare.OURS, input_prepare.PEER, input_prepare.CHECKED]
    assert all(len(row) == 8 and row[0] > 0 and row[6] > 20 for row in rows.values())


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--parts=picture", ("'picture'", "Did you mean 'pictures'?", "scaling")),
        ("--parts=", ("no ''", "pictures, scaling")),
        ("--pictures=40", ("--pictures=40", "16")),
        ("--sizes=500", ("--sizes=500,2000",)),
        ("--sizes=500,many", ("--sizes=500,many",)),
        ("--sizes=500,500", ("--sizes=500,500",)),
    ],
)
def test_wrong_flags_are_explained(argument, words, capsys):
    assert run(argument) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message


def test_a_busy_machine_stops_the_program_at_once(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.1, 0.1))
    assert run("--record") == 2
    assert "--loaded" in capsys.readouterr().err
    assert results.RESULTS.read_text(encoding="utf-8") == BEFORE


def test_photographs_differ_and_their_table_says_so(folder, tmp_path):
    files = sorted((folder / "images").iterdir())
    assert len({path.read_bytes() for path in files}) == len(files) == 16
    assert {Image.open(path).format for path in files} == {"JPEG"}
    table_lines = (folder / "captions.csv").read_text(encoding="utf-8").splitlines()
    assert table_lines[0] == "image,caption,split" and len(table_lines) == 17
    again = tmp_path / "again"
    input_data.photographs(again, 3, files[:2])
    assert len({path.read_bytes() for path in (again / "images").iterdir()}) == 3
    input_data.part(folder, tmp_path / "part", 5)
    assert sorted(path.name for path in (tmp_path / "part" / "images").iterdir()) == [
        path.name for path in files[:5]
    ]
    assert (tmp_path / "part" / "captions.csv").read_text(encoding="utf-8").splitlines() == table_lines[:6]


def test_many_pairs_are_one_shard_listed_often(tmp_path):
    small = prepared.write(tmp_path / "small", splits={"train": 12}, shards=1)
    for name in ("dataset_info.json", "features.json"):
        (small / name).write_text("{}")
    one = Source(small, "train")
    pairs = input_data.many_pairs(small, tmp_path / "many", 1000)
    many = Source(tmp_path / "many", "train")
    assert many.pairs == pairs >= 1000 and pairs - one.pairs < 1000 and len(many) == pairs // one.pairs * 12
    for row in (0, 5, 12, len(many) - 1):
        assert many.read([row])[0]["image_name"] == one.read([row % 12])[0]["image_name"]
    np.testing.assert_array_equal(many.heights[12:24], one.heights)


def test_plain_pictures_have_the_sizes_of_photographs(tmp_path):
    input_data.plain(tmp_path / "plain", count=9, captions=2)
    files = sorted((tmp_path / "plain").glob("*.jpg"))
    sides = [Image.open(path).size[::-1] for path in files]
    assert sides[:8] == list(input_data.SIDES) and len(sides) == 9
    lines = (tmp_path / "plain" / "captions.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 19 and lines[-1] == '000008.jpg,"number 8, text 1",train'


def test_peer_resizes_by_the_same_rule_and_cuts_the_same_patches():
    draw = np.random.default_rng(0)
    sides = draw.integers(20, 1500, (200, 2)).tolist() + [[480, 640], [640, 427], [1, 1], [100, 384]]
    for tall, wide in sides:
        expected = image.resized_size(tall, wide, RULE.shorter, RULE.longer, RULE.patch)
        if max(tall, wide) / min(tall, wide) < 10:  # the original gives longer ones a side of nothing
            made = input_peer.resized(Image.new("L", (wide, tall)))
            assert made.size[::-1] == tuple(int(side) for side in expected)
    pixels = draw.integers(0, 256, (384, 512, 3), np.uint8)
    patches, mask = input_peer.patches(Image.fromarray(pixels))
    planned = image.plan(np.array([384]), np.array([512]), np.zeros(1, np.uint32), RULE)
    np.testing.assert_array_equal(mask, planned["patch_mask"][0])
    np.testing.assert_array_equal(patches, image.cut(pixels, planned["chosen"][0], 32).numpy())


def test_peer_has_the_fourteen_operations_of_vilt():
    pixels = np.random.default_rng(0).integers(60, 200, (64, 96, 3), np.uint8)
    operations = input_peer._operations()
    made = [np.asarray(operation(Image.fromarray(pixels))) for operation in operations]
    assert len(made) == 14 and all(one.shape == pixels.shape and one.dtype == np.uint8 for one in made)
    assert all((one != pixels).any() for one in made)
    posterized, solarized, added, brightness = made[3], made[4], made[5], made[8]
    np.testing.assert_array_equal(posterized, pixels & 128)
    np.testing.assert_array_equal(solarized, np.where(pixels < 77, pixels, 255 - pixels))
    np.testing.assert_array_equal(added, np.where(pixels + 33 < 128, pixels + 33, 222 - pixels.astype(int)))
    assert np.abs(brightness - 0.64 * pixels).max() <= 1
    moved = made[12]
    right, left = (np.zeros_like(pixels) for _ in range(2))
    right[:, 30:], left[:, :-30] = pixels[:, :-30], pixels[:, 30:]
    assert (moved == right).all() or (moved == left).all()
    assert input_peer.augmented(Image.fromarray(pixels)).size == (96, 64)


def test_peer_loads_each_picture_once(folder):
    assert input_peer.epoch(folder, 0, 5, False, False) == 16
    batch = input_peer.padded([input_peer.Pictures(folder, True, False)[number] for number in range(3)])
    assert batch.shape == (3, 3, 608, 576) or batch.shape[2] % 32 == batch.shape[3] % 32 == 0
    assert -1.0 <= float(batch.min()) < -0.5 and 0.5 < float(batch.max()) <= 1.0


def test_unequal_work_is_no_benchmark(folder, tmp_path):
    """A picture of another size or content behind the same name is found out."""

    def names(row, height=64, width=64):
        return (folder / "images" / f"{row:06d}.jpg").read_bytes()

    config = input_side.make_config("", 4, {"threads": 1})
    config.data.dir = str(
        prepared.write(tmp_path / "data", splits={"train": 4}, pictures=names, sizes=((480, 640),))
    )
    rows = np.arange(4)
    contents = [names(row) for row in rows]
    loaded = [image.load(content, image.layout(config.data)) for content in contents]
    batch = {key: np.concatenate([one[key] for one in loaded]) for key in loaded[0]} | {"image_id": rows}
    raw = tmp_path / "raw"
    raw.mkdir()
    for row, content in enumerate(contents):
        (raw / f"{row}.jpg").write_bytes(content)  # as prepared.write names them
    assert input_side.difference(config, batch, raw) < 1.0
    (raw / "2.jpg").write_bytes(contents[3])
    with pytest.raises(RuntimeError, match=r"2\.jpg: .*do not do the same work"):
        input_side.difference(config, batch, raw)


def test_rates_are_against_the_best_peer():
    timings = [
        measure.Timing("ours", (2.0, 1.0, 4.0), (4.0, 5.0, 4.0)),
        measure.Timing("a", (4.0, 4.0, 4.0), (2.0, 3.0, 3.0)),
        measure.Timing("b", (8.0, 2.0, 8.0), (8.0, 8.0, 8.0)),
    ]
    rows = benchmark.rates(timings, 8, timings[1:])
    assert rows[1] == ["ours", "8.0", "4.0", "2.0", "2.00", "2.00", "0.50"]
    assert rows[2] == ["a", "2.0", "2.0", "4.0", "0.50", "1.00", "1.00"]


def test_programs_run_by_turns_in_processes_of_their_own():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self):
            asked.append(self.name)
            return {"wall": 1.0, "cpu": 2.0}

    timings, load, warm = benchmark.by_turns([Fake("a"), Fake("b")], 3, 0.2)
    assert asked == ["a", "b"] + ["a", "b"] + ["b", "a"] + ["a", "b"]
    assert [timing.cpu for timing in timings] == [(2.0,) * 3] * 2 and len(warm) == 2
    assert load.before == 0.2 and load.others is None


def test_own_processes_are_no_others(monkeypatch):
    monkeypatch.setattr(measure, "others_clock", iter([(0.0, 100.0), (10.0, 112.0)]).__next__)
    watch = benchmark.Watch(0.3)
    watch.add(7.0)
    watch.add(4.0)
    assert watch.load().others == pytest.approx(0.1)


def test_a_process_answers_or_its_end_is_told(tmp_path, capfd):
    options = {"directory": str(tmp_path / "absent"), "batch": 2, "count": 1}
    with benchmark.sides(("away", "slope", options, sorted(os.sched_getaffinity(0))[:1])) as (side,):
        with pytest.raises(UserError, match="absent does not exist"):
            side.ask()
        assert len(os.sched_getaffinity(side.process.pid)) == 1
    assert side.process.returncode is not None
    with (
        benchmark.sides(("broken", "nothing", {}, ())) as (side,),
        pytest.raises(RuntimeError, match="'broken' ended"),
    ):
        side.ask()
    assert "KeyError" in capfd.readouterr().err


def test_rest_waits_for_threads_that_work():
    end = time.perf_counter() + 0.4
    busy = threading.Thread(target=lambda: [None for _ in iter(lambda: time.perf_counter() < end, False)])
    busy.start()
    since = input_side.rest()
    assert since >= end - 0.1 and not busy.is_alive()
    assert input_side.rest() <= time.perf_counter()


def test_a_whole_process_is_watched_with_its_children(tmp_path):
    child = "x = bytearray(60 << 20); import time; t = time.process_time() + 0.4\nwhile time.process_time() < t: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run = input_prepare.whole([sys.executable, "-c", parent])
    assert run.cpu >= 0.4 and run.wall >= 0.4 and run.peak > 65 << 20
    with pytest.raises(RuntimeError, match="ended with 3"):
        input_prepare.whole([sys.executable, "-c", "raise SystemExit(3)"])


def test_prepare_rates_are_between_the_two_sizes():
    def one(*walls):
        return {
            count: input_prepare.Run(wall, 2 * wall, 2**20 * count)
            for count, wall in zip((5, 20), walls, strict=True)
        }

    runs = {
        input_prepare.OURS: one(5.0, 8.0),
        input_prepare.PEER: one(1.0, 7.0),
        input_prepare.CHECKED: one(1.0, 10.0),
    }
    rows = input_prepare.table(runs, 5, 20)
    assert rows[1][1:] == ["5.00", "8.00", "5", "400.00", "2.00", "3.00", "5", "20"]
    assert len(rows[0]) == len(rows[1]) and [row[5] for row in rows[1:]] == ["2.00", "1.00", "0.67"]


def test_tfds_builds_the_same_examples(folder, tmp_path):
    import tensorflow_datasets as tfds

    command = [sys.executable, "-m", "benchmarks.input_peer", str(folder), str(tmp_path / "tfds"), "--check"]
    subprocess.run(command, cwd=results.ROOT, check=True, capture_output=True)
    assert input_prepare.records(tmp_path / "tfds") == 16
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    source = tfds.builder_from_directory(info.parent).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    rows = {row["image_name"].decode(): row for row in (source[number] for number in range(16))}
    assert len(rows) == 16 and len({row["pixels"] for row in rows.values()}) == 16
    for name, row in rows.items():
        assert row["image"] == (folder / name).read_bytes()
        assert (row["width"], row["height"]) == Image.open(folder / name).size
        assert [text.decode() for text in row["captions"]] == [
            f"a photograph of many, number {int(name[-10:-4])}."
        ]
    assert json.loads(info.read_bytes())["fileFormat"] == "array_record"
