# SPDX-License-Identifier: Apache-2.0
"""Where things lie in anyone's folder: the table, the texts beside pictures, and the pictures that a table names."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from vlp_jax.data.preparation import tables
from vlp_jax.data.preparation.tables import shown
from vlp_jax.types import UserError, closest

PICTURES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .avif".split())
_NO_CAPTIONS = frozenset(("readme", "license", "licence", "classes", "requirements", "vocab"))
_NO_TABLES = frozenset(("dropped.jsonl", "manifest.json", "features.json", "dataset_info.json"))


def find_table(source: Path, name: str) -> Path | None:
    """The table of this name, else the only one of the folder; None if there is none.

    Raises:
        UserError: the folder cannot be read, there is no such table, or there are several.
    """
    try:
        files = sorted(path for path in source.iterdir() if not path.is_dir() and path.name[0] != ".")
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}. Check its permissions.") from error
    possible = [
        path for path in files if path.suffix.lower() in tables.SUFFIXES and path.name not in _NO_TABLES
    ]
    if name:
        inner = os.path.relpath(name, source) if os.path.isabs(name) else os.path.normpath(name)
        if inner.startswith("..") or not os.path.lexists(source / inner):
            listed = [shown(path.name) for path in possible]
            raise UserError(
                f"There is no table '{shown(name)}' in {source}.{closest(name, listed)} Possible: "
                f"{', '.join(listed[:20]) or 'none'}. Give one of these, or a path below the folder."
            )
        return source / inner
    stems = {path.stem for path in files if path.suffix.lower() in PICTURES}
    # A .json may be anything, and may lie beside each picture: it counts where no other table is.
    chosen = [path for path in possible if path.suffix.lower() != ".json"]
    chosen = chosen or [path for path in possible if path.stem not in stems]
    if len(chosen) > 1:
        listed = ", ".join(shown(path.name) for path in chosen[:20])
        raise UserError(f"{source} has {len(chosen)} tables: {listed}. Choose one with --table=NAME.")
    return chosen[0] if chosen else None


def find_texts(source: Path) -> list[tuple[str, list[str]]]:
    """Each .txt below a folder that may hold captions, with its pictures (a.txt or a.jpg.txt: a.jpg), by path.

    [] where no .txt has a picture.
    """
    by_stem: dict[str, list[str]] = {}
    texts = []
    for path in find_files(source):
        stem, suffix = os.path.splitext(path)
        if suffix.lower() == ".txt":
            texts.append(path)
        elif suffix.lower() in PICTURES:
            by_stem.setdefault(stem, []).append(path)
            by_stem.setdefault(path, []).append(path)
    found = [(path, by_stem.get(os.path.splitext(path)[0], [])) for path in texts]
    own = [one for one in found if one[1] or os.path.basename(one[0])[:-4].lower() not in _NO_CAPTIONS]
    return own if any(pictures for _, pictures in own) else []


def find_files(source: Path) -> list[str]:
    """All files below a folder as paths from it, sorted; hidden ones are left out, links are followed once."""
    found, seen = [], set()
    for folder, inner, names in os.walk(source, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))  # which link comes first
        start = os.path.relpath(folder, source)
        found += [os.path.normpath(os.path.join(start, name)) for name in names if not name.startswith(".")]
    return sorted(found)


def pictures_folder(source: Path, folder: str) -> str:
    """The folder that a table's paths start from, checked.

    Raises:
        UserError: it is not there.
    """
    if folder and not (source / folder).is_dir():
        inside = sorted(shown(path.name) for path in source.iterdir() if path.is_dir())
        raise UserError(
            f"There is no folder '{shown(folder)}' in {source} for --pictures.{closest(folder, inside)} Possible: "
            f"{', '.join(inside[:20]) or 'none'}. Give one of these."
        )
    return folder


def find_picture(source: Path, pictures: str, name: str) -> str | None:
    """The path, from the source where it lies inside, of a picture as a table names it; None if it is not there.

    As written; without blanks around it; from Windows; and as other systems compose its letters.
    """
    source = os.path.abspath(source)
    for spelt in dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))):
        for form in ("", "NFC", "NFD"):
            path = unicodedata.normalize(form, spelt) if form else spelt
            path = os.path.normpath(os.path.join(source, pictures, path))
            if spelt and os.path.lexists(path):
                return path.removeprefix(os.path.join(source, ""))
    return None


def inside(source: Path) -> str:
    """What a folder holds, for messages."""
    names = sorted(path.name for path in source.iterdir())
    return ", ".join(shown(name, 60) for name in names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
