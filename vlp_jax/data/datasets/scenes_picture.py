# SPDX-License-Identifier: Apache-2.0
"""Draws a scene: shapes as shade maps made once at eight times their size, colored and laid on a textured ground."""

from __future__ import annotations

import functools
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from vlp_jax.data.datasets import scenes_world as world

RGB = {
    "red": (214, 32, 36),
    "green": (34, 146, 54),
    "blue": (36, 66, 214),
    "yellow": (244, 214, 34),
    "purple": (142, 48, 178),
    "cyan": (52, 204, 220),
    "black": (30, 30, 32),
    "brown": (122, 74, 32),
}
CANVAS = 256  # side of a shade map; objects are 15 to 30 pixels, so this is eight times oversampled or more
MIDDLE = CANVAS // 2


def draw(objects: list[dict], size: tuple[int, int], level: int, rng: random.Random) -> bytes:
    """Returns the JPEG bytes of a scene of (height, width) pixels."""
    rules = world.LEVELS[level]
    pixels = _ground(size, rules.ground, rng)
    for item in objects:
        x, y, width, height = item["box"]
        alpha, shade, glint = _resized(item["shape"], item["material"], width)
        color = _color(item["color"], rules.near, rng)
        surface = color * shade * (1 - glint) + 255.0 * glint
        patch = pixels[y : y + height, x : x + width]
        patch += alpha * (surface - patch)
    picture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rules.quality, subsampling=0)
    return file.getvalue()


def outline(item: dict) -> list[float]:
    """The polygon of an object in pixels, x and y in turn (COCO segmentation)."""
    x, y, width, height = item["box"]
    points = []
    for px, py in _polygon(item["shape"]):
        points += [round(x + px / CANVAS * width, 2), round(y + py / CANVAS * height, 2)]
    return points


def area(polygon: list[float]) -> float:
    """Area of a polygon in square pixels (the shoelace formula)."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    turns = zip(points, points[1:] + points[:1], strict=True)
    return round(abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turns)) / 2, 2)


def _ground(size: tuple[int, int], lightness: tuple[int, int], rng: random.Random) -> np.ndarray:
    """A dull ground with stripes, checks, blots or grain, float32 [height, width, 3].

    On a light ground every color is the darker one, so that a shape has one sign: what makes level 1 quick to learn.
    """
    height, width = size
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    base = np.float32([rng.randint(*lightness) for _ in range(3)])
    base += (base.mean() - base) * np.float32(0.45)  # away from the colors of objects
    rows, columns = np.mgrid[:height, :width]
    period = rng.choice((4, 6, 8, 12))
    kind = rng.choice(("stripes", "bars", "checks", "blots", "grain"))
    if kind == "stripes":
        texture = (rows + columns) // period % 2
    elif kind == "bars":
        texture = (rows if rng.random() < 0.5 else columns) // period % 2
    elif kind == "checks":
        texture = (rows // period + columns // period) % 2
    elif kind == "blots":
        coarse = noise.integers(0, 256, (height // 8, width // 8), np.uint8)
        texture = (
            np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255.0
        )
    else:
        texture = noise.integers(0, 256, (height, width)) / 255.0
    strength = rng.uniform(10, 26)
    grain = noise.integers(-4, 5, (height, width))
    light = (texture - 0.5) * strength + grain
    return (base + light[..., None]).astype(np.float32)


def _color(name: str, near: float, rng: random.Random) -> np.ndarray:
    """A shade of the named color, drawn towards gray by `near`."""
    color = np.float32(RGB[name]) * np.float32(rng.uniform(0.94, 1.04))
    color += np.float32([rng.uniform(-7, 7) for _ in range(3)])
    return np.clip(color + (128 - color) * np.float32(near * rng.uniform(0.6, 1.0)), 0, 255)


@functools.lru_cache(maxsize=512)
def _resized(shape: str, material: str, side: int) -> tuple[np.ndarray, ...]:
    """The alpha, shade and glint maps of an object, float32 [side, side, 1]; shade 1 is the color itself."""
    maps = [
        np.asarray(one.resize((side, side), Image.Resampling.BOX), np.float32)
        for one in _maps(shape, material)
    ]
    alpha, shade, glint = (one[..., None] / 255 for one in maps)
    return alpha, shade * np.float32(1.275), glint


@functools.lru_cache(maxsize=16)
def _maps(shape: str, material: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Alpha, shade (200 = the color itself) and glint of a shape at CANVAS pixels, gray pictures."""
    alpha, shade, glint = (Image.new("L", (CANVAS, CANVAS), 0) for _ in range(3))
    polygon = _polygon(shape)
    ImageDraw.Draw(alpha).polygon(polygon, fill=255)
    pen = ImageDraw.Draw(shade)
    pen.polygon(polygon, fill=200)
    PAINT[shape](pen)
    if material == "shiny":
        _gloss(shade, glint, shape)
    pen.line([*polygon, polygon[0], polygon[1]], fill=90, width=14, joint="curve")
    return alpha, shade, glint


