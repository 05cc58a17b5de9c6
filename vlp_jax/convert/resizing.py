# SPDX-License-Identifier: Apache-2.0
"""Parameters of one size made another on the way in: position grids, text positions, modalities, answers.

Numpy only; float32 in and out, weights of interpolation in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlp_jax.types import UserError, closest

KEYS = -0.75  # PyTorch's cubic kernel (Keys 1981, there -0.5)


def _half_pixel(old: int, new: int) -> np.ndarray:
    """Where the centres of `new` cells lie among the centres of `old` ones."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _gathered(old: int, places: np.ndarray, taps: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """[new, old] from (offset to the cell below, weight) pairs; cells outside are those of the border."""
    matrix = np.zeros((len(places), old))
    below = np.floor(places).astype(int)
    for offset, weight in taps:
        np.add.at(matrix, (np.arange(len(places)), np.clip(below + offset, 0, old - 1)), weight)
    return matrix


def _linear(old: int, places: np.ndarray) -> np.ndarray:
    share = places - np.floor(places)
    return _gathered(old, places, ((0, 1 - share), (1, share)))


def _bilinear(old: int, new: int) -> np.ndarray:
    return _linear(old, np.clip(_half_pixel(old, new), 0, old - 1))


def _aligned(old: int, new: int) -> np.ndarray:
    return _linear(old, np.arange(new) * ((old - 1) / max(new - 1, 1)))


def _bicubic(old: int, new: int) -> np.ndarray:
    places = _half_pixel(old, new)
    share = places - np.floor(places)

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((KEYS + 2) * x - (KEYS + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 < |x| < 2
        return KEYS * (((x - 5) * x + 8) * x - 4)

    taps = (-1, far(1 + share)), (0, near(share)), (1, near(1 - share)), (2, far(2 - share))
    return _gathered(old, places, taps)


_MATRICES = {"bilinear": _bilinear, "aligned": _aligned, "bicubic": _bicubic}
METHODS = tuple(_MATRICES)


def grid(table: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes a grid of learned positions, without antialiasing.

    Args:
        table: `[rows, columns, width]`.
        size: rows and columns wanted, each at least 1.
        method: as torch.nn.functional.interpolate has it: "bilinear" (align_corners=False: how ViLT and timm of its
            time load another grid), "aligned" (bilinear, align_corners=True) or "bicubic" (align_corners=False).

    Returns:
        `[*size, width]`, float32, within 1e-6 of PyTorch.

    Raises:
        UserError: an unknown method.
        ValueError: not a grid, or an empty one.
    """
    if method not in _MATRICES:
        raise UserError(
            f"Unknown way to resize a position grid: {method!r}.{closest(method, METHODS)} Possible: "
            f"{', '.join(METHODS)}. Give one of them."
        )
    if table.ndim != 3 or min(*table.shape[:2], *size) < 1:
        raise ValueError(f"no grid of {list(table.shape)} can become one of {list(size)}")
    down, across = (_MATRICES[method](old, new) for old, new in zip(table.shape[:2], size, strict=True))
    resized = np.einsum("ij,jkw,lk->ilw", down, table.astype(np.float64), across, optimize=True)
    return resized.astype(np.float32)


def rows(table: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Text positions for texts of another length: the first rows of `table`, what is beyond them from `drawn`.

    Args:
        table: `[n, width]`, from a file.
        drawn: `[m, width]`, initial values.

    Returns:
        `[m, width]`, float32.

    Raises:
        ValueError: their widths differ.
    """
    if table.ndim != 2 or table.shape[1:] != drawn.shape[1:]:
        raise ValueError(f"rows of {list(table.shape)} cannot go among rows of {list(drawn.shape)}")
    result = np.array(drawn, np.float32)
    kept = min(len(table), len(drawn))
    result[:kept] = table[:kept]
    return result


def repeated_rows(table: np.ndarray, count: int) -> np.ndarray:
    """The first `count` rows of `[n, width]`, the last one repeated where there are fewer.

    So the original starts the third modality of NLVR2: a copy of the picture's row.

    Raises:
        ValueError: there is no row to repeat, or none is wanted.
    """
    if table.ndim != 2 or len(table) == 0 or count < 1:
        raise ValueError(f"{list(table.shape)} cannot become {count} rows")
    return table[np.minimum(np.arange(count), len(table) - 1)].astype(np.float32)


def answers(
    table: np.ndarray,
    drawn: np.ndarray,
    old_labels: Sequence[str],
    new_labels: Sequence[str],
    axis: int,
    more: int = 0,
) -> tuple[np.ndarray, int]:
    """Carries the classes of an answer head over to another list of answers, by label; "" is nobody's label.

    Args:
        table: weights or biases from a file, classes of `old_labels` along `axis`.
        drawn: initial values, classes of `new_labels` along `axis`, all else alike.
        old_labels: the answers that the file was trained with, in order.
        new_labels: the answers wanted, in order.
        axis: of the classes.
        more: outputs behind the classes that both have ("no object"): they stay the last.

    Returns:
        float32 of the shape of `drawn`: an answer that both lists have keeps its weights, the others are drawn; and how
        many were kept.

    Raises:
        UserError: a list names an answer twice, or its length is not that of the array.
        ValueError: the arrays differ in more than `axis`.
    """
    for kind, labels, array in (("old", old_labels, table), ("new", new_labels, drawn)):
        _check_labels(kind, labels, array.shape[axis] - more)
    result = np.moveaxis(np.array(drawn, np.float32), axis, 0)
    source = np.moveaxis(table, axis, 0)
    if source.shape[1:] != result.shape[1:]:
        raise ValueError(f"{list(table.shape)} and {list(drawn.shape)} differ in more than axis {axis}")
    place = {label: index for index, label in enumerate(old_labels) if label}
    pairs = [(new, place[label]) for new, label in enumerate(new_labels) if label in place]
    if pairs:
        new, old = map(list, zip(*pairs, strict=True))
        result[new] = source[old]
    if more:
        result[-more:] = source[-more:]
    return np.ascontiguousarray(np.moveaxis(result, 0, axis)), len(pairs)


def _check_labels(kind: str, labels: Sequence[str], classes: int) -> None:
    if len(labels) != classes:
        raise UserError(
            f"The list of {kind} answers has {len(labels)} labels, but the head has {classes} classes. Give the list "
            "that belongs to these weights, one label a class, in their order."
        )
    named = [label for label in labels if label]
    if len(set(named)) < len(named):
        seen: set[str] = set()
        twice = next(label for label in named if label in seen or seen.add(label))
        raise UserError(
            f"The list of {kind} answers has {twice!r} twice, but each of its {len(labels)} labels must name one class. "
            "Remove or rename one of the two."
        )
