# SPDX-License-Identifier: Apache-2.0
"""Random crops, flips and RandAugment: all lots are drawn on the host by (seed, position), tensorflow only obeys.

With a crop: crop, resize to a square, flip, RandAugment (as ALBEF). Without: RandAugment on the raw picture,
resize, flip (as ViLT, which has no flip). The result is a function of the row's `draw` alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data import image, order, randaugment, resample
from vlp_jax.types import UserError

_AREA, _RATIO, _PLACE, _FLIP, _OPERATION, _SIGN = range(0xA0, 0xA6)  # separate the uses of a draw
_TRIES = 10
MOST = 14  # operations a picture: the graph grows with each
_RATIOS = (3 / 4, 4 / 3)  # width by height
# "left" and "right" as whole words, also in "left-hand", "leftmost", "righthand", "rightwards", "left-handed".
_SIDE = re.compile(r"\b(?:left|right)(?:[ -]?(?:most|hand|handed|ward|wards|side))?\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What may happen to a picture; the default is nothing.

    Attributes:
        number, magnitude: RandAugment's; number 0 = off.
        crop: least and greatest share of the area, or () = off.
        flip: probability.
    """

    number: int = 0
    magnitude: float = 0.0
    crop: tuple[float, ...] = ()
    flip: float = 0.0


def rule(data: Any) -> Rule:
    """Reads `config.data`: randaugment, crop, flip.

    Raises:
        UserError: values outside what is possible.
    """
    for key in ("randaugment", "crop"):
        if not all(isinstance(value, int | float) and abs(value) < float("inf") for value in data[key]):
            raise UserError(
                f"data.{key}={tuple(data[key])} are not numbers. Give () for off, or two numbers."
            )
    drawn, crop = tuple(data.randaugment), tuple(float(share) for share in data.crop)
    whole = len(drawn) == 2 and drawn[0] == int(drawn[0])
    if drawn and not (whole and 1 <= drawn[0] <= MOST and 0 <= drawn[1] <= randaugment.LARGEST):
        raise UserError(
            f"data.randaugment={drawn} is not a number of operations (1 to {MOST}) and a magnitude (0 to "
            f"{randaugment.LARGEST}). Possible are () or such a pair. Give (2, 9) for the usual."
        )
    if crop and not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
        raise UserError(
            f"data.crop={crop} is not the least and the greatest share of the area that a crop keeps. Possible are "
            "() or two rising numbers above 0 and up to 1. Give (0.5, 1.0), for example."
        )
    number, magnitude = (int(drawn[0]), float(drawn[1])) if drawn else (0, 0.0)
    return Rule(number, magnitude, crop, probability(data, "flip"))


def probability(data: Any, key: str) -> float:
    """Reads a share of the pictures from `config.data`.

    Raises:
        UserError: it is not between 0 and 1.
    """
    share = float(data[key])
    if not 0 <= share <= 1:
        raise UserError(
            f"data.{key}={share} is not a probability. Possible are 0 to 1. Give 0.5 for half of the pictures."
        )
    return share


def mentions_side(text: str) -> bool:
    """Whether a text says left or right, so that it would not fit the mirrored picture.

    Such pictures are not flipped. To swap the words instead would spoil texts: "left" is also a verb ("he left
    the room"), "right" an adverb ("right behind"). Not to flip is never wrong.
    """
    return _SIDE.search(text) is not None


def flips(draw: np.ndarray, texts: Sequence[str], probability: float) -> np.ndarray:
    """Draws which pictures are mirrored, bool [n]; none whose text mentions a side."""
    lots = order.uniform(np.asarray(draw), _FLIP) < probability
    return lots & ~np.fromiter((mentions_side(text) for text in texts), bool, len(lots))


