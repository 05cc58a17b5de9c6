# SPDX-License-Identifier: Apache-2.0
"""Visual Genome as published, versions 1.0 to 1.4: region phrases with boxes, objects with attributes, questions.

Names of fields differ by version and file: image_id, id or image; names, name or object_names; w or width. Texts stay
as given, but for the final "." of answers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlp_jax.data.datasets import Dropped, coco, published
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError

NAME = "visual_genome"
VERSION = "1"
LICENCE = (
    "Annotations: CC BY 4.0, Krishna et al. Photographs: of YFCC100M and COCO, each its own Flickr licence."
)
VISUAL_WORDS = coco.VISUAL_WORDS
SOURCE = (
    "image_data.json and what is wanted of region_descriptions.json, objects.json, attributes.json and "
    "question_answers.json (any version), and the folders VG_100K/ and VG_100K_2/; from homes.cs.washington.edu/~ranjay/"
    "visualgenome. All of it takes 5 GB of memory for two minutes"
)
FIELDS = ("captions", "caption_boxes", "questions", "answers", "boxes", "box_names", "box_attributes")
UPRIGHT = False
OPTIONS = {"splits": [], "regions": True, "objects": True, "questions": True, "examples": 0}
HELP = {
    "splits": "lists of image ids or names, one a line: validation=FILE,test=FILE[,train=FILE], FILE from --source on; "
    "without train all others. Empty = 5 % validation and 5 % test by sha256 of the image id, which does not heed what "
    "COCO holds out",
    "regions": "take region_descriptions.json as captions with boxes",
    "objects": "take objects.json and attributes.json as boxes",
    "questions": "take question_answers.json",
    "examples": "pictures kept of each split, those of the lowest ids; 0 = all",
}
FILES = {  # file -> key of its lists, option
    "region_descriptions.json": ("regions", "regions"),
    "objects.json": ("objects", "objects"),
    "attributes.json": ("attributes", "objects"),
    "question_answers.json": ("qas", "questions"),
}
FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images", "images2", ".")


class Image(NamedTuple):
    """A row of image_data.json."""

    folder: str  # by its address
    name: str
    coco_id: int
    flickr_id: int


def check(source: Path, **options) -> None:
    """Looks for the annotation files, the lists and a picture folder.

    Raises:
        UserError: one is not there.
    """
    source = Path(source)
    sources(source, **options)
    if not _names(source):
        looked = ", ".join(str(source / name) for name in FOLDERS)
        raise UserError(f"No pictures. Looked for *.jpg in {looked}. Unpack VG_100K and VG_100K_2 there.")


def sources(source: Path, **options) -> list[Path]:
    """The annotation files that are there and wanted, and the lists of the splits option.

    Raises:
        UserError: image_data.json is not there, or nothing besides it.
    """
    source = Path(source)
    files = _files(source, options)
    if len(files) < 2 or "image_data.json" not in files:
        raise published.missing(source, SOURCE)
    return sorted([*files.values(), *_lists(source, options).values()])


def listing(source: Path, each: Callable | None = None, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) by rising image id; phrases are captions with caption_boxes, an answer loses its final "."."""
    source = Path(source)
    sources(source, **options)
    files, names, lists = _files(source, options), _names(source), _lists(source, options)
    images, members = _images(files["image_data.json"]), published.read_splits(lists)
    parts = {name: _parts(path, FILES[name][0]) for name, path in files.items() if name in FILES}
    found = parts.keys() & {"objects.json", "attributes.json"}
    ids: dict[str, list[int]] = {split: [] for split in published.SPLITS}
    for key in sorted(images):
        split = published.split_of(key, members, lists) if lists else published.split_by_hash(str(key))
        if split:
            ids[split].append(key)
    lost = 0
    for split, keys in ids.items():
        for key in keys[: options.get("examples", 0) or None]:
            said = {name: json.loads(part[key]) for name, part in parts.items() if key in part}
            fields = _regions(said) | _questions(said)
            if found & said.keys():
                boxes, unmatched = _objects(said)
                fields, lost = fields | boxes, lost + unmatched
            yield split, _entry(key, images[key], fields, _place(names, images[key]))
        for key, wanted in members.items():
            if wanted == split and key not in images:
                yield split, Dropped(f"image {key}", f"is listed for {split}, but not in image_data.json")
    for name, part in parts.items():
        for key in sorted(part.keys() - images.keys()):
            yield "train", Dropped(f"image {key}", f"is annotated in {name}, but not in image_data.json")
    if lost:
        logging.getLogger("vlp_jax").warning("attributes.json: %d objects are not in objects.json.", lost)


