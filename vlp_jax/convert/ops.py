# SPDX-License-Identifier: Apache-2.0
"""What may happen to a tensor between a file and our parameters: a closed set of operations, each with its inverse.

Shapes are found by running an operation on an array without content, so no operation states its shapes twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """A reversible operation on one tensor of a file.

    Attributes:
        axes: what it does, in words of axes: "[out, in] -> [in, out]".
        forward: tensor -> the arrays that it becomes; ValueError where the tensor has other axes.
        inverse: those arrays and, where they alone do not say it, the shape in the file -> the tensor. ValueError
            where the file's shape is needed and not given, or where something was left away.
    """

    axes: str
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[[Sequence[np.ndarray], Shape | None], np.ndarray]

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of what a tensor of `shape` becomes; nothing is allocated.

        Raises:
            ValueError: the operation does not fit this shape.
        """
        return tuple(part.shape for part in self.forward(np.broadcast_to(np.False_, shape)))


def _axes(x: np.ndarray, count: int) -> np.ndarray:
    if x.ndim != count:
        raise ValueError(f"it has {x.ndim} axes, not {count}")
    return x


def _reshape(axes: str, count: int, forward: Callable, inverse: Callable) -> Op:
    """An operation of one tensor to one array, for tensors of `count` axes."""
    return Op(axes, lambda x: (forward(_axes(x, count)),), lambda parts, shape: inverse(parts[0], shape))


def _in_thirds(x: np.ndarray) -> list[np.ndarray]:
    if len(x) % 3:
        raise ValueError(f"its first axis, {len(x)}, is not divisible by 3")
    return np.split(x, 3)


def _in_file(x: np.ndarray, shape: Shape | None) -> np.ndarray:
    if shape is None:
        raise ValueError("how the heads are cut is not known here")
    return x.reshape(shape)


def _grid(x: np.ndarray, before: int) -> tuple[np.ndarray, ...]:
    """The first row, and those behind `before` special ones as a square."""
    _axes(x, 3)
    side = math.isqrt(max(x.shape[1] - before, 0))
    if x.shape[0] != 1 or side == 0 or side * side != x.shape[1] - before:
        raise ValueError(f"its {x.shape[1]} rows are not {before} and a square")
    return x[0, 0], x[0, before:].reshape(side, side, -1)


def _no_way_back(parts: Sequence[np.ndarray], shape: Shape | None) -> np.ndarray:
    raise ValueError("the distillation token's position was left away")


SAME = Op("as it is", lambda x: (x,), lambda parts, shape: parts[0])
LINEAR = _reshape("[out, in] -> [in, out]", 2, lambda x: x.T, lambda y, shape: y.T)
FUSED_KERNEL = Op(
    "[3 out, in] -> 3 x [in, out]",
    lambda x: tuple(part.T for part in _in_thirds(_axes(x, 2))),
    lambda parts, shape: np.concatenate([part.T for part in parts]),
)
FUSED_BIAS = Op(
    "[3 out] -> 3 x [out]",
    lambda x: tuple(_in_thirds(_axes(x, 1))),
    lambda parts, shape: np.concatenate(parts),
)
# Our patches are flat in row, column, channel order.
CONVOLUTION = _reshape(
    "[out, 3, p, p] -> [p p 3, out]",
    4,
    lambda x: _flat_kernel(x.transpose(2, 3, 1, 0)),
    lambda y, shape: _square_kernel(y).transpose(3, 2, 0, 1),
)
FLAT_CONVOLUTION = _reshape(
    "[p, p, 3, out] -> [p p 3, out]",
    4,
    lambda x: _flat_kernel(x),
    lambda y, shape: _square_kernel(y),
)
KERNEL = _reshape(
    "[out, in, height, width] -> [height, width, in, out]",
    4,
    lambda x: x.transpose(2, 3, 1, 0),
    lambda y, shape: y.transpose(3, 2, 0, 1),
)
POINT = _reshape(
    "[out, in, 1, 1] -> [in, out]", 4, lambda x: _point(x).T, lambda y, shape: y.T[:, :, None, None]
)
HEADS_IN = _reshape("[in, head, k] -> [in, head k]", 3, lambda x: x.reshape(len(x), -1), _in_file)
HEADS_BIAS = _reshape("[head, k] -> [head k]", 2, lambda x: x.reshape(-1), _in_file)
HEADS_OUT = _reshape("[head, k, out] -> [head k, out]", 3, lambda x: x.reshape(-1, x.shape[-1]), _in_file)
TOKEN = _reshape("[1, 1, width] -> [width]", 3, lambda x: _single(x), lambda y, shape: y[None, None])
POSITIONS = Op(
    "[1, 1 + n n, width] -> [width] and [n, n, width]",
    lambda x: _grid(x, 1),
    lambda parts, shape: np.concatenate([parts[0][None], parts[1].reshape(-1, len(parts[0]))])[None],
)
DISTILLED_POSITIONS = Op(
    "[1, 2 + n n, width] -> [width] and [n, n, width]", lambda x: _grid(x, 2), _no_way_back
)


def _single(x: np.ndarray) -> np.ndarray:
    """[1, 1, width] -> [width]."""
    if x.shape[:2] != (1, 1):
        raise ValueError(f"it has {x.shape[0]} x {x.shape[1]} rows, not one")
    return x[0, 0]


def _point(x: np.ndarray) -> np.ndarray:
    """[out, in, 1, 1] -> [out, in]."""
    if x.shape[2:] != (1, 1):
        raise ValueError(f"it looks at {x.shape[2]} x {x.shape[3]} places, not one")
    return x[:, :, 0, 0]


def _flat_kernel(x: np.ndarray) -> np.ndarray:
    """[p, p, 3, out] -> [p p 3, out]; 12 channels would pass for larger patches of 3."""
    rows, columns, channels, out = x.shape
    if rows != columns or channels != 3:
        raise ValueError(f"its patches are {rows} x {columns} with {channels} channels, not square with 3")
    return x.reshape(-1, out)


def _square_kernel(y: np.ndarray) -> np.ndarray:
    """[p p 3, out] -> [p, p, 3, out]."""
    side = math.isqrt(len(y) // 3)
    return y.reshape(side, side, 3, -1)
