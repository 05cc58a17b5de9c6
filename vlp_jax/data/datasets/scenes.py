# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: a small drawn world, written in the public raw formats and read back through them.

Level 1 is learnt in minutes on a laptop, 2 and 3 are harder. Validation and test show combinations of color, shape
and material that training never shows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import Dropped, coco, scenes_picture, scenes_raw
from vlp_jax.data.datasets import scenes_text as text
from vlp_jax.data.datasets import scenes_world as world
from vlp_jax.types import UserError

NAME = "scenes"
VERSION = "2"
LICENCE = "CC0 1.0: drawn and worded by this program."
FIELDS = (*coco.FIELDS, "scene")
UPRIGHT = False
VISUAL_WORDS = world.COLORS + world.SHAPES + world.PLURALS
SOURCE = "nothing: it is drawn into DATA_DIR/raw, in the public formats"
OPTIONS = {"seed": 0, "level": 1, "train": 16_000, "validation": 1000, "test": 1000}
HELP = {
    "seed": "of everything that is drawn: the same seed gives the same bytes",
    "level": "1 learnt in minutes (64 x 64 pixels), 2 smaller objects and other sizes, 3 hard (128 x 128)",
    "train": "training pictures",
    "validation": "validation pictures",
    "test": "test pictures",
}
SPACE = 10_000_000  # image ids of a split: a larger set begins with the same pictures as a smaller one
CHUNK = 500  # pictures drawn by one call
SPLITS = [f"{split}={folder}" for split, folder in scenes_raw.FOLDERS.items()]

truth = text.truth  # (caption, objects) -> bool, None if the caption is not of the grammar
fill = text.fill  # (words, index, objects) -> the words that make the caption true there


def check(source: Path, **options) -> None:
    """Raises UserError for a level or a number of pictures that cannot be drawn."""
    if options["level"] not in world.LEVELS:
        raise UserError(
            f"There is no level {options['level']}. Possible: {', '.join(map(str, world.LEVELS))}. Choose one."
        )
    for split in world.SPLITS:
        if not 2 <= options[split] <= SPACE - 1:
            raise UserError(
                f"--{split}={options[split]} pictures cannot be drawn. Possible: 2 to {SPACE - 1}. Choose a number."
            )


def draw(folder: Path, each: Callable[..., Iterator], **options) -> None:
    """Draws the pictures and writes all raw files below `folder`.

    Args:
        folder: a new folder.
        each: `each(function, jobs)` yields function(job) in the order of jobs, in as many processes as it likes.
        options: seed, level, and the number of pictures of each split.
    """
    rows: dict[str, list[dict]] = {split: [] for split in world.SPLITS}
    jobs = []
    for split in world.SPLITS:
        (folder / scenes_raw.FOLDERS[split]).mkdir(parents=True)
        for first in range(0, options[split], CHUNK):
            last = min(first + CHUNK, options[split])
            jobs.append((str(folder), options["seed"], options["level"], split, first, last))
    for job, made in zip(jobs, each(draw_some, jobs), strict=True):
        rows[job[3]] += made
    scenes_raw.write(folder, rows, options["seed"], options["level"])
    (folder / "README.txt").write_text(
        f"Drawn by vlp_jax, data set scenes, version {VERSION}, options {json.dumps(options)}.\n{LICENCE}\n"
    )


def draw_some(job: tuple[str, int, int, str, int, int]) -> list[dict]:
    """Draws pictures first ... last - 1 of a split and returns their rows (scenes_raw)."""
    folder, seed, level, split, first, last = job
    name = scenes_raw.FOLDERS[split]
    rows = []
    for index in range(first, last):
        objects, (height, width) = world.scene(seed, level, split, index)
        content = scenes_picture.draw(
            objects, (height, width), level, world.lot(seed, level, split, index, "picture")
        )
        key = world.SPLITS.index(split) * SPACE + index + 1
        file = f"COCO_{name}_{key:012d}.jpg"
        (Path(folder) / name / file).write_bytes(content)
        row = {"key": key, "folder": name, "file": file, "height": height, "width": width, "objects": objects}
        row["captions"] = text.captions(objects, level, world.lot(seed, level, split, index, "captions"))
        rows.append(row)
    return rows


def sources(source: Path, **options) -> list[Path]:
    """The caption files and the scenes behind them."""
    scenes = [
        Path(source) / "annotations" / f"scenes_{folder}.json" for folder in scenes_raw.FOLDERS.values()
    ]
    return sorted([*coco.sources(source, splits=SPLITS), *scenes])


def texts(source: Path, **options) -> Iterator[str]:
    """What a vocabulary is trained on: the training captions, and the sentences of all other tasks."""
    source = Path(source)
    questions = json.loads((source / "vqa" / "v2_OpenEnded_mscoco_train2014_questions.json").read_bytes())
    answers = json.loads((source / "vqa" / "v2_mscoco_train2014_annotations.json").read_bytes())
    pairs = (source / "nlvr2" / "data" / "train.json").read_text().splitlines()
    entailment = (source / "snli_ve" / "snli_ve_train.jsonl").read_text().splitlines()
    return itertools.chain(
        itertools.chain.from_iterable(
            entry["captions"] for split, entry in coco.listing(source, map, splits=SPLITS) if split == "train"
        ),
        (row["question"] for row in questions["questions"]),
        (row["multiple_choice_answer"] for row in answers["annotations"]),
        (json.loads(line)["sentence"] for line in pairs),
        (json.loads(line)["sentence2"] for line in entailment),
    )


def listing(source: Path, each: Callable, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields what the reader of COCO lists, with the scene of each picture."""
    scenes = {split: _scenes(source, folder) for split, folder in scenes_raw.FOLDERS.items()}
    for split, entry in coco.listing(source, each, splits=SPLITS):
        if isinstance(entry, dict):
            entry["scene"] = json.dumps(scenes[split][entry["image_key"]])
        yield split, entry


def _scenes(source: Path, folder: str) -> dict[int, list[dict]]:
    content = json.loads((Path(source) / "annotations" / f"scenes_{folder}.json").read_bytes())
    return {row["image_id"]: row["objects"] for row in content}
