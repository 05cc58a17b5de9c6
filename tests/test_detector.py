# SPDX-License-Identifier: Apache-2.0
"""The README's lines on boxes, run as they stand there: train, evaluate, predict, and a released file in their place."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from tests.convert import detr_files
from tests.test_house import commands
from tests.test_weights import run
from vlp_jax.convert.sources import safetensors_file

SHORT = [
    *("--config.train.steps=2", "--config.train.batch_size=4", "--config.train.log_every=1"),
    *("--config.model.unroll=1", "--config.evaluation.batch_size=4", "--config.evaluation.train_examples=4"),
]
FEW = ["--config.evaluation.examples=8"]


def lines(part: str) -> list[str]:
    return [line for line in commands() if f"{part} " in f"{line} "]


@pytest.fixture
def photo(realdata, tmp_path):
    return shutil.copy(next((realdata / "coco/train2017").glob("*.jpg")), tmp_path / "photo.jpg")


@pytest.mark.slow
def test_from_boxes_to_a_detector(scenes_dir, photo, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/scenes").symlink_to(scenes_dir)
    train, evaluate, predict = lines("runs/detr")
    run(tmp_path, train, *SHORT, *FEW)
    metrics = [json.loads(line) for line in (tmp_path / "runs/detr/metrics.jsonl").read_text().splitlines()]
    wanted = {"train/box_class", "train/box_l1", "train/giou", "train/left_out/crowd", "train/padding/image"}
    assert wanted | {"validation/detection/padding"} <= {key for line in metrics for key in line}
    done = run(tmp_path, evaluate)
    assert "detection/ap50" in done.stdout and (tmp_path / "runs/detr/report.html").is_file()
    found = json.loads(run(tmp_path, predict, "--threshold=0").stdout)
    with Image.open(photo) as picture, Image.open(tmp_path / "found.png") as drawn:
        assert (found["width"], found["height"]) == picture.size and drawn.format == "PNG"
    assert len(found["boxes"]) == 16
    assert {box["label"] for box in found["boxes"]} <= {"cube", "ball", "cone", "star"}


@pytest.mark.slow
def test_a_released_detector_on_pictures_and_a_run_from_a_backbone(realdata, photo, tmp_path):
    """The files of the README have ResNet-50's sizes and pictures of 800 pixels; ours are small."""
    run(tmp_path, f"python -m vlp_jax.prepare coco --source={realdata / 'coco'} --target=data/coco")
    config = detr_files.config_of(model__heads__classes=91)
    tensors = detr_files.tensors(detr_files.parameters(config))
    safetensors_file.write(tmp_path / "detr-r50-e632da11.pth", tensors)
    body = {
        name.removeprefix("backbone.0.body."): array for name, array in tensors.items() if "backbone" in name
    }
    safetensors_file.write(tmp_path / "resnet50.pth", body)
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(heads))
    sides = {"shortest_edge": 96, "longest_edge": 160}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": sides}))

    convert, predict, evaluate, train = [line for line in commands() if "detr-r50" in line]
    assert "DETR as released" in run(tmp_path, convert).stdout
    found = json.loads(run(tmp_path, predict, "--threshold=0").stdout)
    assert len(found["boxes"]) == 7 and found["boxes"][0]["label"]
    assert "detection/ap" in run(tmp_path, evaluate).stdout
    sizes = [f"--config.model.grid_embed.{key}={value}" for key, value in
             dict(depths="(1,2,1,3)", widths="(16,32,48,64)", stem_width=12).items()]  # fmt: skip
    pictures = ["--config.data.image_size=96", "--config.data.image_sizes=()", "--config.data.canvases=()"]
    (tmp_path / "config.json").unlink()
    done = run(tmp_path, train, *SHORT, *sizes, *pictures)
    assert "grid_embed/resnet" not in "".join(line for line in done.stderr.splitlines() if "fresh" in line)
    assert "heads/class" in done.stderr
