# SPDX-License-Identifier: Apache-2.0
"""Captions of scenes from a small grammar, and its inverse: is this caption true of that scene?

    caption = [opener] [only | N objects:] item {(, | and) item} [and nothing else]
    item    = thing [in the PLACE] | thing RELATION thing {and RELATION thing} | group
    thing   = a [size] [material] color shape
    group   = N shapes, one color {and one color} | N color objects, a shape {and a shape}

A thing claims that there is one; N, "only" and "nothing else" claim that there are no others.
"""

from __future__ import annotations

import dataclasses
import random
import re

from vlp_jax.data.datasets import scenes_world as world

NUMBERS = ("one", "two", "three", "four")
OPENERS = (
    "a picture of",
    "a photo of",
    "the picture shows",
    "the photo shows",
    "there is",
    "there are",
    "here is",
    "here are",
    "we can see",
)
ONLY = ("only", "just", "nothing but")
VERBS = ("", "is", "sits")
RELATIONS = {
    "left of": (0, -1),
    "to the left of": (0, -1),
    "right of": (0, 1),
    "to the right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}  # sign of (row, column) of the first thing less the second's
SHORTEST, LONGEST = 5, 25  # words
CLASSES = (
    world.COLORS,
    world.SHAPES,
    world.PLURALS,
    world.MATERIALS,
    world.SIZES,
    world.ROWS,
    world.COLUMNS,
    ("above", "below"),
    NUMBERS,
)  # words that may stand for each other


@dataclasses.dataclass
class Meaning:
    """What a caption claims."""

    things: list[dict] = dataclasses.field(default_factory=list)  # wanted values of distinct objects
    relations: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)
    counts: list[tuple[dict, int]] = dataclasses.field(default_factory=list)  # so many have these values


class Unreadable(ValueError):
    """The text is not of this grammar."""


def truth(caption: str, objects: list[dict]) -> bool | None:
    """Whether a caption is true of a scene; None for a text outside the grammar."""
    try:
        meaning = _Reader(caption).read()
    except Unreadable:
        return None
    if any(sum(_fits(item, values) for item in objects) != count for values, count in meaning.counts):
        return False
    return _assign(meaning, objects, [])


def fill(words: list[str], index: int, objects: list[dict]) -> list[str]:
    """The words that make the caption true in place of `words[index]`, among those of its class.

    The words may carry punctuation or have it as words of their own. A word of no class (an article, say) gives [].
    """
    word = words[index].strip(",:")
    possible = sorted({other for group in CLASSES if word in group for other in group})
    rest = words[index].removeprefix(word)
    return [
        other
        for other in possible
        if truth(" ".join([*words[:index], other + rest, *words[index + 1 :]]), objects)
    ]


def captions(objects: list[dict], level: int, rng: random.Random, count: int = 5) -> list[str]:
    """Returns `count` different true captions of a scene, each of 5 to 25 words, naming all its objects."""
    two_sizes = len(world.LEVELS[level].sizes) > 1
    forms = FORMS[min(len(objects), 3)]
    turn = rng.sample(forms, len(forms))  # each form once before any comes again
    written: list[str] = []
    while len(written) < count:
        form = turn.pop() if turn else rng.choice(forms)
        items = rng.sample(objects, len(objects))
        things = [_thing(item, len(items), two_sizes, rng) for item in items]
        text = " ".join(form(items, things, rng).split())
        if text not in written and SHORTEST <= len(text.split()) <= LONGEST:
            written.append(text)
    return written


def _thing(item: dict, count: int, two_sizes: bool, rng: random.Random) -> str:
    words = ["a", item["color"], item["shape"]]
    chance = 0.35 if count < 3 else 0.15
    if rng.random() < chance:
        words.insert(1, item["material"])
    if two_sizes and rng.random() < chance:
        words.insert(1, item["size"])
    return " ".join(words)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _opener(rng: random.Random, number: int = 1) -> str:
    unfit = ("there are", "here are") if number == 1 else ("there is", "here is")
    return rng.choice([text for text in OPENERS if text not in unfit])


def _form_list(items, things, rng) -> str:
    return f"{_opener(rng)} {_listed(things)}"


def _form_only(items, things, rng) -> str:
    return f"{_opener(rng)} {rng.choice(ONLY)} {_listed(things)}"


def _form_nothing_else(items, things, rng) -> str:
    return f"{rng.choice(('', _opener(rng)))} {_listed(things)} and nothing else"


def _form_number(items, things, rng) -> str:
    number = len(items)
    noun = "object" if number == 1 else "objects"
    start = rng.choice(("", _opener(rng, number)))
    if number == 1 and rng.random() < 0.5:
        things = [f"{things[0]} {_place(items[0], rng)}"]
    return f"{start} {NUMBERS[number - 1]} {noun}: {_listed(things)}"


def _form_places(items, things, rng) -> str:
    verb = rng.choice(VERBS)
    return _listed([f"{thing} {verb} {_place(item, rng)}" for item, thing in zip(items, things, strict=True)])


def _form_relations(items, things, rng) -> str:
    """The first thing beside the others (two or three), or two pairs (four)."""
    verb = rng.choice(VERBS)
    if len(items) == 4:
        first = f"{things[0]} {verb} {_relation(items[0], items[1], rng)} {things[1]}"
        return f"{first} and {things[2]} {verb} {_relation(items[2], items[3], rng)} {things[3]}"
    beside = [
        f"{_relation(items[0], item, rng)} {thing}" for item, thing in zip(items[1:], things[1:], strict=True)
    ]
    return f"{things[0]} {verb} {' and '.join(beside)}"


