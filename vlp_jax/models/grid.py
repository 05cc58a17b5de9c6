# SPDX-License-Identifier: Apache-2.0
"""Padded uint8 pictures to a grid of features: a ResNet with frozen norms, a projection, fixed positions.

The grid has ceil(rows / 32) x ceil(columns / 32) cells, flattened row by row (DETR, Carion et al. 2020).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, UInt8

from vlp_jax.layers.convolution import FrozenConvolution
from vlp_jax.layers.linear import Linear, fan_in_uniform
from vlp_jax.layers.position import sine_positions
from vlp_jax.types import Array

# Blocks of the four stages, by the usual name of the network (He et al. 2016, table 1).
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
EXPANSION = 4  # width of a block over the width of its 3x3 convolution
ACTIVATION = ("batch", None, None, "act_embed")


def normalized(
    image: UInt8[Array, "batch rows columns 3"], mask: Bool[Array, "batch rows columns"]
) -> Float[Array, "batch rows columns 3"]:
    """Pixels less ImageNet's mean over its deviation, float32; exactly 0 where the mask is False."""
    mean, deviation = (np.asarray(value, np.float32).reshape(1, 1, 1, 3) for value in (MEAN, DEVIATION))
    pixels = (image.astype(jnp.float32) / 255.0 - mean) / deviation
    return jnp.where(mask[..., None], pixels, 0.0)


def grid_mask(
    mask: Bool[Array, "batch rows columns"], rows: int, columns: int
) -> Bool[Array, "batch grid_rows grid_columns"]:
    """The mask at the first pixel of each cell: index floor(i * size / cells), PyTorch's "nearest".

    `jax.image.resize` would take the pixel in the middle of the cell.
    """
    row, column = (
        np.arange(cells) * size // cells for size, cells in zip(mask.shape[1:], (rows, columns), strict=True)
    )
    return mask[:, row[:, None], column[None]]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut; the stride lies in the 3x3 one, as in torchvision ("v1.5").

    Where the shortcut changes the shape it is a convolution itself: `first` of a stage.
    """

    width: int
    stride: int = 1
    first: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns in"]
    ) -> Float[Array, "batch new_rows new_columns width"]:
        """Maps features to `width` features, rows and columns to ceil(n / stride)."""
        inner, into = self.width // EXPANSION, (None, "embed")
        # `embed` is the wide axis of each kernel, the one that the most devices divide.
        y = nn.relu(FrozenConvolution(inner, 1, 1, ("embed", None), self.dtype, name="conv1")(x))
        y = nn.relu(FrozenConvolution(inner, 3, self.stride, into, self.dtype, name="conv2")(y))
        y = FrozenConvolution(self.width, 1, 1, into, self.dtype, name="conv3")(y)
        if self.first:
            x = FrozenConvolution(self.width, 1, self.stride, into, self.dtype, name="shortcut")(x)
        return nn.with_logical_constraint(nn.relu(x + y), ACTIVATION)


class _Layer(Bottleneck):
    """A block in the shape that `nn.scan` wants: a carry in, a carry and nothing out."""

    def __call__(self, x: Array) -> tuple[Array, None]:
        return super().__call__(x), None


class Stage(nn.Module):
    """The `first` block, which changes the shape, and `depth` - 1 like ones, stacked under `rest` `[depth - 1, ...]`.

    `unroll` as in layers/stack.py: 1 compiles one block and loops over it, `depth` - 1 or more leaves no loop.
    """

    depth: int
    width: int
    stride: int
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns in"]
    ) -> Float[Array, "batch new_rows new_columns width"]:
        """Maps features to `width` features, rows and columns to ceil(n / stride)."""
        x = Bottleneck(self.width, self.stride, True, self.dtype, name="first")(x)
        like = self.depth - 1
        if not like:
            return x
        scanned = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=like,
            unroll=min(self.unroll, like),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.width, dtype=self.dtype, name="rest")(x)[0]


class ResNet(nn.Module):
    """`stem` and `stage1` ... `stage4`, 32 times smaller at the end; without pooling and classifier.

    DETR trains stage2, stage3 and stage4 only: the optimizer's pattern for the rest is `(^|/)(stem|stage1)/`.
    """

    depths: tuple[int, ...] = DEPTHS[50]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns 3"]
    ) -> Float[Array, "batch grid_rows grid_columns width"]:
        """Maps normalised pixels to the features of the last stage."""
        x = nn.relu(FrozenConvolution(self.stem_width, 7, 2, dtype=self.dtype, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pads with -inf
        for index, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            stride = 2 if index else 1
            x = Stage(depth, width, stride, self.unroll, self.dtype, name=f"stage{index + 1}")(x)
        return x


class GridEmbedder(nn.Module):
    """A picture as tokens: `resnet`, then a 1x1 `projection` to `width`, beside fixed sine positions."""

    width: int
    depths: tuple[int, ...] = DEPTHS[50]
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "batch rows columns 3"], image_mask: Bool[Array, "batch rows columns"]
    ) -> tuple[
        Float[Array, "batch token width"], Float[Array, "batch token width"], Bool[Array, "batch token"]
    ]:
        """Returns features, positions (not added) and mask of the cells, row by row; the mask is True where real.

        Cells of padding, and those so near to it that they see it, hold what the network makes of zeros: as in
        DETR they depend a little on how far a picture is padded. Positions count real cells only.
        """
        resnet = ResNet(self.depths, self.widths, self.stem_width, self.unroll, self.dtype, name="resnet")
        x = resnet(normalized(image, image_mask))
        batch, rows, columns, last = x.shape
        initial = fan_in_uniform(last)
        projection = Linear(self.width, (None, "embed"), self.dtype, initial, initial, name="projection")
        features = projection(x.reshape(batch, rows * columns, last))
        mask = grid_mask(image_mask, rows, columns)
        positions = sine_positions(mask, self.width).astype(self.dtype)
        return (
            nn.with_logical_constraint(features, ("batch", "token", "act_embed")),
            positions.reshape(batch, rows * columns, self.width),
            mask.reshape(batch, rows * columns),
        )
