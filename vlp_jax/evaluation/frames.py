# SPDX-License-Identifier: Apache-2.0
"""Boxes drawn into pictures, with names and scores."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlp_jax.evaluation.detection import Detections, Judged, called

LEGIBLE = 480  # pixels of the longer side from which on names in a picture can be read
LONGEST_NAME = 32  # letters
RIGHT, WRONG, TRUTH = (46, 133, 85), (179, 55, 46), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Box:
    """A frame in a picture: x, y, width, height in pixels, color in red, green, blue, text "" for none."""

    box: Sequence[float]
    color: tuple[int, int, int]
    text: str = ""
    dashed: bool = False


def draw_boxes(picture: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Draws frames and above them their texts, the last one on top.

    A picture of less than `LEGIBLE` pixels is enlarged first, each pixel to a square: names must be readable.

    Args:
        picture: uint8 [height, width, 3].
        boxes: finite; what lies outside of the picture is cut off.

    Returns:
        uint8 [height x factor, width x factor, 3].
    """
    height, width = picture.shape[:2]
    factor = max(1, round(LEGIBLE / max(height, width)))
    height, width = height * factor, width * factor
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    line = max(2, round((height * width) ** 0.5 / 200))
    font = ImageFont.load_default(max(13.0, (height * width) ** 0.5 / 30))
    edges = [_inside(box.box, factor, width, height) for box in boxes]
    for box, sides in zip(boxes, edges, strict=True):
        _frame(draw, sides, box, line)
    taken: list[tuple[float, float, float, float]] = []
    for box, sides in zip(boxes, edges, strict=True):
        if box.text:
            _label(draw, sides, box, font, (width, height), taken)
    return np.asarray(image)


def _inside(box: Sequence[float], factor: int, width: int, height: int) -> list[float]:
    """Left, top, right and bottom inside the picture."""
    left, top, wide, high = (float(side) * factor for side in box)
    edges = np.array([left, top, left + wide - 1, top + high - 1])
    left, top, right, bottom = np.clip(edges, 0, [width - 1, height - 1] * 2).tolist()
    return [left, top, max(left, right), max(top, bottom)]


def _frame(draw: ImageDraw.ImageDraw, edges: Sequence[float], box: Box, line: int) -> None:
    left, top, right, bottom = edges
    if not box.dashed:
        draw.rectangle(edges, outline=box.color, width=line)
        return
    dash = 5 * line
    # A dark frame below, so that light dashes show on a light ground.
    draw.rectangle(edges, outline=(40, 40, 40), width=line)
    for x in np.arange(left, right, 2 * dash):
        for y in (top, bottom - line + 1):
            draw.rectangle([x, y, min(x + dash, right), max(y, y + line - 1)], fill=box.color)
    for y in np.arange(top, bottom, 2 * dash):
        for x in (left, right - line + 1):
            draw.rectangle([x, y, max(x, x + line - 1), min(y + dash, bottom)], fill=box.color)


def _label(draw, edges, box: Box, font, size: tuple[int, int], taken: list) -> None:
    """Writes above the frame, else inside, below labels that are there already; `taken` grows by one."""
    text = "".join(letter if letter.isprintable() else "?" for letter in box.text)
    _, _, wide, _ = draw.textbbox((0, 0), text, font=font)
    high = sum(font.getmetrics())
    left = max(0.0, min(edges[0], size[0] - wide - 6))
    top = edges[1] - high if edges[1] >= high else edges[1]
    while any(left < r and x < left + wide + 6 and top < b and y < top + high for x, y, r, b in taken):
        if top + 2 * high > size[1]:
            break  # no room: one on the other
        top += high
    area = (left, top, left + wide + 6, top + high)
    taken.append(area)
    draw.rectangle(area, fill=box.color)
    bright = np.dot(box.color, (0.299, 0.587, 0.114)) > 140
    draw.text((left + 3, top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def color_of(number: int) -> tuple[int, int, int]:
    """A color for a class, far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.78, 0.92)
    return round(255 * red), round(255 * green), round(255 * blue)


def of_classes(said: Detections, names: Sequence[str]) -> list[Box]:
    """Frames in the colors of their classes, the surest last."""
    rows = zip(said.boxes, said.labels, said.scores, strict=True)
    boxes = [
        Box(box, color_of(int(label)), f"{_name(names, label)} {score:.2f}") for box, label, score in rows
    ]
    return [boxes[row] for row in np.argsort(said.scores, kind="stable")]


def of_verdicts(judged: Judged, names: Sequence[str]) -> list[Box]:
    """Objects dashed, with their names if they were not found, and above them what was said, in right and wrong."""
    rows = zip(judged.objects.boxes, judged.objects.labels, judged.found, strict=True)
    there = [Box(box, TRUTH, "" if found else _name(names, label), True) for box, label, found in rows]
    order = np.argsort(judged.said.scores, kind="stable")
    said = zip(of_classes(judged.said, names), judged.right[order], strict=True)
    return there + [dataclasses.replace(box, color=RIGHT if right else WRONG) for box, right in said]


def _name(names: Sequence[str], label: int) -> str:
    name = called(names, label)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