def _files(source: Path, options: dict) -> dict[str, Path]:
    if not source.is_dir():
        raise published.missing(source, SOURCE)
    wanted = ["image_data.json", *(name for name, (_, option) in FILES.items() if options.get(option, True))]
    places = [folder / name for name in wanted for folder in (source, source / "annotations")]
    return {path.name: path for path in reversed(places) if path.is_file()}


def _lists(source: Path, options: dict) -> dict[str, Path]:
    chosen = published.chosen(options.get("splits", ()), "splits", "validation=val.txt,test=test.txt")
    return {split: published.inside(source, name, "splits") for split, name in chosen.items()}


def _names(source: Path) -> dict[str, set[str]]:
    """Folder -> the pictures there."""
    found = {
        name: {file for file in os.listdir(source / name) if file.endswith((".jpg", ".png"))}
        for name in FOLDERS
        if (source / name).is_dir()
    }
    return {name: files for name, files in found.items() if files}


def _place(names: dict[str, set[str]], image: Image) -> str | None:
    """The path of a picture: in the folder of its address, else wherever it is."""
    places = sorted(names, key=lambda name: (not name.endswith(image.folder or "-"), FOLDERS.index(name)))
    folder = next((name for name in places if image.name in names[name]), None)
    return None if folder is None else f"{folder}/{image.name}".removeprefix("./")


def _images(path: Path) -> dict[int, Image]:
    content = tables.read_json(path)
    if not isinstance(content, list):
        raise published.malformed(path, "it", TypeError("is no list of pictures"))
    images: dict[int, Image] = {}
    for number, row in enumerate(content, 1):
        try:
            key = published.identity(row["image_id"] if "image_id" in row else row["id"])
            match = re.search(r"(VG_100K(?:_2)?)/([^/?#]+)$", row.get("url") or "")
            folder, name = match.groups() if match else ("", f"{key}.jpg")
            others = (published.optional_identity(row.get(name)) for name in ("coco_id", "flickr_id"))
            image = Image(folder, name, *others)
            if images.setdefault(key, image) != image:
                raise ValueError(f"has the id {key} of another picture")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"picture {number}", error) from error
    return images


def _parts(path: Path, name: str) -> dict[int, str]:
    """Image id -> what the file says of it, as short json: a tenth of the memory of Python's own objects."""
    take = {"regions": _region, "qas": _question}.get(name, _object)
    parts: dict[int, list] = {}
    for key, item in _items(path, tables.read_json(path), name):
        try:
            row = published.identity(key)
            if item is None:
                parts.setdefault(row, [])
            else:
                parts.setdefault(row, []).append(take(item))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            shown = tables.shown(item, 100)
            raise published.malformed(path, f"image {tables.shown(key, 40)}, {shown}:", error) from error
    return {key: json.dumps(rows, separators=(",", ":")) for key, rows in parts.items()}


