# SPDX-License-Identifier: Apache-2.0
"""The README's four lines on weights, run as they stand there on a small model in the released files' names."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.convert.files import config_of, parameters, tensors
from tests.test_house import ROOT, commands
from vlp_jax.convert.sources import safetensors_file

# The file of the README has ViLT-B/32's sizes; so has the run that it starts. Ours are small.
SMALL = dict(
    width=48, modalities=2, unroll=3, fusion__depth=3, fusion__num_heads=3, fusion__mlp_width=52, dtype="float32"
)  # fmt: skip


def run(folder, line: str, *more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, *shlex.split(line)[1:], *more]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
def test_from_a_released_file_to_a_fine_tuned_model_and_back(realdata, tmp_path):
    shutil.copy(realdata / "bert-base-uncased-vocab.txt", tmp_path / "vocab.txt")
    source = (
        f"python -m vlp_jax.prepare coco --source={realdata / 'coco'} --target=data/coco --vocab=vocab.txt"
    )
    run(tmp_path, source)
    sizes = {f"model__{key}": value for key, value in SMALL.items()}
    config = config_of(**sizes, data__text_length=40, data__image_size=64)
    config.model.text_embed.vocab_size = 30522
    params = parameters(config)
    safetensors_file.write(tmp_path / "vilt_200k_mlm_itm.ckpt", tensors(params))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    convert, evaluate, train, export = [line for line in commands() if "checkpoints/vilt" in line]

    done = run(tmp_path, convert)
    assert "ViLT as released" in done.stdout and (tmp_path / "checkpoints/vilt/assets/vocab.txt").is_file()
    done = run(tmp_path, evaluate)
    assert "itm/accuracy" in done.stdout
    model = [f"--config.model.{key.replace('__', '.')}={value}" for key, value in SMALL.items()]
    data = ["--config.data.image_size=64", "--config.data.patch_size=8", "--config.data.max_patches=0"]
    short = ["--config.train.steps=2", "--config.train.batch_size=4", "--config.optimizer.warmup=0.1"]
    short += ["--config.evaluation.batch_size=4", "--config.evaluation.train_examples=4"]
    done = run(tmp_path, train, *model, *data, *short, "--config.train.log_every=1")
    assert "parameters from checkpoints/vilt" in done.stderr and "fresh" not in done.stderr
    losses = [json.loads(line) for line in (tmp_path / "runs/vilt/metrics.jsonl").read_text().splitlines()]
    assert any("train/mlm" in line for line in losses)
    done = run(tmp_path, export)
    assert "bit for bit the same" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "exported").iterdir()
    }
