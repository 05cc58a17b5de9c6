# SPDX-License-Identifier: Apache-2.0
"""The transformer decoder that reads an encoder's memory, and the learned queries that make it a detector."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from vlp_jax.layers.norm import LayerNorm
from vlp_jax.layers.post_norm import PostNormDecoderLayer, placed, stacked
from vlp_jax.types import Array


class ObjectQueries(nn.Module):
    """A learned table of queries. DETR uses it as positions and starts the content as zeros."""

    queries: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 query width"]:
        """Returns the table in float32, for every row of a batch."""
        table = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed"))
        return self.param("table", table, (self.queries, self.width))[None]


class _Layer(PostNormDecoderLayer):
    """A layer in the shape that `stacked` wants: what the next layer reads is also what this one gives."""

    train: bool = False

    def __call__(self, x: Array, *inputs: Array | None) -> tuple[Array, Array]:
        x = super().__call__(x, *inputs, train=self.train)
        return x, x


class Decoder(nn.Module):
    """`depth` post-norm layers with one final norm for every layer's output (DETR, Carion et al. 2020).

    A layer feeds the next one its output without the final norm. Content, positions and mask are arguments, so
    that one decoder serves object queries (zeros, learned positions, no mask) and words (embeddings, None, causal).
    `unroll` and `remat` as in `stack.Stack`.
    """

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        content: Float[Array, "batch query width"],
        positions: Float[Array, "#batch query width"] | None,
        memory: Float[Array, "batch token width"],
        memory_positions: Float[Array, "#batch token width"] | None,
        memory_mask: Bool[Array, "batch token"],
        self_mask: Bool[Array, "#batch query query"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "batch layer query width"]:
        """Decodes `content`, attending to the real tokens of `memory`.

        Args:
            content: what the layers transform.
            positions: re-added to queries at each layer, and to the keys of the self-attention.
            memory: the encoder's output.
            memory_positions: re-added to the memory as keys at each layer.
            memory_mask: True = real. A row without any real token gets nothing from its memory but biases.
            self_mask: which query sees which in the self-attention, True = seen; None: all see all.
            train: drops, by the rng stream "dropout".

        Returns:
            The normalised output of each layer; `[:, -1]` is the prediction, those before it are auxiliary.
        """
        memory = memory.astype(self.dtype)
        memory_keys = placed(memory, memory_positions)  # the same for all layers
        layers = stacked(_Layer, self.depth, self.unroll, self.remat)(
            self.num_heads, self.mlp_width, self.dropout, self.eps, self.unroll < self.depth, self.dtype,
            train=train, name="layers",
        )  # fmt: skip
        content = content.astype(self.dtype)
        _, outputs = layers(content, positions, self_mask, memory_keys, memory, memory_mask)
        return LayerNorm(self.eps, self.dtype, name="norm")(outputs)
