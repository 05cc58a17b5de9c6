# SPDX-License-Identifier: Apache-2.0
"""Convolutions with explicit padding, followed by a batch norm whose statistics are frozen."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from vlp_jax.layers.linear import gathered
from vlp_jax.types import Array

# He et al. 2015, eq. 10, over the outputs: what torchvision draws the convolutions of a ResNet from.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "batch rows columns in"], kernel: Float[Array, "height width in out"], stride: int
) -> Float[Array, "batch new_rows new_columns out"]:
    """Correlates with an odd square kernel, zeros of half its size around: n becomes ceil(n / stride).

    The padding is PyTorch's. XLA's "SAME" puts all of it at the end where n is even and the stride 2. A CPU
    gets its gradient as products of matrices: with XLA's own a training step of ResNet-50 takes ten times as long in
    a loop of layers, 1.6 times as long without. A 1x1 convolution is one product there, 1.4 times as fast.
    """
    if kernel.shape[:2] != (1, 1):
        return _convolve(x, kernel, stride)
    default = functools.partial(_convolve, stride=stride)
    return jax.lax.platform_dependent(
        x, kernel, cpu=functools.partial(_product, stride=stride), default=default
    )


def _product(x: Array, kernel: Array, stride: int) -> Array:
    """A 1x1 convolution as a product of matrices."""
    seen = x[:, ::stride, ::stride]
    out = _dot(seen.reshape(-1, seen.shape[-1]), kernel[0, 0], 1, 0)
    return out.reshape(*seen.shape[:3], -1).astype(x.dtype)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    around = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple]:
    return convolve(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple, cotangent: Array) -> tuple[Array, Array]:
    cpu, default = (functools.partial(pull, stride) for pull in (_pull_products, _pull))
    return jax.lax.platform_dependent(*residuals, cotangent, cpu=cpu, default=default)


convolve.defvjp(_forward, _backward)


def _pull(stride: int, x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _convolve(x, kernel, stride), x, kernel)[1](cotangent)


def _pull_products(stride: int, x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    """Both gradients from two products of matrices for each place of the kernel, summed in float32."""
    height, width, features, out = kernel.shape
    top, left = height // 2, width // 2
    padded = jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    batch, rows, columns, _ = padded.shape
    used = [(size - 1) * stride + 1 for size in cotangent.shape[1:3]]  # from the first seen to the last
    flat = cotangent.reshape(-1, out)
    straight = stride == 1 and height > 1
    d_kernel, d_padded = [], jnp.zeros(padded.shape, jnp.float32)
    for i, j in np.ndindex(height, width):
        end = (batch, i + used[0], j + used[1], features)
        seen = jax.lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
        d_kernel.append(_outer(seen.reshape(-1, features), flat))
        if not straight:
            d_seen = _dot(flat, kernel[i, j], 1, 1).reshape(seen.shape)
            around = ((0, 0, 0), (i, rows - end[1], stride - 1), (j, columns - end[2], stride - 1), (0, 0, 0))
            d_padded += jax.lax.pad(d_seen, np.float32(0), around)
    if straight:
        d_x = _convolve(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1)
    else:
        d_x = d_padded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return d_x.astype(x.dtype), jnp.stack(d_kernel).reshape(kernel.shape).astype(kernel.dtype)


def _outer(left: Array, right: Array) -> Array:
    """`left.T @ right`; the narrower factor is the one that is transposed, which a CPU does 1.1 to 1.5 times as fast."""
    if left.shape[1] <= right.shape[1]:
        return _dot(left, right, 0, 0)
    return _dot(right, left, 0, 0).T


def _dot(left: Array, right: Array, *contracted: int) -> Array:
    axes = tuple((axis,) for axis in contracted)
    return jax.lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)


class FrozenNorm(nn.Module):
    """Batch norm that never changes: `x * s + (bias - mean * s)`, `s = scale / sqrt(variance + eps)`.

    All four vectors are parameters, so that they are converted, restored and exported, but no gradient reaches
    them. Name it `frozen`: by that the optimizer knows them (DETR, models/backbone.py, FrozenBatchNorm2d).
    """

    dtype: DTypeLike = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., width]` to `[..., width]`; computed in float32, cast once to `dtype`."""
        one, zero = nn.initializers.ones_init(), nn.initializers.zeros_init()
        initial = {"scale": one, "bias": zero, "mean": zero, "variance": one}
        vectors = (
            self.param(name, nn.with_logical_partitioning(init, ("norm",)), (x.shape[-1],))
            for name, init in initial.items()
        )
        scale, bias, mean, variance = map(jax.lax.stop_gradient, vectors)
        scale = scale * jax.lax.rsqrt(variance + self.eps)
        row = (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32) * scale.reshape(row) + (bias - mean * scale).reshape(row)
        return y.astype(self.dtype)


class FrozenConvolution(nn.Module):
    """A convolution without bias and its frozen norm; kernel `[size, size, in, out]` with logical `axes` (in, out).

    A preset that cuts `embed` cuts one of the channel axes at rest; the kernel is whole when it is used.
    """

    features: int
    size: int = 1
    stride: int = 1
    axes: tuple[str | None, str | None] = (None, "embed")
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch rows columns in"]
    ) -> Float[Array, "batch new_rows new_columns out"]:
        """Maps `[batch, n, m, in]` to `[batch, ceil(n / stride), ceil(m / stride), features]`."""
        axes = (None, None, *self.axes)
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(fan_out_normal, axes), shape)
        x = convolve(x.astype(self.dtype), gathered(kernel, axes, self.dtype), self.stride)
        return FrozenNorm(self.dtype, name="frozen")(x)
