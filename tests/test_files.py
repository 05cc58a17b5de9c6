# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os

import pytest

from vlp_jax import files
from vlp_jax.types import UserError


def test_text_and_bytes_are_written_and_digested(tmp_path):
    path = tmp_path / "a.json"
    files.save(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    files.save(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and [path] == list(tmp_path.iterdir())
    assert files.digest(path) == hashlib.sha256(b"\x00\xff").hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.save(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="a.json"):
        files.save(path, "new")
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone cannot be read"):
        files.digest(tmp_path / "gone")
