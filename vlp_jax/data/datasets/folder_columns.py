# SPDX-License-Identifier: Apache-2.0
"""The columns of anyone's table: which name means what, and what a row says in these words."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from vlp_jax.data.preparation.tables import shown
from vlp_jax.types import UserError, closest

# Meaning -> other names that people give it; taken only where the name itself and its rivals are absent.
COLUMNS = {
    "image": "image_0 file_name filename file filepath file_path path image_path image_file image_name "
    "image_file_name img img_path picture photo images",
    "image_1": "",
    "caption": "captions text texts sentence sentences description title comment prompt",
    "question": "questions",
    "answer": "answers",
    "label": "labels class category",
    "boxes": "bboxes",
    "split": "set subset partition",
}
SAYING = ("caption", "question", "label", "boxes")  # a table needs one of these
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {value: split for split, values in SPLITS.items() for value in values}
_MEANING = {other: meaning for meaning, others in COLUMNS.items() for other in others.split()}
_NUMBERED = re.compile(r"(.*?[a-z])_?(\d+)")
LONGEST_BOXES = 1_000_000  # characters of a cell that is read as Python's notation


@dataclasses.dataclass
class Row:
    """What one row says. Empty = nothing; `boxes` None = nothing, [] = that there are no objects."""

    image: str
    image_1: str
    split: str
    captions: list[str]
    questions: list[str]
    answers: list[str]  # parallel to questions
    label: str
    boxes: list[tuple[tuple[float, ...], str]] | None


class Header:
    """Reads the columns of one table, and warns once of each that is not used."""

    def __init__(self, table: str, *, quiet: bool = False) -> None:
        self.table, self.quiet = table, quiet
        self.meanings: dict[tuple[str, ...], dict[str, str]] = {}
        self.warned: set[str] = set()

    def read(self, names: Sequence[str]) -> dict[str, str]:
        """Name as written -> meaning, for those that have one.

        Raises:
            UserError: two names for one thing.
        """
        names = tuple(names)
        if names not in self.meanings:
            found = self._read(names)
            if len(self.meanings) > 1000:  # a jsonl whose objects all have other keys
                self.meanings.clear()
            self.meanings[names] = found
        return self.meanings[names]

    def _read(self, names: tuple[str, ...]) -> dict[str, str]:
        plain = {name: re.sub(r"[\s_.-]+", "_", name.strip().lower()).strip("_") for name in names}
        by_meaning: dict[str, dict[str, list[str]]] = {}
        for name, word in plain.items():
            numbered = _NUMBERED.fullmatch(word)
            base = numbered[1] if numbered else word
            if _MEANING.get(base, base) == "caption":  # caption_1, caption_2, ...; pandas writes caption.1
                word = base
            elif numbered and base == "image":
                word = f"image_{int(numbered[2])}"
            meaning = word if word in COLUMNS else _MEANING.get(word, "")
            by_meaning.setdefault(meaning, {}).setdefault(word, []).append(name)
        found = {}
        for meaning, words in by_meaning.items():
            taken = meaning if meaning in words else next(iter(words))
            if meaning and taken != meaning and len(words) > 1:
                listed = " and ".join(repr(shown(one, 60)) for group in words.values() for one in group)
                raise UserError(
                    f"{self.table}: the columns {listed} may each be the {meaning}. Name the one '{meaning}'."
                )
            if meaning and meaning != "caption" and len(words[taken]) > 1:
                listed = " and ".join(repr(shown(one, 60)) for one in words[taken])
                raise UserError(
                    f"{self.table}: the columns {listed} are both '{meaning}'. Leave one of them."
                )
            for word, group in words.items():
                if meaning and word == taken:
                    found |= dict.fromkeys(group, meaning)
                else:
                    self._warn(group)
        return found

    def _warn(self, names: list[str]) -> None:
        for name in names:
            if self.quiet or not name.strip() or name in self.warned or len(self.warned) >= 20:
                continue
            self.warned.add(name)
            logging.getLogger("vlp_jax").warning(
                "%s: the column '%s' is not used.%s Used are %s.",
                *(self.table, shown(name, 60), closest(name.lower(), COLUMNS), ", ".join(COLUMNS)),
            )


def read_row(record: dict[str, Any], meanings: dict[str, str]) -> Row:
    """What a row of a table says.

    Raises:
        ValueError: which cell cannot be understood.
    """
    row = Row("", "", "", [], [], [], "", None)
    answers: list[str] = []
    for name, meaning in meanings.items():
        value = record[name]
        if meaning == "caption":
            row.captions += _texts(value, name)
        elif meaning == "question":
            values = value if isinstance(value, list) else [value]
            texts = [_text(one, name) for one in values]  # empty ones, too: answers are parallel
            row.questions = texts if any(map(str.strip, texts)) else []
        elif meaning == "answer":
            answers = _answers(value, name)
        elif meaning == "boxes":
            row.boxes = _boxes(value)
        elif meaning == "image" and isinstance(value, list) and len(value) == 2:
            row.image, row.image_1 = (_text(one, name) for one in value)
        else:
            setattr(row, meaning, _text(value, name))
    if answers and not row.questions:
        raise ValueError("has an answer, but no question")
    if len(row.questions) > 1 and len(answers) not in (0, len(row.questions)):
        raise ValueError(f"has {len(row.questions)} questions, but {len(answers)} answers")
    if len(row.questions) == 1:
        answers = ["|".join(answers)]
    row.answers = answers or [""] * len(row.questions)
    return row


def split_of(value: str) -> str:
    """train, validation or test for what people write, "" for anything else."""
    return _SPLIT_OF.get(value.strip().lower(), "")


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value) if not isinstance(value, float) or math.isfinite(value) else ""
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0], name)
    raise ValueError(f"{shown(name, 60)} is {shown(value, 60)}, not a text")


def _texts(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for one in values if (text := _text(one, name)).strip()]


def _answers(value: Any, name: str) -> list[str]:
    """One string a question; answers to one question are joined by |. A list in a list: several answers each."""
    values = value if isinstance(value, list) else [value]
    texts = ["|".join(_texts(one, name)) for one in values]
    return texts if any(text.strip() for text in texts) else []


def _boxes(value: Any) -> list[tuple[tuple[float, ...], str]] | None:
    given = value
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _parsed(value)
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value[:4]):
        value = [value]  # one box without the outer list
    boxes = []
    for box in value if isinstance(value, list) else [None]:
        good = isinstance(box, list) and len(box) in (4, 5) and all(map(_number, box[:4]))
        if not good or not isinstance(box[-1] if len(box) == 5 else "", str):
            raise ValueError(f"boxes is {shown(given, 80)}, not [[x, y, w, h, name], ...] in pixels")
        boxes.append((tuple(map(float, box[:4])), box[4] if len(box) == 5 else ""))
    return boxes


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _parsed(text: str) -> Any:
    """json, or what pandas writes of a list: Python's notation."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > LONGEST_BOXES:
            return False
    try:
        with warnings.catch_warnings(action="ignore"):  # of a name with a backslash
            value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value))  # tuples become lists
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
