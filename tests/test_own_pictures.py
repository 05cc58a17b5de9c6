# SPDX-License-Identifier: Apache-2.0
"""The three lines of the README, from twenty pictures of one's own to a trained model, run as they stand there."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.test_house import ROOT, commands


@pytest.mark.slow
def test_from_twenty_pictures_to_a_trained_model(realdata, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(realdata / "coco" / "train2017", folder)
    told = json.loads((realdata / "coco/annotations/captions_train2017.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in told["images"]}
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = [(names[one["image_id"]], one["caption"]) for one in told["annotations"]]
        csv.writer(file).writerows([("image", "caption"), *rows])
    own = [line for line in commands() if "mine" in line]
    assert [line.split()[2] for line in own] == [
        f"vlp_jax.{n}" for n in ("prepare", "train", "evaluate", "doctor")
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    for line in own:
        command = [sys.executable, *shlex.split(line)[1:]]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert run.returncode == 0, f"{line}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        if "train" in command[2]:
            assert "data folder: " in run.stderr and "% of the source alive" in run.stderr
    losses = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/mlm"] for line in losses if "train/mlm" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "runs/mine/report.html").is_file() and (tmp_path / "mine.html").is_file()
    kept = tmp_path / "runs/mine/checkpoints/200/assets/folder.manifest.json"
    assert kept.read_bytes() == (tmp_path / "data/mine/manifest.json").read_bytes()
