# SPDX-License-Identifier: Apache-2.0
"""The proof of a detector: the file runs in PyTorch, ours in JAX, on one fixed batch of two padded pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import systems
from vlp_jax.convert import settings
from vlp_jax.convert.engine import Reading, unwrapped
from vlp_jax.convert.importing import Import
from vlp_jax.convert.proof import detr
from vlp_jax.convert.proof.blocks import Parts
from vlp_jax.convert.proof.lines import BOUND, Line, Proof, line
from vlp_jax.layers import trace
from vlp_jax.training.paths import nest

CANVAS = (96, 128)
PICTURES = ((96, 71), (53, 128))  # rows and columns: each is padded, in another direction
RESNET = "grid_embed/resnet"
BOUNDS = {"logits": 1e-4}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


def prove(conversion: Import, params: Mapping[str, np.ndarray]) -> Proof:
    """Runs each file by its own names and our parameters by ours, and compares every part that both have.

    Raises:
        UserError: a file is damaged.
    """
    batch = random_batch()
    lines: list[Line] = []
    left: dict[str, str] = {}
    ours = run_ours(conversion.config, params, batch)
    for reading in conversion.plan.readings:
        whole, names = reading.table.complete, unwrapped(reading.source)

        def get(name: str, reading: Reading = reading, names: Mapping[str, str] = names) -> np.ndarray:
            return reading.source.read(names[name])

        reference = detr.detr if whole else detr.resnet
        theirs = reference(get, list(names), _numbers(conversion.config, reading), batch)
        for part, found in theirs.items():
            if reason := _changed(part, conversion):
                left[f"{part} of {reading.source.path}"] = reason
                continue
            mask = _mask(batch, ours, part)
            bound = BOUNDS.get(part, BOUND)
            lines.append(line(str(reading.source.path), part, ours[part][mask], found[mask], bound))
    return Proof(lines, left)


def random_batch() -> dict[str, np.ndarray]:
    """Two pictures of odd sizes on one canvas; the same at every call."""
    draw = np.random.default_rng(0)
    image = np.zeros((len(PICTURES), *CANVAS, 3), np.uint8)
    mask = np.zeros((len(PICTURES), *CANVAS), bool)
    for index, (rows, columns) in enumerate(PICTURES):
        image[index, :rows, :columns] = draw.integers(0, 256, (rows, columns, 3))
        mask[index, :rows, :columns] = True
    return {"image": image, "image_mask": mask}


def run_ours(config: ConfigDict, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> Parts:
    """The parts of our model, in float32, by the names of proof/detr.py."""
    config = ConfigDict(config.to_dict())
    config.model.dtype, config.model.unroll = "float32", 1
    system = systems.get(config.system).build(config)
    tree = jax.device_put(nest(params.items()))
    paths = [f"{RESNET}/stem", "encoder/layers", "decoder/layers", "grid_embed/projection"]
    stages = range(1, len(config.model.grid_embed.depths) + 1)
    paths += [f"{RESNET}/stage{stage}/{place}" for stage in stages for place in ("first", "rest")]

    def run() -> Any:
        return jax.jit(system.predict["boxes"], compiler_options=QUICK_TO_COMPILE)(tree, batch)

    with jax.default_matmul_precision("highest"):
        out, found = trace.outputs(run, paths)
    parts = {"stem": np.maximum(found[paths[0]][0], 0), "features": found["grid_embed/projection"][0]}
    for stage in stages:
        blocks = [x for place in ("first", "rest") for x in found[f"{RESNET}/stage{stage}/{place}"]]
        parts |= {f"stage {stage} block {index}": x for index, x in enumerate(blocks)}
    for name in ("encoder", "decoder"):
        parts |= {f"{name} {index}": x for index, x in enumerate(found[f"{name}/layers"])}
    parts |= {"logits": out["class_logits"], "boxes": out["boxes"]}
    return {name: np.asarray(part) for name, part in parts.items()}


def _numbers(config: ConfigDict, reading: Reading) -> detr.Numbers:
    """What `config.json` states, read apart from settings.py, else what ours has."""
    stated = settings.json_beside(reading.source.path)[1]
    stacks = ("encoder", "decoder")
    heads = (stated.get(f"{name}_attention_heads") or config.model[name].num_heads for name in stacks)
    return detr.Numbers(*map(int, heads), *(config.model[name].eps for name in stacks))


def _changed(part: str, conversion: Import) -> str:
    """Why a part cannot be the file's any more; "" if it can."""
    if part == "logits" and any(path.startswith("heads/class/") for path in conversion.plan.resized):
        return "its classes were changed"
    late = part == "boxes" or part == "logits" or part.startswith("decoder")
    if late and "object_queries/table" in conversion.plan.resized:
        return "its queries were changed"
    return ""


def _mask(batch: Mapping[str, np.ndarray], ours: Parts, part: str) -> Any:
    """Which tokens of a part mean something; all, but in the encoder."""
    if not part.startswith("encoder"):
        return slice(None)
    last = [name for name in ours if name.startswith("stage")][-1]
    sizes = zip(batch["image_mask"].shape[1:], ours[last].shape[1:3], strict=True)
    row, column = (np.arange(cells) * size // cells for size, cells in sizes)
    return batch["image_mask"][:, row[:, None], column[None]].reshape(len(batch["image_mask"]), -1)
