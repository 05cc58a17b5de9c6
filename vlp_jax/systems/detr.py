# SPDX-License-Identifier: Apache-2.0
"""DETR: grid features, an encoder, object queries in a decoder, sets matched exactly (Carion et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from vlp_jax.models.decoder import Decoder, ObjectQueries
from vlp_jax.models.detection_heads import DetectionHeads
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.grid import EXPANSION, GridEmbedder
from vlp_jax.objectives.detection import detection
from vlp_jax.systems import base
from vlp_jax.types import BOXES_LEFT_OUT, Array, Batch, Extra, Key, LossOut, Params, Term, UserError


class Detr(nn.Module):
    """The parts and how they are wired."""

    model: Any  # config.model, frozen

    def setup(self) -> None:
        m, dtype = self.model, jnp.dtype(self.model.dtype)
        shared = dict(dropout=m.dropout, dtype=dtype, unroll=m.unroll)
        self.grid_embed = GridEmbedder(**m.grid_embed, width=m.width, dtype=dtype, unroll=m.unroll)
        self.encoder = Encoder(**m.encoder, **shared)
        self.object_queries = ObjectQueries(**m.object_queries, width=m.width)
        self.decoder = Decoder(**m.decoder, **shared)
        self.heads = DetectionHeads(**m.heads, dtype=dtype)

    def __call__(self, image: Array, image_mask: Array, train: bool = False) -> tuple[Array, Array]:
        """Logits [batch, layer, query, classes + 1] and boxes [batch, layer, query, 4] of each decoder layer."""
        features, positions, mask = self.grid_embed(image, image_mask)
        memory = self.encoder(features, positions, mask, train=train)
        queries = self.object_queries()
        content = jnp.zeros((image.shape[0], *queries.shape[1:]), memory.dtype)
        decoded = self.decoder(content, queries, memory, positions, mask, train=train)
        return self.heads(decoded)


def resolve(config: ConfigDict, facts: Mapping[str, Any]) -> ConfigDict:
    """Fills the number of classes, which follows from the data, and checks that all sizes fit; pure."""
    base.needs_inputs(config, "grid", "boxes")
    config = base.fill_unknown(config, facts, {"model.heads.classes": "classes"})
    base.whole_heads(config, "encoder", "decoder")
    width, grid = config.model.width, config.model.grid_embed
    if width % 4:
        raise UserError(
            f"config.model.width {width} is not a multiple of 4: positions are a sine and a cosine of row and column. "
            f"Take {width // 4 * 4 or 4} or {(width // 4 + 1) * 4}."
        )
    if (
        len(grid.depths) != len(grid.widths)
        or not grid.depths
        or min(*grid.depths, *grid.widths, grid.stem_width) < 1
    ):
        raise UserError(
            f"config.model.grid_embed has depths {tuple(grid.depths)}, widths {tuple(grid.widths)} and a stem_width of "
            f"{grid.stem_width}: each stage needs one of both, all above 0. Give, for example, (3, 4, 6, 3), (256, 512, "
            "1024, 2048) and 64."
        )
    if any(one % EXPANSION for one in grid.widths):
        raise UserError(
            f"config.model.grid_embed.widths {tuple(grid.widths)} are not all multiples of {EXPANSION}, by which a "
            "block narrows them. Change those that are not."
        )
    return config


def build(config: ConfigDict) -> base.Functions:
    """Makes the system of a resolved config."""
    module = Detr(FrozenConfigDict(config.model))
    active = {name for name, coefficient in config.objectives.items() if coefficient}

    def init(rng: Key, batch: Batch) -> tuple[Params, Extra]:
        return module.init(rng, batch["image"], batch["image_mask"])["params"], {}

    def prepare(batch: Batch, rng: Key) -> Batch:
        return batch

    def loss(params: Params, extra: Extra, batch: Batch, rng: Key) -> LossOut:
        pictures = batch["image"], batch["image_mask"]
        logits, boxes = module.apply({"params": params}, *pictures, train=True, rngs={"dropout": rng})
        valid = batch["example_id"] >= 0
        every, metrics = detection(logits, boxes, batch["boxes"], batch["box_labels"], valid)
        terms = {name: term for name, term in every.items() if name in active}
        return LossOut(terms, metrics | _left_out(batch, valid), extra)

    def boxes(params: Params, batch: Batch, rng: Key | None = None) -> Mapping[str, Array]:
        logits, found = module.apply({"params": params}, batch["image"], batch["image_mask"])
        return {"class_logits": logits[:, -1], "boxes": found[:, -1]}

    return base.Functions(init, prepare, loss, base.jitted({"boxes": boxes}, {}))


def _left_out(batch: Batch, valid: Array) -> dict[str, Term]:
    """Which shares of the records' boxes are no targets, and why."""
    left_out = jnp.where(valid[:, None], batch["boxes_left_out"], 0).astype(jnp.float32)
    every = jnp.sum(left_out) + jnp.sum(batch["box_mask"] & valid[:, None], dtype=jnp.float32)
    return {f"left_out/{why}": Term(jnp.sum(left_out[:, i]), every) for i, why in enumerate(BOXES_LEFT_OUT)}
