# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes: there whole or not at all, and never over another one unasked."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlp_jax.types import UserError

MADE = ".converted"  # in what a conversion has made: the names beside it, a line each


def check(target: str, overwrite: bool, sources: Sequence[str] = ()) -> Path:
    """Returns the absolute path of a target that may be written; makes nothing.

    Raises:
        UserError: it exists and may not be replaced, or is no place for a folder.
    """
    if not target:
        raise UserError(
            "--target is missing: no folder to write to. Give --target=DIR, or --dry-run to see the plan."
        )
    path = Path(target).expanduser().absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--target {path} is no folder. Give a folder that does not exist yet.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise UserError(
                f"--target {path} exists and is left as it is. Give another folder, or --overwrite to replace what a "
                "conversion has written there."
            )
        _refuse_sources(path, sources)
        if not _is_ours(path):
            raise UserError(
                f"--target {path} holds something else than a converted model ({', '.join(sorted(os.listdir(path))[:5])}"
                "): --overwrite replaces converted models only. Give another folder, or remove this one yourself."
            )
    above = next(folder for folder in path.parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(
            f"--target {path} cannot be made: {above} is no folder that may be written to. Give another."
        )
    return path


@contextlib.contextmanager
def folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `path`, which takes its place when all went well and vanishes otherwise.

    What a killed conversion to the same target has left is removed first.

    Raises:
        UserError: something has come to `path` since it was checked.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.unfinished"):
        with contextlib.suppress(OSError), _locked(left):
            if (left / "replaced").is_dir() and not path.exists():
                (left / "replaced").replace(path)  # killed between the two renames below
            shutil.rmtree(left)
    made = _made(path)
    try:
        with _locked(made):
            inside = made / path.name
            inside.mkdir()
            yield inside
            (inside / MADE).write_text("\n".join(sorted(os.listdir(inside))))
            inside.chmod(0o777 & ~_umask())
            check(str(path), overwrite)
            old = made / "replaced"
            try:
                if path.exists():
                    path.replace(old)
                inside.replace(path)
            except BaseException:  # Ctrl-C too
                if old.exists() and not path.exists():
                    old.replace(path)
                raise
    finally:
        for _ in range(20):  # orbax's threads may still be writing into it
            shutil.rmtree(made, ignore_errors=True)
            if not made.exists():
                break
            time.sleep(0.1)


def _made(path: Path) -> Path:
    """A new folder beside `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    except OSError as error:
        raise UserError(f"--target {path} cannot be made: {error.strerror}. Give another folder.") from error


def _refuse_sources(path: Path, sources: Sequence[str]) -> None:
    for source in sources:
        if Path(source).expanduser().resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--target {path} holds the source {source}, which --overwrite would delete. Give another folder."
            )


def _is_ours(path: Path) -> bool:
    """Whether there is nothing in a folder but what a conversion has put there."""
    try:
        return set(os.listdir(path)) == {MADE, *(path / MADE).read_text().splitlines()}
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder as long as the process lives; OSError where another one does."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
