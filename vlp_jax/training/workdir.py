# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: held by one process at a time, and by one configuration for ever."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlp_jax.files import save
from vlp_jax.parallel import processes
from vlp_jax.training.paths import flatten
from vlp_jax.types import UserError

log = logging.getLogger(__name__)

# What a restart may change: where and how fast it runs, how often it tells, saves and looks, and for how long.
FREE = re.compile(
    r"(parallel|checkpoint|evaluation)\..*|compilation_cache|data\.(dir|threads|prefetch)"
    r"|train\.(log_every|evaluate_every|max_skipped|watchdog)"
)
MANIFEST = "manifest_sha256"
# What may differ between the processes of a run.
OWN = re.compile(r"parallel\.(process|coordinator)|compilation_cache|data\.(dir|threads|prefetch)")
VISIBLE = 90  # seconds until a file is seen by the other hosts: NFS remembers for 60 what is not there


@contextlib.contextmanager
def open_workdir(path: str | Path, config: ConfigDict, manifest_sha256: str) -> Iterator[Path]:
    """Makes the folder, locks it, and writes config.json; gives its absolute path.

    Only process 0 does so; the others see to it that they share its folder and were started as it was. A run that
    ends by the user's fault before its first checkpoint leaves no config.json, so that the corrected command may use
    the folder.

    Args:
        path: the folder; what is not there is made.
        config: resolved.
        manifest_sha256: of the data, so that the same data may lie elsewhere at a restart.

    Raises:
        UserError: another process holds it, or it belongs to a run of another configuration or other data; the
            processes of this run differ in their settings or do not share the folder.
    """
    folder = Path(path).expanduser().absolute()
    settings = {**json.loads(config.to_json()), MANIFEST: manifest_sha256}
    common = {key: value for key, value in flatten(settings, ".") if not OWN.fullmatch(key)}
    processes.agree({**common, "version of jax": jax.__version__})
    if jax.process_index() != 0:
        _check_shared(folder)
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir {folder} is, or lies below, a file. Give a folder.") from error
    except OSError as error:
        reason = error.strerror
        raise UserError(f"--workdir {folder} cannot be made: {reason}. Give a folder that can be.") from error
    with _locked(folder):
        _claim(folder, settings)
        try:
            _check_shared(folder)
            yield folder
        except Exception:
            if not (folder / "checkpoints").exists():
                (folder / "config.json").unlink(missing_ok=True)
            raise


def _check_shared(folder: Path) -> None:
    """Process 0 leaves a file, and the others look whether they find it, with the right word in it."""
    if jax.process_count() == 1:
        return
    mark, first = folder / ".meeting", jax.process_index() == 0
    word = f"{os.getpid()} on {socket.gethostname()}, {time.time_ns()}"
    if first:
        save(mark, word)
    word, end = processes.announced("workdir", word), time.monotonic() + VISIBLE
    while not (mark.is_file() and mark.read_text() == word):
        if time.monotonic() > end:
            raise UserError(
                f"--workdir {folder} is not the folder of process 0: {mark.name}, which process 0 has written there, "
                f"is not seen from here in {VISIBLE} s. Give all processes one folder on a file system that they share."
            )
        time.sleep(0.1)
    processes.meet("workdir")
    if first:
        mark.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The kernel lets go of the lock when the process ends, however it ends."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"--workdir {folder} is in use by {holder}. Wait for that run, stop it, or give another --workdir."
            ) from error
        except OSError as error:
            # Some network file systems have no locks; a run there goes on without one.
            log.warning("%s is not locked (%s): start no second run in it.", folder, error.strerror)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(handle)


def _claim(folder: Path, new: dict[str, Any]) -> None:
    """Compares with the config.json of the run that lives here, and writes the new one."""
    file = folder / "config.json"
    if file.is_file():
        try:
            old = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{file} is damaged: {error}. Give another --workdir, or delete this one."
            ) from error
        if changed := differences(old, new):
            raise UserError(
                f"--workdir {folder} belongs to a run of another configuration:\n"
                + "\n".join(f"  {key}: {before} there, {now} given" for key, before, now in changed)
                + "\nGive the same values, or another --workdir."
            )
    elif (folder / "checkpoints").exists():
        raise UserError(f"--workdir {folder} holds checkpoints but no config.json. Give another --workdir.")
    save(file, json.dumps(new, indent=2, sort_keys=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What a restart must not change: (dotted key, old value, new value), sorted; "absent" where there is none."""
    before, now = dict(flatten(old, ".")), dict(flatten(new, "."))
    found = []
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key, "absent"), now.get(key, "absent")
        longer = key == "train.steps" and one != "absent" and other != "absent" and other > one
        if one != other and not FREE.fullmatch(key) and not longer:
            found.append((key, one, other))
    return found
