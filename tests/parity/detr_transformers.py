# SPDX-License-Identifier: Apache-2.0
"""DETR's oracle of another house: transformers' DetrForObjectDetection on its own ResNet, two of its flaws avoided.

Its auxiliary outputs change the network, so each layer's output is taken by a hook. It freezes all convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch
import transformers
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional

from tests.parity.harness import Row, convolution, linear, module, same
from tests.parity.oracle import Oracle, randomise
from vlp_jax.models.grid import DEVIATION, MEAN

BACKBONE = "model.backbone.model"
FROZEN = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
# What feeds the norms, they themselves among it: their outputs are added to what the next one sees.
QUIET = r"o_proj|fc2|_layer_norm|input_projection"


def rows(config: ConfigDict) -> tuple[Row, ...]:
    """The table of `config`'s sizes."""
    return (
        *_resnet(config.model.grid_embed.depths),
        Row("model.input_projection.weight", "grid_embed/projection/kernel", lambda x: linear(x[:, :, 0, 0])),
        Row("model.input_projection.bias", "grid_embed/projection/bias"),
        *_stack("encoder", {"self_attn": "attention"}),
        *_stack("decoder", {"self_attn": "self_attention", "encoder_attn": "cross_attention"}),
        *module("model.decoder.layernorm", "decoder/norm", same),
        Row("model.query_position_embeddings.weight", "object_queries/table"),
        *module("class_labels_classifier", "heads/class/dense"),
        *(
            row
            for number, name in enumerate(("hidden1", "hidden2", "out"))
            for row in module(f"bbox_predictor.layers.{number}", f"heads/box/{name}")
        ),
    )


def _resnet(depths: tuple[int, ...]) -> Iterator[Row]:
    def unit(source: str, ours: str, first: int = 0) -> Iterator[Row]:
        source, ours = f"{BACKBONE}.{source}", f"grid_embed/resnet/{ours}"
        yield Row(f"{source}.convolution.weight", f"{ours}/kernel", convolution, first)
        for name, theirs in FROZEN.items():
            yield Row(f"{source}.normalization.{theirs}", f"{ours}/frozen/{name}", same, first)

    yield from unit("embedder.embedder", "stem")
    for stage, depth in enumerate(depths):
        source, ours = f"encoder.stages.{stage}.layers", f"stage{stage + 1}"
        yield from unit(f"{source}.0.shortcut", f"{ours}/first/shortcut")
        for place in range(3):
            yield from unit(f"{source}.0.layer.{place}", f"{ours}/first/conv{place + 1}")
            if depth > 1:
                yield from unit(f"{source}.{{layer}}.layer.{place}", f"{ours}/rest/conv{place + 1}", first=1)


def _stack(kind: str, attentions: Mapping[str, str]) -> Iterator[Row]:
    source, ours = f"model.{kind}.layers.{{layer}}", f"{kind}/layers"
    norms = [f"{name}_layer_norm" for name in (*attentions, "final")]
    for name, own in attentions.items():
        for projection, part in ATTENTION.items():
            yield from module(f"{source}.{name}.{projection}", f"{ours}/{own}/{part}")
    for number, name in enumerate(norms):
        yield from module(f"{source}.{name}", f"{ours}/norm{number + 1}", same)
    yield from module(f"{source}.mlp.fc1", f"{ours}/mlp/hidden")
    yield from module(f"{source}.mlp.fc2", f"{ours}/mlp/out")


def settings(config: ConfigDict, auxiliary: bool = False) -> transformers.DetrConfig:
    """Our sizes in the port's words, without dropout."""
    model, grid = config.model, config.model.grid_embed
    backbone = transformers.ResNetConfig(
        embedding_size=grid.stem_width, hidden_sizes=list(grid.widths), depths=list(grid.depths),
        out_features=[f"stage{len(grid.depths)}"],
    )  # fmt: skip
    return transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, num_labels=model.heads.classes, dropout=0.0,
        num_queries=model.object_queries.queries, d_model=model.width, auxiliary_loss=auxiliary,
        encoder_layers=model.encoder.depth, decoder_layers=model.decoder.depth,
        encoder_attention_heads=model.encoder.num_heads, decoder_attention_heads=model.decoder.num_heads,
        encoder_ffn_dim=model.encoder.mlp_width, decoder_ffn_dim=model.decoder.mlp_width,
    )  # fmt: skip


