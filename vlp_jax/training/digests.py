# SPDX-License-Identifier: Apache-2.0
"""The sha256 of every file of a checkpoint: written last, so that what has all of them is complete; verified before use."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax

from vlp_jax.files import save
from vlp_jax.types import UserError

BARRIER_SECONDS = 600  # how long a process waits for the others at a commit


def complete_steps(directory: Path) -> list[int]:
    """The steps below a folder that are committed with all their digests, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and is_complete(path))


def is_complete(path: Path) -> bool:
    """Whether a step has the digests of all processes that wrote it."""
    try:
        count = json.loads((path / "digests.0.json").read_text())["processes"]
    except (OSError, ValueError, KeyError, TypeError):
        # A damaged digest file is found by verify; here it only has to be there.
        return (path / "digests.0.json").is_file()
    return all((path / f"digests.{process}.json").is_file() for process in range(count))


def _files(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("digests."):
            yield file.relative_to(path).as_posix()


def write_digests(path: Path) -> None:
    """Writes this process's part of the digests; array data is shared out, the rest is of process 0."""
    process, count = jax.process_index(), jax.process_count()
    deadline = time.monotonic() + BARRIER_SECONDS
    while not path.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)  # process 0 commits by rename; on a shared file system the others see it later
    mine = [n for n in _files(path) if (zlib.crc32(n.encode()) % count if "/d/" in n else 0) == process]
    digests = dict(zip(mine, _hash_all(path, mine), strict=True))
    save(path / f"digests.{process}.json", json.dumps({"processes": count, "files": digests}, indent=0))


def _hash_all(path: Path, names: list[str]) -> list[str]:
    def digest(name: str) -> str:
        try:
            with (path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return ""

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, names))


def verify(path: Path, items: tuple[str, ...] = ()) -> None:
    """Compares the files of a step (or of some items) with their digests.

    Raises:
        UserError: names the first file that is missing or changed, or says that the step is incomplete.
    """
    if not is_complete(path):
        raise UserError(
            f"{path} is no complete checkpoint: its digests.*.json are missing. Choose another step."
        )
    files: dict[str, str] = {}
    for listing in sorted(path.glob("digests.*.json")):
        try:
            files |= json.loads(listing.read_text())["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, listing.name, "is unreadable") from error
    names = [name for name in files if not items or name.split("/")[0] in items]
    for name, actual in zip(names, _hash_all(path, names), strict=True):
        if actual != files[name]:
            raise damaged(path, name, "has changed since it was written" if actual else "is missing")


def damaged(path: Path, name: str, how: str) -> UserError:
    """The error for a file of a checkpoint that cannot be used; says which step to go back to."""
    earlier = [
        step for step in complete_steps(path.parent) if not path.name.isdigit() or step < int(path.name)
    ]
    advice = f"go back to step {earlier[-1]}" if earlier else "start again: there is no earlier step"
    item = name.split("/")[0]
    return UserError(f"Checkpoint {path}: {name} (part of {item}) {how}. Delete {path} to {advice}.")
