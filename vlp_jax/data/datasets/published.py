# SPDX-License-Identifier: Apache-2.0
"""What the readers of published annotation files share: ids, lists of ids, splits by hash, and how they complain."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlp_jax.data.preparation import tables
from vlp_jax.types import UserError, closest

SPLITS = ("train", "validation", "test")
HASHED = 50  # of a thousand pictures, for validation and as many for test


def identity(value: Any) -> int:
    """An id of an annotation file, which may be written as a text.

    Raises:
        ValueError: it is none.
    """
    number = int(value) if isinstance(value, str) or type(value) is int else -1
    if not 0 <= number < 2**63:
        raise ValueError(f"{tables.shown(value, 40)} is no id")
    return number


def optional_identity(value: Any) -> int:
    """An id that may be absent, null or nonsense: 0 then."""
    try:
        return identity(value)
    except ValueError:
        return 0


def file_name(value: Any) -> str:
    """A file or folder that an annotation file names, with / between folders.

    Raises:
        ValueError: it is none, or leads out of its folder.
    """
    parts = value.split("/") if isinstance(value, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
        raise ValueError(f"has no name of a file, but {tables.shown(value, 60)}")
    return value


def flickr_id(url: Any) -> int:
    """The number of a photograph by its address at Flickr, 0 if it lies elsewhere."""
    pattern = r"https?://[\w.-]*flickr\.com/(?:\d+/)+(\d{1,18})_[0-9a-f]+(?:_\w+)?\.\w+"
    match = re.match(pattern, url) if isinstance(url, str) else None
    return int(match[1]) if match else 0


def malformed(path: Path, where: str, error: Exception) -> UserError:
    """The message for a file that is not laid out as its site publishes it."""
    what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return UserError(
        f"{path} is not laid out as published: {where} {tables.shown(what, 200)}. Download the file again."
    )


def missing(source: Path, wanted: str) -> UserError:
    """The message for a folder that does not hold what a data set needs."""
    if not source.is_dir():
        return UserError(f"The folder {source} is not there. Give --source=FOLDER that holds {wanted}.")
    inside = ", ".join(tables.shown(path.name, 40) for path in sorted(source.iterdir())[:8]) or "nothing"
    return UserError(f"{source} lacks its annotation files; it holds {inside}. Needed: {wanted}.")


def chosen(texts: Iterable[str], option: str, example: str) -> dict[str, str]:
    """Reads an option of the form split=VALUE,split=VALUE.

    Raises:
        UserError: another form, an unknown split, or one twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        split, mark, value = (part.strip() for part in text.partition("="))
        split = {"val": "validation", "dev": "validation"}.get(split, split)
        if not mark or not value or split not in SPLITS or split in found:
            twice = f" It names {split} twice." if split in found else closest(split, SPLITS)
            raise UserError(
                f"--{option} does not take '{text}'.{twice} Possible: split=VALUE with commas between, split one of "
                f"{', '.join(SPLITS)}. Write e.g. --{option}={example}."
            )
        found[split] = value
    return found


def inside(source: Path, name: str, option: str) -> Path:
    """A file that an option names, which lies below the source.

    Raises:
        UserError: it is not there.
    """
    path = source / name
    if not path.is_file() or not path.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--{option}: {path} is no file below {source}. Put it there and name it from there on."
        )
    return path


def read_splits(lists: dict[str, Path]) -> dict[int, str]:
    """Reads lists of pictures, one a line, and returns id -> split.

    A line is an id or the name of a file that ends in it (COCO_val2014_000000391895.jpg, VG_100K/2407890.jpg); what
    follows a blank is not read.

    Raises:
        UserError: a line without id, an id in two lists, or an empty list.
    """
    found: dict[int, str] = {}
    for split, path in lists.items():
        size = len(found)
        for number, line in tables.read_lines(path):
            words = line.split()
            match = re.search(r"(?<!\d)(\d{1,18})(?:\.\w+)?$", words[0]) if words else None
            if words and not match:
                raise UserError(
                    f"{path}, line {number}: no id in '{tables.shown(line, 60)}'. Possible: 391895 or "
                    "COCO_val2014_000000391895.jpg. Mend that line."
                )
            if match and found.setdefault(int(match[1]), split) != split:
                raise UserError(
                    f"{path}, line {number}: {match[1]} is in the list of {found[int(match[1])]}, too. A picture "
                    "belongs to one split. Take it out of one of them."
                )
        if len(found) == size:
            raise UserError(f"{path} lists no picture. Give one id a line, or leave the list out.")
    return found


def split_of(number: int, members: dict[int, str], lists: Iterable[str]) -> str | None:
    """The split of a picture: by `read_splits`; one that is not listed is for training if that has no list."""
    return members.get(number, None if "train" in lists else "train")


def split_by_hash(name: str) -> str:
    """The split of a picture by the sha256 of its name: 5 % validation, 5 % test, the same for ever."""
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 1000
    return "validation" if place < HASHED else "test" if place < 2 * HASHED else "train"
