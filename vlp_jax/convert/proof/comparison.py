# SPDX-License-Identifier: Apache-2.0
"""The proof of a conversion: the file runs in PyTorch, ours in JAX, on one fixed random batch, block by block."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import systems
from vlp_jax.convert.engine import Reading, unwrapped
from vlp_jax.convert.importing import Import
from vlp_jax.convert.proof import detection, references
from vlp_jax.convert.proof.blocks import Parts
from vlp_jax.convert.proof.lines import Proof, line
from vlp_jax.convert.proof.settings import Settings
from vlp_jax.convert.settings import json_beside
from vlp_jax.layers import trace
from vlp_jax.training.paths import nest

ROWS, PIECES, MASKED = 2, 40, 2
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
STACK = "fusion/stack/layers"


def hindrance() -> str:
    """Why a file cannot be run in PyTorch here; "" where it can."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError:
        return "PyTorch is not installed (requirements-oracle.txt)"
    except Exception as error:  # a broken installation fails in many ways
        return f"PyTorch does not load: {error}"
    return ""


def prove(conversion: Import, params: Mapping[str, np.ndarray]) -> Proof:
    """Runs each file by its own names and our parameters by ours, and compares every part that both have.

    Raises:
        UserError: a file is damaged.
    """
    if "grid" in conversion.config.data.inputs:
        return detection.prove(conversion, params)
    config = _exact(conversion.config)
    kept = conversion.plan.resized.get("text_embed/position", ((PIECES,),))[0][
        0
    ]  # positions that the file has
    batch, lines, left = random_batch(config, kept), [], {}
    for reading in conversion.plan.readings:
        name = str(reading.source.path)
        reference = references.find(unwrapped(reading.source).keys())
        if reference is None:
            left[name] = "there is no reference for this layout"
            continue
        alone = "text_embed/word" not in reading.shapes
        ours = run_ours(config, _without_text(params, config) if alone else params, batch, alone)
        batch["features"] = ours["norm"][:, : batch["text_ids"].shape[1]]
        theirs = reference(*_reader(reading, conversion), _settings(config, reading), batch)
        for part, found in theirs.items():
            if reason := _changed(part, conversion):
                left[f"{part} of {name}"] = reason
            elif part in ours:
                mask = _mask(batch, found.shape[1], alone) if found.ndim == 3 else slice(None)
                lines.append(line(name, part, ours[part][mask], found[mask]))
    return Proof(lines, left)


