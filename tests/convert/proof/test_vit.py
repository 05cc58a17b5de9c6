# SPDX-License-Identifier: Apache-2.0
"""The references of vision transformers against transformers' own, one picture at a time, and flax's modules for the npz."""

from __future__ import annotations

import dataclasses
import importlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlp_jax.convert.proof import vit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
harness = importlib.import_module("tests.convert.proof.harness")
port = importlib.import_module("tests.parity.vilt_transformers")


def hat(size: int, new: int) -> np.ndarray:
    """Rows of weights that read a line of `size` values at `new` even places from the first to the last."""
    places = np.arange(new) * (size - 1) / max(1, new - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))


def resized(positions: np.ndarray, special: int, rows: int, columns: int) -> np.ndarray:
    """`[special + grid^2, width]` for a picture of another grid, by a product of two matrices."""
    grid = positions[special:].reshape(harness.GRID, harness.GRID, -1)
    grid = np.stack(
        [hat(harness.GRID, rows) @ grid[..., d] @ hat(harness.GRID, columns).T for d in range(harness.WIDTH)],
        -1,
    )
    return np.concatenate([positions[:special], grid.reshape(rows * columns, -1)]).astype(np.float32)


def one_by_one(forward) -> dict[str, np.ndarray]:
    """Runs pictures alone, whole and without padding, and puts their tokens where our slots are.

    `forward(picture [3, height, width], rows, columns)` gives the stream before, after each block and behind the norm.
    """
    batch = harness.example()
    streams = ["patch_embed", *(f"layer {i}" for i in range(harness.LAYERS)), "norm"]
    parts = {name: np.zeros((5, 1 + harness.SLOTS, harness.WIDTH), np.float32) for name in streams}
    pixels, _ = port.pictures(batch)
    for i, (rows, columns) in enumerate(batch["grid_size"]):
        outputs = forward(
            pixels[i, :, : rows * harness.PATCH, : columns * harness.PATCH], int(rows), int(columns)
        )
        place = batch["patch_positions"][i] @ [columns, 1]
        for name, tokens in zip(streams, outputs, strict=True):
            slots = np.where(batch["patch_mask"][i], 1 + place, 0)
            parts[name][i] = np.asarray(tokens)[np.concatenate([[0], slots])]
    return parts


def vit_outputs(net: torch.nn.Module, special: int = 1) -> dict[str, np.ndarray]:
    """Parts of a ViTModel or DeiTModel; the embedding of another grid's network is made for each picture."""
    body = getattr(net, "vit", getattr(net, "deit", net))

    def forward(picture, rows, columns):
        config = type(net.config)(
            **harness.SIZES,
            patch_size=harness.PATCH,
            image_size=(rows * harness.PATCH, columns * harness.PATCH),
        )
        other = type(body)(config, add_pooling_layer=False).eval()
        tensors = body.state_dict()
        positions = resized(tensors["embeddings.position_embeddings"][0].numpy(), special, rows, columns)
        tensors["embeddings.position_embeddings"] = torch.tensor(positions[None])
        other.load_state_dict({name: x for name, x in tensors.items() if "pooler" not in name})
        port.set_epsilon(other, "", harness.SETTINGS.eps)
        seen = []
        other.embeddings.register_forward_hook(lambda _, inputs, x: torch.cat([x[:, :1], x[:, special:]], 1))
        other.embeddings.register_forward_hook(lambda _, inputs, x: seen.append(x))
        for layer in other.layers:
            layer.register_forward_hook(lambda _, inputs, x: seen.append(x))
        with torch.no_grad():
            seen.append(other(picture[None]).last_hidden_state)
        return [x[0] for x in seen]

    return one_by_one(forward)


@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification"]
)
def test_vit_of_transformers(name, tmp_path):
    """The names on disk and those in memory; DeiT runs without its distillation token."""
    distilled = name.startswith("DeiT")
    config = (transformers.DeiTConfig if distilled else transformers.ViTConfig)(
        **harness.SIZES, **harness.PICTURE
    )
    net = harness.prepared(getattr(transformers, name)(config))
    wanted = vit_outputs(net, 2 if distilled else 1)
    disk, memory = harness.on_disk(net, tmp_path), harness.arrays(net)
    assert any("layer.0.attention.attention.query" in name for name in disk)
    assert any("layers.0.attention.q_proj" in name for name in memory)
    for tensors in (disk, memory):
        harness.check(
            harness.run(tensors, vit.vit_transformers), wanted, harness.token_masks(image_only=True)
        )


