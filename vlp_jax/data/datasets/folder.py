# SPDX-License-Identifier: Apache-2.0
"""Anyone's pictures: a folder with one table of what is said about them, or with one .txt a picture.

Without splits in the table they are made from the decoded pixels: equal pictures stay together whatever their names,
and a picture that was once for training is for training in every larger copy of the folder.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlp_jax.data.datasets import Dropped, coco
from vlp_jax.data.datasets.folder_columns import COLUMNS, SAYING, SPLITS, Header, Row, read_row, split_of
from vlp_jax.data.datasets.folder_layout import (
    PICTURES,
    find_files,
    find_picture,
    find_table,
    find_texts,
    inside,
    pictures_folder,
)
from vlp_jax.data.preparation import admission, tables
from vlp_jax.data.preparation.tables import shown
from vlp_jax.types import UserError, closest

NAME = "folder"
VERSION = "1"
LICENCE = "not stated"
VISUAL_WORDS = coco.VISUAL_WORDS  # of English captions; others leave that score out
FIELDS = ("captions", "questions", "answers", "labels", "boxes", "box_names", "image_1")
UPRIGHT = True
SOURCE = (
    "nothing to download: a folder with pictures and one table (captions.csv, .tsv or .jsonl, any name) with the columns "
    "image, and caption, or question and answer, or label, or boxes; or with one .txt a picture, a caption a line"
)
OPTIONS = {"table": "", "pictures": "", "licence": LICENCE}
HELP = {
    "table": "the table's name where the folder has several; its columns are image (or image_0 and image_1), caption "
    "(any number: more rows, or caption_1, caption_2), question, answer (several joined by |), label, boxes "
    "([[x, y, w, h, name], ...] in pixels), split (train, validation, test; without it 80/10/10 by the pixels)",
    "pictures": "folder that the table's paths start from, below --source; empty = --source itself",
    "licence": "of the pictures and texts, kept in the manifest",
}
SPLIT_SHARE = 0.1  # of the distinct pictures, for validation and for test
BATCH = 16  # pictures a job
LOOK = 100  # rows that are looked at before work begins
MOST_BAD = 10_000  # records that cannot be read; beyond it a table of mostly such ones is given up


def check(source: Path, **options) -> None:
    """Looks at the layout, the first rows and their pictures.

    Raises:
        UserError: no such folder, no table and no .txt, several tables, columns that say nothing, no row, or none of
            the first pictures is there.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"The folder {source} is not there. Give --source=FOLDER; needed is {SOURCE}.")
    pictures = pictures_folder(source, options.get("pictures", ""))
    table = find_table(source, options.get("table", ""))
    if table is None:
        if not find_texts(source):
            raise UserError(
                f"{source} has no table and no .txt beside a picture; it holds {inside(source)}. Needed: {SOURCE}."
            )
        return
    header, good, first, bad = Header(table.name, quiet=True), 0, "", ""
    lost: list[str] = []
    for line, record in itertools.islice(tables.read_rows(table), LOOK):
        if isinstance(record, ValueError):
            bad = bad or f"line {line} {record}"
            continue
        meanings = header.read(record)
        first = first or _columns_fault(table, record, meanings)
        if not {"image"} <= {*meanings.values()} or not {*SAYING} & {*meanings.values()}:
            continue
        good += 1
        name = next(record[name] for name, meaning in meanings.items() if meaning == "image")
        if isinstance(name, str) and find_picture(source, pictures, name) is None:
            lost.append(name)
    if not good:
        raise UserError(
            first or f"{table} has no row that can be read{bad and f': {bad}'}. Write a row a picture."
        )
    if len(lost) == good:
        raise _none_there(source, pictures, table, lost)


def sources(source: Path, **options) -> list[Path]:
    """The table, or all .txt files."""
    source = Path(source)
    table = find_table(source, options.get("table", ""))
    return (
        [table] if table else [source / path for path, _ in find_texts(source) if (source / path).is_file()]
    )


