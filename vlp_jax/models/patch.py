# SPDX-License-Identifier: Apache-2.0
"""Raw uint8 patches to features: ViT's embedding layer for pictures of any grid."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, UInt8

from vlp_jax.layers.linear import Linear, fan_in_uniform, normal
from vlp_jax.layers.position import grid_positions
from vlp_jax.types import Array


class PatchEmbedder(nn.Module):
    """`[class; projection(patch)] + position`, without the dropout that follows it.

    A linear map of a flattened patch is the convolution of ViT with stride = kernel = `patch_size`. Pixels are
    scaled to [-1, 1] (mean and deviation 0.5) here, on the device.
    """

    patch_size: int
    grid: int
    width: int
    mask_token: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        initial = fan_in_uniform(3 * self.patch_size**2)
        self.projection = Linear(
            self.width, (None, "embed"), self.dtype, kernel_init=initial, bias_init=initial
        )
        vector = nn.with_logical_partitioning(normal, ("embed",))
        self.class_token = self.param("class_token", vector, (self.width,))
        self.class_position = self.param("class_position", vector, (self.width,))
        table = nn.with_logical_partitioning(normal, (None, None, "embed"))
        self.position = self.param("position", table, (self.grid, self.grid, self.width))
        if self.mask_token:
            self.mask_vector = self.param("mask_vector", vector, (self.width,))

    def __call__(
        self,
        patches: UInt8[Array, "batch patch pixels"],
        positions: Int[Array, "batch patch 2"],
        grid_size: Int[Array, "batch 2"],
    ) -> tuple[Float[Array, "batch patch width"], Float[Array, "batch patch width"]]:
        """Returns projected patches and their positions, not yet added: a masked patch keeps its position.

        `patches` hold pixels in row, column, channel order; `grid_size` is rows and columns of the whole picture.
        """
        pixels = patches.astype(self.dtype) * (2.0 / 255.0) - 1.0
        x = nn.with_logical_constraint(self.projection(pixels), ("batch", "token", "act_embed"))
        return x, grid_positions(self.position, positions, grid_size).astype(self.dtype)

    def assemble(
        self,
        projected: Float[Array, "batch patch width"],
        position: Float[Array, "batch patch width"],
        masked: Bool[Array, "batch patch"] | None = None,
    ) -> Float[Array, "batch patch_and_class width"]:
        """Puts the class token before the patches; `masked` ones become the mask vector before their position."""
        if masked is not None:
            vector = self.mask_vector.astype(self.dtype)[None, None]
            projected = jnp.where(masked[..., None], vector, projected)
        first = (self.class_token + self.class_position).astype(self.dtype)[None, None]
        first = jnp.broadcast_to(first, (projected.shape[0], 1, self.width))
        x = jnp.concatenate([first, projected + position], axis=1)
        return nn.with_logical_constraint(x, ("batch", "token", "act_embed"))