@pytest.mark.parametrize("distilled", [False, True])
def test_vit_of_timm(distilled, tmp_path):
    net = harness.prepared(transformers.ViTModel(transformers.ViTConfig(**harness.SIZES, **harness.PICTURE)))
    tensors = harness.timm_names(harness.on_disk(net, tmp_path), "", "")
    if distilled:
        draw = np.random.default_rng(4)
        tensors["dist_token"], row = draw.normal(size=(2, 1, 1, harness.WIDTH)).astype(np.float32)
        first, rest = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
        tensors["pos_embed"] = np.concatenate([first, row, rest], 1)
    harness.check(harness.run(tensors, vit.vit_timm), vit_outputs(net), harness.token_masks(image_only=True))


class MlpBlock(nn.Module):
    """With flax's own modules and numbers for names, as Google's repository has it."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(80)(x))  # flax numbers in the order of making
        return nn.Dense(x.shape[-1])(hidden)


class FlaxBlock(nn.Module):
    """A block of Google's ViT; flax names its parts, which is what the file holds."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(harness.SETTINGS.eps)(x)
        x = x + nn.MultiHeadDotProductAttention(harness.HEADS)(y, y)
        return x + MlpBlock()(nn.LayerNorm(harness.SETTINGS.eps)(x))


class FlaxViT(nn.Module):
    """Google's ViT without its head: the stream before, after each block and behind the norm."""

    @nn.compact
    def __call__(self, picture, positions):
        x = nn.Conv(
            harness.WIDTH,
            (harness.PATCH, harness.PATCH),
            (harness.PATCH, harness.PATCH),
            "VALID",
            name="embedding",
        )(picture[None])
        token = self.param("cls", nn.initializers.zeros, (1, 1, harness.WIDTH))
        x = jax.numpy.concatenate([token, x.reshape(1, -1, harness.WIDTH)], 1) + positions[None]
        streams = [x]
        for i in range(harness.LAYERS):
            x = FlaxBlock(name=f"Transformer-encoderblock_{i}")(x)
            streams.append(x)
        return [*streams, nn.LayerNorm(harness.SETTINGS.eps, name="Transformer-encoder_norm")(x)]


@pytest.mark.parametrize("numbered", ["together", "apart"])
def test_vit_of_google(numbered):
    draw = np.random.default_rng(5)
    net, size = FlaxViT(), harness.GRID * harness.PATCH
    shapes = jax.eval_shape(
        net.init, jax.random.key(0), np.zeros((size, size, 3)), np.zeros((1 + harness.GRID**2, harness.WIDTH))
    )
    params = jax.tree.map(lambda x: draw.normal(0, 0.15, x.shape).astype(np.float32), shapes["params"])
    positions = draw.normal(size=(1 + harness.GRID**2, harness.WIDTH)).astype(np.float32)
    apply = jax.jit(net.apply)

    def forward(picture, rows, columns):
        pixels = picture.permute(1, 2, 0).numpy()
        streams = apply({"params": params}, pixels, resized(positions, 1, rows, columns))
        return [x[0] for x in streams]

    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = {"/".join(key.key for key in path).replace("-", "/"): value for path, value in leaves}
    tensors["Transformer/posembed_input/pos_embedding"] = positions[None]
    tensors |= {"pre_logits/bias": np.zeros(harness.WIDTH), "head/bias": np.zeros(9)}
    if numbered == "together":
        attention = "MultiHeadDotProductAttention_"
        pairs = (
            (f"{attention}0", f"{attention}1"),
            ("LayerNorm_1", "LayerNorm_2"),
            ("MlpBlock_0", "MlpBlock_3"),
        )
        tensors = harness.renamed(tensors, *pairs)
    found = harness.run(tensors, vit.vit_google, dataclasses.replace(harness.SETTINGS, gelu="tanh"))
    harness.check(found, one_by_one(forward), harness.token_masks(image_only=True))
