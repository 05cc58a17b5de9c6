# SPDX-License-Identifier: Apache-2.0
"""Word pieces to features: BERT's embedding layer."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from vlp_jax.layers.embedding import lookup
from vlp_jax.layers.linear import normal
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.types import Array


class TextEmbedder(nn.Module):
    """`LayerNorm(word + segment 0 + position)`, without the dropout that follows it (Devlin et al. 2019).

    As in BERT, the word row of [PAD] (`pad_id`) gets no gradient; it is initialised and decayed like the others.
    """

    vocab_size: int
    length: int
    width: int
    pad_id: int = 0
    eps: float = 1e-12
    segments: int = 2
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        table = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        small = nn.with_logical_partitioning(normal, (None, "embed"))
        self.word = self.param("word", table, (self.vocab_size, self.width))
        self.position = self.param("position", small, (self.length, self.width))
        self.segment = self.param("segment", small, (self.segments, self.width))
        self.norm = LayerNorm(self.eps, self.dtype)

    def __call__(self, text_ids: Int[Array, "batch text"]) -> Float[Array, "batch text width"]:
        """Embeds ids of at most `length` pieces."""
        word = lookup(self.word, text_ids, self.pad_id)
        place = self.position[: text_ids.shape[1]] + self.segment[:1]
        x = self.norm(word + place[None])
        return nn.with_logical_constraint(x, ("batch", "token", "act_embed"))
