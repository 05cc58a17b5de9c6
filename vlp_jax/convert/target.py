# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes: there whole or not at all, and never over another one unasked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlp_jax.types import UserError

HOLDER = ".writing"  # locked as long as the process lives that fills the folder


def check(target: str, overwrite: bool) -> Path:
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
def folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`, which takes its place when all went well and vanishes otherwise.

    What a killed conversion to the same target has left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.unfinished"):
        if (left / HOLDER).is_file() and not _held(left / HOLDER):
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    try:
        with (made / HOLDER).open("w") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            inside = made / path.name
            inside.mkdir()
            yield inside
            inside.chmod(0o777 & ~_umask())
            old = made / "replaced"
            if path.exists():
                path.replace(old)
            try:
                inside.replace(path)
            except OSError:
                if old.exists():
                    old.replace(path)
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    checkpoint = (path / "params").is_dir() and (path / "digests.0.json").is_file()
    return checkpoint or ((path / "model.safetensors").is_file() and not (path / ".git").exists())


def _held(file: Path) -> bool:
    with file.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
