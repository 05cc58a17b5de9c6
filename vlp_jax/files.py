# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vlp_jax.types import UserError

LABELS = "labels.json"  # among the assets of a checkpoint: a list, the name of class 0 first


def save(path: Path, content: bytes | str) -> None:
    """Writes a file (text as UTF-8) as `written` does."""
    with written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes its name by rename: neither a reader nor a kill ever meets half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
