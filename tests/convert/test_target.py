# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes: whole or not at all, and nothing of the user's goes with it."""

from __future__ import annotations

import os

import pytest

from vlp_jax.convert import target
from vlp_jax.types import UserError


def make(path, content="weights", overwrite=False):
    """What a conversion does with its target."""
    target.check(str(path), overwrite)
    with target.folder(path, overwrite) as inside:
        (inside / "model.safetensors").write_text(content)


def test_a_target_is_replaced_only_if_a_conversion_made_all_of_it(tmp_path):
    path = tmp_path / "made"
    make(path, "old")
    with pytest.raises(UserError, match="exists and is left as it is"):
        make(path, "new")
    make(path, "new", overwrite=True)
    assert (path / "model.safetensors").read_text() == "new" and os.listdir(tmp_path) == ["made"]
    (path / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match="holds something else than a converted model"):
        make(path, "newest", overwrite=True)
    assert (path / "thesis.tex").exists() and (path / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("names", [("model.safetensors",), ("params", "digests.0.json"), (".converted",)])
def test_the_user_s_own_model_is_no_conversion(tmp_path, names):
    path = tmp_path / "mine"
    path.mkdir()
    for name in names:
        (path / name).write_text("mine")
    with pytest.raises(UserError, match="replaces converted models only"):
        make(path, overwrite=True)


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_source_is_never_replaced(tmp_path):
    make(tmp_path / "made")
    for source in (tmp_path / "made", tmp_path / "made" / "model.safetensors"):
        with pytest.raises(UserError, match="which --overwrite would delete"):
            target.check(str(tmp_path / "made"), True, [str(source)])


def test_what_comes_meanwhile_stays(tmp_path):
    path = tmp_path / "made"
    with pytest.raises(UserError, match="exists"), target.folder(path) as inside:
        (inside / "model.safetensors").write_text("weights")
        path.mkdir()
        (path / "thesis.tex").write_text("words")
    assert (path / "thesis.tex").read_text() == "words" and os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_failure_leaves_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / "made"
    make(path, "old")
    with pytest.raises(error), target.folder(path, overwrite=True) as inside:
        (inside / "model.safetensors").write_text("new")
        raise error
    assert (path / "model.safetensors").read_text() == "old" and os.listdir(tmp_path) == ["made"]
    rename = type(path).replace

    def fail(self, to):
        if self.name == "made" and ".unfinished" in str(self):
            raise error
        return rename(self, to)

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(error):
        make(path, "new", overwrite=True)
    assert (path / "model.safetensors").read_text() == "old" and os.listdir(tmp_path) == ["made"]


def test_what_a_kill_left_is_cleared_and_an_old_target_put_back(tmp_path):
    path, left = tmp_path / "made[1]", tmp_path / ".made[1].abcdefgh.unfinished"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "model.safetensors").write_text("old")
    (left / "replaced" / target.MADE).write_text("model.safetensors")
    with pytest.raises(UserError, match="exists"), target.folder(path):
        pass
    assert (path / "model.safetensors").read_text() == "old" and os.listdir(tmp_path) == ["made[1]"]


def test_a_running_conversion_is_left_alone(tmp_path):
    path = tmp_path / "made"
    with target.folder(path) as first:
        with pytest.raises(UserError, match="exists"), target.folder(path):
            assert first.is_dir()
            path.mkdir()
            (path / "other").write_text("quicker")
        assert first.is_dir()
        (path / "other").unlink()
        path.rmdir()
        (first / "model.safetensors").write_text("weights")
    assert (path / "model.safetensors").exists()


def test_places_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for bad in (file, file / "below", tmp_path / "link"):
        with pytest.raises(UserError):
            target.check(str(bad), True)
    with pytest.raises(UserError, match="--target is missing"):
        target.check("", False)