def _gloss(shade: Image.Image, glint: Image.Image, shape: str) -> None:
    """A dark lower half and a white spot and edge of light: seen at 15 pixels too."""
    fall = (
        Image.linear_gradient("L").resize((CANVAS, CANVAS)).point([255 - level // 2 for level in range(256)])
    )
    dark = Image.fromarray(
        (np.asarray(shade, np.uint16) * np.asarray(fall) // 235).clip(0, 255).astype(np.uint8)
    )
    shade.paste(dark)
    x, y = {"cube": (96, 70), "ball": (92, 84), "cone": (112, 118), "star": (118, 104)}[shape]
    pen = ImageDraw.Draw(glint)
    pen.ellipse((x - 40, y - 30, x + 40, y + 30), fill=130)
    pen.ellipse((x - 30, y - 22, x + 30, y + 22), fill=255)
    pen.ellipse((168 - 12, 172 - 12, 168 + 12, 172 + 12), fill=150)


def _polygon(shape: str) -> list[tuple[float, float]]:
    """The outline of a shape on the canvas."""
    if shape == "ball":
        return [_around(MIDDLE - 8, angle * math.tau / 32) for angle in range(32)]
    if shape == "cube":
        return [(24, 72), (96, 16), (240, 16), (240, 172), (172, 240), (24, 240)]
    if shape == "cone":
        base = [_around(1.0, math.pi - angle * math.pi / 12) for angle in range(13)]
        return [
            (MIDDLE, 8),
            *reversed([(MIDDLE + (x - MIDDLE) * 108, 206 + (y - MIDDLE) * 40) for x, y in base]),
        ]
    points = [
        _around(MIDDLE - 4 if turn % 2 == 0 else 56, (turn - 2.5) * math.tau / 10) for turn in range(10)
    ]
    return [(x, y + 8) for x, y in points]


def _around(radius: float, angle: float) -> tuple[float, float]:
    """A point on a circle about the middle of the canvas, rounded so that no platform differs."""
    return round(MIDDLE + radius * math.cos(angle), 4), round(MIDDLE + radius * math.sin(angle), 4)


def _paint_cube(pen: ImageDraw.ImageDraw) -> None:
    pen.polygon([(24, 72), (96, 16), (240, 16), (172, 72)], fill=250)
    pen.polygon([(172, 72), (240, 16), (240, 172), (172, 240)], fill=120)
    pen.line([(24, 72), (172, 72), (240, 16)], fill=90, width=8)
    pen.line([(172, 72), (172, 240)], fill=90, width=8)


def _paint_ball(pen: ImageDraw.ImageDraw) -> None:
    for step in range(6):  # darker from the middle to the rim
        radius, shift = 112 - 18 * step, 5 * step
        pen.ellipse(
            (128 - radius - shift, 128 - radius - shift, 128 + radius - shift, 128 + radius - shift),
            fill=165 + 9 * step,
        )


def _paint_cone(pen: ImageDraw.ImageDraw) -> None:
    pen.polygon([(128, 8), (128, 250), (244, 206)], fill=150)
    pen.polygon([(128, 8), (60, 240), (110, 250)], fill=235)


def _paint_star(pen: ImageDraw.ImageDraw) -> None:
    middle = (MIDDLE, MIDDLE + 8)
    points = _polygon("star")
    for first in range(0, 10, 2):
        pen.polygon([middle, points[first], points[first + 1]], fill=160)


PAINT = {"cube": _paint_cube, "ball": _paint_ball, "cone": _paint_cone, "star": _paint_star}
