# SPDX-License-Identifier: Apache-2.0
"""What a proof says: part by part, how far a file's own result is from ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

BOUND = 1e-5  # of max(1, the largest value), as DESIGN.md has it


@dataclasses.dataclass(frozen=True)
class Line:
    """One part that both sides have: how far they are apart."""

    source: str
    part: str
    distance: float  # largest absolute difference
    largest: float  # largest absolute value of the reference
    bound: float = BOUND

    @property
    def good(self) -> bool:
        """Whether the distance is within the bound; never where one of the two is no number."""
        return bool(self.distance <= self.bound * max(1.0, self.largest))


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared, and what was not and why."""

    lines: Sequence[Line]
    left_out: Mapping[str, str]

    @property
    def good(self) -> bool:
        """Whether something was compared and all of it agrees."""
        return bool(self.lines) and all(line.good for line in self.lines)


def line(source: str, part: str, ours: np.ndarray, theirs: np.ndarray, bound: float = BOUND) -> Line:
    """Compares a part; arrays of unlike shapes are infinitely far apart."""
    if ours.shape != theirs.shape:
        return Line(source, f"{part} {list(ours.shape)} against {list(theirs.shape)}", float("inf"), 0.0)
    # Infinite values or none at all give a distance that is no number, which is never good.
    distance = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
    return Line(source, part, float(distance), float(np.abs(theirs).max()), bound)
