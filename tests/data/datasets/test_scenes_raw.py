# SPDX-License-Identifier: Apache-2.0
"""The raw files of the drawn world: laid out as the public data sets, right in what they say, balanced, reproducible."""

from __future__ import annotations

import collections
import hashlib
import json

import pytest

from vlp_jax.data.datasets import scenes, scenes_questions

COUNTS = {"train": 600, "validation": 60, "test": 120}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "raw"
    scenes.draw(folder, map, **{**scenes.OPTIONS, **COUNTS})
    return folder


def load(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def objects_of(raw):
    return {
        row["image_id"]: row["objects"]
        for folder in ("train2014", "val2014", "test2015")
        for row in load(raw / "annotations" / f"scenes_{folder}.json")
    }


@pytest.mark.parametrize("split", ["train2014", "val2014", "test2015"])
def test_questions_are_balanced_so_that_blindness_is_chance(raw, split):
    questions = {
        one["question_id"]: one
        for one in load(raw / "vqa" / f"v2_OpenEnded_mscoco_{split}_questions.json")["questions"]
    }
    counts = collections.defaultdict(collections.Counter)
    for row in load(raw / "vqa" / f"v2_mscoco_{split}_annotations.json")["annotations"]:
        counts[row["question_type"], questions[row["question_id"]]["question"]][
            row["multiple_choice_answer"]
        ] += 1
    assert len(counts) > 8
    for (kind, asked), answers in counts.items():
        assert set(answers) == set(scenes_questions.possible_answers(kind, 1)), asked
        assert len(set(answers.values())) == 1, (asked, answers)


def _answer(question, objects):
    """Answers a question from the scene, written without a look at how it was asked."""
    words = question.lower().rstrip("?").split()
    singular = {"cubes": "cube", "balls": "ball", "cones": "cone", "stars": "star"}
    the = next((one for one in objects if words[-1] == one["shape"]), None)
    if words[:2] == ["how", "many"]:
        return str(sum(words[2] == "objects" or one["shape"] == singular[words[2]] for one in objects))
    if words[:2] == ["what", "shape"]:
        return next(one["shape"] for one in objects if one["color"] == words[4])
    if words[0] == "what":
        return the[words[1]]
    if words[0] == "where":
        return the["place"]
    if words[:2] == ["is", "there"]:
        return "yes" if any([one["color"], one["shape"]] == words[3:] for one in objects) else "no"
    first = next(one for one in objects if one["shape"] == words[2])
    rows, columns = first["row"] - the["row"], first["column"] - the["column"]
    held = {"left": columns < 0, "right": columns > 0, "above": rows < 0, "below": rows > 0}[words[3]]
    return "yes" if held else "no"


def test_answers_are_right_and_ten(raw):
    scene = objects_of(raw)
    kinds = collections.Counter()
    for split in ("train2014", "test2015"):
        asked = load(raw / "vqa" / f"v2_OpenEnded_mscoco_{split}_questions.json")
        answered = load(raw / "vqa" / f"v2_mscoco_{split}_annotations.json")
        assert asked["task_type"] == "Open-Ended" and asked["data_subtype"] == split
        for question, row in zip(asked["questions"], answered["annotations"], strict=True):
            assert (
                question["question_id"] == row["question_id"]
                and question["question_id"] // 1000 == row["image_id"]
            )
            assert _answer(question["question"], scene[row["image_id"]]) == row["multiple_choice_answer"]
            given = [one["answer"] for one in row["answers"]]
            assert [one["answer_id"] for one in row["answers"]] == list(range(1, 11))
            assert given.count(row["multiple_choice_answer"]) >= 8
            kinds[row["answer_type"]] += 1
    assert set(kinds) == {"yes/no", "number", "other"}


def test_coco_files(raw):
    for folder, split in (("train2014", "train"), ("val2014", "validation"), ("test2015", "test")):
        instances = load(raw / "annotations" / f"instances_{folder}.json")
        captions = load(raw / "annotations" / f"captions_{folder}.json")
        ids = [image["id"] for image in captions["images"]]
        assert instances["images"] == captions["images"] and len(set(ids)) == COUNTS[split]
        assert collections.Counter(row["image_id"] for row in captions["annotations"]) == dict.fromkeys(
            ids, 5
        )
        assert len({row["id"] for row in captions["annotations"]}) == 5 * len(ids)
        names = {category["id"]: category["name"] for category in instances["categories"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
        scene = objects_of(raw)
        for row in instances["annotations"]:
            x, y, w, h = row["bbox"]
            assert (
                0 <= x
                and x + w <= sizes[row["image_id"]][0]
                and 0 <= y
                and y + h <= sizes[row["image_id"]][1]
            )
            assert 0.2 * w * h < row["area"] < w * h and len(row["segmentation"][0]) >= 12
            xs, ys = row["segmentation"][0][::2], row["segmentation"][0][1::2]
            assert x <= min(xs) and max(xs) <= x + w and y <= min(ys) and max(ys) <= y + h
            assert [x, y, w, h] in [
                one["box"] for one in scene[row["image_id"]] if one["shape"] == names[row["category_id"]]
            ]


def test_karpathy_file(raw):
    content = load(raw / "dataset_coco.json")
    assert collections.Counter(image["split"] for image in content["images"]) == {
        "train": 600,
        "val": 60,
        "test": 120,
    }
    for image in content["images"]:
        assert (raw / image["filepath"] / image["filename"]).is_file() and len(image["sentences"]) == 5
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]


def test_visual_genome_files(raw):
    folder = raw / "visual_genome"
    data, objects, attributes, regions = (
        load(folder / f"{name}.json")
        for name in ("image_data", "objects", "attributes", "region_descriptions")
    )
    scene = objects_of(raw)
    assert len(data) == len(objects) == len(attributes) == len(regions) == sum(COUNTS.values())
    for image, some, having, described in zip(data, objects, attributes, regions, strict=True):
        key = image["image_id"]
        assert (
            key == some["image_id"] == having["image_id"] == described["id"]
            and (folder / image["url"]).is_file()
        )
        for one, item, more, region in zip(
            scene[key], some["objects"], having["attributes"], described["regions"], strict=True
        ):
            assert [item["x"], item["y"], item["w"], item["h"]] == one["box"] and item["names"] == [
                one["shape"]
            ]
            assert more["object_id"] == item["object_id"] and {one["color"], one["material"]} <= set(
                more["attributes"]
            )
            assert region["phrase"] == f"a {one['material']} {one['color']} {one['shape']}"


def test_nlvr2_pairs_are_balanced_and_labelled_rightly(raw):
    by_bytes = {path.read_bytes(): int(path.stem[-12:]) for path in raw.glob("*20*/*.jpg")}
    scene = objects_of(raw)
    for name, part in (("train", "images/train"), ("dev", "dev"), ("test1", "test1")):
        rows = lines(raw / "nlvr2" / "data" / f"{name}.json")
        assert len(rows) >= 10
        labels = collections.defaultdict(collections.Counter)
        for row in rows:
            labels[row["sentence"]][row["label"]] += 1
            folder = raw / "nlvr2" / part / (str(row["directory"]) if name == "train" else "")
            stem = row["identifier"].rsplit("-", 1)[0]
            left, right = (
                scene[by_bytes[(folder / f"{stem}-img{side}.png").read_bytes()]] for side in (0, 1)
            )
            words = row["sentence"].rstrip(".").split()
            if words[0] == "Both":
                held = all(any(one["shape"] == words[-1] for one in side) for side in (left, right))
            elif words[0] == "Only":
                held = sum(any(one["color"] == words[-2] for one in side) for side in (left, right)) == 1
            elif words[:3] == ["There", "are", "more"]:
                held = len(left) > len(right)
            elif words[0] == "There":
                held = len(left) + len(right) == int(words[2])
            else:
                held = any(one["color"] == words[5] for one in left) and any(
                    one["shape"] == words[-1] for one in right
                )
            assert str(held) == row["label"], row
        assert all(count["True"] == count["False"] for count in labels.values())


def test_snli_ve_labels(raw):
    scene = objects_of(raw)
    for name in ("train", "dev", "test"):
        rows = lines(raw / "snli_ve" / f"snli_ve_{name}.jsonl")
        assert set(collections.Counter(row["gold_label"] for row in rows).values()) == {len(rows) // 3}
        for row in rows:
            assert (raw / "snli_ve" / "flickr30k-images" / f"{row['Flickr30K_ID']}.jpg").is_file()
            said, objects = row["sentence2"], scene[int(row["Flickr30K_ID"])]
            if "heavy" in said:
                present = scenes.truth(said.replace("heavy ", ""), objects)
                assert row["gold_label"] == ("neutral" if present else "contradiction")
            else:
                assert row["gold_label"] == ("entailment" if scenes.truth(said, objects) else "contradiction")


def test_refcoco_expressions_fit_one_object(raw):
    refs, instances = (
        load(raw / "refcoco_plus" / "refs(unc).json"),
        load(raw / "refcoco_plus" / "instances.json"),
    )
    boxes = {row["id"]: row["bbox"] for row in instances["annotations"]}
    scene = objects_of(raw)
    assert {ref["split"] for ref in refs} == {"train", "val", "testA", "testB"}
    for ref in refs:
        assert len(ref["sentences"]) == len(ref["sent_ids"]) >= 1
        for sentence in ref["sentences"]:
            wanted = set(sentence["tokens"]) - {"object"}
            fitting = [
                one
                for one in scene[ref["image_id"]]
                if wanted <= {one["color"], one["shape"], one["material"]}
            ]
            assert [one["box"] for one in fitting] == [boxes[ref["ann_id"]]]


def test_layouts_are_the_published_ones(raw, realdata):
    """Every field of the real files is there."""

    def fields(rows):
        return set().union(*rows)

    for ours, real in (
        (raw / "annotations/instances_val2014.json", realdata / "coco/annotations/instances_val2017.json"),
        (raw / "annotations/captions_val2014.json", realdata / "coco/annotations/captions_val2017.json"),
        (raw / "vqa/v2_mscoco_val2014_annotations.json", realdata / "vqav2/annotations.json"),
        (raw / "vqa/v2_OpenEnded_mscoco_val2014_questions.json", realdata / "vqav2/questions.json"),
    ):
        mine, theirs = load(ours), load(real)
        assert set(theirs) <= set(mine)
        for key in set(theirs) & {"images", "annotations", "categories", "questions"}:
            assert fields(theirs[key]) <= fields(mine[key]), (ours, key)
    assert fields(lines(realdata / "nlvr2/dev.json")) <= fields(lines(raw / "nlvr2/data/dev.json"))
    parses = {"sentence1_parse", "sentence2_parse", "sentence1_binary_parse", "sentence2_binary_parse"}
    theirs = fields(lines(realdata / "snli_ve/sample_pairs.jsonl"))
    assert theirs - parses <= fields(lines(raw / "snli_ve/snli_ve_dev.jsonl"))
    refs = load(realdata / "refcoco_plus/refs_unc_sample.json")
    assert fields(refs) <= fields(load(raw / "refcoco_plus/refs(unc).json"))


def test_the_same_seed_gives_the_same_bytes(raw, tmp_path):
    """All raw files, drawn again in parts of another size and order of work."""

    def digests(folder):
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*.*")
            if path.is_file() and path.name != "options.json"
        }

    def backwards(function, jobs):
        return reversed([function(job) for job in reversed(jobs)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "CHUNK", 70)
        scenes.draw(tmp_path / "again", backwards, **{**scenes.OPTIONS, **COUNTS})
    assert digests(tmp_path / "again") == digests(raw)
