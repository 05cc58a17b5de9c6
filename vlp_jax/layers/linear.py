# SPDX-License-Identifier: Apache-2.0
"""Projections whose parameters carry logical axis names, and the initialisers that the field uses.

Axis names of parameters: embed (model width), heads, mlp, vocab, norm, layers; of activations: batch, token,
act_embed, act_mlp, act_vocab. A preset in parallel/rules.py maps them to the mesh.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vlp_jax.layers.product import product
from vlp_jax.types import Array

Initializer = Callable[..., Array]

# BERT and timm: N(0, 0.02). timm truncates at an absolute 2, a hundred standard deviations away: no difference.
normal = nn.initializers.normal(0.02)


def fan_in_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for convolutions and their biases: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def gathered(kernel: Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> Array:
    """Casts a kernel to the compute type and asks for it whole along `embed`.

    Under fsdp the partitioner otherwise contracts over the sharded weight and moves activations of the whole
    batch instead of 2 bytes a parameter (seen at the patch projection: 2.4 GB all-reduced a step).
    """
    return nn.with_logical_constraint(kernel.astype(dtype), tuple(None if a == "embed" else a for a in axes))


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `[in, out]` in float32 with logical axes, computed in `dtype`."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = normal
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., features]`."""
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias_init = nn.with_logical_partitioning(self.bias_init, (_bias_axis(self.axes[1]),))
        bias = self.param("bias", bias_init, (self.features,)).astype(self.dtype)
        rows = "abc"[: x.ndim - 1]
        return product(
            x.astype(self.dtype), gathered(kernel, self.axes, self.dtype), bias, f"{rows}d,df->{rows}f"
        )


class HeadLinear(nn.Module):
    """A `[in, heads x head]` projection whose result is laid out `[batch, heads, token, head]`."""

    num_heads: int
    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = normal

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, token, in]` to `[batch, heads, token, features / heads]`."""
        axes = ("embed", "heads")
        head = self.features // self.num_heads
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, axes), (x.shape[-1], self.features)
        )
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
        bias = self.param("bias", bias_init, (self.features,)).astype(self.dtype)
        kernel = gathered(kernel, axes, self.dtype).reshape(x.shape[-1], self.num_heads, head)
        return product(x.astype(self.dtype), kernel, bias.reshape(self.num_heads, head), "btd,dhk->bhtk")


def _bias_axis(axis: str | None) -> str | None:
    return "norm" if axis == "embed" else axis
