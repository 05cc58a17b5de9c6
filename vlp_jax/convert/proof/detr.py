# SPDX-License-Identifier: Apache-2.0
"""DETR and its ResNet in PyTorch, by the names of the authors, of torchvision and of transformers.

Written from the description in Carion et al. 2020 and the released code's behaviour: post-norm layers, positions
re-added at every attention, one final norm for the decoder's outputs, which do not feed the next layer normalised.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping

import numpy as np

from vlp_jax.convert.proof.blocks import Get, Pair, Parts, Tensor, Weights, arrays, linear, norm

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_NORM_EPS, TEMPERATURE = 1e-5, 10000.0


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What shapes do not say."""

    encoder_heads: int
    decoder_heads: int
    encoder_eps: float
    decoder_eps: float


@dataclasses.dataclass(frozen=True)
class Names:
    """Where things lie in a file: `(convolution, norm)` of the backbone by stage and block, and the layers' parts."""

    weights: Weights
    prefix: str  # of the backbone
    torchvision: bool

    def stem(self) -> tuple[str, str]:
        """The first convolution."""
        if self.torchvision:
            return f"{self.prefix}conv1", f"{self.prefix}bn1"
        return self._pair("embedder.embedder")

    def inner(self, stage: int, block: int, number: int) -> tuple[str, str]:
        """The first, second or third convolution of a block; all count from 0."""
        if self.torchvision:
            stem = f"{self.prefix}layer{stage + 1}.{block}"
            return f"{stem}.conv{number + 1}", f"{stem}.bn{number + 1}"
        return self._pair(f"encoder.stages.{stage}.layers.{block}.layer.{number}")

    def shortcut(self, stage: int, block: int) -> tuple[str, str]:
        """The convolution beside a block, which the first of a stage has."""
        if self.torchvision:
            stem = f"{self.prefix}layer{stage + 1}.{block}.downsample"
            return f"{stem}.0", f"{stem}.1"
        return self._pair(f"encoder.stages.{stage}.layers.{block}.shortcut")

    def _pair(self, stem: str) -> tuple[str, str]:
        return f"{self.prefix}{stem}.convolution", f"{self.prefix}{stem}.normalization"