def crops(draw: np.ndarray, height: np.ndarray, width: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Draws a stretch of each picture by the rule of torchvision's `RandomResizedCrop.get_params`.

    A share of the area and a ratio of the sides (log-uniform between 3/4 and 4/3), ten tries to fit; after that
    the middle, as large as the ratios allow.

    Args:
        draw: uint [n].
        height, width: int [n], pixels.
        shares: least and greatest share of the area.

    Returns:
        int32 [n, 4]: top, left, height, width.
    """
    draw, tall, wide = (np.asarray(value)[:, None] for value in (draw, height, width))
    tries = np.arange(_TRIES)
    area = tall * wide * (shares[0] + (shares[1] - shares[0]) * order.uniform(draw, _AREA, tries))
    low, high = np.log(_RATIOS)
    ratio = np.exp(low + (high - low) * order.uniform(draw, _RATIO, tries))
    columns, rows = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (columns > 0) & (columns <= wide) & (rows > 0) & (rows <= tall)
    first = np.argmax(fits, 1)[:, None]
    rows, columns = (np.take_along_axis(side, first, 1)[:, 0] for side in (rows, columns))
    tall, wide, fits = tall[:, 0], wide[:, 0], fits.any(1)
    top = np.floor(order.uniform(draw[:, 0], _PLACE, 0) * (tall - rows + 1))
    left = np.floor(order.uniform(draw[:, 0], _PLACE, 1) * (wide - columns + 1))
    rows = np.where(fits, rows, np.minimum(tall, np.maximum(np.rint(wide / _RATIOS[0]), 1)))
    columns = np.where(fits, columns, np.minimum(wide, np.maximum(np.rint(tall * _RATIOS[1]), 1)))
    top, left = np.where(fits, top, (tall - rows) // 2), np.where(fits, left, (wide - columns) // 2)
    return np.stack([top, left, rows, columns], -1).astype(np.int32)


def operations(draw: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws RandAugment's operations, with replacement, and their signs (1 or -1): int32 [n, number] each."""
    draw, which = np.asarray(draw)[:, None], np.arange(number)
    chosen = (order.uniform(draw, _OPERATION, which) * len(randaugment.OPERATIONS)).astype(np.int32)
    return chosen, np.where(order.uniform(draw, _SIGN, which) < 0.5, 1, -1).astype(np.int32)


def plan(
    given: Rule,
    layout: image.Layout,
    draw: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    texts: Sequence[str],
) -> dict[str, np.ndarray]:
    """Says for n pictures everything that will happen to them, from their sizes and texts alone.

    Args:
        given: the augmentation.
        layout: of the patches; with a crop the pictures become squares of `layout.shorter`.
        draw: uint [n].
        height, width: int [n], original pixels.
        texts: n; what is said about each picture (several texts joined).

    Returns:
        The arrays of `image.plan` and those of `keys`, but the contents.
    """
    made, before = {}, np.stack([height, width], -1)
    if given.crop:
        made["box"] = crops(draw, height, width, given.crop)
        before = made["box"][:, 2:]
        height = width = np.full(len(before), layout.shorter)
    patches = image.plan(height, width, draw, layout)
    after = patches["size"]
    if given.number:
        made["operations"], signs = operations(draw, given.number)
        sizes = after if given.crop else before
        made["affine"] = randaugment.affine(made["operations"], signs, sizes, given.magnitude)
    mirrored = flips(draw, texts, given.flip) if given.flip else None
    return patches | made | resample.plan(before, after, mirrored)


def keys(given: Rule) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The arrays that `apply` takes: name -> type (`object` for bytes) and shape of one row."""
    needed = {"contents": (object, ()), "before": (np.int32, (2,)), "after": (np.int32, (2,))}
    needed |= {"across": (object, ()), "down": (object, ())}
    if given.crop:
        needed["box"] = (np.int32, (4,))
    if given.number:
        needed["operations"] = (np.int32, (given.number,))
        needed["affine"] = (np.int32, (given.number, 6))
    return needed


def apply(row: dict[str, Any], given: Rule):
    """Decodes a picture and does what `plan` has said; a tensorflow function, eager or not.

    Args:
        row: the tensors of `keys`; others are not looked at.

    Returns:
        uint8 [height, width, 3] of the size planned.
    """
    picture = image.decode(row["contents"], row["box"] if given.crop else None)

    def augmented(picture):
        for number in range(given.number):
            chosen = row["operations"][number], row["affine"][number]
            picture = randaugment.apply(picture, *chosen, given.magnitude)
        return picture

    def resized(picture):
        return resample.resize(picture, *(row[key] for key in ("before", "after", "across", "down")))

    return augmented(resized(picture)) if given.crop else resized(augmented(picture))
