# SPDX-License-Identifier: Apache-2.0
"""Networks of transformers with random weights, of odd sizes, and what they compute on our batches.

The outputs come from transformers' own modules, apart from the tables and from the references of the proof.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from unittest import mock

import numpy as np
import torch
import transformers

from configs import vilt
from tests.parity import oracle
from tests.parity import vilt_transformers as port

Tensors = dict[str, np.ndarray]
# Parts that are drawn small: what feeds the norm of a deep head, whose epsilon is 1e-5; or what feeds any norm.
LOUD, QUIET = (
    r"classifier\.0",
    r"embeddings|cls_token|output\.dense|o_proj|fc2|transform\.dense|classifier\.0",
)
BLOCKS = ("vilt.encoder", "vilt.layernorm")  # whose norms have another epsilon in the original
HEADS = {
    "ViltForMaskedLM": "mlm",
    "ViltForQuestionAnswering": "answer",
    "ViltForImagesAndTextClassification": "pair",
    "ViltForImageAndTextRetrieval": "rank",
    "ViltForTokenClassification": "tag",
}
CLASSES = ("ViltModel", *HEADS)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes that no released model has."""

    layers: int
    heads: int
    width: int
    hidden: int
    patch: int
    grid: int
    words: int
    length: int
    classes: int


ODD = Size(layers=3, heads=3, width=48, hidden=100, patch=8, grid=3, words=61, length=12, classes=7)
OTHER = Size(layers=2, heads=2, width=32, hidden=52, patch=4, grid=5, words=83, length=9, classes=4)


def network(name: str, size: Size, quiet: bool = False, **changes: object) -> torch.nn.Module:
    """A network of transformers, its decoder of words apart from the word table.

    Args:
        name: its class.
        size: of all parts.
        quiet: whether what feeds the norms is so small that an epsilon of 1e-6 shows.
        changes: keys of its config.
    """
    kind = next(kind for kind in ("Vilt", "ViT", "DeiT", "Bert") if name.startswith(kind))
    sizes = dict(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.hidden,
    )
    if kind != "Bert":
        sizes |= dict(image_size=size.grid * size.patch, patch_size=size.patch, num_labels=size.classes)
    if kind in ("Vilt", "Bert"):
        sizes |= dict(vocab_size=size.words, max_position_embeddings=size.length)
    if name == "ViltForImagesAndTextClassification":
        sizes |= dict(modality_type_vocab_size=3, num_images=2, num_labels=2)
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    net = getattr(transformers, name)(config).eval()
    head = getattr(net, "mlm_score", getattr(getattr(net, "cls", None), "predictions", None))
    if head is not None:
        head.decoder.weight = torch.nn.Parameter(torch.zeros_like(head.decoder.weight))
    oracle.randomise(net, QUIET if quiet else LOUD)
    return net


def tied(net: torch.nn.Module) -> torch.nn.Module:
    """The same with the word table for its decoder, as BERT is trained."""
    head = net.mlm_score if hasattr(net, "mlm_score") else net.cls.predictions
    head.decoder.weight = net.get_input_embeddings().weight
    return net


def as_released(name: str, size: Size) -> torch.nn.Module:
    """A ViLT with the epsilons of its authors."""
    net = network(name, size, quiet=True, layer_norm_eps=1e-12)
    port.set_epsilon(net, BLOCKS, 1e-6)
    return net


def config_of(size: Size, **changes: object):
    """A config as a user gives it, for sources that do not hold a whole ViLT."""
    config = vilt.get_config("variant=tiny,smoke")
    config.model.width, config.model.fusion.depth = size.width, size.layers
    config.model.fusion.num_heads, config.model.fusion.mlp_width = size.heads, size.hidden
    config.data.text_length, config.data.patch_size = size.length, size.patch
    config.data.image_size = size.grid * size.patch
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


# Outputs


def batch_of(size: Size) -> Tensors:
    """Five texts of all lengths, each with two pictures: one row, one column, one patch, the learned grid; shuffled."""
    draw, batch = np.random.default_rng(9), {}
    mask = np.arange(size.length) < draw.permutation(size.length - np.arange(5))[:, None]
    ids = np.where(mask, draw.integers(0, size.words, mask.shape), 0).astype(np.int32)
    batch = {"text_ids": ids, "text_mask": mask, "mlm_inputs": ids, "mlm_labels": ids}
    batch["mlm_positions"] = np.arange(size.length, dtype=np.int32)[None].repeat(5, 0)
    for suffix in ("", "_1"):
        grid = draw.permutation([(1, 5), (7, 1), (1, 1), (2, 7), (size.grid, size.grid)])
        slots = int(grid.prod(1).max()) + 1
        order = np.stack([draw.permutation(slots) for _ in grid])
        batch[f"patches{suffix}"] = draw.integers(0, 256, (5, slots, 3 * size.patch**2)).astype(np.uint8)
        batch[f"patch_positions{suffix}"] = np.stack(np.divmod(order, grid[:, 1:]), -1).astype(np.int32)
        batch[f"patch_mask{suffix}"] = order < grid.prod(-1, keepdims=True)
        batch[f"grid_size{suffix}"] = grid.astype(np.int32)
    return batch


