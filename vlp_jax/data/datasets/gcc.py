# SPDX-License-Identifier: Apache-2.0
"""Conceptual Captions (GCC, CC3M): lists of captions and addresses beside folders of downloaded files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import Dropped, coco, published, web_files
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

NAME = "gcc"
VERSION = "1"
LICENCE = "Captions and addresses: free use with acknowledgement of Google LLC. Pictures: each its own, of its website."
VISUAL_WORDS = coco.VISUAL_WORDS
SOURCE = (
    "Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv from ai.google.com/research/ConceptualCaptions, or "
    "ViLT's train_annot.json and val_annot.json; beside them what you downloaded, in train/ (training/, images_train/) "
    f"and validation/ (val/, images_val/). {web_files.NAMING}"
)
FIELDS = ("captions",)
UPRIGHT = False
OPTIONS = {"lists": [], "images": [], "first_row": 0, "rows": 0}
HELP = {
    "lists": "split=FILE, e.g. train=cc3m.tsv,validation=cc3m_val.tsv (caption and address in either order, a line of "
    "column names or none); empty = the .tsv or .json files with train and val in their names. Captions stay as given, "
    "<PERSON> too",
    "images": "split=FOLDER of the downloaded files; empty = by the usual names",
    "first_row": "number of the first row in file names",
    "rows": "rows read of each list, the first ones; 0 = all",
}
FOLDERS = {
    "train": ("train", "training", "images_train", "train_images", "cc3m"),
    "validation": ("validation", "val", "images_val", "val_images"),
    "test": ("test",),
}


def check(source: Path, **options) -> None:
    """Looks for the lists and the folders of downloaded files.

    Raises:
        UserError: one is not there, or an option is wrong.
    """
    _folders(Path(source), options)


def sources(source: Path, **options) -> list[Path]:
    """The lists."""
    return sorted(_lists(Path(source), options).values())


def listing(source: Path, each: Callable | None = None, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) in the order of the lists; the image key is the row number, from 0."""
    source = Path(source)
    lists, folders = _lists(source, options), _folders(source, options)
    for split, path in lists.items():
        folder = web_files.Folder(folders[split])
        most = options.get("rows", 0) or None
        if path.suffix == ".json":
            yield from web_files.by_path(split, web_files.read_pairs(path)[:most], folder, source)
        else:
            alone = list(folders.values()).count(folders[split]) == 1
            rows = functools.partial(_rows, path, most)
            first = options.get("first_row", 0)
            yield from web_files.by_address(split, rows, folder, source, first=first, alone=alone)


def _lists(source: Path, options: dict) -> dict[str, Path]:
    if not source.is_dir():
        raise published.missing(source, SOURCE)
    chosen = published.chosen(options.get("lists", ()), "lists", "train=cc3m.tsv")
    if chosen:
        return {split: published.inside(source, name, "lists") for split, name in chosen.items()}
    found: dict[str, Path] = {}
    for path in sorted([*source.glob("*.tsv"), *source.glob("*_annot.json")]):
        name = path.name.lower()
        split = next(
            (split for split, part in (("train", "train"), ("validation", "val")) if part in name), ""
        )
        if split in found:
            raise UserError(
                f"{found[split].name} and {path.name} in {source} are both lists of {split}. Only one can be read. Choose: "
                f"--lists={split}={path.name}."
            )
        if split:
            found[split] = path
    if not found:
        raise published.missing(source, SOURCE)
    return {split: found[split] for split in published.SPLITS if split in found}


def _folders(source: Path, options: dict) -> dict[str, Path]:
    chosen = published.chosen(options.get("images", ()), "images", "train=cc3m")
    found = {
        split: web_files.find_folder(source, FOLDERS[split], chosen.get(split, ""))
        for split in _lists(source, options)
    }
    return found


def _rows(path: Path, most: int | None) -> Iterator[web_files.Row | Dropped]:
    """The rows of a list without quotes: caption, tab, address (CC3M), or the other way round (CC12M)."""
    caption, url, header = 0, 1, 0
    for number, line in tables.read_lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1:
            lower = [cell.lower() for cell in cells]
            columns = [place for place, name in enumerate(lower) if name in ("url", "image_url")]
            if "caption" in lower and columns:
                caption, url, header = lower.index("caption"), columns[0], 1
            elif "://" in cells[0] and len(cells) > 1 and "://" not in cells[1]:
                caption, url = 1, 0
        row = number - 1 - header
        if row < 0 or not line:
            continue
        if most and row >= most:
            return
        place = f"{path.name}:{number}"
        if len(cells) <= max(caption, url) or "://" not in cells[url]:
            yield Dropped(place, "has no caption and address with a tab between")
        else:
            yield web_files.Row(row, place, cells[url], (cells[caption],))
