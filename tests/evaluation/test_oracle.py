# SPDX-License-Identifier: Apache-2.0
"""What is true of which picture, on hand-made worlds."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from vlp_jax.data import datasets
from vlp_jax.evaluation.oracle import Knowledge, normalise


class Records:
    """Two drawn pictures of three and one captions; counts how often it is read."""

    def __init__(self, rows: list[dict]):
        self.rows, self.asked = rows, []
        self.ends = np.cumsum([len(row["captions"]) for row in rows])

    def locate(self, pairs):
        record = np.searchsorted(self.ends, pairs, side="right")
        return record, pairs - (self.ends - [len(row["captions"]) for row in self.rows])[record]

    def read(self, rows):
        self.asked += list(rows)
        return [dict(self.rows[row], image=b"") for row in rows]


DRAWN = Records(
    [
        {"captions": ["red", "warm", "not a colour"], "scene": json.dumps([{"color": "red"}])},
        {"captions": ["blue"], "scene": json.dumps([{"color": "blue"}])},
    ]
)
PHOTOGRAPHS = Records([{"captions": ["A red bus.", "A bus"]}, {"captions": ["a  RED bus"]}])


def truth(caption: str, scene: list[dict]) -> bool | None:
    if caption == "warm":
        return scene[0]["color"] == "red"
    return caption == scene[0]["color"] if caption in ("red", "blue") else None


def fill(words: list[str], index: int, scene: list[dict]) -> list[str]:
    return [scene[0]["color"], "coloured"] if words[index] in ("red", "blue") else []


@pytest.fixture
def knowledge() -> Knowledge:
    DRAWN.asked, PHOTOGRAPHS.asked = [], []
    return Knowledge([DRAWN, PHOTOGRAPHS], [types.SimpleNamespace(truth=truth, fill=fill), object()])


def test_captions_by_pair(knowledge):
    assert [knowledge.caption(0, pair) for pair in range(4)] == ["red", "warm", "not a colour", "blue"]
    assert [knowledge.caption(1, pair) for pair in range(3)] == ["A red bus.", "A bus", "a  RED bus"]


def test_truth_of_scenes_and_of_photographs(knowledge):
    assert knowledge.is_true("warm", 0, 0) and not knowledge.is_true("warm", 0, 1)
    assert not knowledge.is_true("blue", 0, 0) and knowledge.is_true("blue", 0, 1)
    assert knowledge.is_true("a red bus", 1, 0) and knowledge.is_true("A red bus.", 1, 1)
    assert not knowledge.is_true("A bus", 1, 1)
    assert knowledge.knows_scenes(0, 1) and not knowledge.knows_scenes(1, 1)


def test_a_text_that_the_world_cannot_read_is_true_of_its_own_picture_only(knowledge):
    assert knowledge.is_true("not a colour", 0, 0) and not knowledge.is_true("not a colour", 0, 1)


def test_guess_draws_among_what_is_true(knowledge):
    assert knowledge.guess(["red"], 0, 0, 0) == 0.5
    assert knowledge.guess(["blue"], 0, 0, 0) == 0.0
    assert knowledge.guess(["a", "red"], 0, 0, 0) is None
    assert knowledge.guess(["red"], 0, 1, 0) is None


def test_pictures_are_read_once_and_padding_never(knowledge):
    knowledge.load(np.array([0, 0, 1, -1]), np.array([1, 1, 0, -1]))
    knowledge.load(np.array([0, 0]), np.array([1, 0]))
    knowledge.captions(0, 0)
    assert DRAWN.asked == [1, 0] and PHOTOGRAPHS.asked == [0]


def test_normalise():
    assert normalise("A  Red, bus!\n") == "a red bus" == normalise("a red bus")
    assert normalise("a redbus") != "a red bus"


def test_the_drawn_world_answers_under_the_names_that_are_asked_for():
    scene = [
        dict(color="red", shape="cube", material="matte", size="large", row=0, column=0, place="top left"),
        dict(
            color="blue", shape="ball", material="shiny", size="large", row=1, column=1, place="bottom right"
        ),
    ]
    records = Records([{"captions": ["two objects: a red cube and a blue ball"], "scene": json.dumps(scene)}])
    knowledge = Knowledge([records], [datasets.get("scenes")])
    assert knowledge.is_true("a blue ball right of a matte red cube", 0, 0)
    assert not knowledge.is_true("a blue cube right of a red cube", 0, 0)
    words = knowledge.caption(0, 0).split()
    assert knowledge.guess(words, words.index("blue"), 0, 0) == 1.0
    assert knowledge.guess(words, words.index("a"), 0, 0) is None
