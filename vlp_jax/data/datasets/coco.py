# SPDX-License-Identifier: Apache-2.0
"""COCO as published: captions_*.json and instances_*.json beside picture folders, or Karpathy's splits of them.

One record holds captions and boxes of a picture; the pictures of 2014 and 2017 are the same under other names.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlp_jax.data.datasets import Dropped, published
from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError, closest

NAME = "coco"
VERSION = "2"
LICENCE = "Annotations: CC BY 4.0, COCO Consortium. Photographs: each its own Flickr licence, see the source's json."
VISUAL_WORDS = tuple(
    "red orange yellow green blue purple pink brown black white gray "  # colors
    "man woman boy girl dog cat horse cow sheep bird elephant giraffe zebra bear "
    "train bus car truck motorcycle bicycle boat plane tree grass snow beach street building "
    "table chair bed couch bench pizza cake plate bowl bottle clock sign ball umbrella kite".split()
)
SOURCE = (
    "captions_train2017.json and captions_val2017.json (or 2014), for boxes instances_*.json of the same names, under "
    "annotations/; the folders train2017/ and val2017/; from cocodataset.org. For Karpathy's splits dataset_coco.json "
    "from cs.stanford.edu/people/karpathy, or lists of ids"
)
FIELDS = ("captions", "boxes", "box_names", "box_crowd", "box_area")
UPRIGHT = False
OPTIONS = {"splits": [], "karpathy": [], "same_splits": False, "boxes": True, "examples": 0, "captions": 0}
HELP = {
    "splits": "split=NAME of captions_NAME.json or instances_NAME.json, e.g. train=train2017,validation=val2017:0/2,"
    "test=val2017:1/2 (every second picture); or karpathy-train, karpathy-val, karpathy-test. Empty = Karpathy's where "
    "his file or lists are, else by name",
    "karpathy": "lists of COCO ids or picture names, one a line, instead of dataset_coco.json: validation=FILE,"
    "test=FILE[,train=FILE], FILE from --source on; without train all other pictures of train and val",
    "same_splits": "all splits hold the pictures of the first one, to check that a model can learn them by heart",
    "boxes": "take instances_*.json too, where they are; that of train2017 takes 3 GB of memory for half a minute",
    "examples": "pictures kept of each split, the first ones; 0 = all",
    "captions": "captions kept of each picture, the first ones; 0 = all",
}
KARPATHY = {"karpathy-train": ("train", "restval"), "karpathy-val": ("val",), "karpathy-test": ("test",)}
KARPATHY_SPLITS = {"train": "karpathy-train", "validation": "karpathy-val", "test": "karpathy-test"}
OTHER_YEARS = {  # the same photographs, published again under other names
    "train2014": ("train2017", "val2017"),
    "val2014": ("train2017", "val2017"),
    "train2017": ("train2014", "val2014"),
    "val2017": ("val2014", "train2014"),
    "test2015": ("test2017",),
    "test2017": ("test2015",),
}


class Row(NamedTuple):
    """One picture of an annotation file."""

    key: int
    folder: str
    file: str
    captions: tuple[str, ...]
    flickr_id: int = 0


class Box(NamedTuple):
    """One instance: pixels of the box, category, 1 for a crowd, pixels of the mask."""

    box: tuple[float, float, float, float]
    name: str
    crowd: int
    area: float


class Part(NamedTuple):
    """What a split is made of: pictures first, first + step, ... of an origin."""

    origin: str
    first: int
    step: int


@dataclasses.dataclass(frozen=True)
class _Files:
    """The annotation files of a source."""

    source: Path
    captions: dict[str, Path]  # NAME -> captions_NAME.json
    instances: dict[str, Path]  # NAME -> instances_NAME.json; empty without boxes
    karpathy: Path | None
    lists: dict[str, Path]  # split -> list of ids

    def origins(self) -> dict[str, list[Path]]:
        """What splits can be made of -> the files that it takes."""
        found = {
            name: [files[name] for files in (self.captions, self.instances) if name in files]
            for name in [*self.captions, *self.instances]
        }
        if self.lists:
            pool = [path for name in self.pool() for path in found[name]]
            found |= dict.fromkeys(KARPATHY, [*self.lists.values(), *pool])
        elif self.karpathy:
            objects = [path for name, path in self.instances.items() if name in OTHER_YEARS]
            found |= dict.fromkeys(KARPATHY, [self.karpathy, *objects])
        return found

    def pool(self) -> list[str]:
        """The caption files that Karpathy's pictures are among; 2014 and 2017 hold the same."""
        for year in ("2014", "2017"):
            if names := [name for name in ("train" + year, "val" + year) if name in self.captions]:
                return names
        return list(self.captions)

    def objects_of(self, folder: str) -> list[str]:
        """The instance files that the pictures of a folder are in."""
        names = [folder] if folder in self.instances else OTHER_YEARS.get(folder, ())
        return [name for name in names if name in self.instances]


