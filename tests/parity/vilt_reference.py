# SPDX-License-Identifier: Apache-2.0
"""ViLT's pretraining step in PyTorch, written from the published description, one example at a time.

No example is padded, so there is no mask to get wrong; names are those of the original's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional

from tests.parity.harness import (
    Row,
    first_position,
    grid_positions,
    linear,
    module,
    patch_kernel,
    same,
    third,
)
from tests.parity.oracle import Oracle, Recipe, randomise

BLOCK, OURS = "transformer.blocks.{layer}", "fusion/stack/layers"


def fused(index: int, name: str) -> tuple[Row, Row]:
    """The rows of query, key or value, which the original keeps in one projection."""
    return (
        Row(f"{BLOCK}.attn.qkv.weight", f"{OURS}/attention/{name}/kernel", third(index, linear)),
        Row(f"{BLOCK}.attn.qkv.bias", f"{OURS}/attention/{name}/bias", third(index)),
    )


ROWS = (
    Row("text_embeddings.word_embeddings.weight", "text_embed/word"),
    Row("text_embeddings.position_embeddings.weight", "text_embed/position"),
    Row("text_embeddings.token_type_embeddings.weight", "text_embed/segment"),
    *module("text_embeddings.LayerNorm", "text_embed/norm", same),
    *module("transformer.patch_embed.proj", "patch_embed/projection", patch_kernel),
    Row("transformer.cls_token", "patch_embed/class_token", lambda x: x[0, 0]),
    Row("transformer.pos_embed", "patch_embed/class_position", first_position),
    Row("transformer.pos_embed", "patch_embed/position", grid_positions),
    Row("token_type_embeddings.weight", "fusion/modality"),
    *module(f"{BLOCK}.norm1", f"{OURS}/norm1", same),
    *fused(0, "query"),
    *fused(1, "key"),
    *fused(2, "value"),
    *module(f"{BLOCK}.attn.proj", f"{OURS}/attention/out"),
    *module(f"{BLOCK}.norm2", f"{OURS}/norm2", same),
    *module(f"{BLOCK}.mlp.fc1", f"{OURS}/mlp/hidden"),
    *module(f"{BLOCK}.mlp.fc2", f"{OURS}/mlp/out"),
    *module("transformer.norm", "fusion/norm", same),
    *module("pooler.dense", "heads/pooler/dense"),
    *module("mlm_score.transform.dense", "heads/mlm/dense"),
    *module("mlm_score.transform.LayerNorm", "heads/mlm/norm", same),
    Row("mlm_score.decoder.weight", "heads/mlm/decoder/kernel", linear),
    Row("mlm_score.bias", "heads/mlm/decoder/bias"),
    *module("itm_score.fc", "heads/itm/dense"),
)
QUIET = r"embed|cls_token|attn\.proj|fc2|transform\.dense"


def build(config: ConfigDict, quiet: bool) -> Oracle:
    """The reference with our sizes and random weights, and the original's optimizer with our numbers."""
    net = Vilt(config)
    randomise(net, QUIET if quiet else "")
    optimizer, steps = config.optimizer, config.train.steps
    recipe = Recipe(
        lr=optimizer.lr,
        warmup=int(optimizer.warmup * steps),
        steps=steps,
        no_decay=("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight"),
        betas=(0.9, 0.98),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        coefficients={"mlm": 1.0, "itm": 1.0, "wpa": 0.1},
    )
    # The softmax does not see what is added to all keys alike.
    return Oracle(net, ROWS, net.terms, recipe=recipe, idle=[f"{OURS}/attention/key/bias"])


