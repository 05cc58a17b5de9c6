# SPDX-License-Identifier: Apache-2.0
"""Small DETRs for tests of conversion without PyTorch: random parameters, and files of them in the authors' names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vlp_jax import cli, systems
from vlp_jax.convert import importing, writing
from vlp_jax.convert.sources import open_source, safetensors_file
from vlp_jax.convert.tables import detr
from vlp_jax.files import LABELS
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import nest

NAMES = ["", "net", "boat", "", "eel"]
DEPTHS, WIDTHS = (1, 2, 1, 3), (16, 32, 48, 64)


def config_of(**changes):
    """A resolved config of sizes that no released model has."""
    config = cli.load_config("detr:variant=tiny")
    model = config.model
    model.width, model.unroll, model.heads.classes, model.object_queries.queries = 24, 1, 5, 7
    model.grid_embed = dict(depths=DEPTHS, widths=WIDTHS, stem_width=12)
    for part, sizes in (("encoder", (2, 3, 40)), ("decoder", (3, 2, 36))):
        model[part].depth, model[part].num_heads, model[part].mlp_width = sizes
    for key, value in changes.items():
        *parents, name = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return systems.get("detr").resolve(config, {})


def parameters(config, seed=0):
    """Random parameters, frozen statistics too, far from their initial values."""
    draw = np.random.default_rng(seed)

    def array(path, shape):
        if path.endswith("variance"):
            return draw.uniform(0.5, 1.5, shape)
        if path.endswith("kernel"):
            return draw.normal(0, 1 / np.prod(shape[-4 if "resnet" in path else -2 : -1]) ** 0.5, shape)
        return draw.normal(float(path.endswith("scale")), 0.2, shape)

    return {
        path: array(path, shape).astype(np.float32)
        for path, shape in sorted(importing.shapes(config).items())
    }


def tensors(params):
    """Parameters by the authors' names."""
    shapes = {path: array.shape for path, array in params.items()}
    rows = writing.written_names(detr.ORIGINAL, shapes)
    return {name: writing.written(row, layer, params) for name, row, layer in rows}


HEADS = {"encoder_attention_heads": 3, "decoder_attention_heads": 2}


def file(folder, params, beside=HEADS, **changes):
    """Writes a file of the authors' names; `changes` replace tensors, or remove them where None."""
    content = {**tensors(params), **changes}
    safetensors_file.write(folder / "detr.safetensors", {k: v for k, v in content.items() if v is not None})
    (folder / "config.json").write_text(json.dumps(beside))
    return folder / "detr.safetensors"


def plan(path, config=None, **more):
    wishes = importing.Wishes("detr", config or cli.load_config(detr.CONFIG), config is not None, **more)
    with open_source(path) as source:
        return importing.plan([source], wishes)


def checkpoint_of(folder: Path, config, params) -> Path:
    """Writes a checkpoint of ours with names of its classes."""
    meta = {"config": config.to_dict(), "facts": {}, "step": 0, "metrics": {}, "finite": True}
    checkpoint.write(folder, nest(params.items()), meta, {LABELS: json.dumps(NAMES)})
    return folder