def listing(source: Path, each: Callable, **options) -> Iterator[tuple[str, dict | Dropped]]:
    """Yields (split, entry or Dropped): first what cannot be used, then the pictures as the table orders them.

    Several rows of a picture are one entry; what is repeated in them is taken once. With a split column each picture
    must have one: a picture whose rows name two splits is dropped, a table that leaves some empty is an error.

    Raises:
        UserError: see `check`; also a split that is none, or fewer than three distinct pictures to make splits of.
    """
    source = Path(source)
    check(source, **options)
    groups, dropped = _Groups(), []
    table = find_table(source, options.get("table", ""))
    _read_table(source, table, options, groups, dropped) if table else _read_texts(source, groups, dropped)
    _warn_of_others(source, groups, table.name if table else ".txt")
    _refuse_single(groups, dropped)
    if any(group["splits"] for group in groups.by_key.values()):
        splits = _named_splits(table, groups, dropped)
    else:
        splits = _made_splits(source, table or source, each, groups, dropped)
    used = {*splits.values()}  # a row that does not say its split counts for one that has pictures
    anywhere = next((split for split in SPLITS if split in used), "train")
    for split, file, reason in dropped:
        yield split or anywhere, Dropped(file, reason)
    for number, (key, group) in enumerate(groups.by_key.items(), 1):
        if key in splits:
            yield splits[key], _entry(key, group, number)