class Vilt(nn.Module):
    """Text and patches through one pre-norm transformer, with the heads of pretraining."""

    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        model, width, patch = config.model, config.model.width, config.model.patch_embed
        self.heads, self.beta = model.fusion.num_heads, 0.5
        text = model.text_embed
        self.text_embeddings = nn.ModuleDict(
            dict(
                word_embeddings=nn.Embedding(text.vocab_size, width, padding_idx=0),
                position_embeddings=nn.Embedding(text.length, width),
                token_type_embeddings=nn.Embedding(2, width),
                LayerNorm=nn.LayerNorm(width, eps=1e-12),
            )
        )
        self.token_type_embeddings = nn.Embedding(2, width)
        projection = nn.Conv2d(3, width, patch.patch_size, patch.patch_size)
        self.transformer = nn.ModuleDict(
            dict(
                patch_embed=nn.ModuleDict(dict(proj=projection)),
                blocks=nn.ModuleList(block(width, model.fusion.mlp_width) for _ in range(model.fusion.depth)),
                norm=nn.LayerNorm(width, eps=1e-6),
            )
        )
        self.transformer.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer.pos_embed = nn.Parameter(torch.zeros(1, 1 + patch.grid**2, width))
        self.pooler = nn.ModuleDict(dict(dense=nn.Linear(width, width)))
        transform = dict(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))
        decoder = nn.Linear(width, text.vocab_size, bias=False)
        self.mlm_score = nn.ModuleDict(dict(transform=nn.ModuleDict(transform), decoder=decoder))
        self.mlm_score.bias = nn.Parameter(torch.zeros(text.vocab_size))
        self.itm_score = nn.ModuleDict(dict(fc=nn.Linear(width, 2)))

    def terms(self, batch: Mapping) -> dict[str, torch.Tensor]:
        """Means over the batch: masked words; matching and word-patch alignment, both of the exchanged pairs."""
        words, labels, matches, distances = [], [], [], []
        for row, matched in enumerate(batch["matched"]):
            image = self.image(batch, row)
            ids = torch.tensor(batch["text_ids"][row][batch["text_mask"][row]]).long()
            slots = np.flatnonzero(batch["mlm_labels"][row] >= 0)
            positions = batch["mlm_positions"][row, slots]
            ids[positions] = torch.tensor(batch["mlm_inputs"][row, slots]).long()
            words.append(self.word_logits(self.encode(ids, image)[positions]))
            labels += batch["mlm_labels"][row, slots].tolist()

            ids = torch.tensor(batch["pair_text_ids"][row][batch["pair_text_mask"][row]]).long()
            tokens = self.encode(ids, image)
            matches.append(self.itm_score.fc(torch.tanh(self.pooler.dense(tokens[0]))))
            distance = transport_distance(tokens[1 : len(ids) - 1], tokens[len(ids) + 1 :], self.beta)
            distances.append(distance if matched else -distance)
        matched = torch.tensor(np.asarray(batch["matched"])).long()
        return {
            "mlm": functional.cross_entropy(torch.cat(words), torch.tensor(labels)),
            "itm": functional.cross_entropy(torch.stack(matches), matched),
            "wpa": torch.stack(distances).mean(),
        }

    def image(self, batch: Mapping, row: int) -> torch.Tensor:
        """`[1 + kept patches, width]`: class token and patches with their positions and type."""
        t = self.transformer
        rows, columns = (int(n) for n in batch["grid_size"][row])
        size = t.patch_embed.proj.kernel_size[0]
        kept = batch["patch_mask"][row]
        places = batch["patch_positions"][row][kept]
        picture = np.zeros((rows * size, columns * size, 3), np.float32)
        for (r, c), pixels in zip(places * size, batch["patches"][row][kept], strict=True):
            picture[r : r + size, c : c + size] = pixels.reshape(size, size, 3)
        patches = t.patch_embed.proj(torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1)[0]
        side = round((t.pos_embed.shape[1] - 1) ** 0.5)
        grid = t.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=True)
        r, c = torch.tensor(places).long().unbind(1)
        first = t.cls_token[0] + t.pos_embed[0, :1]
        return torch.cat([first, (patches + grid[0])[:, r, c].T]) + self.token_type_embeddings.weight[1]

    def encode(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """`[text + image, width]` after all blocks and the last norm."""
        e = self.text_embeddings
        text = e.word_embeddings(ids) + e.token_type_embeddings.weight[0]
        text = e.LayerNorm(text + e.position_embeddings.weight[: len(ids)])
        x = torch.cat([text + self.token_type_embeddings.weight[0], image])
        for part in self.transformer.blocks:
            query, key, value = (
                y.unflatten(-1, (self.heads, -1)).transpose(0, 1)
                for y in part.attn.qkv(part.norm1(x)).chunk(3, -1)
            )
            weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
            x = x + part.attn.proj((weights @ value).transpose(0, 1).flatten(1))
            x = x + part.mlp.fc2(functional.gelu(part.mlp.fc1(part.norm2(x))))
        return self.transformer.norm(x)

    def word_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits."""
        transform = self.mlm_score.transform
        x = transform.LayerNorm(functional.gelu(transform.dense(x)))
        return self.mlm_score.decoder(x) + self.mlm_score.bias


def block(width: int, hidden: int) -> nn.ModuleDict:
    """The parts of one pre-norm block."""
    return nn.ModuleDict(
        dict(
            norm1=nn.LayerNorm(width, eps=1e-6),
            attn=nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))),
            norm2=nn.LayerNorm(width, eps=1e-6),
            mlp=nn.ModuleDict(dict(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))),
        )
    )


def transport_distance(text: torch.Tensor, image: torch.Tensor, beta: float) -> torch.Tensor:
    """Cost of moving uniform mass from words to patches by the plan of 50 proximal steps (IPOT); a scalar.

    The gradient flows through the cost alone.
    """
    cost = 1 - functional.normalize(text, dim=-1, eps=1e-5) @ functional.normalize(image, dim=-1, eps=1e-5).T
    with torch.no_grad():
        kernel = torch.exp(-cost / beta)
        plan, from_words = torch.ones_like(cost), torch.full((len(text),), 1 / len(text))
        for _ in range(50):
            joint = kernel * plan
            to_patches = 1 / (len(image) * (from_words @ joint))
            from_words = 1 / (len(text) * (joint @ to_patches))
            plan = from_words[:, None] * joint * to_patches
    return (cost * plan).sum()


# Ways to be wrong, each of which the first losses must show.


def padding_learns(oracle: Oracle) -> None:
    """The padding word gets a gradient."""
    oracle.net.text_embeddings.word_embeddings.padding_idx = None


def other_beta(oracle: Oracle) -> None:
    """Proximal steps of another size."""
    oracle.net.beta = 0.6


def torch_epsilon(oracle: Oracle) -> None:
    """PyTorch's default epsilon in the blocks."""
    for part in oracle.net.transformer.blocks:
        part.norm1.eps = part.norm2.eps = 1e-5
