# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes, balanced: every question text has each of its answers equally often.

So a model that cannot see is at chance: 1/2 for yes and no, 1/8 for colors, and so on (VQAv2's complementary pairs).
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterator
from typing import NamedTuple

from vlp_jax.data.datasets import scenes_text as text
from vlp_jax.data.datasets import scenes_world as world

PER_PICTURE = 3  # wanted on average; rare questions give fewer
BESIDE = ("left of", "right of", "above", "below")


class Question(NamedTuple):
    """A question about the picture `row`."""

    row: int
    kind: str  # question_type in VQAv2
    text: str
    answer: str


def answer_type(answer: str) -> str:
    """The three types of VQAv2."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def possible_answers(kind: str, level: int) -> tuple[str, ...]:
    """The answers that a kind of question has at a level, each as frequent as the others."""
    rules = world.LEVELS[level]
    places = {
        world.words_of_cell(row, column, rules.grid)
        for row in range(rules.grid)
        for column in range(rules.grid)
    }
    return {
        "how many objects": tuple(str(number) for number in rules.objects),
        "how many": ("0", "1", "2"),
        "what color": world.COLORS,
        "what shape": world.SHAPES,
        "what material": world.MATERIALS,
        "what size": world.SIZES,
        "where is": tuple(sorted(places)),
        "is there": ("no", "yes"),
        "is the": ("no", "yes"),
    }[kind]


def candidates(row: int, objects: list[dict], rng: random.Random) -> Iterator[Question]:
    """All questions that may be asked about a picture; "the cube" only where there is one cube."""
    yield Question(row, "how many objects", "how many objects are there", str(len(objects)))
    shapes = collections.Counter(item["shape"] for item in objects)
    colors = collections.Counter(item["color"] for item in objects)
    for shape, plural in zip(world.SHAPES, world.PLURALS, strict=True):
        yield Question(row, "how many", f"how many {plural} are there", str(shapes[shape]))
    alone = [item for item in objects if shapes[item["shape"]] == 1]
    for item in alone:
        yield Question(row, "what color", f"what color is the {item['shape']}", item["color"])
        yield Question(row, "what material", f"what material is the {item['shape']}", item["material"])
        yield Question(row, "what size", f"what size is the {item['shape']}", item["size"])
        yield Question(row, "where is", f"where is the {item['shape']}", item["place"])
    for item in objects:
        if colors[item["color"]] == 1:
            yield Question(row, "what shape", f"what shape is the {item['color']} object", item["shape"])
    here = {(item["color"], item["shape"]) for item in objects}
    absent = [
        (color, shape) for color in world.COLORS for shape in world.SHAPES if (color, shape) not in here
    ]
    for color, shape in [*sorted(here), *rng.sample(absent, len(here))]:
        answer = "yes" if (color, shape) in here else "no"
        yield Question(row, "is there", f"is there a {color} {shape}", answer)
    for first in alone:
        for second in alone:
            for relation in BESIDE if first is not second else ():
                answer = "yes" if text.related(first, relation, second) else "no"
                yield Question(
                    row, "is the", f"is the {first['shape']} {relation} the {second['shape']}", answer
                )


def balanced(scenes: list[list[dict]], level: int, rng: random.Random) -> list[Question]:
    """Chooses about PER_PICTURE questions a picture, in the order of the pictures.

    A text is asked m times for each of its possible answers, m being what its rarest answer allows; so a text whose
    answer is always the same is never asked.
    """
    found: dict[str, dict[str, dict[str, list[Question]]]] = {}
    for row, objects in enumerate(scenes):
        for question in candidates(row, objects, rng):
            by_answer = found.setdefault(question.kind, {}).setdefault(question.text, {})
            by_answer.setdefault(question.answer, []).append(question)
    chosen = []
    for kind, texts in sorted(found.items()):
        answers = possible_answers(kind, level)
        wanted = -(-PER_PICTURE * len(scenes) // (len(found) * len(texts) * len(answers)))
        for _, by_answer in sorted(texts.items()):
            each = (
                min(wanted, *(len(by_answer.get(answer, ())) for answer in answers))
                if len(answers) > 1
                else 0
            )
            for answer in answers if each else ():
                chosen += rng.sample(by_answer[answer], each)
    return sorted(chosen)


def ten_answers(question: Question, level: int, rng: random.Random) -> list[dict]:
    """Ten annotators as in VQAv2: at least eight are right, so that the right answer scores 1."""
    right = rng.choice((10, 10, 10, 9, 8))
    others = [answer for answer in possible_answers(question.kind, level) if answer != question.answer]
    given = [question.answer] * right + [rng.choice(others) for _ in range(10 - right)]
    rng.shuffle(given)
    return [
        {
            "answer": answer,
            "answer_confidence": "yes" if answer == question.answer else "maybe",
            "answer_id": number,
        }
        for number, answer in enumerate(given, 1)
    ]
