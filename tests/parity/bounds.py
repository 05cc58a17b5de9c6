# SPDX-License-Identifier: Apache-2.0
"""How far two sides may differ (DESIGN.md section 5), and the table that says where they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Pairs = Iterable[tuple[str, np.ndarray, np.ndarray]]  # (name, ours, reference)


class Mismatch(AssertionError):
    """The two sides differ; the message lists what does, in the order in which it was computed."""


def judge(what: str, rows: Sequence[tuple[str, float, float]]) -> float:
    """Raises where a distance passes its bound (or is no number); else returns the largest ratio of the two."""
    assert rows, f"{what}: nothing was compared"
    bad = [row for row in rows if not row[1] <= row[2]]
    if bad:
        lines = [f"  {name}: {distance:.3g}, allowed {bound:.3g}" for name, distance, bound in bad]
        raise Mismatch(f"{what}: {len(bad)} of {len(rows)} differ\n" + "\n".join(lines))
    return max(distance / bound if bound else 0.0 for _, distance, bound in rows)


def _checked(name: str, ours: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise Mismatch(f"{name}: shape {ours.shape}, the reference has {reference.shape}")
    assert reference.size, f"{name}: nothing of it is real"
    return ours, reference


def forward(pairs: Pairs, floor: float = 1.0, what: str = "outputs") -> float:
    """max|d| <= 1e-5 x max(`floor`, max|reference|), for each pair."""
    rows = []
    for name, ours, reference in pairs:
        ours, reference = _checked(name, ours, reference)
        bound = 1e-5 * max(floor, float(np.abs(reference).max()))
        rows.append((name, float(np.abs(ours - reference).max()), bound))
    return judge(what, rows)


def gradients(pairs: Pairs) -> float:
    """||d|| <= 1e-4 ||reference|| + 1e-7 ||all references||, for each tensor.

    The second part is for tensors without a true gradient, such as a key bias: theirs is rounding alone.
    """
    pairs = [(name, *_checked(name, ours, reference)) for name, ours, reference in pairs]
    everything = float(np.sqrt(sum(np.sum(reference**2) for _, _, reference in pairs)))
    assert everything > 0, "all gradients of the reference are 0"
    return judge(
        "gradients",
        [
            (name, np.linalg.norm(ours - ref), 1e-4 * np.linalg.norm(ref) + 1e-7 * everything)
            for name, ours, ref in pairs
        ],
    )


def losses(ours: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]) -> float:
    """|d| <= 1e-4 |reference| for the total, and for each term by its mean size: a signed term may pass 0."""
    rows = []
    sizes = {
        name: np.mean([abs(step[name]) for step in reference]) for name in reference[0] if name != "loss"
    }
    for number, (own, other) in enumerate(zip(ours, reference, strict=True)):
        for name, value in other.items():
            bound = 1e-4 * max(sizes.get(name, 0.0), abs(value))
            rows.append((f"step {number} {name}", abs(own[name] - value), bound))
    return judge("losses", rows)


def movements(pairs: Pairs, start: Mapping[str, np.ndarray], bound: float = 1e-4) -> float:
    """||d|| <= `bound` ||reference - start|| for each tensor after training."""
    rows = []
    for name, ours, reference in pairs:
        ours, reference = _checked(name, ours, reference)
        rows.append((name, np.linalg.norm(ours - reference), bound * np.linalg.norm(reference - start[name])))
    return judge("trained parameters", rows)
