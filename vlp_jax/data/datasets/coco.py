# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions as COCO publishes them: captions_*.json beside picture folders, or Karpathy's splits.

The file is the model of a data set: it reads public raw files and yields examples; data/writer.py does the rest.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlp_jax.data.datasets import Dropped, picture_size
from vlp_jax.types import UserError, closest

NAME = "coco"
VERSION = "1"
LICENCE = (
    "Captions: CC BY 4.0, COCO Consortium. Photographs: each its own Flickr licence, see the source's json."
)
VISUAL_WORDS = tuple(
    "red orange yellow green blue purple pink brown black white gray "  # colors
    "man woman boy girl dog cat horse cow sheep bird elephant giraffe zebra bear "
    "train bus car truck motorcycle bicycle boat plane tree grass snow beach street building "
    "table chair bed couch bench pizza cake plate bowl bottle clock sign ball umbrella kite".split()
)
SOURCE = (
    "captions_train2017.json and captions_val2017.json (or 2014) under annotations/, the folders train2017/ and "
    "val2017/, and, for Karpathy's splits, dataset_coco.json; all from cocodataset.org and cs.stanford.edu/people/karpathy"
)
OPTIONS = {"splits": [], "same_splits": False, "examples": 0, "captions": 0}
HELP = {
    "splits": "split=NAME of captions_NAME.json, e.g. train=train2017,validation=val2017:0/2,test=val2017:1/2 (every "
    "second picture); or karpathy-train, karpathy-val, karpathy-test. Empty = Karpathy's where his file is, else by name",
    "same_splits": "all splits hold the pictures of the first one, to check that a model can learn them by heart",
    "examples": "pictures kept of each split, the first ones; 0 = all",
    "captions": "captions kept of each picture, the first ones; 0 = all",
}
KARPATHY = {"karpathy-train": ("train", "restval"), "karpathy-val": ("val",), "karpathy-test": ("test",)}


class Row(NamedTuple):
    """One picture of an annotation file."""

    key: int
    folder: str
    file: str
    captions: tuple[str, ...]


def features():
    """The fields of a record, as TFDS describes them; the picture keeps its original bytes."""
    import numpy as np
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image_name": tfds.features.Text(),
            "image_key": tfds.features.Scalar(np.int64),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "height": tfds.features.Scalar(np.int32),
            "width": tfds.features.Scalar(np.int32),
        }
    )


def splits(source: Path, **options) -> list[str]:
    """The splits that can be made, after a look at what is there.

    Raises:
        UserError: no such folder, no annotation file, a wrong `splits` option, or no picture folder.
    """
    plan = _plan(source, options)
    seen: dict[int, str] = {}
    for split in plan:
        rows = _rows(source, split, options)
        if not rows:
            raise UserError(f"The split {split} of {source} has no pictures. Check its annotation file.")
        folders = {row.folder for row in rows}
        if not any(path.is_dir() for folder in folders for path in _folders(source, folder)):
            looked = ", ".join(str(path) for folder in sorted(folders) for path in _folders(source, folder))
            raise UserError(
                f"No picture folder for the split {split}. Looked for {looked}. Unpack the pictures there."
            )
        shared = {seen[row.key] for row in rows if row.key in seen}
        if shared and not options.get("same_splits"):
            logging.getLogger("vlp_jax").warning(
                "%s holds pictures of %s, too.", split, ", ".join(sorted(shared))
            )
        seen.update(dict.fromkeys((row.key for row in rows), split))
    return list(plan)


def sources(source: Path, **options) -> list[Path]:
    """The annotation files that the splits come from."""
    origins = _origins(source)
    return sorted({origins[origin] for origin, _, _ in _plan(source, options).values()})


def count(source: Path, split: str, **options) -> int:
    """The number of pictures of a split, bad ones included."""
    return len(_rows(source, split, options))


def texts(source: Path, **options) -> Iterator[str]:
    """The captions that a vocabulary is trained on: those of the first split."""
    for row in _rows(source, next(iter(_plan(source, options))), options):
        yield from row.captions


def examples(source: Path, split: str, part: int = 0, parts: int = 1, **options) -> Iterator[dict | Dropped]:
    """Yields the pictures of one contiguous part of a split, by rising image id, each with its captions."""
    rows = _rows(source, split, options)
    for row in rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]:
        path = next((path for path in _files(source, row) if path.is_file()), None)
        if path is None:
            yield Dropped(f"{row.folder}/{row.file}", "not found")
        elif not row.captions:
            yield Dropped(f"{row.folder}/{row.file}", "has no caption")
        else:
            yield _example(path, row)


def _example(path: Path, row: Row) -> dict | Dropped:
    try:
        content = path.read_bytes()
        height, width = picture_size(content)
    except (OSError, ValueError) as error:
        return Dropped(f"{row.folder}/{row.file}", getattr(error, "strerror", None) or str(error))
    return {
        "image": content,
        "image_name": row.file,
        "image_key": row.key,
        "captions": list(row.captions),
        "height": height,
        "width": width,
    }


def _rows(source: Path, split: str, options: dict) -> list[Row]:
    origin, first, step = _plan(source, options)[split]
    path = _origins(source)[origin]
    rows = _karpathy(path)[origin] if origin in KARPATHY else _published(path)
    rows = rows[first::step]
    rows = rows[: options.get("examples", 0) or None]
    keep = options.get("captions", 0) or None
    return [row._replace(captions=row.captions[:keep]) for row in rows]


