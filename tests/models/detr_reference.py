# SPDX-License-Identifier: Apache-2.0
"""DETR's transformer and heads in PyTorch, written from its description, and the table to our parameters."""

from __future__ import annotations

import torch
from torch import nn

from tests.parity.harness import Row, linear, module, same, third


class EncoderLayer(nn.Module):
    """Post-norm; positions on queries and keys."""

    def __init__(self, width, heads, mlp_width, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, positions, padding):
        here = x + positions
        # Asking for the weights keeps torch on its plain path, whose dropout a test can replace.
        x = self.norm1(x + self.drop(self.self_attn(here, here, x, key_padding_mask=padding)[0]))
        return self.norm2(x + self.drop(self.linear2(self.drop(self.linear1(x).relu()))))


class DecoderLayer(nn.Module):
    """Post-norm; positions on queries and keys of both attentions."""

    def __init__(self, width, heads, mlp_width, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, positions, memory, memory_positions, padding, unseen=None):
        here = x + positions
        x = self.norm1(x + self.drop(self.self_attn(here, here, x, attn_mask=unseen)[0]))
        keys = memory + memory_positions
        y = self.multihead_attn(x + positions, keys, memory, key_padding_mask=padding)[0]
        x = self.norm2(x + self.drop(y))
        return self.norm3(x + self.drop(self.linear2(self.drop(self.linear1(x).relu()))))


class Reference(nn.Module):
    """`(features [B, T, W], positions, real) -> {features [B, L, Q, W], logits, boxes}`."""

    def __init__(self, width, heads, mlp_width, depth, queries, classes, dropout=0.0):
        super().__init__()
        sizes = (width, heads, mlp_width, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(depth))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.query_embed = nn.Embedding(queries, width)
        self.class_embed = nn.Linear(width, classes + 1)
        self.bbox_embed = nn.ModuleList(nn.Linear(width, out) for out in (width, width, 4))

    def forward(self, x, positions, real):
        for layer in self.encoder:
            x = layer(x, positions, ~real)
        place = self.query_embed.weight[None].expand(len(x), -1, -1)
        content, outputs = torch.zeros_like(place), []
        for layer in self.decoder:
            content = layer(content, place, x, positions, ~real)
            outputs.append(self.norm(content))
        features = torch.stack(outputs, 1)
        first, second, third_ = self.bbox_embed
        boxes = third_(second(first(features).relu()).relu()).sigmoid()
        return {"features": features, "logits": self.class_embed(features), "boxes": boxes}


def attention(source, ours):
    """Rows of a packed attention."""
    rows = module(f"{source}.out_proj", f"{ours}/out")
    for index, name in enumerate(("query", "key", "value")):
        rows += (
            Row(f"{source}.in_proj_weight", f"{ours}/{name}/kernel", third(index, linear)),
            Row(f"{source}.in_proj_bias", f"{ours}/{name}/bias", third(index)),
        )
    return rows


def stack(source, ours, attentions, norms):
    """Rows of a stack of layers."""
    source, ours = f"{source}.{{layer}}", f"{ours}/layers"
    rows = module(f"{source}.linear1", f"{ours}/mlp/hidden") + module(f"{source}.linear2", f"{ours}/mlp/out")
    for name, own in attentions.items():
        rows += attention(f"{source}.{name}", f"{ours}/{own}")
    for number in range(1, norms + 1):
        rows += module(f"{source}.norm{number}", f"{ours}/norm{number}", same)
    return rows


ROWS = (
    *stack("encoder", "encoder", {"self_attn": "attention"}, 2),
    *stack("decoder", "decoder", {"self_attn": "self_attention", "multihead_attn": "cross_attention"}, 3),
    *module("norm", "decoder/norm", same),
    Row("query_embed.weight", "queries/table"),
    *module("class_embed", "classes/dense"),
    *module("bbox_embed.0", "boxes/hidden1"),
    *module("bbox_embed.1", "boxes/hidden2"),
    *module("bbox_embed.2", "boxes/out"),
)
