# SPDX-License-Identifier: Apache-2.0
"""The drawn world: true captions, held-out combinations, balanced questions, the public raw formats, the same bytes."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import source, text, writer
from vlp_jax.data.datasets import scenes, scenes_picture, scenes_questions, scenes_text, scenes_world
from vlp_jax.types import UserError

COUNTS = {"train": 600, "validation": 60, "test": 120}
ITEM = {"material": "matte", "size": "large"}
SCENE = [
    {"shape": "cube", "color": "red", "row": 0, "column": 0, "place": "top left", **ITEM},
    {
        "shape": "ball",
        "color": "blue",
        "row": 0,
        "column": 1,
        "place": "top right",
        **ITEM,
        "material": "shiny",
    },
    {"shape": "cube", "color": "blue", "row": 1, "column": 1, "place": "bottom right", **ITEM},
]


def drawn(split, number, level=1, seed=0):
    return [scenes_world.scene(seed, level, split, index)[0] for index in range(number)]


def worded(split, index, objects, level=1):
    return scenes_text.captions(objects, level, scenes_world.lot(0, level, split, index, "captions"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    target = tmp_path_factory.mktemp("scenes")
    writer.write(scenes, "", target, options=COUNTS, workers=1)
    return target


@pytest.fixture(scope="module")
def raw(prepared):
    return prepared / "raw"


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


# Each judged by hand from SCENE: a matte red cube top left, a shiny blue ball top right, a matte blue cube below it.
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a picture of a red cube and a blue ball", True),
        ("a picture of a blue ball and a red cube", True),
        ("a picture of a red cube and a green ball", False),
        ("there is a shiny blue ball", True),
        ("there is a matte blue ball", False),
        ("a small red cube in the top left", False),
        ("a large red cube in the top left corner", True),
        ("a red cube in the top right", False),
        ("only a red cube and a blue ball", False),
        ("just a blue cube, a red cube and a blue ball", True),
        ("a red cube and a blue ball and nothing else", False),
        ("a blue cube, a red cube and a blue ball and nothing else", True),
        ("there are three objects: a red cube, a blue cube and a blue ball", True),
        ("two objects: a red cube and a blue cube", False),
        ("here are two cubes, one blue and one red, and a blue ball", True),
        ("here are two cubes, one blue and one green, and a blue ball", False),
        ("two blue objects, a ball and a cube", True),
        ("two balls, one blue and one red", False),
        ("a red cube left of a blue ball", True),
        ("a red cube is right of a blue ball", False),
        ("a red cube sits above a blue cube and to the left of a blue ball", True),
        ("a red cube is above a blue ball", False),
        ("a blue cube is below a red cube and right of a blue ball", False),
        (
            "a red cube left of a blue ball and a blue cube below a blue ball",
            False,
        ),  # two balls, two cubes besides
        ("a blue ball is above a blue cube", True),
        ("a red cube and a red cube", False),
        ("a dog on a red cube", None),
        ("red cube", None),
        ("a red cube is", None),
        ("a red cube in the middle center corner", None),
        ("", None),
    ],
)
def test_truth_of_sentences_judged_by_hand(caption, expected):
    assert scenes.truth(caption, SCENE) is expected


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_caption_is_true_short_and_different(level, split):
    for index, objects in enumerate(drawn(split, 150, level)):
        written = worded(split, index, objects, level)
        assert len(set(written)) == 5
        for caption in written:
            assert scenes.truth(caption, objects) is True, (caption, objects)
            assert 5 <= len(caption.split()) <= 25 and caption == caption.lower()
            named = collections.Counter(
                word for word in caption.replace(",", "").split() if word in scenes.VISUAL_WORDS
            )
            assert named, caption


def test_captions_turn_false_with_their_words():
    """A color or shape that the scene does not have makes a caption false; so does the exchange of two colors."""
    exchanged = 0
    for index, objects in enumerate(drawn("test", 150)):
        absent_color = next(
            color for color in scenes_world.COLORS if color not in {one["color"] for one in objects}
        )
        for caption in worded("test", index, objects):
            words = caption.replace(",", " ,").replace(":", " :").split()
            for place, word in enumerate(words):
                if word in scenes_world.COLORS:
                    changed = [*words[:place], absent_color, *words[place + 1 :]]
                    assert scenes.truth(" ".join(changed), objects) is False
            colors = [word for word in words if word in scenes_world.COLORS]
            if len(set(colors)) == 2 == len(colors) and len({one["shape"] for one in objects}) == len(
                objects
            ):
                swapped = [colors[1 - colors.index(word)] if word in colors else word for word in words]
                exchanged += 1
                assert scenes.truth(" ".join(swapped), objects) is False
    assert exchanged > 50


def test_fill_gives_the_words_that_make_a_caption_true():
    words = "a red cube left of a blue ball".split()
    assert scenes.fill(words, 1, SCENE) == ["red"]
    assert scenes.fill(words, 7, SCENE) == ["ball", "cube"]  # columns alone decide what is left
    assert scenes.fill("a red cube above a blue cube".split(), 6, SCENE) == ["cube"]
    assert scenes.fill("a red cube and a blue ball".split(), 6, SCENE) == ["ball", "cube"]
    assert scenes.fill("there is a blue cube".split(), 3, SCENE) == ["blue", "red"]
    assert scenes.fill("two objects : a red cube , a blue cube and a blue ball".split(), 0, SCENE) == [
        "three"
    ]
    assert scenes.fill("three objects: a red cube, a blue cube and a blue ball".split(), 4, SCENE) == ["cube"]
    assert scenes.fill("two cubes , one red and one blue".split(), 1, SCENE) == ["cubes"]
    assert scenes.fill(words, 0, SCENE) == []


def test_exchanged_captions_are_mostly_false():
    for split in ("train", "test"):
        world = drawn(split, 300)
        draw = random.Random(0)
        pairs = [draw.sample(range(300), 2) for _ in range(6000)]
        true = sum(
            scenes.truth(worded(split, one, world[one])[draw.randrange(5)], world[other])
            for one, other in pairs
        )
        assert true / len(pairs) < 0.02


@pytest.mark.parametrize("level", [1, 2, 3])
def test_training_never_shows_a_held_out_combination(level):
    def kinds(objects):
        return {(one["color"], one["shape"], one["material"]) for one in objects}

    train = set().union(*map(kinds, drawn("train", 800, level)))
    assert train == set(scenes_world.KNOWN) and len(train) == 48
    for split in ("validation", "test"):
        assert all(kinds(objects) & set(scenes_world.HELD_OUT) for objects in drawn(split, 200, level))
    for one, other in itertools.combinations(range(3), 2):
        pairs = {(kind[one], kind[other]) for kind in scenes_world.COMBINATIONS}
        assert {(kind[one], kind[other]) for kind in train} == pairs


@pytest.mark.parametrize("level", [1, 2, 3])
def test_pictures_have_whole_patches_and_show_their_objects(level):
    """The color at the middle of a matte object is nearest to the named one: labels and pixels agree."""
    right = total = 0
    for index in range(60):
        objects, (height, width) = scenes_world.scene(0, level, "train", index)
        content = scenes_picture.draw(
            objects, (height, width), level, scenes_world.lot(0, level, "train", index, "picture")
        )
        pixels = np.asarray(Image.open(io.BytesIO(content)), np.float32)
        assert pixels.shape == (height, width, 3) and height % 16 == width % 16 == 0
        for one in objects:
            x, y, w, h = one["box"]
            assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
            assert one["place"] == scenes_world.words_of_cell(
                one["row"], one["column"], scenes_world.LEVELS[level].grid
            )
            if one["material"] == "matte":
                seen = pixels[y + h // 2 - 1 : y + h // 2 + 2, x + w // 2 - 1 : x + w // 2 + 2].mean((0, 1))
                far = {name: np.abs(seen - np.float32(rgb)).sum() for name, rgb in scenes_picture.RGB.items()}
                right, total = right + (min(far, key=far.get) == one["color"]), total + 1
    assert total > 40 and right / total > (0.95 if level < 3 else 0.7)


def test_shiny_objects_have_a_glint_that_matte_ones_lack():
    def lightest(item):
        ground = scenes_picture.draw([item], (64, 64), 1, random.Random(3))
        x, y, w, h = item["box"]
        return np.asarray(Image.open(io.BytesIO(ground)), np.float32)[y : y + h, x : x + w].min(-1).max()

    for color, shape in itertools.product(set(scenes_world.COLORS) - {"white"}, scenes_world.SHAPES):
        item = {"color": color, "shape": shape, "box": [3, 3, 28, 28]}
        assert lightest(item | {"material": "shiny"}) > 230 > lightest(item | {"material": "matte"})


def test_records_hold_what_was_drawn(prepared, raw):
    opened = source.Source(prepared, "test")
    assert (len(opened), opened.pairs) == (120, 600)
    for record in opened.read(range(0, 120, 7)):
        objects = json.loads(record["scene"])
        assert record["image"] == (raw / "test2015" / record["image_name"]).read_bytes()
        assert objects == objects_of(raw)[record["image_key"]]
        assert all(scenes.truth(caption, objects) for caption in record["captions"])


def test_words_are_single_pieces(prepared):
    vocabulary = text.Vocabulary.load(prepared / "vocabulary.model")
    assert all(len(ids) == 1 for ids in vocabulary.tokenize(list(scenes.VISUAL_WORDS)))
    for objects_index, objects in enumerate(drawn("test", 100)):
        for caption in worded("test", objects_index, objects):
            spaced = caption.replace(",", " ,").replace(":", " :")
            assert len(vocabulary.tokenize([caption])[0]) == len(spaced.split()) <= 30
            assert scenes.truth(vocabulary.decode(vocabulary.tokenize([caption])[0]), objects)


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


def test_a_larger_set_begins_with_the_smaller_one_and_seeds_differ():
    assert drawn("train", 5) == drawn("train", 9)[:5] and drawn("train", 5) != drawn("train", 5, seed=1)


@pytest.mark.parametrize(("name", "value"), [("level", 4), ("train", 1), ("test", 10**8)])
def test_what_cannot_be_drawn(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{value}.* Possible: .*Choose"):
        writer.write(scenes, "", tmp_path / "data", options={name: value}, workers=1)
    assert not (tmp_path / "data").exists()


def test_a_foreign_raw_folder_stays(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("mine")
    with pytest.raises(
        UserError, match="raw is in the way: it was not drawn by this program. Choose another"
    ):
        writer.write(scenes, "", tmp_path, options=COUNTS, workers=1, overwrite=True)
    assert (tmp_path / "raw" / "mine.txt").read_text() == "mine"