def _origins(source: Path) -> dict[str, Path]:
    """What splits can be made of: the names of captions_NAME.json, and Karpathy's three."""
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"The folder {source} is not there. Give --source=FOLDER that holds {SOURCE}.")
    found: dict[str, Path] = {}
    for folder in (source, source / "annotations"):
        for path in sorted(folder.glob("captions_*.json")):
            found.setdefault(path.stem.removeprefix("captions_"), path)
        for path in (folder / "dataset_coco.json", folder / "dataset_flickr30k.json"):
            if path.is_file():
                found |= dict.fromkeys(KARPATHY, path)
    if not found:
        inside = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
        raise UserError(f"{source} has no annotation file; it holds {inside}. Needed: {SOURCE}.")
    return found


def _plan(source: Path, options: dict) -> dict[str, tuple[str, int, int]]:
    """Split -> (origin, first picture, step)."""
    origins = _origins(source)
    chosen = _chosen(options.get("splits", ()), origins) if options.get("splits") else _default(origins)
    if options.get("same_splits"):
        chosen = dict.fromkeys(("train", "validation", "test"), next(iter(chosen.values())))
    return chosen


def _default(origins: dict[str, Path]) -> dict[str, tuple[str, int, int]]:
    if "karpathy-train" in origins:
        return {
            name: (f"karpathy-{short}", 0, 1)
            for name, short in zip(("train", "validation", "test"), ("train", "val", "test"), strict=True)
        }
    newest = {
        short: max((name for name in origins if name.startswith(short)), default="")
        for short in ("train", "val", "test")
    }
    plan = {}
    if newest["train"]:
        plan["train"] = (newest["train"], 0, 1)
    if newest["test"] or not newest["val"]:
        plan |= {
            name: (newest[short], 0, 1)
            for name, short in (("validation", "val"), ("test", "test"))
            if newest[short]
        }
    else:  # COCO publishes no captions of its test pictures: every second picture of val
        plan |= {"validation": (newest["val"], 0, 2), "test": (newest["val"], 1, 2)}
    return plan or {"train": (next(iter(origins)), 0, 1)}


def _chosen(wanted: list[str], origins: dict[str, Path]) -> dict[str, tuple[str, int, int]]:
    """Reads "train=train2017" or "test=val2017:1/2" (every second picture, from the second one)."""
    plan = {}
    for text in wanted:
        match = re.fullmatch(r"(\w+)=([^:=]+)(?::(\d+)/(\d+))?", text)
        if match is None or (match[4] and int(match[3]) >= int(match[4])):
            raise UserError(
                f"--splits does not take '{text}'. Give split=NAME or split=NAME:0/2, with commas between."
            )
        if match[2] not in origins:
            raise UserError(
                f"--splits={text}: there are no captions '{match[2]}'.{closest(match[2], origins)} "
                f"Possible: {', '.join(sorted(origins))}. Choose one of these."
            )
        plan[match[1]] = (match[2], int(match[3] or 0), int(match[4] or 1))
    return plan


@functools.lru_cache(maxsize=4)
def _published(path: Path) -> list[Row]:
    """captions_NAME.json: the pictures lie in the folder NAME."""
    folder = path.stem.removeprefix("captions_")
    content = _json(path, "images", "annotations")
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if (text := _clean(annotation["caption"])) and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(text)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        return [Row(int(key), folder, files[key], tuple(captions[key])) for key in sorted(files)]
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(path, error) from error


@functools.lru_cache(maxsize=2)
def _karpathy(path: Path) -> dict[str, list[Row]]:
    """dataset_coco.json or dataset_flickr30k.json: one list of pictures with a split each."""
    rows: dict[str, list[Row]] = {name: [] for name in KARPATHY}
    names = {split: name for name, members in KARPATHY.items() for split in members}
    try:
        for image in _json(path, "images")["images"]:
            captions = tuple(filter(None, (_clean(sentence["raw"]) for sentence in image["sentences"])))
            folder = image.get("filepath", "flickr30k-images")
            key = image.get("cocoid", image["imgid"])
            rows[names[image["split"]]].append(Row(int(key), folder, image["filename"], captions))
    except (KeyError, TypeError, AttributeError) as error:
        raise _malformed(path, error) from error
    return {name: sorted(members) for name, members in rows.items()}


def _json(path: Path, *keys: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Fetch the file again.") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        there = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} lacks {', '.join(missing)}; it holds {there}. Give the file as published.")
    return content


def _malformed(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not laid out as published ({type(error).__name__}: {error}). Fetch the file again."
    )


def _clean(text: str) -> str:
    """Only line breaks and blanks at the ends go; everything else is the text road's business."""
    return " ".join(text.splitlines()).strip()


@functools.lru_cache(maxsize=64)
def _folders(source: Path, folder: str) -> list[Path]:
    """Where a picture folder may lie; pictures of 2014 are the same as those of 2017, in other folders."""
    later = ["train2017", "val2017"] if folder in ("train2014", "val2014") else []
    return [place / name for name in (folder, *later) for place in (Path(source), Path(source) / "images")]


def _files(source: Path, row: Row) -> Iterator[Path]:
    for path in _folders(source, row.folder):
        yield path / (row.file if path.name == row.folder else re.sub(r"^COCO_\w+?2014_", "", row.file))
