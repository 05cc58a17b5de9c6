# SPDX-License-Identifier: Apache-2.0
"""What turns features into logits."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from vlp_jax.layers.activation import gelu
from vlp_jax.layers.linear import Linear
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.types import Array


class Pooler(nn.Module):
    """`tanh(linear(x))` of the first token (BERT)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch width"]:
        """Maps a sequence to one vector; tanh in float32."""
        y = Linear(x.shape[-1], ("embed", None), self.dtype, name="dense")(x[:, 0])
        return jnp.tanh(y.astype(jnp.float32)).astype(self.dtype)


class TokenPredictor(nn.Module):
    """BERT's prediction head: linear, GELU, LayerNorm (1e-12), then an untied decoder with bias.

    Masked language modelling decodes into the vocabulary, masked patch prediction into 3 x 256 bins.
    """

    outputs: int
    eps: float = 1e-12
    gelu: str = "exact"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch slot width"]) -> Float[Array, "batch slot output"]:
        """Maps features to float32 logits."""
        # The transform keeps its output whole: the norm that follows needs every unit of it.
        y = gelu(Linear(x.shape[-1], ("embed", None), self.dtype, name="dense")(x), self.gelu)
        y = LayerNorm(self.eps, self.dtype, name="norm")(y)
        logits = Linear(self.outputs, ("embed", "vocab"), self.dtype, name="decoder")(y)
        return nn.with_logical_constraint(logits, ("batch", "token", "act_vocab")).astype(jnp.float32)


class Classifier(nn.Module):
    """One linear map to float32 logits."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch class"]:
        """Maps a pooled vector to logits."""
        return Linear(self.classes, ("embed", None), self.dtype, name="dense")(x).astype(jnp.float32)
