# SPDX-License-Identifier: Apache-2.0
"""Small DETRs of transformers and ResNets of our own in torch, with random weights and frozen statistics, as files.

What they compute is transformers' (or torch's) own, apart from the tables and from the references of the proof.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from torch import nn

Tensors = dict[str, np.ndarray]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes that no released model has."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: int
    width: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    hidden: tuple[int, int]
    queries: int
    classes: int


ODD = Size((1, 2, 1, 3), (16, 32, 48, 64), 12, 24, (2, 3), (3, 2), (40, 36), 7, 5)
DEEP = Size((3, 4, 6, 3), (16, 16, 20, 24), 8, 16, (1, 2), (2, 4), (20, 24), 5, 91)
SIZES = {"odd": ODD, "as deep as ResNet-50": DEEP}


class Block(nn.Module):
    """A bottleneck; the stride lies in the second convolution."""

    def __init__(self, into, width, stride):
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = nn.Conv2d(into, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or into != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(into, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """With torchvision's names of its parts."""

    def __init__(self, depths, widths, stem, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.pool = nn.MaxPool2d(3, 2, 1)
        into = stem
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = [
                Block(width if index else into, width, 2 if number > 1 and not index else 1)
                for index in range(depth)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            into = width
        self.fc = nn.Linear(into, classes)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and statistic far from its start, signals about as large behind as before."""
    draw = torch.Generator().manual_seed(seed)

    def normal(x: torch.Tensor, mean: float, deviation: float) -> None:
        x.copy_(mean + deviation * torch.randn(x.shape, generator=draw))

    for name, x in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            x.copy_(0.5 + torch.rand(x.shape, generator=draw))
        elif x.ndim > 1:
            normal(x, 0, 1.2 / x[0].numel() ** 0.5 if "embeddings" not in name else 1.0)
        elif x.ndim == 1:
            norm = name.endswith("weight")
            # The last norm of a block adds to the shortcut: small, or fifty blocks grow without end.
            last = re.search(r"bn3\.weight$|layer\.2\.normalization\.weight$", name)
            normal(x, 0.3 if last else float(norm), 0.1)
    return net.eval()


def network(size: Size = ODD, **changes: object) -> transformers.DetrForObjectDetection:
    """A DETR of transformers with its own ResNet."""
    backbone = transformers.ResNetConfig(
        embedding_size=size.stem,
        hidden_sizes=list(size.widths),
        depths=list(size.depths),
        out_features=[f"stage{len(size.depths)}"],
    )
    sizes = {
        f"{name}_{key}": value
        for key, values in (
            ("layers", size.layers),
            ("attention_heads", size.heads),
            ("ffn_dim", size.hidden),
        )
        for name, value in zip(("encoder", "decoder"), values, strict=True)
    }
    sizes |= dict(d_model=size.width, num_queries=size.queries, num_labels=size.classes)
    config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes | changes)
    return randomise(transformers.DetrForObjectDetection(config))


def memory(net: nn.Module) -> Tensors:
    """All tensors by the names in memory."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def disk(net: nn.Module, folder: Path) -> Tensors:
    """All tensors by the names that transformers writes, in a folder that then holds its config.json too."""
    net.save_pretrained(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def torchvision(tensors: Mapping[str, np.ndarray], old: str, new: str) -> Tensors:
    """A ResNet of transformers behind `old` in torchvision's names behind `new`; all else as it is."""
    result = {}
    for name, value in tensors.items():
        if name.startswith(old):
            rest = name.removeprefix(old)
            rest = rest.replace("embedder.embedder.convolution", "conv1")
            rest = rest.replace("embedder.embedder.normalization", "bn1")
            rest = re.sub(r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", rest)
            rest = rest.replace("shortcut.convolution", "downsample.0")
            rest = rest.replace("shortcut.normalization", "downsample.1")
            rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
            rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
            name = new + rest
        result[name] = value
    return result


# (regular expression on a name in memory, the name of the authors), in order.
AUTHORS = (
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.mlp\.fc", ".linear"),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.o_proj\.", ".out_proj."),
    (r"transformer\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.input_projection", "input_proj"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
)


def original(net: nn.Module) -> Tensors:
    """All tensors by the authors' names, query, key and value packed."""
    result = {}
    for name, value in torchvision(memory(net), "model.backbone.model.", "backbone.0.body.").items():
        for pattern, replacement in AUTHORS:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    for name in [name for name in result if ".q_proj." in name]:
        parts = [result.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        result[name.replace(".q_proj.", ".in_proj_")] = np.concatenate(parts)
    return result


def pixels(batch: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Pictures as DETR's image processor gives them, padded with zeros."""
    x = (torch.tensor(batch["image"]).double() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    x = x * torch.tensor(batch["image_mask"])[..., None]
    return x.float().permute(0, 3, 1, 2)


@torch.no_grad()
def outputs(net: nn.Module, batch: Mapping[str, np.ndarray]) -> Tensors:
    """Logits and boxes of a DETR of transformers, and what its ResNet gives, rows first."""
    mask = torch.tensor(batch["image_mask"]).long()
    out = net(pixel_values=pixels(batch), pixel_mask=mask)
    features = net.model.backbone.model(pixels(batch)).feature_maps[-1]
    return {
        "logits": out.logits.numpy(),
        "boxes": out.pred_boxes.numpy(),
        "resnet": features.permute(0, 2, 3, 1).numpy(),
    }
