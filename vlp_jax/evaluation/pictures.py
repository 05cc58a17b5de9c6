# SPDX-License-Identifier: Apache-2.0
"""Drawing: patches back to pixels, heat-maps of a transport plan, charts as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

SHOWN = 0.16  # how much of a patch without mass is left to see
GROUND = 236.0  # the light grey that veils it
SMALL = 200  # pixels: up to here PNG without loss, above it JPEG
WIDTH, HEIGHT = 360, 190  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 8, 24  # margins of a chart
SMOOTHED = 30  # points from which on a line is drawn as its running mean, the points pale behind it

Points = Sequence[tuple[float, float]]


def unpatchify(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lays patches out as a picture, uint8 [height, width, 3]; slots that are not filled stay grey.

    Args:
        row: one row of a batch: patches uint8 [N, 3 p^2] (row, column, channel inside a patch), patch_positions
            [N, 2], patch_mask [N], grid_size [2].
    """
    size = round((row["patches"].shape[-1] / 3) ** 0.5)
    rows, columns = (int(n) for n in row["grid_size"])
    picture = np.full((rows, columns, size, size, 3), round(GROUND), np.uint8)
    real = row["patch_mask"].astype(bool)
    at = row["patch_positions"][real]
    picture[at[:, 0], at[:, 1]] = row["patches"][real].reshape(-1, size, size, 3)
    return picture.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)


def heat_map(mass: np.ndarray, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mass that a word has on each patch, as ViLT's demo shows it: float32 [rows, columns] in [0, 1].

    z-normalised over the patches that there are, cut to [1, 3], then stretched to [0, 1]. All zero where no patch
    stands out by one standard deviation.
    """
    real = row["patch_mask"].astype(bool)
    values = mass[real].astype(np.float64)
    deviation = values.std() if len(values) else 0.0
    # An even spread differs by rounding only, which must not be stretched into a pattern.
    if deviation <= 1e-5 * np.abs(values).sum():
        values = np.zeros_like(values)
    else:
        values = np.clip((values - values.mean()) / deviation, 1.0, 3.0)
        span = values.max() - values.min()
        values = (values - values.min()) / span if span else np.zeros_like(values)
    heat = np.zeros(tuple(int(n) for n in row["grid_size"]), np.float32)
    at = row["patch_positions"][real]
    heat[at[:, 0], at[:, 1]] = values
    return heat


def veil(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Fades the picture to light grey where there is no heat; colours stay true where there is.

    Args:
        picture: uint8 [height, width, 3], both sides multiples of those of `heat`.
        heat: float [rows, columns] in [0, 1], each cell a patch (nearest-resized).
    """
    rows, columns = heat.shape
    alpha = heat.repeat(picture.shape[0] // rows, axis=0).repeat(picture.shape[1] // columns, axis=1)
    alpha = (SHOWN + (1 - SHOWN) * alpha)[:, :, None]
    return np.round(picture * alpha + GROUND * (1 - alpha)).astype(np.uint8)


def data_uri(picture: np.ndarray, longest: int = 384) -> str:
    """A picture as text for the `src` of an image, at most `longest` pixels on its longer side."""
    image = Image.fromarray(picture)
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def chart(lines: Mapping[str, Points], label: str, fraction: bool = False) -> str:
    """Draws lines over the training step as inline SVG; its size follows the column it stands in.

    Args:
        lines: CSS class ("run", "reference", "blind", "oracle") -> points (step, value); "run" is drawn on top.
        label: what it shows, for readers of the screen.
        fraction: whether the axis goes from 0 to 1.
    """
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    steps = [step for points in lines.values() for step, _ in points] or [0.0]
    values = [value for points in lines.values() for _, value in points] or [0.0]
    last = max(*steps, 1.0)
    y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if fraction else ticks(min(values), max(values))

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        low, high = y_ticks[0], y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for step in [tick for tick in ticks(0.0, last, 4) if tick <= last]:
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{_short(step)}</text>')
    for name, points in sorted(lines.items(), key=lambda line: line[0] == "run"):
        smooth = running_mean(points)
        if len(points) >= SMOOTHED and name == "run":
            parts.append(f'<path class="line pale {name}" d="{_path(points, x, y)}"/>')
        parts.append(f'<path class="line {name}" d="{_path(smooth, x, y)}"/>')
        if len(points) < SMOOTHED:
            dots = "".join(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>' for s, v in points)
            parts.append(f'<g class="dots {name}">{dots}</g>')
    return "".join([*parts, "</svg>"])


def meter(score: float, blind: float | None, oracle: float | None) -> str:
    """A bar from 0 to 1 with ticks where the blind twin and the oracle stand."""
    parts = ['<svg class="meter" viewBox="0 0 200 16" preserveAspectRatio="none" aria-hidden="true">']
    parts.append('<rect class="track" x="0" y="5" width="200" height="6"/>')
    parts.append(f'<rect class="fill" x="0" y="5" width="{200 * min(max(score, 0.0), 1.0):.1f}" height="6"/>')
    for name, value in (("blind", blind), ("oracle", oracle)):
        if value is not None:
            at = min(max(200 * value, 1.5), 198.5)
            parts.append(f'<rect class="{name}" x="{at - 1.5:.1f}" y="1" width="3" height="14"/>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` steps apart, that span [low, high]."""
    if low == high:
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    span = max(high - low, 1e-9, abs(high) * 1e-6)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def running_mean(points: Points) -> list[tuple[float, float]]:
    """The mean over a window of a tenth of the points, centred and narrower at the ends; few points stay."""
    if len(points) < SMOOTHED:
        return list(points)
    half, values = len(points) // 20, np.array([value for _, value in points])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    means = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def _path(points: Points, x, y) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points) if points else ""


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