def check(source: Path, **options) -> None:
    """Looks at what is there: options, annotation files, captions, and picture folders.

    Raises:
        UserError: no such folder, no annotation file or one that does not read, a wrong option, no picture folder.
    """
    files = _files(Path(source), options)
    seen: dict[int, str] = {}
    for split, part in _plan(files, options).items():
        rows = _part(_rows(files, part.origin)[0], part, options)
        if not rows and part.origin not in files.instances:
            raise UserError(
                f"The split {split} of {source} has no pictures. Check its annotation file and the options."
            )
        folders = {row.folder for row in rows} or {part.origin}
        if not any(path.is_dir() for folder in folders for path in _folders(files.source, folder)):
            looked = ", ".join(
                str(path) for folder in sorted(folders) for path in _folders(files.source, folder)
            )
            raise UserError(
                f"No picture folder for the split {split}. Looked for {looked}. Unpack the pictures there."
            )
        shared = {seen[row.key] for row in rows if row.key in seen}
        if shared and not options.get("same_splits"):
            logging.getLogger("vlp_jax").warning(
                "%s holds pictures of %s, too.", split, ", ".join(sorted(shared))
            )
        seen.update(dict.fromkeys((row.key for row in rows), split))


def sources(source: Path, **options) -> list[Path]:
    """The annotation files that the splits come from."""
    files = _files(Path(source), options)
    origins = files.origins()
    return sorted({path for part in _plan(files, options).values() for path in origins[part.origin]})


