# SPDX-License-Identifier: Apache-2.0
"""Batches of whole pictures and boxes against PIL and loops in Python: content, order, hosts, canvases, errors."""

import collections
import io
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import detr
from tests.data import prepared, test_detection, test_grid
from vlp_jax.data import categories, datasets, detection, facts, grid, pipeline, source, spec, text
from vlp_jax.data.preparation import writer
from vlp_jax.types import BOXES_LEFT_OUT, UserError

TRAIN, VALIDATION = 60, 23
SIZES = ((64, 64), (48, 80), (90, 60), (40, 40))  # become 64 x 64, 63 x 106, 96 x 64 and 64 x 64
CANVASES = ((64, 64), (64, 106), (106, 64), (106, 106))
NAMES = ("cat", "dog", "kite", "thing")
MODES = {
    "plain": {},
    "sizes": {"image_sizes": (48, 64), "flip": 0.5, "size_crop": 0.5},
    "canvases": {"canvases": CANVASES, "image_sizes": (48, 56, 64), "flip": 0.5, "size_crop": 0.3},
}


def objects(split, row):
    """None in every fifth picture, else up to seven, some beyond the edge, empty or a crowd."""
    draw = np.random.default_rng(row)
    number = 0 if row % 5 == 4 else 1 + row % 7
    boxes = draw.uniform(-8, 60, (number, 4))
    boxes[:, 2:] = np.abs(boxes[:, 2:]) * (draw.random((number, 1)) > 0.1)
    return {
        "boxes": boxes.astype(np.float32).ravel().tolist(),
        "box_names": [NAMES[i] for i in draw.integers(0, 4, number)],
        "box_crowd": (draw.random(number) < 0.1).astype(int).tolist(),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    splits = {"train": TRAIN, "validation": VALIDATION}
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return prepared.write(folder, splits=splits, sizes=SIZES, more=objects)


@pytest.fixture(scope="module")
def silent(tmp_path_factory, directory):
    """Boxes and no captions at all."""
    given = {"sizes": SIZES[::-1], "more": objects, "texts": lambda row: [], "name": "silent"}
    given["vocabulary"] = directory / "vocabulary.model"
    return prepared.write(tmp_path_factory.mktemp("data") / "silent", splits={"train": 9}, **given)


@pytest.fixture
def config(directory):
    config = detr.get_config("variant=tiny")
    config.data.update(dir=str(directory), flip=0.0, max_boxes=5, image_limit=106)
    config.train.batch_size = 16
    return config


@pytest.fixture(params=MODES)
def any_config(request, config):
    config.data.update(MODES[request.param])
    return config


def take(batches, count):
    return list(itertools.islice(batches, count))


def equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def check_row(batch, row, size, made, one, classes, slots):
    """A row holds the picture of its record as PIL makes it, and its boxes as a loop does."""
    record = int(batch["image_id"][row])
    height, width = size
    tall, wide = made.size[one]
    picture = Image.open(io.BytesIO(prepared.picture(record, height, width))).convert("RGB")
    # In small pictures many values lie half-way between two levels, and twice resized they are rounded twice.
    test_grid.same(batch["image"][row][:tall, :wide], test_grid.by_pil(picture, made, one), 0.15, 2)
    mask = np.zeros(batch["image_mask"].shape[1:], bool)
    mask[:tall, :wide] = True
    np.testing.assert_array_equal(batch["image_mask"][row], mask)
    assert not batch["image"][row][~mask].any()
    said = objects("", record)
    boxes = np.array(said["boxes"]).reshape(-1, 4).tolist()
    kept, lost = test_detection.naive(
        (boxes, said["box_names"], said["box_crowd"]), made, one, classes, slots
    )
    assert batch["boxes_left_out"][row].tolist() == lost
    assert batch["box_labels"][row].tolist() == [k[1] for k in kept] + [-1] * (slots - len(kept))
    assert batch["box_mask"][row].tolist() == [i < len(kept) for i in range(slots)]
    np.testing.assert_allclose(
        batch["boxes"][row][: len(kept)], np.array([k[0] for k in kept]).reshape(-1, 4), atol=1e-6
    )


def test_rows_hold_what_the_files_hold(any_config):
    config, lost = any_config, np.zeros(len(BOXES_LEFT_OUT), int)
    maker = pipeline._Maker(config, "train")
    rule = grid.rule(config.data)
    for step, batch in enumerate(take(pipeline.batches(config), 4)):
        rows, canvas = maker.chooser.step(step, 0, 16)
        assert canvas in grid.canvases(config.data)
        spec.check(batch, spec.spec(config, 16, canvas))
        np.testing.assert_array_equal(batch["image_id"], rows.record)
        np.testing.assert_array_equal(batch["example_id"], rows.record)
        sizes = np.array([SIZES[record % 4] for record in rows.record])
        made = detection.plan(rule, rows.draw, *sizes.T)
        for row in range(16):
            check_row(batch, row, sizes[row], made, row, list(NAMES), 5)
        lost += batch["boxes_left_out"].sum(0)
    assert lost[BOXES_LEFT_OUT.index("crowd")] and lost[BOXES_LEFT_OUT.index("empty")]
    assert lost[BOXES_LEFT_OUT.index("too_many")] and not lost[BOXES_LEFT_OUT.index("unknown")]


@pytest.mark.parametrize("canvases", [(), CANVASES])
def test_every_picture_once_an_epoch_those_without_objects_too(config, canvases):
    config.data.canvases, config.train.batch_size = canvases, 20
    batches = take(pipeline.batches(config), 96 if canvases else 6)  # whole windows, of 32 batches
    seen = np.concatenate([batch["image_id"] for batch in batches])
    assert set(np.bincount(seen, minlength=TRAIN)) == {len(seen) // TRAIN}
    without = np.concatenate([~batch["box_mask"].any(1) for batch in batches])
    assert without[seen % 5 == 4].all()


@pytest.mark.slow
def test_hosts_resuming_and_threads_change_nothing(config):
    config.data.update(MODES["canvases"])
    whole = take(pipeline.batches(config), 8)
    parts = [take(pipeline.batches(config, host=host, hosts=2), 8) for host in range(2)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    equal(whole, joined)
    equal(whole[5:], take(pipeline.batches(config, start=5), 3))
    config.data.threads, config.data.prefetch = 3, 1
    equal(whole, take(pipeline.batches(config), 8))
    config.seed = 1
    assert (next(pipeline.batches(config))["image_id"] != whole[0]["image_id"]).any()


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_is_one_pass(any_config, hosts):
    config = any_config
    assert pipeline.examples(config, "validation") == VALIDATION
    options = dict(split="validation", batch_size=8, hosts=hosts)
    parts = [list(pipeline.evaluation_batches(config, host=host, **options)) for host in range(hosts)]
    batches = [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    shown = np.concatenate([batch["example_id"] for batch in batches])
    assert len(batches) == 3 and (shown[:VALIDATION] >= 0).all() and (shown[VALIDATION:] == -1).all()
    np.testing.assert_array_equal(np.sort(shown[:VALIDATION]), np.arange(VALIDATION))
    made = detection.plan(detection.Rule((64,), 106), np.zeros(4, int), *np.array(SIZES).T)
    for batch in batches:
        for row in np.flatnonzero(batch["example_id"] >= 0):
            record = batch["image_id"][row]
            check_row(batch, row, SIZES[record % 4], made, record % 4, list(NAMES), 5)
        assert batch["image"].shape[1:3] in grid.canvases(config.data)
    last = {key: value[batches[-1]["example_id"] < 0] for key, value in batches[-1].items()}
    assert (last["box_labels"] == -1).all() and (last["image_id"] == -1).all()
    assert not last["box_mask"].any() and not last["boxes"].any() and not last["boxes_left_out"].any()
    assert last["image_mask"].any((1, 2)).all()
    if config.data.canvases:
        assert len({batch["image"].shape for batch in batches}) > 1


def test_text_grid_and_boxes_together(config, directory):
    config.data.update(inputs=("text", "grid", "boxes"), index="pairs", text_length=32, flip=0.9)
    vocabulary = text.Vocabulary.load(directory / "vocabulary.model")
    pairs = [(row, number) for row in range(TRAIN) for number in range(len(prepared.captions(row)))]
    assert pipeline.examples(config, "train") == len(pairs)
    batches = take(pipeline.batches(config), 3)
    for batch in batches:
        spec.check(batch, spec.spec(config, 16))
        for row, pair in enumerate(batch["example_id"]):
            record, number = pairs[pair]
            assert batch["image_id"][row] == record
            encoded = vocabulary.encode([prepared.captions(record)[number]], 32)
            np.testing.assert_array_equal(batch["text_ids"][row], encoded["text_ids"][0])
    config.data.update(index="pictures", mask_rate=0.3)
    records = np.concatenate([batch["image_id"] for batch in take(pipeline.batches(config), 15)])
    assert set(np.bincount(records)) == {4}
    evaluated = list(pipeline.evaluation_batches(config, split="validation", batch_size=16))
    shown = np.concatenate([batch["example_id"] for batch in evaluated])
    assert sorted(shown[shown >= 0]) == list(range(pipeline.examples(config, "validation")))


def test_a_picture_whose_text_says_left_is_not_mirrored(config, tmp_path):
    def said(row):
        return [f"a thing on the left of {row}" if row % 2 else f"a thing near {row}"]

    config.data.dir = str(prepared.write(tmp_path / "sides", splits={"train": 16}, texts=said, more=objects))
    config.data.update(inputs=("text", "grid", "boxes"), index="pairs", text_length=32, flip=1.0)
    batch = next(pipeline.batches(config))
    straight = {record: grid.load(prepared.picture(record), config.data)["image"][0] for record in range(16)}
    for row, record in enumerate(batch["image_id"].tolist()):
        expected = straight[record] if record % 2 else straight[record][:, :64][:, ::-1]
        np.testing.assert_array_equal(batch["image"][row][:, : expected.shape[1]], expected)


def test_a_set_without_captions(config, silent, directory):
    config.data.dir = str(silent)
    shown = np.concatenate([batch["image_id"] for batch in take(pipeline.batches(config), 9)])
    assert set(np.bincount(shown)) == {16}
    assert facts.collect(config)["sources"]["silent"]["splits"]["train"]["pairs"] == 0
    config.data.dir = f"one={directory},two={silent}"
    config.train.batch_size = 256
    batches = take(pipeline.batches(config), 16)
    sources = np.concatenate([batch["source_id"] for batch in batches])
    assert (sources == 1).mean() == pytest.approx(9 / 69, abs=0.001)
    config.data.inputs = ("text", "grid", "boxes")
    with pytest.raises(UserError, match="no caption"):
        pipeline.batches(config)


def test_facts_and_assets(config, silent):
    found = facts.collect(config)
    assert found["categories"] == sorted(NAMES) and found["classes"] == 4
    assert json.loads(facts.assets(found)["labels.json"]) == sorted(NAMES)
    config.data.categories = "coco91"
    assert facts.collect(config)["classes"] == 91
    batch = next(pipeline.batches(config))
    assert batch["boxes_left_out"][:, BOXES_LEFT_OUT.index("unknown")].any()  # "thing"
    used = set(batch["box_labels"][batch["box_mask"]].tolist())
    assert used <= {number for number, name in categories.COCO.items() if name in NAMES}
    config.data.inputs = ("grid",)
    assert "classes" not in facts.collect(config) and "labels.json" not in facts.assets(facts.collect(config))
    assert set(next(pipeline.batches(config))) == {
        "image",
        "image_mask",
        "example_id",
        "image_id",
        "source_id",
    }


def test_all_crowd_and_no_box_at_all(config, tmp_path):
    def crowds(split, row):
        said = objects(split, row)
        return said | {"box_crowd": [1] * len(said["box_crowd"])}

    config.data.dir = str(prepared.write(tmp_path / "crowds", splits={"train": 16}, more=crowds))
    batch = next(pipeline.batches(config))
    assert not batch["box_mask"].any()
    counts = [len(objects("", record)["box_names"]) for record in batch["image_id"]]
    np.testing.assert_array_equal(batch["boxes_left_out"][:, 0], counts)
    assert not batch["boxes_left_out"][:, 1:].any()


def test_what_does_not_go_together_is_refused(config, directory, silent):
    def refused(words, **changes):
        before = {key: config.data[key] for key in changes}
        config.data.update(changes)
        with pytest.raises(UserError) as error:
            pipeline.batches(config)
        assert all(word in str(error.value) for word in words), str(error.value)
        config.data.update(before)

    refused(["inputs=('patches', 'grid')", "(text, grid, boxes)"], inputs=("patches", "grid"))
    refused(["boxes are carried along"], inputs=("text", "patches", "boxes"), index="pairs")
    refused(["no batch"], inputs=("text",))
    refused(["no batch"], inputs=())
    refused(["no batch"], inputs=("grid", "grid"))
    refused(["'box'", "Did you mean 'boxes'"], inputs=("grid", "box"))
    refused(["data.index='pairs'", "data.index=pictures"], index="pairs")
    refused(["randaugment", "means nothing"], randaugment=(2, 9))
    refused(["crop", "means nothing"], crop=(0.5, 1.0))
    refused(["buckets", "means nothing"], buckets=(3, 4))
    refused(["image_sizes", "means nothing"], inputs=("text", "patches"), image_sizes=(64,), index="pairs")
    refused(["categories='coco'", "Did you mean"], categories="coco")
    refused(["max_boxes=0"], max_boxes=0)
    refused(["rising area"], canvases=((9, 9), (3, 3)))
    refused(["has 90 x 60 pixels", "96 x 64", "(96, 128)"], canvases=((64, 106),))
    next(pipeline.batches(config))


def test_data_without_boxes_or_from_an_older_version_is_refused(config, directory, tmp_path):
    config.data.dir = str(prepared.write(tmp_path / "plain", splits={"train": 16}))
    with pytest.raises(UserError, match="have no boxes and no box_names"):
        pipeline.batches(config)
    copy = shutil.copytree(directory, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["box_names"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    config.data.dir = str(copy)
    for refused in (pipeline.batches, facts.collect):
        with pytest.raises(UserError, match="Prepare it again, with --overwrite"):
            refused(config)


def test_damage_is_named(config, tmp_path):
    def one_name_less(split, row):
        said = objects(split, row)
        return said | {"box_names": said["box_names"][: -1 if row == 7 else None]}

    config.data.dir = str(prepared.write(tmp_path / "names", splits={"train": 20}, more=one_name_less))
    with pytest.raises(UserError, match=r"record 7 of .* has 1 boxes, 0 names of boxes and 1 marks"):
        take(pipeline.batches(config), 3)

    def pictures(row, height, width):
        content = prepared.picture(row, height, width)
        return content if row != 7 else content[:300]

    made = prepared.write(tmp_path / "broken", splits={"train": 20}, pictures=pictures, more=objects)
    config.data.dir = str(made)
    with pytest.raises(UserError, match=r"picture in record 7 of .*00000-of-00002 .*cannot be decoded"):
        take(pipeline.batches(config), 3)


def test_the_manifest_counts_the_names_of_all_records(scenes_dir, tmp_path):
    manifest = json.loads((scenes_dir / "manifest.json").read_text())
    names = collections.Counter(
        name
        for split in manifest["splits"]
        for record in source.Source(scenes_dir, split).read(range(manifest["splits"][split]["records"]))
        for name in record["box_names"]
    )
    assert manifest["box_names"] == names and list(manifest["box_names"]) == sorted(names)
    # What an older version made is not taken for what is asked for.
    copy = shutil.copytree(scenes_dir, tmp_path / "copy")
    del manifest["box_names"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    options = {"train": 64, "validation": 24, "test": 24}
    with pytest.raises(UserError, match="does not list the names of boxes.* --overwrite"):
        writer.write(datasets.get("scenes"), "", copy, options=options, workers=1)
