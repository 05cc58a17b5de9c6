# SPDX-License-Identifier: Apache-2.0
"""From a decoder's features to classes and boxes, one pair of heads for all layers (DETR, Carion et al. 2020)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from vlp_jax.layers.linear import Linear, fan_in_uniform
from vlp_jax.types import Array


def _linear(features: int, fan_in: int, dtype: DTypeLike, name: str) -> Linear:
    """A projection with PyTorch's initial values, kernel and bias alike."""
    init = fan_in_uniform(fan_in)
    return Linear(features, ("embed", None), dtype, init, init, name=name)


class ClassHead(nn.Module):
    """One linear map to the logits of `classes` classes and of no-object, which is the last."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch layer query width"]
    ) -> Float[Array, "batch layer query classes_and_none"]:
        """Maps features to float32 logits."""
        return _linear(self.classes + 1, x.shape[-1], self.dtype, "dense")(x).astype(jnp.float32)


class BoxHead(nn.Module):
    """Three linear maps with ReLU between and a sigmoid, all in float32.

    A bfloat16 coordinate near 1 is known to 1/256 of the picture only; the products here are few.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch layer query width"]) -> Float[Array, "batch layer query 4"]:
        """Maps features to boxes `cx cy w h` in [0, 1] of the picture without its padding."""
        width = x.shape[-1]
        x = jax.nn.relu(_linear(width, width, jnp.float32, "hidden1")(x))
        x = jax.nn.relu(_linear(width, width, jnp.float32, "hidden2")(x))
        return jax.nn.sigmoid(_linear(4, width, jnp.float32, "out")(x))


class DetectionHeads(nn.Module):
    """Both heads: `class` and `box`."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch layer query width"]
    ) -> tuple[Float[Array, "batch layer query classes_and_none"], Float[Array, "batch layer query 4"]]:
        """Maps features to logits and boxes."""
        return ClassHead(self.classes, self.dtype, name="class")(x), BoxHead(name="box")(x)