def listing(source: Path, each: Callable | None = None, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry) by rising image id; see `datasets` for the entry.

    A picture of an instance file has boxes, be it none; a box without area is left to the writer, which counts it.
    An annotation of a picture that is not listed is a Dropped of its own, at the end of the split.
    """
    files = _files(Path(source), options)
    find = _Pictures(files.source).find
    load = functools.cache(_instances)  # of this call, so that the memory is given back
    for split, part in _plan(files, options).items():
        rows, strangers = _rows(files, part.origin)
        if part.origin in files.instances:
            images, _, unlisted = load(files.instances[part.origin])
            known = {row.key for row in rows}
            rows = _sorted([*rows, *(row for key, row in images.items() if key not in known)])
            strangers = sorted({*strangers, *unlisted} - {row.key for row in rows})
        for row in _part(rows, part, options):
            loaded = [load(files.instances[name]) for name in files.objects_of(row.folder)]
            found = next((one for one in loaded if row.key in one[0]), None)
            boxes = None if found is None else found[1].get(row.key, [])
            flickr_id = row.flickr_id or (found[0][row.key].flickr_id if found else 0)
            yield split, _entry(row._replace(flickr_id=flickr_id), find(row.folder, row.file), boxes)
        reason = f"is annotated in {part.origin}, but not listed there"
        if part.origin in KARPATHY:
            reason = f"is in the list of {split}, but not in {' or '.join(files.pool())}"
        for key in strangers if part.first == 0 else ():
            yield split, Dropped(f"image {key}", reason)


def _part(rows: list[Row], part: Part, options: dict) -> list[Row]:
    rows = rows[part.first :: part.step][: options.get("examples", 0) or None]
    keep = options.get("captions", 0)
    if not keep:
        return rows
    return [row._replace(captions=tuple(text for text in row.captions if _said(text))[:keep]) for row in rows]


def _said(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _entry(row: Row, image: str | None, boxes: list[Box] | None) -> dict | Dropped:
    if image is None:
        return Dropped(f"{row.folder}/{row.file}", "not found")
    if boxes is None and not row.captions:
        return Dropped(image, "has no caption")
    entry = {"image": image, "image_name": row.file, "image_key": row.key, "coco_id": row.key}
    entry["flickr_id"] = row.flickr_id
    if row.captions:
        entry["captions"] = list(row.captions)
    if boxes is not None:
        entry |= {
            "boxes": [list(one.box) for one in boxes],
            "box_names": [one.name for one in boxes],
            "box_crowd": [one.crowd for one in boxes],
            "box_area": [one.area for one in boxes],
        }
    return entry


def _files(source: Path, options: dict) -> _Files:
    if not source.is_dir():
        raise published.missing(source, SOURCE)
    kinds: dict[str, dict[str, Path]] = {"captions": {}, "instances": {}}
    karpathy = None
    for folder in (source, source / "annotations"):
        for kind, found in kinds.items():
            for path in sorted(folder.glob(f"{kind}_*.json")):
                found.setdefault(path.stem.removeprefix(f"{kind}_"), path)
        path = folder / "dataset_coco.json"
        karpathy = karpathy or (path if path.is_file() else None)
    lists = published.chosen(
        options.get("karpathy", ()), "karpathy", "validation=val_ids.txt,test=test_ids.txt"
    )
    lists = {split: published.inside(source, name, "karpathy") for split, name in lists.items()}
    if not options.get("boxes", True):
        kinds["instances"] = {}
    files = _Files(source, *kinds.values(), karpathy, lists)
    if not files.origins() or (lists and not files.captions):
        raise published.missing(source, SOURCE)
    return files


def _plan(files: _Files, options: dict) -> dict[str, Part]:
    origins = files.origins()
    plan = _chosen(options["splits"], origins) if options.get("splits") else _default(files, origins)
    if options.get("same_splits"):
        plan = dict.fromkeys(published.SPLITS, next(iter(plan.values())))
    return plan


def _default(files: _Files, origins: dict[str, list[Path]]) -> dict[str, Part]:
    if files.lists or files.karpathy:
        wanted = {"train", *files.lists} if files.lists else KARPATHY_SPLITS
        return {split: Part(name, 0, 1) for split, name in KARPATHY_SPLITS.items() if split in wanted}
    newest = {
        short: max((name for name in origins if name.startswith(short)), default="")
        for short in ("train", "val", "test")
    }
    plan = {}
    if newest["train"]:
        plan["train"] = Part(newest["train"], 0, 1)
    if newest["test"] or not newest["val"]:
        plan |= {
            split: Part(newest[short], 0, 1)
            for split, short in (("validation", "val"), ("test", "test"))
            if newest[short]
        }
    else:  # COCO publishes no annotations of its test pictures: every second picture of val
        plan |= {"validation": Part(newest["val"], 0, 2), "test": Part(newest["val"], 1, 2)}
    return plan or {"train": Part(next(iter(origins)), 0, 1)}


def _chosen(wanted: list[str], origins: dict[str, list[Path]]) -> dict[str, Part]:
    """Reads "train=train2017" or "test=val2017:1/2" (every second picture, from the second one)."""
    plan = {}
    for split, text in published.chosen(wanted, "splits", "train=train2017,validation=val2017").items():
        match = re.fullmatch(r"([^:=]+)(?::(\d{1,9})/(\d{1,9}))?", text)
        if match is None or (match[3] and int(match[2]) >= int(match[3])):
            raise UserError(
                f"--splits does not take '{split}={text}'. Possible: split=NAME or split=NAME:0/2 (first, step). "
                "Write one of these, with commas between."
            )
        if match[1] not in origins:
            raise UserError(
                f"--splits={split}={text}: there are no annotations '{match[1]}'.{closest(match[1], origins)} "
                f"Possible: {', '.join(sorted(origins))}. Choose one of these."
            )
        plan[split] = Part(match[1], int(match[2] or 0), int(match[3] or 1))
    return plan


def _rows(files: _Files, origin: str) -> tuple[list[Row], list[int]]:
    """The captioned pictures of an origin by rising id, and the ids that are captioned but not listed."""
    if origin not in KARPATHY:
        return _read(_published, files.captions[origin]) if origin in files.captions else ([], [])
    if not files.lists:
        return _read(_karpathy, files.karpathy)[origin], []
    members = published.read_splits(files.lists)
    wanted = next(split for split, name in KARPATHY_SPLITS.items() if name == origin)
    pool = [row for name in files.pool() for row in _read(_published, files.captions[name])[0]]
    rows = [row for row in pool if published.split_of(row.key, members, files.lists) == wanted]
    known = {row.key for row in rows}
    return _sorted(rows), sorted(
        key for key, split in members.items() if split == wanted and key not in known
    )


def _read(reader: Callable, path: Path) -> Any:
    """What a reader with a memory gives; it reads again what has changed."""
    return reader(path, path.stat().st_mtime_ns)


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.key)


def _images(path: Path, content: dict) -> dict[int, Row]:
    folder = path.stem.partition("_")[2]
    images: dict[int, Row] = {}
    for number, image in enumerate(content["images"], 1):
        try:
            key, file = published.identity(image["id"]), published.file_name(image["file_name"])
            row = Row(key, folder, file, (), published.flickr_id(image.get("flickr_url")))
            if images.setdefault(key, row).file != file:
                raise ValueError(f"has the id {key} of {images[key].file}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"picture {number}", error) from error
    return images


@functools.lru_cache(maxsize=4)
def _published(path: Path, changed: int) -> tuple[list[Row], list[int]]:
    """captions_NAME.json: the pictures lie in the folder NAME."""
    content = tables.read_json(path, "images", "annotations")
    images = _listed(path, content)
    texts: dict[int, list[str]] = {}
    seen = set()
    for number, one in enumerate(content["annotations"], 1):
        try:
            key, text = published.identity(one["image_id"]), one["caption"]
            same = (one.get("id"), key, text)
            if same not in seen:
                texts.setdefault(key, []).append(text)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"caption {number}", error) from error
        if one.get("id") is not None:
            seen.add(same)
    rows = [row._replace(captions=tuple(texts.get(row.key, ()))) for row in images.values()]
    return _sorted(rows), sorted(texts.keys() - images.keys())


def _listed(path: Path, content: dict) -> dict[int, Row]:
    for name in ("images", "annotations"):
        if not isinstance(content[name], list):
            raise published.malformed(path, name, TypeError("is no list"))
    return _images(path, content)


def _instances(path: Path) -> tuple[dict[int, Row], dict[int, list[Box]], list[int]]:
    """instances_NAME.json: its pictures, their boxes, and the ids that have boxes but are not listed."""
    content = tables.read_json(path, "images", "annotations", "categories")
    images = _listed(path, content)
    try:
        names = {one["id"]: one["name"] + "" for one in content["categories"]}
    except (KeyError, TypeError) as error:
        raise published.malformed(path, "a category", error) from error
    boxes: dict[int, list[Box]] = {}
    seen = set()
    for number, one in enumerate(content["annotations"], 1):
        try:
            key, name = published.identity(one["image_id"]), names.get(one["category_id"])
            if name is None:
                raise ValueError(f"is of category {one['category_id']}, which categories does not list")
            x, y, width, height = map(float, one["bbox"])
            area = float(one.get("area", width * height))
            box = Box((x, y, width, height), name, int(bool(one.get("iscrowd", 0))), area)
            same = (one.get("id"), key, box)
            if same not in seen:
                boxes.setdefault(key, []).append(box)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"instance {number}", error) from error
        if one.get("id") is not None:
            seen.add(same)
    return images, boxes, sorted(boxes.keys() - images.keys())


@functools.lru_cache(maxsize=2)
def _karpathy(path: Path, changed: int) -> dict[str, list[Row]]:
    """dataset_coco.json: one list of pictures with a split each."""
    rows: dict[str, dict[int, Row]] = {name: {} for name in KARPATHY}
    names = {split: name for name, members in KARPATHY.items() for split in members}
    content = tables.read_json(path, "images")
    if not isinstance(content["images"], list):
        raise published.malformed(path, "images", TypeError("is no list"))
    for number, image in enumerate(content["images"], 1):
        try:
            key, split = published.identity(image["cocoid"]), image["split"]
            captions = tuple(sentence["raw"] for sentence in image["sentences"])
            if split not in names:
                raise ValueError(f"is of the split {tables.shown(split, 40)}, not {', '.join(names)}")
            row = Row(
                key, published.file_name(image["filepath"]), published.file_name(image["filename"]), captions
            )
            if rows[names[split]].setdefault(key, row) != row:
                raise ValueError(f"has the cocoid {key} of another picture")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise published.malformed(path, f"picture {number}", error) from error
    return {name: _sorted(members.values()) for name, members in rows.items()}


def _folders(source: Path, folder: str) -> list[Path]:
    """Where a picture folder may lie."""
    names = [folder, *OTHER_YEARS.get(folder, ())]
    return [place / name for name in names for place in (source, source / "images")]


class _Pictures:
    """Finds picture files; each folder is read once."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.names: dict[Path, dict[str, str]] = {}

    def find(self, folder: str, file: str) -> str | None:
        """The path of a picture from the source on, whatever year's name it has, None if it is not there."""
        parent, _, name = file.rpartition("/")
        for place in _folders(self.source, folder):
            names = self._names(place / parent if parent else place)
            if found := names.get(name) or names.get(_bare(name)):
                return (place / parent / found).relative_to(self.source).as_posix()
        return None

    def _names(self, folder: Path) -> dict[str, str]:
        if folder not in self.names:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            self.names[folder] = {_bare(name): name for name in names} | {name: name for name in names}
        return self.names[folder]


def _bare(name: str) -> str:
    """COCO_val2014_000000391895.jpg -> 000000391895.jpg, which is its name of 2017."""
    return re.sub(r"^COCO_[a-z]+\d{4}_", "", name)