def build(config: ConfigDict, quiet: bool) -> Oracle:
    """The port with our sizes, random weights and random statistics; `quiet` streams show the norms' epsilon."""
    net = transformers.DetrForObjectDetection(settings(config)).eval()
    randomise(net, QUIET if quiet else "")
    draw_backbone(net)
    net.requires_grad_(True)
    stages = len(config.model.grid_embed.depths)
    layers = [
        (f"{BACKBONE}.encoder.stages.{n}", f"grid_embed/resnet/stage{n + 1}", f"stage{n + 1}")
        for n in range(stages)
    ]
    layers += [
        ("model.input_projection", "grid_embed/projection", "every cell"),
        ("model.encoder.layers.{layer}", "encoder/layers", "cells"),
        ("model.decoder.layers.{layer}", "decoder/layers", "queries"),
    ]
    streams = {f"stage{n + 1}": lambda x, batch: x.permute(0, 2, 3, 1) for n in range(stages)}
    streams |= {name: lambda x, batch: x for name in ("cells", "queries")}
    streams["every cell"] = lambda x, batch: x.flatten(2).mT
    return Oracle(net, rows(config), lambda batch: forward(net, batch), layers=layers, streams=streams)


def draw_backbone(net: nn.Module) -> None:
    """Statistics as of a trained network, and convolutions that keep the size of what they see."""
    for name, x in net.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2.0)
        elif name.endswith("normalization.weight"):
            x.uniform_(0.5, 1.2)
        elif name.endswith(("normalization.bias", "running_mean")):
            x.normal_(0, 0.3)
        elif name.endswith("convolution.weight"):
            x.normal_(0, (2 / x[0].numel()) ** 0.5)


def pixels(batch: Mapping) -> dict[str, torch.Tensor]:
    """Normalised pictures `[batch, 3, rows, columns]`, zero at padding, and the mask, 1 = picture."""
    mask = np.asarray(batch["image_mask"])
    values = (batch["image"] / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)
    values = np.where(mask[..., None], values, 0).astype(np.float32)
    return {
        "pixel_values": torch.tensor(values.transpose(0, 3, 1, 2)),
        "pixel_mask": torch.tensor(mask).long(),
    }


def forward(net: nn.Module, batch: Mapping) -> dict[str, torch.Tensor]:
    """Grid features, the encoder's output, and logits and boxes `[batch, layer, query, ...]` of all decoder layers."""
    outputs, features, memory = [], [], []
    parts = [(layer, outputs) for layer in net.model.decoder.layers]
    parts += [(net.model.input_projection, features), (net.model.encoder.layers[-1], memory)]
    handles = [
        part.register_forward_hook(lambda _, __, result, found=found: found.append(result))
        for part, found in parts
    ]
    net(**pixels(batch))
    for handle in handles:
        handle.remove()
    decoded = torch.stack([net.model.decoder.layernorm(x) for x in outputs], 1)
    return {
        "features": features[0].flatten(2).mT,
        "memory": memory[0],
        "logits": net.class_labels_classifier(decoded),
        "boxes": net.bbox_predictor(decoded).sigmoid(),
    }


# Ways to be wrong, each of which some comparison must see.


def norm_epsilon(oracle: Oracle) -> None:
    """1e-12 in the norms of the transformer, which have 1e-5."""
    for part in oracle.net.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-12


def statistics_epsilon(oracle: Oracle) -> None:
    """1e-4 beside the frozen variances, which have 1e-5."""
    for name, x in oracle.net.named_buffers():
        if name.endswith("running_var"):
            x += 9e-5


def normalised_layers(oracle: Oracle) -> None:
    """A decoder layer reads the normalised output of the one before, as with the port's auxiliary outputs."""
    decoder = oracle.net.model.decoder
    for layer in decoder.layers[1:]:
        layer.register_forward_pre_hook(lambda _, given: (decoder.layernorm(given[0]), *given[1:]))


def early_stride(oracle: Oracle) -> None:
    """The stride in the first 1x1 convolution, as in the paper of ResNet."""
    for stage in oracle.net.model.backbone.model.encoder.stages[1:]:
        first, second = (stage.layers[0].layer[place].convolution for place in (0, 1))
        first.stride, second.stride = (2, 2), (1, 1)


def central_mask(oracle: Oracle) -> None:
    """A cell takes the mask of the pixel in its middle."""
    backbone, plain, interpolate = (
        oracle.net.model.backbone,
        oracle.net.model.backbone.forward,
        functional.interpolate,
    )

    def forward(*given: torch.Tensor) -> list:
        exact = functools.partial(interpolate, mode="nearest-exact")
        with mock.patch.object(functional, "interpolate", exact):
            return plain(*given)

    backbone.forward = forward


def unmasked_positions(oracle: Oracle) -> None:
    """Positions that count padding, too."""
    table, plain = oracle.net.model.position_embedding, oracle.net.model.position_embedding.forward
    table.forward = lambda shape, device, dtype, mask=None: plain(shape, device, dtype).expand(
        len(mask), -1, -1, -1
    )
