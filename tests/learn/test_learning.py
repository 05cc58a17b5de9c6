# SPDX-License-Identifier: Apache-2.0
"""The numbers that the README promises, by the commands that it shows. Minutes each: `bash tests/run.sh --learn`."""

import json
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.learn


def command(module, *arguments):
    done = subprocess.run([sys.executable, "-m", f"vlp_jax.{module}", *map(str, arguments)], cwd=REPOSITORY)
    assert done.returncode == 0


def test_default_run_on_held_out_scenes(tmp_path):
    subprocess.run(
        ["bash", "launch/local.sh", f"--data={tmp_path / 'scenes'}", f"--workdir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        check=True,
    )
    scores = json.loads((tmp_path / "run/evaluation.json").read_text())
    print(json.dumps(scores, indent=2))
    assert scores["itm/accuracy"] >= 0.90 and abs(scores["itm/accuracy_blind"] - 0.5) < 0.05
    assert scores["mlm/accuracy_visual"] >= 0.80 and scores["mlm/accuracy_visual_blind"] < 0.45
    assert scores["image_retrieval/r1"] >= 0.25 and scores["text_retrieval/r1"] >= 0.25
    assert scores["image_retrieval/r1_blind"] < 0.05 and scores["text_retrieval/r1_blind"] < 0.05


@pytest.mark.parametrize("pictures, captions, steps", [(8, 1, 600), (20, 5, 1200)])
def test_photographs_are_learned_by_heart(realdata, tmp_path, pictures, captions, steps):
    data, run = tmp_path / "data", tmp_path / "run"
    command(
        "prepare", "coco", f"--source={realdata / 'coco'}", f"--target={data}", f"--examples={pictures}",
        f"--captions={captions}", "--same_splits", f"--vocab={realdata / 'bert-base-uncased-vocab.txt'}",
    )  # fmt: skip
    command(
        "train", "--config=configs/vilt.py:variant=tiny", f"--config.data.dir={data}", f"--workdir={run}",
        "--config.data.image_size=384", "--config.data.patch_size=32", "--config.data.max_patches=0",
        "--config.data.mask_rate=0.15", "--config.optimizer.lr=2e-3", "--config.optimizer.warmup=0.05", "--config.train.batch_size=8", f"--config.train.steps={steps}",
        "--config.evaluation.batch_size=8",
    )  # fmt: skip
    command("evaluate", f"--workdir={run}")
    scores = json.loads((run / "evaluation.json").read_text())
    print(json.dumps(scores, indent=2))
    if pictures == 8:
        assert scores["itm/accuracy"] > 0.95 and scores["mlm/accuracy"] > 0.95
