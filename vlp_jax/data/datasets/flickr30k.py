# SPDX-License-Identifier: Apache-2.0
"""Flickr30k: five captions a photograph, in Karpathy's splits or with lists of one's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import Dropped, coco, published
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

NAME = "flickr30k"
VERSION = "1"
LICENCE = "Captions: for non-commercial research and education, University of Illinois. Photographs: Flickr's terms of use."
VISUAL_WORDS = coco.VISUAL_WORDS
SOURCE = (
    "flickr30k-images/ and results_20130124.token from shannon.cs.illinois.edu/DenotationGraph (on request), and "
    "dataset_flickr30k.json with Karpathy's splits from cs.stanford.edu/people/karpathy; without that json the captions "
    "come from the .token file"
)
FIELDS = ("captions",)
UPRIGHT = False
OPTIONS = {"splits": [], "examples": 0, "captions": 0}
HELP = {
    "splits": "lists of picture names or numbers, one a line: validation=FILE,test=FILE[,train=FILE], FILE from --source "
    "on; without train all others. Empty = Karpathy's, or without his file 5 % validation and 5 % test by sha256 of the "
    "picture's name",
    "examples": "pictures kept of each split, the first ones; 0 = all",
    "captions": "captions kept of each picture, the first ones; 0 = all",
}
KARPATHY, TOKEN = "dataset_flickr30k.json", "results_20130124.token"
KARPATHY_SPLITS = {"train": "train", "val": "validation", "test": "test"}
FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images")


def check(source: Path, **options) -> None:
    """Looks for the captions, the lists and the picture folder.

    Raises:
        UserError: one is not there.
    """
    sources(source, **options)
    _folder(Path(source))


def sources(source: Path, **options) -> list[Path]:
    """The annotation file and the lists of the splits option."""
    return sorted([_annotations(Path(source)), *_lists(Path(source), options).values()])


def listing(source: Path, each: Callable | None = None, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) by rising number; the image key is the number in the picture's name, Flickr's own."""
    source = Path(source)
    path, folder, lists = _annotations(source), _folder(source), _lists(source, options)
    pictures, bad = _karpathy(path) if path.name == KARPATHY else _token(path)
    members = published.read_splits(lists)
    there = set(os.listdir(folder))
    rows: dict[str, list[tuple[int, str, list[str]]]] = {split: [] for split in published.SPLITS}
    for name, (split, captions) in pictures.items():
        number = _number(name)
        if lists:
            split = published.split_of(number, members, lists)
        if split:
            rows[split].append((number, name, captions))
    for split, chosen in rows.items():
        keep = options.get("captions", 0) or None
        for number, name, captions in sorted(chosen)[: options.get("examples", 0) or None]:
            image = f"{folder.relative_to(source).as_posix()}/{name}"
            if name not in there:
                yield split, Dropped(image, "not found")
                continue
            entry = {"image": image, "image_name": name, "image_key": number, "flickr_id": number}
            yield split, entry | {"captions": captions[:keep]}
    known = {_number(name) for name in pictures}
    for number, split in members.items():
        if number not in known:
            yield (
                split,
                Dropped(f"{number}.jpg", f"is listed for {split}, but has no captions in {path.name}"),
            )
    for one in bad:
        yield "train", one


def _number(name: str) -> int:
    match = re.match(r"\d{1,18}(?=\D|$)", name)
    return int(match[0]) if match else 0


def _annotations(source: Path) -> Path:
    for folder in (source, source / "annotations"):
        for name in (KARPATHY, TOKEN, "results.token"):
            if (folder / name).is_file():
                return folder / name
    raise published.missing(source, SOURCE)


def _lists(source: Path, options: dict) -> dict[str, Path]:
    chosen = published.chosen(options.get("splits", ()), "splits", "validation=val.txt,test=test.txt")
    return {split: published.inside(source, name, "splits") for split, name in chosen.items()}


def _folder(source: Path) -> Path:
    looked = [source / name for name in FOLDERS]
    for path in looked:
        if path.is_dir():
            return path
    raise UserError(
        f"No picture folder. Looked for {', '.join(map(str, looked))}. Unpack the pictures in the first one."
    )


def _karpathy(path: Path) -> tuple[dict[str, tuple[str, list[str]]], list[Dropped]]:
    """Picture -> (split, captions), of Karpathy's json."""
    content = tables.read_json(path, "images")
    if not isinstance(content["images"], list):
        raise published.malformed(path, "images", TypeError("is no list"))
    found: dict[str, tuple[str, list[str]]] = {}
    for number, image in enumerate(content["images"], 1):
        try:
            name, split = published.file_name(image["filename"]), KARPATHY_SPLITS.get(image["split"])
            if split is None:
                raise ValueError(f"is of the split {image['split']}, not {', '.join(KARPATHY_SPLITS)}")
            row = (split, [sentence["raw"] for sentence in image["sentences"]])
            if found.setdefault(name, row) != row:
                raise ValueError(f"has the filename {name} of another picture")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"picture {number}", error) from error
    return found, []


def _token(path: Path) -> tuple[dict[str, tuple[str, list[str]]], list[Dropped]]:
    """Picture -> (split, captions), of lines like "1000092795.jpg#0 tab caption"; and the lines of another form."""
    found: dict[str, tuple[str, list[str]]] = {}
    bad = []
    for number, line in tables.read_lines(path):
        name, tab, caption = line.partition("\t")
        name = name.partition("#")[0].strip()
        if line.strip() and not (tab and name):
            bad.append(Dropped(f"{path.name}:{number}", "has no picture and caption with a tab between"))
        elif line.strip():
            found.setdefault(name, (published.split_by_hash(name), []))[1].append(caption)
    return found, bad