class _Groups:
    """What is said of each picture or pair: (path, second path or "") -> lists."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, key: tuple[str, str], place: str, split: str, row: Row) -> None:
        """Adds a row; captions, questions and boxes that are there already are not added again."""
        empty = {"place": place, "splits": [], "captions": {}, "questions": {}, "labels": {}, "boxes": None}
        group = self.by_key.setdefault(key, empty)
        if split and split not in group["splits"]:
            group["splits"].append(split)
        for caption in row.captions:
            group["captions"][caption, row.label] = None
        for question, answer in zip(row.questions, row.answers, strict=True):
            group["questions"].setdefault((question, row.label), []).append(answer)
        if row.label and not row.captions and not row.questions:
            group["labels"][row.label] = None
        if row.boxes is not None:
            group["boxes"] = (group["boxes"] or {}) | dict.fromkeys(row.boxes)


def _read_table(source: Path, table: Path, options: dict, groups: _Groups, dropped: list) -> None:
    header, pictures = Header(table.name), pictures_folder(source, options.get("pictures", ""))
    paths: dict[str, str | None] = {}
    good = bad = 0
    for line, record in tables.read_rows(table):
        place = f"{table.name}, {'record' if table.suffix.lower() == '.json' else 'line'} {line}"
        try:
            if isinstance(record, ValueError):
                raise record
            row = read_row(record, header.read(record))
        except ValueError as error:
            dropped.append(("", place, str(error)))
            bad += 1
            if bad > max(MOST_BAD, good):
                raise UserError(
                    f"{table}: {bad} of its first {bad + good} records cannot be read, the first: "
                    f"{' '.join(dropped[0][1:])}. Mend it: is one quote open, or are cells separated otherwise?"
                ) from error
            continue
        good += 1
        split = split_of(row.split)
        if row.split.strip() and not split:
            possible = [value for values in SPLITS.values() for value in values]
            raise UserError(
                f"{table}, line {line}: there is no split '{shown(row.split, 60)}'.{closest(row.split.lower(), possible)} "
                f"Possible: {', '.join(possible)}. Write one of these."
            )
        names = [name for name in (row.image, row.image_1) if name.strip()]
        for name in names:
            if name not in paths:
                paths[name] = find_picture(source, pictures, name)
        lost = next((name for name in names if paths[name] is None), None)
        if not row.image.strip():
            dropped.append((split, place, "names no picture"))
        elif lost is not None:
            web = lost.strip().lower().startswith(("http://", "https://"))
            reason = "is a web address: download it first" if web else "not found"
            dropped.append((split, f"{shown(lost)} ({place})", reason))
        else:
            groups.add((paths[row.image], paths[row.image_1] if len(names) > 1 else ""), place, split, row)


def _read_texts(source: Path, groups: _Groups, dropped: list) -> None:
    for path, pictures in find_texts(source):
        if len(pictures) != 1:
            found = f"has several pictures: {', '.join(pictures)}" if pictures else "has no picture beside it"
            dropped.append(("", path, found))
            continue
        try:
            captions = [line for _, line in tables.read_lines(source / path) if line.strip()]
        except UserError:
            dropped.append(("", path, "is no file that can be read"))
            continue
        groups.add((pictures[0], ""), path, "", Row(pictures[0], "", "", captions, [], [], "", None))


def _columns_fault(table: Path, record: dict, meanings: dict[str, str]) -> str:
    """What the columns of a table lack, "" if nothing."""
    found, given = {*meanings.values()}, ", ".join(shown(name, 60) for name in list(record)[:20])
    if "image" not in found:
        likely = closest("image", [name for name in record if name not in meanings])
        what = (
            f"has no column 'image'; its first line gives {given}.{likely} Name the pictures' column 'image'"
        )
    elif not found & {*SAYING}:
        unused = [name for name in record if name not in meanings]
        hints = (closest(word, unused) for word in SAYING)
        what = f"says nothing about its pictures; its columns are {given}.{next(filter(None, hints), '')} "
        what += f"Name one {', '.join(SAYING[:-1])} or {SAYING[-1]}"
    else:
        return ""
    return f"{table} {what} (possible: {', '.join(COLUMNS)})."


def _none_there(source: Path, pictures: str, table: Path, lost: list[str]) -> UserError:
    wanted = os.path.basename(lost[0].replace("\\", "/"))
    there = next((path for path in find_files(source) if os.path.basename(path) == wanted), None)
    where = f" {shown(there)} is there: is it --pictures={shown(os.path.dirname(there))}?" if there else ""
    where = " Download the pictures first." if "://" in lost[0] else where
    return UserError(
        f"{table}: none of its first {len(lost)} pictures is there, e.g. {shown(lost[0])}.{where} Paths start from "
        f"{source / pictures}; --pictures=FOLDER names another start."
    )


def _warn_of_others(source: Path, groups: _Groups, what: str) -> None:
    named = {path for key in groups.by_key for path in key}
    others = [path for path in find_files(source) if os.path.splitext(path)[1].lower() in PICTURES]
    others = [path for path in others if path not in named]
    if others:
        logging.getLogger("vlp_jax").warning(
            "%d pictures of %s are not used: %s does not name them, e.g. %s.",
            *(len(others), source, what, shown(others[0])),
        )


def _refuse_single(groups: _Groups, dropped: list) -> None:
    """In a table of pairs each entry is one."""
    if any(second for _, second in groups.by_key):
        single = [key for key in groups.by_key if not key[1]]
        for key in single:
            group = groups.by_key.pop(key)
            split = next(iter(group["splits"]), "")
            dropped.append((split, f"{key[0]} ({group['place']})", "has no image_1, as others have"))


def _named_splits(table: Path, groups: _Groups, dropped: list) -> dict[tuple[str, str], str]:
    """The splits that the table names."""
    by_picture: dict[str, list[str]] = {}
    for key, group in groups.by_key.items():
        for path in filter(None, key):
            by_picture.setdefault(path, []).extend(group["splits"])
    without = [group["place"] for group in groups.by_key.values() if not group["splits"]]
    if without:
        raise UserError(
            f"{table}: {len(without)} of {len(groups.by_key)} pictures have no split, others have; the first: "
            f"{without[0]}. Fill in the column, or leave it out for 80/10/10 by the pixels."
        )
    splits = {}
    for key, group in groups.by_key.items():
        crossing = next((path for path in filter(None, key) if len({*by_picture[path]}) > 1), None)
        if crossing is None:
            splits[key] = group["splits"][0]
        else:
            listed = " and ".join(split for split in SPLITS if split in by_picture[crossing])
            dropped.append((group["splits"][0], f"{crossing} ({group['place']})", f"is in {listed}"))
    return splits


def _digests(job: tuple[str, list[str]]) -> list[int | str]:
    """The pixels of some pictures, or why one cannot be used; runs in a worker."""
    results: list[int | str] = []
    for path in job[1]:
        try:
            content = admission.read(Path(job[0], path))
            results.append(int(admission.admit(content, upright=UPRIGHT).pixels))
        except ValueError as error:
            results.append(str(error))
    return results


def _made_splits(
    source: Path, what: Path, each: Callable, groups: _Groups, dropped: list
) -> dict[tuple[str, str], str]:
    """80/10/10 by the pixels; pictures of equal pixels, and all that are paired with one another, go together."""
    paths = sorted({path for key in groups.by_key for path in key if path})
    jobs = [(str(source), paths[start : start + BATCH]) for start in range(0, len(paths), BATCH)]
    pixels = dict(zip(paths, itertools.chain.from_iterable(each(_digests, jobs)), strict=True))
    parent: dict[int, int] = {}

    def root(one: int) -> int:
        parent.setdefault(one, one)
        while parent[one] != one:
            parent[one] = one = parent[parent[one]]
        return one

    kept: dict[tuple[str, str], int] = {}
    for key, group in groups.by_key.items():
        found = [pixels[path] for path in key if path]
        reason = next((one for one in found if isinstance(one, str)), None)
        if reason is not None:
            dropped.append(("", f"{key[found.index(reason)]} ({group['place']})", reason))
            continue
        kept[key] = found[0]
        low, high = sorted((root(found[0]), root(found[-1])))
        parent[high] = low
    chosen = _shares(what, sorted({root(one) for one in kept.values()}), dropped)
    return {key: chosen[root(one)] for key, one in kept.items()}


def _shares(what: Path, keys: list[int], dropped: list) -> dict[int, str]:
    """Lowest tenth of 2^64 = validation, highest = test; where one would be empty it takes its nearest key."""
    if len(keys) < 3:
        bad = f" {len(dropped)} could not be used, the first: {' '.join(dropped[0][1:])}." if dropped else ""
        raise UserError(
            f"{what} has {len(keys)} distinct pictures (equal ones count once); train, validation and test need one "
            f"each.{bad} Add pictures, or a column 'split'."
        )
    share = int(SPLIT_SHARE * 2**64)
    low = max(1, sum(key < share for key in keys))
    high = max(1, sum(key >= 2**64 - share for key in keys))
    while low + high >= len(keys):
        low, high = (low - 1, high) if low > high else (low, high - 1)
    names = ["validation"] * low + ["train"] * (len(keys) - low - high) + ["test"] * high
    return dict(zip(keys, names, strict=True))


def _entry(key: tuple[str, str], group: dict[str, Any], number: int) -> dict[str, Any]:
    captions, questions, labels = group["captions"], group["questions"], list(group["labels"])
    entry: dict[str, Any] = {"image": key[0], "image_name": Path(key[0]).as_posix(), "image_key": number}
    if key[1]:
        entry["image_1"] = key[1]
    if captions:
        entry["captions"] = [caption for caption, _ in captions]
    if questions:
        entry["questions"] = [question for question, _ in questions]
        entry["answers"] = ["|".join(filter(None, answers)) for answers in questions.values()]
    own = [label for _, label in captions or questions]
    if any(own) or labels:
        one = "|".join(labels)
        entry["labels"] = [label or one for label in own] or [one]
    if group["boxes"] is not None:
        entry["boxes"] = [list(box) for box, _ in group["boxes"]]
        entry["box_names"] = [name for _, name in group["boxes"]]
    return entry