def _items(path: Path, content: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """(image id, item), or (image id, None) for a picture without items, of any of the layouts."""
    if isinstance(content, dict):  # by image id
        content = [{"image_id": key, name: value} for key, value in content.items()]
    if not isinstance(content, list):
        raise published.malformed(path, "it", TypeError("is no list of pictures"))
    for number, row in enumerate(content, 1):
        if isinstance(row, dict) and isinstance(row.get(name), dict) and name in row[name]:
            row = row[name]  # by image id with the id again
        key = _first(row, "image_id", "image", "id") if isinstance(row, dict) else None
        if key is None:
            raise published.malformed(path, f"picture {number}", TypeError("has no id"))
        items = row.get(name)
        if items is None or (
            items and "x" in row
        ):  # a flat list of items; attributes have a list of that name, too
            yield key, row
            continue
        items = list(items.values()) if isinstance(items, dict) else items
        if not isinstance(items, list):
            raise published.malformed(path, f"picture {number}", TypeError(f"has no list of {name}"))
        yield key, None
        for item in items:
            yield key, item


def _first(item: dict, *names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _box(item: dict) -> list[int]:
    box = [item["x"], item["y"], _first(item, "w", "width"), _first(item, "h", "height")]
    if not all(isinstance(value, int | float) for value in box):
        raise ValueError("has no box")
    return box


def _region(item: dict) -> list:
    return [item["phrase"], *_box(item)]


def _question(item: dict) -> list:
    question, answer = item["question"] + "", item["answer"].strip()
    answer = answer[:-1] if answer.endswith(".") and not answer.endswith("..") else answer
    return [question, answer.replace("|", "/")]  # | stands between several answers in records


def _object(item: dict) -> list:
    """[id or None, ids merged into it, name, attributes, box]"""
    names = _words(_first(item, "names", "object_names", "name"))
    merged = [str(one) for one in item.get("merged_object_ids") or ()]
    attributes = [
        part.strip() for text in _words(_first(item, "attributes", "attribute")) for part in text.split(",")
    ]
    attributes = list(dict.fromkeys(filter(None, attributes)))
    return [_first(item, "object_id", "id"), merged, names[0] if names else "", attributes, _box(item)]


def _words(value: Any) -> list[str]:
    """Names and attributes: null, a text, a list of texts, or an object of them."""
    values = value.values() if isinstance(value, dict) else [value] if isinstance(value, str) else value or []
    return [text for text in values if isinstance(text, str) and text.strip()]


def _regions(said: dict[str, list]) -> dict[str, list]:
    rows = said.get("region_descriptions.json")
    return {"captions": [row[0] for row in rows], "caption_boxes": [row[1:] for row in rows]} if rows else {}


def _questions(said: dict[str, list]) -> dict[str, list]:
    rows = said.get("question_answers.json")
    return {"questions": [row[0] for row in rows], "answers": [row[1] for row in rows]} if rows else {}


def _objects(said: dict[str, list]) -> tuple[dict[str, list], int]:
    """The boxes of a picture, and how many objects with attributes have none.

    objects.json says what there is; attributes.json is joined by object id, by the ids that version 1.4 has merged, or,
    where version 1.0 has no ids, by box. Without objects.json attributes.json says it alone.
    """
    described = said.get("attributes.json", [])
    objects = said.get("objects.json", described)
    words: list[dict[str, None]] = [{} for _ in objects]
    lost = 0
    places: dict[Any, int] = {}
    for place, (key, merged, _, attributes, box) in reversed(list(enumerate(objects))):
        words[place] |= dict.fromkeys(attributes)
        places[tuple(box)] = place
        places |= {str(one): place for one in [*merged, key] if one is not None}
    for key, _, _, attributes, box in described if "objects.json" in said else ():
        place = places.get(str(key), places.get(tuple(box)))
        if place is not None:
            words[place] |= dict.fromkeys(attributes)
        elif attributes:
            lost += 1
    fields = {"boxes": [row[4] for row in objects], "box_names": [row[2] for row in objects]}
    return fields | {"box_attributes": [",".join(one) for one in words]}, lost


def _entry(key: int, image: Image, fields: dict[str, list], path: str | None) -> dict | Dropped:
    if path is None:
        return Dropped(f"{image.folder or 'VG_100K'}/{image.name}", "not found")
    if not fields:
        return Dropped(path, "has no annotation")
    entry = {"image": path, "image_name": image.name, "image_key": key}
    return entry | {"coco_id": image.coco_id, "flickr_id": image.flickr_id} | fields
