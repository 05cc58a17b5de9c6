# SPDX-License-Identifier: Apache-2.0
"""`x @ kernel + bias` with its gradient, arranged as the platform likes it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from vlp_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x: Array, kernel: Array, bias: Array, spec: str) -> Array:
    """`einsum(spec, x, kernel) + bias`, all of one type.

    A CPU gets products of two matrices, summed in float32 and rounded once. With two axes of rows, XLA computes the
    gradient of a float32 kernel at 0.57 of the speed; a bfloat16 product whose result is bfloat16 runs as float32
    and not on AMX, at a quarter of the speed; and a bfloat16 bias gradient is summed window by window. Elsewhere it
    is the einsum with its own gradient.

    Args:
        x: rows and contracted axes.
        kernel: contracted axes first, then new ones.
        bias: the new axes.
        spec: einsum's, new axes of the result in the kernel's order.
    """
    return _on_platform(_rows, _plain, spec, x, kernel, bias)


def _forward(x: Array, kernel: Array, bias: Array, spec: str) -> tuple[Array, tuple]:
    return product(x, kernel, bias, spec), (x, kernel, bias)


def _backward(spec: str, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    return _on_platform(_pull_rows, _pull, spec, *residuals, cotangent)


product.defvjp(_forward, _backward)


def _on_platform(cpu, default, spec: str, *arguments: Array):
    cpu, default = (functools.partial(function, spec) for function in (cpu, default))
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)


def _plain(spec: str, x: Array, kernel: Array, bias: Array) -> Array:
    _, _, new, out = _letters(spec)
    y = jnp.einsum(spec, x, kernel)
    return y + bias.reshape([size if c in new else 1 for c, size in zip(out, y.shape, strict=True)])


def _pull(spec: str, x: Array, kernel: Array, bias: Array, cotangent: Array) -> tuple[Array, Array, Array]:
    return jax.vjp(functools.partial(_plain, spec), x, kernel, bias)[1](cotangent)


def _rows(spec: str, x: Array, kernel: Array, bias: Array) -> Array:
    rows, contracted, new, out = _letters(spec)
    x = _ordered(x, spec.partition(",")[0], rows + contracted)
    flat, lead = _flat(x, len(rows)), x.shape[: len(rows)]
    y = _dot(flat, _flat(kernel, len(contracted)), 1, 0) + bias.reshape(1, -1).astype(jnp.float32)
    return _ordered(y.astype(x.dtype).reshape(*lead, *bias.shape), rows + new, out)


def _pull_rows(
    spec: str, x: Array, kernel: Array, bias: Array, cotangent: Array
) -> tuple[Array, Array, Array]:
    rows, contracted, new, out = _letters(spec)
    letters = spec.partition(",")[0]
    x, cotangent = _ordered(x, letters, rows + contracted), _ordered(cotangent, out, rows + new)
    left, right = _flat(x, len(rows)), _flat(cotangent, len(rows))
    d_x = _dot(right, _flat(kernel, len(contracted)), 1, 1).astype(x.dtype).reshape(x.shape)
    d_bias = jnp.sum(right.astype(jnp.float32), axis=0)
    if x.dtype != jnp.float32 and len(rows) > 1:
        # Two axes of rows make the compiler transpose first, which AMX needs.
        left, right = (y.reshape(*x.shape[: len(rows)], -1) for y in (left, right))
    axes = tuple(range(left.ndim - 1))
    d_kernel = _dot(left, right, axes, axes)
    return (
        _ordered(d_x, rows + contracted, letters),
        d_kernel.astype(kernel.dtype).reshape(kernel.shape),
        d_bias.astype(bias.dtype).reshape(bias.shape),
    )


def _letters(spec: str) -> tuple[str, str, str, str]:
    """Letters of the rows, of the contracted axes, of the new ones, and of the result."""
    left, right, out = spec.replace("->", ",").split(",")
    contracted = "".join(c for c in right if c in left)
    return "".join(c for c in left if c not in right), contracted, right[len(contracted) :], out


def _ordered(x: Array, letters: str, wanted: str) -> Array:
    return x if letters == wanted else x.transpose([letters.index(c) for c in wanted])


def _flat(x: Array, axes: int) -> Array:
    """A matrix of `x`, its first `axes` axes as rows."""
    return x.reshape(math.prod(x.shape[:axes]), -1)


def _dot(left: Array, right: Array, *contracted: int | tuple[int, ...]) -> Array:
    axes = tuple((each,) if isinstance(each, int) else each for each in contracted)
    return jax.lax.dot_general(left, right, (axes, ((), ())), preferred_element_type=jnp.float32)
