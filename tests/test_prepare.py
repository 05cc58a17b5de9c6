# SPDX-License-Identifier: Apache-2.0
"""The command: its help, its messages and exit codes, and what lies there when it is done."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.data import corpus, raw
from vlp_jax import cli, prepare
from vlp_jax.data.source import Source


def call(capsys, *argv):
    code = cli.run(prepare.main, prepare.define, usage=prepare.__doc__, arguments=("DATASET",), argv=argv)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def test_help_lists_what_to_download():
    """In a process of its own: the list of data sets is made where the program starts."""
    run = subprocess.run(
        [sys.executable, "-m", "vlp_jax.prepare", "--help"], capture_output=True, text=True, check=True
    )
    for words in (
        "scenes  nothing: it is drawn",
        "coco  captions_train2017.json",
        "--level",
        "--same_splits",
        "--max_bad",
    ):
        assert words in run.stdout


def test_help_and_errors_need_no_tensorflow():
    code = (
        "import sys; from vlp_jax import cli, prepare;"
        "cli.run(prepare.main, prepare.define, usage='', arguments=('DATASET',), argv=['coco', '--target=t', '--source=none']);"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_scenes_twice(capsys, tmp_path):
    small = ["scenes", f"--target={tmp_path}", "--train=20", "--validation=4", "--test=4", "--workers=1"]
    code, out, err = call(capsys, *small, "--seed=3", "--level=2")
    assert code == 0 and out.startswith(f"scenes: done, {tmp_path}\ntrain: 20 pictures, 100 captions\n")
    assert json.loads((tmp_path / "manifest.json").read_text())["options"]["seed"] == 3
    assert len(Source(tmp_path, "test")) == 4
    code, out, err = call(capsys, *small, "--seed=3", "--level=2")
    assert code == 0 and "already there" in out
    code, out, err = call(capsys, *small)
    assert code == 2 and not out and "seed is 3, asked for 0; level is 2, asked for 1" in err
    assert call(capsys, *small, "--overwrite")[0] == 0


def test_coco_eight_pictures_for_a_check_by_heart(capsys, tmp_path):
    raw.coco(tmp_path / "raw", {"train2017": 9})
    flags = ["--examples=8", "--captions=1", "--same_splits", "--workers=1"]
    code, out, _ = call(
        capsys, "coco", f"--source={tmp_path / 'raw'}", f"--target={tmp_path / 'data'}", *flags
    )
    assert code == 0 and out.count("8 pictures, 8 captions") == 3
    assert Source(tmp_path / "data", "test").read([7]) == Source(tmp_path / "data", "train").read([7])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["sceens", "--target=x"],
            "There is no data set 'sceens'. Did you mean 'scenes'? Possible: coco, flickr30k, folder, ",
        ),
        (["coco", "--target=x"], "--source is missing."),
        (["scenes"], "--target is missing."),
        (["scenes", "--target=x", "--captions=2"], "--captions is no flag of scenes. Possible: --target, "),
        (["scenes", "--target=x", "--source=y"], "--source is no flag of scenes."),
        (
            ["coco", "--target=x", "--source=nowhere"],
            "nowhere is not there. Give --source=FOLDER that holds captions_",
        ),
        (["coco", "--target=x", "--source=y", "--examples=-1"], "--examples"),
        (["scenes", "--target=x", "--max_bad=2"], "--max_bad"),
        (["scenes", "--target=x", "--levle=2"], "Did you mean 'level'"),
        (["scenes", "--target=x", "--level=9"], "There is no level 9. Possible: 1, 2, 3. Choose one."),
        (["scenes", "--target=/dev/null/x"], "cannot be written: Not a directory"),
        ([], "wanted DATASET"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_no_trace(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "") and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_of_bad_files_ends_well(tmp_path):
    """The command on some 200 files that are no pictures, among a few good ones: each is named, with its reason."""
    pictures = tmp_path / "pictures"
    expected = corpus.make(pictures)
    good = {f"good{number}": content for number, content in enumerate(corpus.good().values())}
    for name, content in good.items():
        (pictures / name).write_bytes(content)
    lines = [json.dumps({"image": name, "caption": "a picture"}) + "\n" for name in [*expected, *good]]
    (pictures / "captions.jsonl").write_text("".join(lines) + "no json\n")
    command = [sys.executable, "-m", "vlp_jax.prepare", "folder", f"--source={pictures}"]
    command += [f"--target={tmp_path / 'data'}", "--workers=2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and "larger --max_bad" in run.stderr and "Traceback" not in run.stderr
    run = subprocess.run([*command, "--max_bad=1"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-2000:]
    dropped = [json.loads(line) for line in (tmp_path / "data/dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == len(expected) + 1
    said = {one["file"]: one["reason"] for one in dropped}
    for name, pattern in expected.items():
        reason = next((reason for file, reason in said.items() if name in file), "not named")
        assert re.search(pattern, reason), (name, reason)
    assert any("captions.jsonl" in file and str(len(lines) + 1) in file for file in said)
    records = json.loads((tmp_path / "data/manifest.json").read_text())["splits"]
    assert sum(split["records"] for split in records.values()) == len(good)


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    command = f"{sys.executable} -m vlp_jax.prepare --help | head -1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.returncode in (0, cli.CLOSED) and run.stderr == "" and "vlp_jax.prepare" in run.stdout
    closed = f"{sys.executable} -m vlp_jax.prepare --help >&-"
    run = subprocess.run(["bash", "-c", closed], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