def pixels(batch: Mapping[str, np.ndarray]) -> Tensor:
    """`[batch, 3, rows, columns]` by ImageNet's mean and deviation, zero outside the pictures."""
    import torch

    x = torch.tensor(batch["image"]).float() / 255
    x = (x - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return (x * torch.tensor(batch["image_mask"])[..., None]).permute(0, 3, 1, 2)


def run_resnet(names: Names, x: Tensor) -> dict[str, Tensor]:
    """The network without pooling and classes: "stem" (before the pooling), "stage 1 block 0", ..., rows first."""
    from torch.nn import functional

    parts = {}
    x = parts["stem"] = _normed(names.weights, x, names.stem(), 2).relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for stage in itertools.count():
        for block in itertools.count():
            if f"{names.inner(stage, block, 0)[0]}.weight" not in names.weights.names:
                break
            x = parts[f"stage {stage + 1} block {block}"] = _block(names, x, stage, block)
        if block == 0:
            return parts


def _block(names: Names, x: Tensor, stage: int, block: int) -> Tensor:
    stride = 2 if stage and not block else 1
    y = _normed(names.weights, x, names.inner(stage, block, 0), 1).relu()
    y = _normed(names.weights, y, names.inner(stage, block, 1), stride).relu()
    y = _normed(names.weights, y, names.inner(stage, block, 2), 1)
    if f"{names.shortcut(stage, block)[0]}.weight" in names.weights.names:
        x = _normed(names.weights, x, names.shortcut(stage, block), stride)
    return (x + y).relu()


def _normed(weights: Weights, x: Tensor, pair: tuple[str, str], stride: int) -> Tensor:
    from torch.nn import functional

    convolution, batch_norm = pair
    kernel = weights(f"{convolution}.weight")
    x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    ends = ("running_mean", "running_var", "weight", "bias")
    return functional.batch_norm(x, *(weights(f"{batch_norm}.{end}") for end in ends), eps=BATCH_NORM_EPS)


def positions(real: Tensor, width: int) -> Tensor:
    """Sines of row and column, counted among the real cells `[batch, rows, columns]`: `[batch, row column, width]`."""
    import torch

    half = width // 2
    places = []
    for axis in (1, 2):
        count = real.float().cumsum(axis)
        count = 2 * math.pi * count / (count.narrow(axis, -1, 1) + 1e-6)
        frequency = TEMPERATURE ** (torch.arange(0, half, 2) / half)
        angle = count[..., None] / frequency
        places.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(-2))
    return torch.cat(places, -1).flatten(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, maps: tuple[Pair, ...], heads: int, real: Tensor
) -> Tensor:
    """Attention by the projections of query, key, value and output; `real` `[batch, key]`."""
    query, key, value = (
        linear(x, pair).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, pair in zip((query, key, value), maps, strict=False)
    )
    scores = query @ key.mT / query.shape[-1] ** 0.5
    chances = scores.masked_fill(~real[:, None, None], -float("inf")).softmax(-1)
    return linear((chances @ value).transpose(1, 2).flatten(2), maps[3])


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a file, of either house."""

    weights: Weights
    start: str  # what stands before the detector: "detr." in panoptic files
    original: bool

    def there(self, stack: str, index: int) -> str:
        """What the names of a layer begin with; "" where there is none."""
        stem = f"{self.start}{'transformer' if self.original else 'model'}.{stack}.layers.{index}"
        return stem if any(name.startswith(f"{stem}.") for name in self.weights.names) else ""

    def maps(self, stem: str, cross: bool) -> tuple[Pair, ...]:
        """Query, key, value and output of an attention."""
        if self.original:
            stem = f"{stem}.{'multihead_attn' if cross else 'self_attn'}"
            packed = (self.weights(f"{stem}.in_proj_{end}").chunk(3) for end in ("weight", "bias"))
            return *zip(*packed, strict=True), self.weights.pair(f"{stem}.out_proj")
        stem = f"{stem}.{'encoder_attn' if cross else 'self_attn'}"
        out = "out" if f"{stem}.out_proj.weight" in self.weights.names else "o"
        return tuple(self.weights.pair(f"{stem}.{name}_proj") for name in ("q", "k", "v", out))

    def norm(self, stem: str, number: int, last: bool) -> Pair:
        """The norm behind an attention (1, of the decoder's second 2) or behind the products of a layer."""
        if self.original:
            return self.weights.pair(f"{stem}.norm{number}")
        kind = "final" if last else {1: "self_attn", 2: "encoder_attn"}[number]
        return self.weights.pair(f"{stem}.{kind}_layer_norm")

    def products(self, x: Tensor, stem: str) -> Tensor:
        """The two linear maps with a ReLU between."""
        if self.original:
            first, second = f"{stem}.linear1", f"{stem}.linear2"
        else:
            middle = "mlp." if f"{stem}.mlp.fc1.weight" in self.weights.names else ""
            first, second = f"{stem}.{middle}fc1", f"{stem}.{middle}fc2"
        return linear(linear(x, self.weights.pair(first)).relu(), self.weights.pair(second))


def run_encoder(layers: Layers, x: Tensor, places: Tensor, real: Tensor, numbers: Numbers) -> list[Tensor]:
    """What each layer gives."""
    found = []
    for index in itertools.count():
        if not (stem := layers.there("encoder", index)):
            return found
        maps, eps = layers.maps(stem, False), numbers.encoder_eps
        y = attend(x + places, x + places, x, maps, numbers.encoder_heads, real)
        x = norm(x + y, layers.norm(stem, 1, False), eps)
        x = norm(x + layers.products(x, stem), layers.norm(stem, 2, True), eps)
        found.append(x)


def run_decoder(
    layers: Layers, queries: Tensor, memory: Tensor, places: Tensor, real: Tensor, numbers: Numbers
) -> list[Tensor]:
    """What each layer gives, without the final norm."""
    import torch

    x, found = torch.zeros_like(queries), []
    everywhere, heads, eps = (
        torch.ones(x.shape[:2], dtype=torch.bool),
        numbers.decoder_heads,
        numbers.decoder_eps,
    )
    for index in itertools.count():
        if not (stem := layers.there("decoder", index)):
            return found
        y = attend(x + queries, x + queries, x, layers.maps(stem, False), heads, everywhere)
        x = norm(x + y, layers.norm(stem, 1, False), eps)
        y = attend(x + queries, memory + places, memory, layers.maps(stem, True), heads, real)
        x = norm(x + y, layers.norm(stem, 2, False), eps)
        x = norm(x + layers.products(x, stem), layers.norm(stem, 3, True), eps)
        found.append(x)


def resnet(get: Get, names: Collection[str], numbers: Numbers, batch: Mapping[str, np.ndarray]) -> Parts:
    """A ResNet alone: the parts of `run_resnet`, `[batch, rows, columns, features]`."""
    import torch

    with torch.no_grad():
        return _rows_first(run_resnet(_backbone(Weights(get, names)), pixels(batch)))


def detr(get: Get, names: Collection[str], numbers: Numbers, batch: Mapping[str, np.ndarray]) -> Parts:
    """A whole DETR: the parts of `resnet`, "features" and "encoder 0", ... `[batch, token, width]`, "decoder 0", ...
    `[batch, query, width]` without the final norm, "logits" and "boxes" of the last layer.

    Reads image, image_mask.
    """
    import torch
    from torch.nn import functional

    weights = Weights(get, names)
    start = "detr." if any(name.startswith("detr.") for name in names) else ""
    original = f"{start}query_embed.weight" in names
    layers, before = Layers(weights, start, original), start if original else f"{start}model."
    with torch.no_grad():
        parts = run_resnet(_backbone(weights), pixels(batch))
        *_, x = parts.values()
        found = _rows_first(parts)
        rows, columns = x.shape[2:]
        mask = torch.tensor(batch["image_mask"])[:, None].float()
        real = functional.interpolate(mask, size=(rows, columns))[:, 0].bool()
        x = functional.conv2d(x, *weights.pair(f"{before}{'input_proj' if original else 'input_projection'}"))
        x = x.flatten(2).mT
        places, flat = positions(real, x.shape[-1]), real.flatten(1)
        encoded = run_encoder(layers, x, places, flat, numbers)
        table = weights(f"{before}{'query_embed' if original else 'query_position_embeddings'}.weight")
        queries = table.expand(len(x), *table.shape)
        decoded = run_decoder(layers, queries, encoded[-1], places, flat, numbers)
        final = f"{start}transformer.decoder.norm" if original else f"{before}decoder.layernorm"
        last = norm(decoded[-1], weights.pair(final), numbers.decoder_eps)
        parts = {"features": x}
        parts |= {f"encoder {index}": layer for index, layer in enumerate(encoded)}
        parts |= {f"decoder {index}": layer for index, layer in enumerate(decoded)}
        classes = f"{start}{'class_embed' if original else 'class_labels_classifier'}"
        if f"{classes}.weight" in names:
            parts["logits"] = linear(last, weights.pair(classes))
        stem = f"{start}{'bbox_embed' if original else 'bbox_predictor'}.layers"
        if f"{stem}.0.weight" in names:
            first, second = (weights.pair(f"{stem}.{number}") for number in (0, 1))
            last = linear(linear(last, first).relu(), second).relu()
            parts["boxes"] = linear(last, weights.pair(f"{stem}.2")).sigmoid()
        return found | arrays(parts)


def _backbone(weights: Weights) -> Names:
    """Finds the backbone by its first convolution."""
    ends = {"conv1.weight": True, "embedder.embedder.convolution.weight": False}
    for end, torchvision in ends.items():
        found = [name for name in weights.names if name == end or name.endswith(f".{end}")]
        # The shortest: a block of torchvision has a conv1 too.
        if found:
            return Names(weights, min(found, key=len).removesuffix(end), torchvision)
    raise ValueError("no name of a ResNet's first convolution")


def _rows_first(parts: Mapping[str, Tensor]) -> Parts:
    return arrays({name: part.permute(0, 2, 3, 1).contiguous() for name, part in parts.items()})
