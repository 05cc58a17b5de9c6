# SPDX-License-Identifier: Apache-2.0
"""How the modalities meet."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.dropout import Dropout
from vlp_jax.layers.linear import normal
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.layers.stack import Stack
from vlp_jax.types import Array


class MergedAttention(nn.Module):
    """One transformer over text and image tokens together (single stream).

    Dropout comes before the modality embedding is added, as in ViLT.
    """

    depth: int
    num_heads: int
    mlp_width: int
    modalities: int = 2
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: bool = False
    gelu: str = "exact"
    token_multiple: int = 1

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "batch text width"],
        text_mask: Bool[Array, "batch text"],
        image: Float[Array, "batch image width"],
        image_mask: Bool[Array, "batch image"],
        picture: int = 0,
        *,
        train: bool,
    ) -> tuple[Float[Array, "batch text width"], Float[Array, "batch image width"]]:
        """Returns the normalised text and image features; `picture` numbers the pictures of one text."""
        width = text.shape[-1]
        table = self.param(
            "modality", nn.with_logical_partitioning(normal, (None, "embed")), (self.modalities, width)
        )
        table = table.astype(self.dtype)
        text = Dropout(self.dropout, name="text_dropout")(text, train) + table[None, :1]
        row = table[None, 1 + picture : 2 + picture]
        image = Dropout(self.dropout, name="image_dropout")(image, train) + row
        x = jnp.concatenate([text, image], axis=1)
        mask = jnp.concatenate([text_mask, image_mask], axis=1)
        stack = Stack(
            self.depth, self.num_heads, self.mlp_width, self.eps, self.dropout, self.dtype, self.unroll, self.remat,
            self.gelu, self.token_multiple, name="stack",
        )  # fmt: skip
        x = LayerNorm(self.eps, self.dtype, name="norm")(stack(x, mask, train))
        return x[:, : text.shape[1]], x[:, text.shape[1] :]