def hat(old: int, new: int) -> np.ndarray:
    """Weights that read a line of `old` values at `new` even places from the first to the last."""
    places = np.arange(new) * (old - 1) / max(1, new - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def of_vit(net: torch.nn.Module, batch: Mapping[str, np.ndarray]) -> Tensors:
    """Parts of a ViTModel or DeiTModel, each picture alone and whole; a distillation token is taken out first."""
    body = getattr(net, "vit", getattr(net, "deit", net))
    special = 1 + hasattr(body.embeddings, "distillation_token")
    tensors, patch = body.state_dict(), net.config.patch_size
    places = tensors["embeddings.position_embeddings"][0].double().numpy()
    side = round((len(places) - special) ** 0.5)
    learned = places[special:].reshape(side, side, -1)
    pixels, _ = port.pictures(batch)
    names = ["patch_embed", *(f"layer {i}" for i in range(net.config.num_hidden_layers)), "norm"]
    shape = (*batch["patch_mask"].shape, net.config.hidden_size)
    parts = {name: np.zeros((shape[0], 1 + shape[1], shape[2]), np.float32) for name in names}
    for i, (rows, columns) in enumerate(batch["grid_size"].tolist()):
        config = type(net.config).from_dict(
            net.config.to_dict() | {"image_size": (rows * patch, columns * patch)}
        )
        alone = type(body)(config, add_pooling_layer=False).eval()
        grid = np.einsum("ij,jkw,lk->ilw", hat(side, rows), learned, hat(side, columns))
        grid = np.concatenate([places[:special], grid.reshape(rows * columns, -1)])
        state = {name: x for name, x in tensors.items() if "pooler" not in name}
        alone.load_state_dict(state | {"embeddings.position_embeddings": torch.tensor(grid[None]).float()})
        seen = []
        alone.embeddings.register_forward_hook(lambda _, inputs, x: torch.cat([x[:, :1], x[:, special:]], 1))
        alone.embeddings.register_forward_hook(lambda _, inputs, x, seen=seen: seen.append(x))
        for layer in alone.layers:
            layer.register_forward_hook(lambda _, inputs, x, seen=seen: seen.append(x))
        with torch.no_grad():
            seen.append(alone(pixels[i : i + 1, :, : rows * patch, : columns * patch]).last_hidden_state)
        slots = np.where(batch["patch_mask"][i], 1 + batch["patch_positions"][i] @ [columns, 1], 0)
        for name, tokens in zip(names, seen, strict=True):
            parts[name][i] = tokens[0].numpy()[np.concatenate([[0], slots])]
    return parts


def of_bert(net: torch.nn.Module, batch: Mapping[str, np.ndarray], features: np.ndarray) -> Tensors:
    """The text embedding of a BERT, and its head for masked words on `features`."""
    with torch.no_grad():
        ids = torch.tensor(batch["text_ids"]).long()
        parts = {"text_embed": getattr(net, "bert", net).embeddings(ids).numpy()}
        if hasattr(net, "cls"):
            parts["mlm"] = net.cls.predictions(torch.tensor(features)).numpy()
    return parts


def of_vilt(net: torch.nn.Module, batch: Mapping[str, np.ndarray]) -> Tensors:
    """Parts of a ViLT of transformers; those of the body are of the first picture."""
    body, name = getattr(net, "vilt", net), type(net).__name__
    second = {**batch, **{key[:-2]: value for key, value in batch.items() if key.endswith("_1")}}
    pixels, masks = zip(*map(port.pictures, (batch, second)), strict=True)
    ids = torch.tensor(batch["text_ids"]).long()
    first = {"input_ids": ids, "attention_mask": torch.tensor(batch["text_mask"]).long()}
    first |= {"pixel_values": pixels[0], "pixel_mask": masks[0]}
    # It shuffles the patches of the largest pictures; in raster order each can be found again.
    raster = mock.patch("torch.multinomial", lambda p, count, **_: torch.arange(int(count)) % len(p))
    with torch.no_grad(), raster:
        out = body(**first, output_hidden_states=True)
        if HEADS.get(name) == "pair":
            size = np.max([picture.shape[2:] for picture in pixels], 0)

            def whole(x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))

            first["pixel_values"] = torch.stack([whole(picture) for picture in pixels], 1)
            first["pixel_mask"] = torch.stack([whole(mask) for mask in masks], 1)
        logits = net(**first).logits if name in HEADS else None
        embedded, *layers = (port.aligned(x, batch) for x in out.hidden_states)
        modality = body.embeddings.token_type_embeddings.weight
        parts = {f"layer {i}": x for i, x in enumerate(layers)}
        parts["text_embed"] = embedded[:, : ids.shape[1]] - modality[0]
        parts["patch_embed"] = embedded[:, ids.shape[1] :] - modality[1]
        parts["norm"] = port.aligned(out.last_hidden_state, batch)
    parts |= {"pooled": out.pooler_output} if out.pooler_output is not None else {}
    parts |= {HEADS[name]: logits} if logits is not None else {}
    return {part: value.numpy() for part, value in parts.items()}


def ratios(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], batch: Mapping
) -> dict[str, float]:
    """max|d| / max(1, max|theirs|) of each part of theirs, where tokens are real; infinite where it is not comparable."""
    text, picture = (
        batch["text_mask"],
        np.pad(batch["patch_mask"], ((0, 0), (1, 0)), constant_values=True),
    )
    masks = {"text_embed": text, "mlm": text, "tag": text, "patch_embed": picture}
    found = {}
    for part, reference in theirs.items():
        whole = picture if reference.shape[1:2] == picture.shape[1:] else np.concatenate([text, picture], 1)
        keep = masks.get(part, whole) if reference.ndim == 3 else slice(None)
        if ours[part].shape != reference.shape:
            found[part] = np.inf
            continue
        one, other = ours[part][keep].astype(np.float64), reference[keep].astype(np.float64)
        distance = np.abs(one - other).max() / max(1.0, np.abs(other).max())
        found[part] = distance if np.isfinite(distance) else np.inf
    return found