def apart(one: ConfigDict, other: ConfigDict, params: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far the outputs of the heads are from each other when the same parameters run under two configs."""
    batch = random_batch(one)
    found = [run_ours(_exact(config), params, batch, alone=False) for config in (one, other)]
    heads = [name for name in found[0] if not _picture(name) and name != "text_embed"]
    return {name: float(np.abs(found[0][name] - found[1][name]).max()) for name in heads}


def _exact(config: ConfigDict) -> ConfigDict:
    """A copy that computes in float32 and is quick to compile."""
    config = ConfigDict(config.to_dict())
    config.model.dtype, config.model.unroll, config.model.token_multiple = "float32", 1, 1
    return config


def random_batch(config: ConfigDict, longest: int = PIECES) -> dict[str, np.ndarray]:
    """Two texts, of `longest` pieces at most, and twice two pictures of odd sizes, padded; the same at every call."""
    draw, model = np.random.default_rng(0), config.model
    length, side = min(PIECES, longest, model.text_embed.length), model.patch_embed.grid
    lengths = np.array([length, max(2, length // 2)])
    text_mask = np.arange(length)[None] < lengths[:, None]
    batch = {
        "text_ids": np.where(text_mask, draw.integers(0, model.text_embed.vocab_size, text_mask.shape), 0),
        "text_mask": text_mask,
    }
    for suffix in ("", "_1"):
        # One picture has the learned grid's own height, none its whole size: positions are interpolated.
        grid = np.array([(min(side, 4), min(side + 1, 5)), (2, min(side, 3))])
        slots = int(grid.prod(1).max()) + 1
        place = np.arange(slots)[None].repeat(ROWS, 0)
        batch[f"patches{suffix}"] = draw.integers(
            0, 256, (ROWS, slots, 3 * model.patch_embed.patch_size**2), np.uint8
        )
        batch[f"patch_positions{suffix}"] = np.stack(np.divmod(place, grid[:, 1:]), -1).astype(np.int32)
        batch[f"patch_mask{suffix}"] = place < grid.prod(1)[:, None]
        batch[f"grid_size{suffix}"] = grid.astype(np.int32)
    everywhere = np.arange(length, dtype=np.int32)[None].repeat(ROWS, 0)
    ids = batch["text_ids"] = batch["text_ids"].astype(np.int32)
    return batch | {"mlm_positions": everywhere, "mlm_inputs": ids, "mlm_labels": ids}


def run_ours(
    config: ConfigDict, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], alone: bool
) -> Parts:
    """The parts of our model, by the names of `references.find`; `alone`: the picture without the text."""
    system, heads = systems.get(config.system).build(config), config.model.heads
    tree = jax.device_put(nest(params.items()))
    if alone:
        batch = {**batch, "text_mask": np.zeros_like(batch["text_mask"])}

    def fused() -> Any:
        def run(tree: Any, batch: Any) -> Any:
            features = {
                **system.predict["encode_text"](tree, batch),
                **system.predict["encode_image"](tree, batch),
            }
            return features, system.predict["fuse"](tree, features)

        return jax.jit(run, compiler_options=QUICK_TO_COMPILE)(tree, batch)

    with jax.default_matmul_precision("highest"):
        (features, out), found = trace.outputs(fused, [STACK, "fusion/norm"])
        parts = {
            "text_embed": features["text"],
            "patch_embed": features["image"],
            "norm": found["fusion/norm"][0],
        }
        parts |= {f"layer {number}": layer for number, layer in enumerate(found[STACK])}
        if heads.pooler:
            parts["pooled"] = out["pooled"]
        if heads.rank:
            parts["rank"] = out["match_logits"][:, 1:]
        elif heads.itm:
            parts["itm"] = out["match_logits"]
        wanted = {"mlm": ("fill", "logits"), "answer": ("answer", "logits"), "pair": ("classify", "logits")}
        wanted["tag"] = ("classify", "token_logits")
        for head, (function, key) in wanted.items():
            if heads[head] and not alone and not (head == "pair" and heads.tag):
                quick = jax.jit(system.predict[function], compiler_options=QUICK_TO_COMPILE)
                parts[head] = quick(tree, batch)[key]
    parts = {name: np.asarray(value) for name, value in parts.items()}
    if alone:
        start = batch["text_ids"].shape[1]
        parts = {
            name: value[:, start:] if _whole(name) else value
            for name, value in parts.items()
            if _picture(name)
        }
        parts["norm_and_text"] = np.asarray(found["fusion/norm"][0])
    return parts


def _whole(part: str) -> bool:
    return part == "norm" or part.startswith("layer ")


def _picture(part: str) -> bool:
    return part == "patch_embed" or _whole(part)


def _without_text(params: Mapping[str, np.ndarray], config: ConfigDict) -> dict[str, np.ndarray]:
    """A ViT knows no modality row."""
    return {**params, "fusion/modality": np.zeros((config.model.modalities, config.model.width), np.float32)}


def _settings(config: ConfigDict, reading: Reading) -> Settings:
    """What the reference runs with: what `config.json` states, read apart from settings.py, else what ours has."""
    model, stated = config.model, json_beside(reading.source.path)[1]
    own, everywhere = stated.get("vlp_jax") or {}, stated.get("layer_norm_eps")

    def eps(part: str) -> float:
        ours = model[part].eps if everywhere is None else everywhere
        return own.get(f"model.{part}.eps", ours) if reading.table.settings else ours

    heads = stated.get("num_attention_heads") or model.fusion.num_heads
    gelu = {"exact": "exact", "tanh": "tanh", "sigmoid": "exact"}[model.gelu]
    if stated.get("hidden_act") is not None and model.gelu != "sigmoid":
        gelu = "exact" if stated["hidden_act"] == "gelu" else "tanh"
    return Settings(int(heads), eps("fusion"), eps("text_embed"), eps("heads"), gelu)


def _reader(reading: Reading, conversion: Import) -> tuple[Callable[[str], np.ndarray], Sequence[str]]:
    """(read a tensor by its name without wrapper, all such names); a resized position grid is resized by PyTorch."""
    names = unwrapped(reading.source)
    grids = {}
    for piece in reading.pieces:
        if "patch_embed/position" in piece.row.targets and "patch_embed/position" in conversion.plan.resized:
            wanted = conversion.plan.resized["patch_embed/position"][1]
            grids[piece.names[0]] = wanted[:2]

    def get(name: str) -> np.ndarray:
        tensor = reading.source.read(names[name])
        return (
            _resized(tensor, grids[names[name]], conversion.position_resize)
            if names[name] in grids
            else tensor
        )

    return get, list(names)


def _resized(positions: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """PyTorch's own interpolation of the square of positions behind the special ones."""
    import torch
    from torch.nn import functional

    x = torch.from_numpy(np.asarray(positions, np.float32))
    side = int((x.shape[1] - 1) ** 0.5)
    first, grid = x[:, : x.shape[1] - side * side], x[:, x.shape[1] - side * side :]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    mode = "bicubic" if method == "bicubic" else "bilinear"
    grid = functional.interpolate(grid, size, mode=mode, align_corners=method == "aligned")
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, size[0] * size[1], -1)], 1).numpy()


def _changed(part: str, conversion: Import) -> str:
    """Why a part cannot be the file's any more; "" if it can."""
    if part == "answer" and any(path.startswith("heads/answer/") for path in conversion.plan.resized):
        return "its classes were changed"
    if any(path.startswith(f"heads/{part}/") for path in conversion.plan.unused):
        return "the config has no such head"
    return ""


def _mask(batch: Mapping[str, np.ndarray], tokens: int, alone: bool) -> np.ndarray:
    """Which of `tokens` are real: text, class token and patches, or all of them in this order."""
    text, patches = batch["text_mask"], batch["patch_mask"]
    picture = np.pad(patches, ((0, 0), (1, 0)), constant_values=True)
    if alone or tokens == picture.shape[1] != text.shape[1]:
        return picture
    return text if tokens == text.shape[1] else np.concatenate([text, picture], 1)
