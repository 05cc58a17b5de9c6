# SPDX-License-Identifier: Apache-2.0
"""The small world of the scenes data set: which objects there are, which are held out, how a scene is drawn by lot.

A scene is a list of objects; an object is a dict of shape, color, material, size, row, column, place (the words for
row and column) and box (x, y, width, height in pixels). Everything depends on (seed, level, split, index) only.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

COLORS = (
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "cyan",
    "black",
    "brown",
)  # none takes "an": "a" tells nothing
SHAPES = ("cube", "ball", "cone", "star")
PLURALS = ("cubes", "balls", "cones", "stars")
MATERIALS = ("shiny", "matte")
SIZES = ("large", "small")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Level:
    """How hard a world is; sizes in pixels are multiples of 16, so that patches of 16 fit."""

    pictures: tuple[tuple[int, int], ...]  # (height, width), drawn by lot
    grid: int  # rows and columns of cells, at most one object a cell
    objects: tuple[int, ...]  # how many, drawn by lot
    sizes: tuple[str, ...]
    near: float  # how far the colors are drawn together, 0 = as named
    ground: tuple[int, int]  # lightness of the ground, drawn by lot, of 255
    quality: int  # of the JPEG


LEVELS = {
    1: Level(
        pictures=((64, 64),),
        grid=2,
        objects=(1, 2, 3),
        sizes=("large",),
        near=0.0,
        ground=(200, 236),
        quality=92,
    ),
    2: Level(
        pictures=((96, 96), (96, 96), (96, 128), (128, 96), (112, 96), (96, 144)),
        grid=3,
        objects=(1, 2, 3, 4),
        sizes=("large", "small"),
        near=0.0,
        ground=(112, 236),
        quality=90,
    ),
    3: Level(
        pictures=((128, 128),),
        grid=3,
        objects=(2, 3, 4),
        sizes=("small",),
        near=0.4,
        ground=(112, 158),
        quality=80,
    ),
}
SHARE = {"large": (0.88, 0.94), "small": (0.46, 0.54)}  # of the shorter side of a cell


def held_out(color: str, shape: str, material: str) -> bool:
    """Whether training never shows this combination: 16 of the 64, by a Latin square.

    Every pair of values (color and shape, color and material, shape and material) still occurs in training.
    """
    return (COLORS.index(color) + SHAPES.index(shape) + 2 * MATERIALS.index(material)) % 4 == 0


COMBINATIONS = tuple(itertools.product(COLORS, SHAPES, MATERIALS))
KNOWN = tuple(combination for combination in COMBINATIONS if not held_out(*combination))
HELD_OUT = tuple(combination for combination in COMBINATIONS if held_out(*combination))


def lot(seed: int, level: int, split: str, index: int, purpose: str) -> random.Random:
    """A generator of its own for one purpose of one picture: neither order nor number of workers matters."""
    return random.Random(f"scenes/{seed}/{level}/{split}/{index}/{purpose}")


def words_of_cell(row: int, column: int, grid: int) -> str:
    """The words for a cell, "top left" ... "bottom right"; a grid of two has no middle and no center."""
    step = 2 // (grid - 1)
    return f"{ROWS[row * step]} {COLUMNS[column * step]}"


def scene(seed: int, level: int, split: str, index: int) -> tuple[list[dict], tuple[int, int]]:
    """Draws by lot the objects of one picture and its (height, width).

    Training holds known combinations only; validation and test at least one held-out combination a picture. Color
    and shape together name one object of a scene, so that "the red cube" is never ambiguous.
    """
    rules = LEVELS[level]
    draw = lot(seed, level, split, index, "scene")
    height, width = draw.choice(rules.pictures)
    count = draw.choice(rules.objects)
    kinds = [] if split == "train" else [draw.choice(HELD_OUT)]
    while len(kinds) < count:
        kind = draw.choice(KNOWN if split == "train" else COMBINATIONS)
        if kind[:2] not in [other[:2] for other in kinds]:
            kinds.append(kind)
    cells = draw.sample(list(itertools.product(range(rules.grid), repeat=2)), count)
    objects = [
        _object(kind, cell, draw.choice(rules.sizes), rules.grid, (height, width), draw)
        for kind, cell in zip(kinds, cells, strict=True)
    ]
    return sorted(objects, key=lambda item: (item["row"], item["column"])), (height, width)


def _object(kind, cell, size, grid, picture, draw) -> dict:
    """One object with its box somewhere inside its cell."""
    color, shape, material = kind
    cell_height, cell_width = picture[0] / grid, picture[1] / grid
    side = round(min(cell_height, cell_width) * draw.uniform(*SHARE[size]))
    x = int(cell[1] * cell_width) + draw.randint(0, int(cell_width) - side)
    y = int(cell[0] * cell_height) + draw.randint(0, int(cell_height) - side)
    return {
        "shape": shape,
        "color": color,
        "material": material,
        "size": size,
        "row": cell[0],
        "column": cell[1],
        "place": words_of_cell(*cell, grid),
        "box": [x, y, side, side],
    }
