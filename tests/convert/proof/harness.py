# SPDX-License-Identifier: Apache-2.0
"""What the tests of references share: sizes, a batch, random networks with an epsilon a site, the bound, names of timm."""

from __future__ import annotations

import pathlib

import numpy as np
import safetensors.numpy
import torch

from tests.parity import oracle
from vlp_jax.convert.proof import references
from vlp_jax.convert.proof.settings import Settings

WIDTH, HEADS, LAYERS, PATCH, GRID, WORDS, LENGTH, ANSWERS = 48, 3, 3, 8, 3, 30, 12, 11
PIECES, SLOTS = 7, 15
SETTINGS = Settings(HEADS, eps=2e-2, text_eps=5e-2, head_eps=8e-2)
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 80,
}
PICTURE = {"image_size": GRID * PATCH, "patch_size": PATCH}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
EPSILONS = {
    **dict.fromkeys(("encoder", "layer"), SETTINGS.eps),  # "layernorm" and "layers" too
    **dict.fromkeys(("embeddings", "text_embeddings"), SETTINGS.text_eps),
    **dict.fromkeys(("mlm_score", "cls"), SETTINGS.head_eps),
}


def pictures(seed: int) -> dict[str, np.ndarray]:
    """Patches of five pictures in a random order: one row, one column of the grid, one patch, the learned grid."""
    draw = np.random.default_rng(seed)
    grid = draw.permutation([(1, 5), (4, 3), (1, 1), (2, 7), (3, 3)])
    order = np.stack([draw.permutation(SLOTS) for _ in grid])
    return {
        "patches": draw.integers(0, 256, (len(grid), SLOTS, 3 * PATCH**2)).astype(np.uint8),
        "patch_positions": np.stack(np.divmod(order, grid[:, 1:]), -1).astype(np.int32),
        "patch_mask": order < grid.prod(-1, keepdims=True),
        "grid_size": grid.astype(np.int32),
    }


def example() -> dict[str, np.ndarray]:
    """Five texts of all lengths, each with two pictures, and features for BERT's head."""
    draw = np.random.default_rng(0)
    text_mask = np.arange(PIECES) < draw.integers(3, PIECES + 1, (5, 1))
    second = {f"{key}_1": value for key, value in pictures(2).items()}
    return {
        "text_ids": np.where(text_mask, draw.integers(0, WORDS, text_mask.shape), 0).astype(np.int32),
        "text_mask": text_mask,
        "features": draw.normal(size=(5, PIECES, WIDTH)).astype(np.float32),
        **pictures(1),
        **second,
    }


def prepared(net: torch.nn.Module) -> torch.nn.Module:
    """The network with random weights, a table of its own for the decoder, and the epsilon of each site."""
    for name in ("mlm_score", "cls"):
        head = getattr(getattr(net, name, None), "predictions", getattr(net, name, None))
        if head is not None:
            head.decoder.weight = torch.nn.Parameter(torch.zeros_like(head.decoder.weight))
    oracle.randomise(net.eval(), r"classifier\.0")  # so that 1e-5 shows in the norm behind it
    for name, part in net.named_modules():
        if isinstance(part, torch.nn.LayerNorm):
            known = [eps for site, eps in EPSILONS.items() if f".{site}" in f".{name}"]
            part.eps = known[-1] if known else part.eps
    return net


def arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def run(tensors: dict[str, np.ndarray], reference, settings: Settings = SETTINGS) -> dict[str, np.ndarray]:
    assert references.find(tensors.keys()) is reference
    return reference(tensors.__getitem__, tensors.keys(), settings, example())


def difference(found: np.ndarray, wanted, mask: np.ndarray | None = None) -> float:
    """max|d| over max(1, max|wanted|), where `mask` (the leading axes) is True."""
    wanted = np.asarray(wanted.detach() if isinstance(wanted, torch.Tensor) else wanted)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    keep = np.ones(found.shape[:1], bool) if mask is None else mask
    assert np.isfinite(found[keep]).all()
    return np.abs(found - wanted)[keep].max() / max(1, np.abs(wanted[keep]).max())


def check(found: dict[str, np.ndarray], wanted: dict, masks: dict[str, np.ndarray]) -> None:
    """The same parts, each within 1e-5; those without a mask are compared whole."""
    assert set(found) == set(wanted)
    bad = {name: difference(found[name], wanted[name], masks.get(name)) for name in wanted}
    assert max(bad.values()) <= 1e-5, bad


def token_masks(image_only: bool = False) -> dict[str, np.ndarray]:
    batch = example()
    image = np.pad(batch["patch_mask"], ((0, 0), (1, 0)), constant_values=True)
    tokens = image if image_only else np.concatenate([batch["text_mask"], image], 1)
    return {"patch_embed": image, "norm": tokens} | {f"layer {i}": tokens for i in range(LAYERS)}


def on_disk(net: torch.nn.Module, folder: pathlib.Path) -> dict[str, np.ndarray]:
    net.save_pretrained(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def fused(tensors: dict[str, np.ndarray], stem: str, names: tuple[str, str, str], new: str) -> None:
    """Puts query, key and value one below the other."""
    for end in ("weight", "bias"):
        tensors[f"{new}.{end}"] = np.concatenate([tensors.pop(f"{stem}.{name}.{end}") for name in names])


def renamed(tensors: dict[str, np.ndarray], *pairs: tuple[str, str]) -> dict[str, np.ndarray]:
    """Replaces parts of names, in order."""
    result = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = value
    return result


def timm_names(tensors: dict[str, np.ndarray], prefix: str, new: str) -> dict[str, np.ndarray]:
    """The port's names on disk as timm's; those of the text stay."""
    tensors = dict(tensors)
    for i in range(LAYERS):
        stem = f"{prefix}encoder.layer.{i}.attention.attention"
        fused(tensors, stem, ("query", "key", "value"), f"{new}blocks.{i}.attn.qkv")
    return renamed(
        tensors,
        (f"{prefix}encoder.layer.", f"{new}blocks."),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        (f"{prefix}layernorm", f"{new}norm"),
        (f"{prefix}embeddings.patch_embeddings.projection", f"{new}patch_embed.proj"),
        (f"{prefix}embeddings.position_embeddings", f"{new}pos_embed"),
        (f"{prefix}embeddings.cls_token", f"{new}cls_token"),
    )
