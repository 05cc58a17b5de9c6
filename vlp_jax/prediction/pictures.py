# SPDX-License-Identifier: Apache-2.0
"""Picture files that a user gives, and those that show what was found in them."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlp_jax.data.preparation import admission
from vlp_jax.files import written
from vlp_jax.types import UserError

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # that are written


def read(path: Path) -> admission.Picture:
    """Reads a picture as `prepare` does, sizes first: bytes that decode, height and width.

    Raises:
        UserError: there is no such file, or no picture in it that can be used.
    """
    try:
        return admission.admit(admission.read(path))
    except ValueError as error:
        raise UserError(
            f"--image={path} {error}. Possible: a file with a JPEG, PNG, WebP or GIF picture. Give another."
        ) from error


def check(images: Sequence[str]) -> list[Path]:
    """The paths that a user gives as --image.

    Raises:
        UserError: none, or one that is no file.
    """
    if not images or not all(images):
        raise UserError("--image is missing or empty. Give --image=FILE, for several pictures several times.")
    paths = [Path(image).expanduser() for image in images]
    for path in paths:
        if not path.is_file():
            wrong = "is no file" if path.exists() else "does not exist"
            raise UserError(f"--image={path} {wrong}. Give the path of a picture.")
    return paths


def targets(images: Sequence[Path], picture: str, overwrite: bool) -> list[Path | None]:
    """Where the pictures with what was found go: a file, or a folder that gets NAME.png for each; makes nothing.

    Args:
        images: that are shown.
        picture: a file name that ends in one of `KINDS`, a folder, or "" for none.
        overwrite: whether files that exist may be replaced; those of `images` never are.

    Raises:
        UserError: it is not clear which picture goes where, or one cannot be written there.
    """
    if not picture:
        return [None] * len(images)
    path = Path(picture).expanduser()
    folder = path.is_dir() or picture.endswith(os.sep) or not path.suffix
    if not folder and path.suffix.lower() not in KINDS:
        raise UserError(
            f"--picture={picture}: pictures of the kind {path.suffix} are not written. Possible: a name that ends in "
            f"{', '.join(KINDS)}, or a folder. Give one of these."
        )
    if not folder and len(images) > 1:
        raise UserError(
            f"--picture={picture} is one file, but {len(images)} pictures are given. Give a folder, which gets a .png "
            "named after each."
        )
    found = [path / f"{image.stem}.png" for image in images] if folder else [path]
    name, times = collections.Counter(found).most_common(1)[0]
    if times > 1:
        same = ", ".join(str(image) for image, one in zip(images, found, strict=True) if one == name)
        raise UserError(
            f"--picture={picture}: {same} would all be drawn to {name}. Give them in several commands, with a folder "
            "each."
        )
    for one in found:
        _check_target(one, images, overwrite)
    return list(found)


def _check_target(target: Path, images: Sequence[Path], overwrite: bool) -> None:
    if target.is_dir():
        raise UserError(f"--picture: {target} is a folder. Remove it, or give another name.")
    if any(target.exists() and target.samefile(image) for image in images):
        raise UserError(
            f"--picture: {target} is a picture to look at and is never replaced. Give another name."
        )
    if target.exists() and not overwrite:
        raise UserError(
            f"--picture: {target} exists and is left as it is. Give another name, or --overwrite."
        )
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(
            f"--picture: {target} cannot be written: {above} is no folder that may be written to. Give another."
        )


def save(picture: np.ndarray, path: Path) -> None:
    """Writes uint8 [height, width, 3] as the kind that the name says; makes the folder.

    Raises:
        UserError: it cannot be written, or is too large for the kind (16,383 pixels a side for WebP).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            Image.fromarray(picture).save(file, KINDS[path.suffix.lower()], quality=92)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--picture: {path} cannot be written: {why}. Give another name or place.") from error
