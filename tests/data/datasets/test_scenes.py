# SPDX-License-Identifier: Apache-2.0
"""The drawn world: true captions, held-out combinations, pictures that show what is said, records."""

from __future__ import annotations

import collections
import io
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import source, text
from vlp_jax.data.datasets import scenes, scenes_picture, scenes_text, scenes_world
from vlp_jax.data.preparation import writer
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
        ground = scenes_picture.draw([item], (64, 64), 3, random.Random(3))  # level 3: a darker ground
        x, y, w, h = item["box"]
        return np.asarray(Image.open(io.BytesIO(ground)), np.float32)[y : y + h, x : x + w].min(-1).max()

    for color, shape in itertools.product(scenes_world.COLORS, scenes_world.SHAPES):
        item = {"color": color, "shape": shape, "box": [3, 3, 28, 28]}
        assert lightest(item | {"material": "shiny"}) > 230 > lightest(item | {"material": "matte"})


def test_records_hold_what_was_drawn(prepared):
    raw = prepared / "raw"
    rows = json.loads((raw / "annotations" / "scenes_test2015.json").read_text())
    drawn_objects = {row["image_id"]: row["objects"] for row in rows}
    opened = source.Source(prepared, "test")
    assert (len(opened), opened.pairs) == (120, 600)
    for record in opened.read(range(0, 120, 7)):
        objects = json.loads(record["scene"])
        assert record["image"] == (raw / "test2015" / record["image_name"]).read_bytes()
        assert objects == drawn_objects[record["image_key"]]
        assert all(scenes.truth(caption, objects) for caption in record["captions"])


def test_words_are_single_pieces(prepared):
    vocabulary = text.Vocabulary.load(prepared / "vocabulary.model")
    assert all(len(ids) == 1 for ids in vocabulary.tokenize(list(scenes.VISUAL_WORDS)))
    for objects_index, objects in enumerate(drawn("test", 100)):
        for caption in worded("test", objects_index, objects):
            spaced = caption.replace(",", " ,").replace(":", " :")
            assert len(vocabulary.tokenize([caption])[0]) == len(spaced.split()) <= 30
            assert scenes.truth(vocabulary.decode(vocabulary.tokenize([caption])[0]), objects)


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