def _form_group(items, things, rng) -> str:
    """Objects of one shape or color counted first, then the others; a list where none is shared."""
    groups = [
        (key, [item for item in items if item[key] == value])
        for key, possible in (("shape", world.SHAPES), ("color", world.COLORS))
        for value in possible
    ]
    groups = [(key, members) for key, members in groups if len(members) > 1]
    if not groups:
        return _form_number(items, things, rng)
    key, members = rng.choice(groups)
    if key == "shape":
        head = world.PLURALS[world.SHAPES.index(members[0]["shape"])]
        parts = [f"one {item['color']}" for item in members]
    else:
        head = f"{members[0]['color']} objects"
        parts = [f"a {item['shape']}" for item in members]
    others = [thing for item, thing in zip(items, things, strict=True) if item not in members]
    rest = f", and {_listed(others)}" if others else ""
    return f"{_opener(rng, len(members))} {NUMBERS[len(members) - 1]} {head}, {_listed(parts)}{rest}"


FORMS = {
    1: (_form_only, _form_nothing_else, _form_number, _form_places),
    2: (_form_list, _form_only, _form_nothing_else, _form_number, _form_places, _form_relations, _form_group),
    3: (_form_list, _form_number, _form_places, _form_relations, _form_group, _form_nothing_else),
}  # by the number of objects; 3 also for more


def _place(item: dict, rng: random.Random) -> str:
    corner = "middle" not in item["place"] and "center" not in item["place"] and rng.random() < 0.4
    return f"in the {item['place']}{' corner' if corner else ''}"


def _relation(first: dict, second: dict, rng: random.Random) -> str:
    return rng.choice([name for name in RELATIONS if related(first, name, second)])


def related(first: dict, relation: str, second: dict) -> bool:
    """Whether "first RELATION second" holds; rows and columns of cells decide."""
    row, column = RELATIONS[relation]
    return (first["row"] - second["row"]) * row + (first["column"] - second["column"]) * column > 0


def _fits(item: dict, values: dict) -> bool:
    return all(item[key] == value for key, value in values.items())


def _assign(meaning: Meaning, objects: list[dict], chosen: list[dict]) -> bool:
    """Whether distinct objects can stand for the things, the first ones being chosen already."""
    if len(chosen) == len(meaning.things):
        return all(related(chosen[one], name, chosen[other]) for one, name, other in meaning.relations)
    wanted = meaning.things[len(chosen)]
    return any(
        _assign(meaning, objects, [*chosen, item])
        for item in objects
        if item not in chosen and _fits(item, wanted)
    )


class _Reader:
    """Reads one caption from left to right."""

    def __init__(self, caption: str) -> None:
        if re.search(r"[^a-z,: ]", caption):
            raise Unreadable(caption)
        self.words = re.findall(r"[a-z]+|[,:]", caption)
        self.at = 0
        self.meaning = Meaning()

    def read(self) -> Meaning:
        self._any(*OPENERS)
        total = None
        if self._any(*ONLY):
            total = 0
        elif number := self._any(
            *[f"{number} {noun}" for number in NUMBERS for noun in ("object", "objects")]
        ):
            total = NUMBERS.index(number.split()[0]) + 1
            if not self._any(":"):
                raise Unreadable(number)
        self._item()
        while self.at < len(self.words):
            if self._any("and nothing else"):
                total = 0
                break
            if not self._any(", and", ",", "and"):
                break
            self._item()
        if self.at < len(self.words):
            raise Unreadable(" ".join(self.words))
        if total is not None:
            self.meaning.counts.append(({}, total or len(self.meaning.things)))
        return self.meaning

    def _any(self, *phrases: str) -> str:
        """Takes the first of the phrases that comes next, "" if none does."""
        for phrase in phrases:
            words = phrase.split()
            if self.words[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return phrase
        return ""

    def _need(self, *phrases: str) -> str:
        found = self._any(*phrases)
        if not found:
            raise Unreadable(" ".join(self.words))
        return found

    def _item(self) -> None:
        number = self._any(*NUMBERS[1:])
        if number:
            self._group(NUMBERS.index(number) + 1)
            return
        first = self._thing()
        while True:
            verb = self._any("is", "sits")
            before = self.at
            joined = bool(self.meaning.relations) and self._any("and")
            relation = self._any(*RELATIONS)
            if not relation:
                self.at = before
                if verb:
                    self._need("in the")
                    self.at -= 2
                break
            if joined and self.meaning.relations[-1][0] != first:
                raise Unreadable(relation)
            self.meaning.relations.append((first, relation, self._thing()))
        self._at_place(first)

    def _thing(self) -> int:
        self._need("a")
        values = {"size": self._any(*world.SIZES), "material": self._any(*world.MATERIALS)}
        values |= {"color": self._need(*world.COLORS), "shape": self._need(*world.SHAPES)}
        self.meaning.things.append({key: value for key, value in values.items() if value})
        return len(self.meaning.things) - 1

    def _at_place(self, thing: int) -> None:
        if self._any("in the"):
            place = f"{self._need(*world.ROWS)} {self._need(*world.COLUMNS)}"
            if self._any("corner") and ("middle" in place or "center" in place):
                raise Unreadable(place)
            self.meaning.things[thing]["place"] = place

    def _group(self, count: int) -> None:
        plural = self._any(*world.PLURALS)
        if plural:
            shared = {"shape": world.SHAPES[world.PLURALS.index(plural)]}
        else:
            shared = {"color": self._need(*world.COLORS)}
            self._need("objects")
        self.meaning.counts.append((shared, count))
        for _ in range(count):
            self._need(",", "and")
            self._need("one" if plural else "a")
            value = self._need(*(world.COLORS if plural else world.SHAPES))
            self.meaning.things.append(shared | {"color" if plural else "shape": value})
