# SPDX-License-Identifier: Apache-2.0
"""Convolutions and frozen norms: both arrangements of the gradient against the definition in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlp_jax.layers import convolution
from vlp_jax.layers.convolution import FrozenConvolution, FrozenNorm, convolve


def windows(x, size, stride):
    """What the kernel sees at each place of the result, `[batch, rows, columns, in, size, size]`."""
    half = size // 2
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (half, half), (half, half), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    return seen[:, ::stride, ::stride]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows, columns", [(5, 6), (1, 2)])
@pytest.mark.parametrize(
    "size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), pytest.param(7, 2, marks=pytest.mark.slow)]
)
def test_value_and_gradient_equal_the_definition(size, stride, rows, columns, dtype, platform, monkeypatch):
    # The branch is chosen here, so that the one for other platforms is computed too.
    branch = lambda *a, **branches: branches[platform](*a)  # noqa: E731
    monkeypatch.setattr(convolution.jax.lax, "platform_dependent", branch)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, rows, columns, 3)), dtype)
    kernel = jnp.asarray(draw.normal(size=(size, size, 3, 4)), dtype)
    value, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
    assert value.shape == (2, -(-rows // stride), -(-columns // stride), 4)
    cotangent = jnp.asarray(draw.normal(size=value.shape), dtype)
    k, upstream = np.asarray(kernel, np.float64), np.asarray(cotangent, np.float64)
    # The gradient for x is the result of each basis picture against the cotangent.
    basis = np.eye(rows * columns * 3).reshape(-1, rows, columns, 3)
    answers = np.einsum("erwcij,ijco->erwo", windows(basis, size, stride), k)
    expected = [
        np.einsum("brwcij,ijco->brwo", windows(x, size, stride), k),
        np.einsum("erwo,brwo->be", answers, upstream).reshape(x.shape),
        np.einsum("brwcij,brwo->ijco", windows(x, size, stride), upstream),
    ]
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for ours, true in zip((value, *pull(cotangent)), expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        assert np.abs(np.asarray(ours, np.float64) - true).max() <= tolerance * max(1, np.abs(true).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frozen_norm_is_an_affine_map_without_gradient(dtype):
    draw = np.random.default_rng(0)
    values = {name: draw.uniform(0.5, 2, 4).astype(np.float32) for name in ("scale", "variance")}
    values |= {name: draw.normal(size=4).astype(np.float32) for name in ("bias", "mean")}
    values["variance"][0] = 0  # a channel that is always off: only epsilon keeps it finite
    x = jnp.asarray(draw.normal(size=(2, 3, 5, 4)), dtype)
    norm = FrozenNorm(dtype)
    wide = {name: value.astype(np.float64) for name, value in values.items()}
    expected = (np.asarray(x, np.float64) - wide["mean"]) / np.sqrt(wide["variance"] + 1e-5)
    expected = expected * wide["scale"] + wide["bias"]
    y = norm.apply({"params": values}, x)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-4
    )
    grads = jax.grad(lambda p: jnp.sum(norm.apply({"params": p}, x).astype(jnp.float32) ** 2))(values)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    d_x = jax.grad(lambda x: jnp.sum(norm.apply({"params": values}, x).astype(jnp.float32)))(x)
    assert np.all(np.asarray(d_x, np.float32) != 0)


def test_parameters_have_names_and_axes():
    layer = FrozenConvolution(8, 3, 2)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 4, 6)))["params"]
    assert set(shapes) == {"kernel", "frozen"} and shapes["kernel"].names == (None, None, None, "embed")
    assert {name: (leaf.value.shape, leaf.names) for name, leaf in shapes["frozen"].items()} == {
        name: ((8,), ("norm",)) for name in ("scale", "bias", "mean", "variance")
    }


def test_kernels_are_drawn_as_torchvision_does():
    kernel = nn.unbox(FrozenConvolution(64, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32))))
    np.testing.assert_allclose(kernel["params"]["kernel"].std(), np.sqrt(2 / (64 * 9)), rtol=0.03)
