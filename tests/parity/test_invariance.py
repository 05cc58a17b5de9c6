# SPDX-License-Identifier: Apache-2.0
"""An example's outputs do not depend on its batch mates, on how far it is padded, or on what stands in padding."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.parity import bounds, harness
from tests.parity.cases import CASES, made
from vlp_jax.training.paths import nest

# Keys of a batch with padding along axis 1 -> what pads them, and which entries of which key are real.
PADDED = {
    "text_ids": (0, "text_mask", bool),
    "patches": (0, "patch_mask", bool),
    "patch_positions": (0, "patch_mask", bool),
    "image": (0, "image_mask", bool),
    "mlm_positions": (0, "mlm_labels", lambda labels: labels >= 0),
    "mlm_inputs": (0, "mlm_labels", lambda labels: labels >= 0),
    "text_mask": (False, "", None),
    "patch_mask": (False, "", None),
    "mlm_labels": (-1, "", None),
}
PLAIN = [case for case in CASES if case.compares == "outputs"]
NAMES = [pytest.param(case.name, marks=[pytest.mark.slow] * case.slow) for case in PLAIN]


def longer(batch, text_length):
    """The same examples with more padding: texts up to `text_length`, four more of all else."""

    def pad(key, value):
        if key not in PADDED:
            return value
        more = text_length - value.shape[1] if key.startswith("text") else 4
        width = [(0, 0), (0, more)] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, width, constant_values=PADDED[key][0])

    return {key: pad(key, value) for key, value in batch.items()}


def littered(batch):
    """The same examples with noise in all padding, each kind within the range of real values."""
    draw, result = np.random.default_rng(5), dict(batch)
    for key, (_, by, real) in PADDED.items():
        if by and key in batch:
            value, mask = batch[key], np.vectorize(real)(batch[by])
            noise = draw.integers(0, int(value.max()) + 1, value.shape).astype(value.dtype)
            result[key] = np.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, noise)
    return result


def moved(batch, strangers):
    """Row r of `batch` at r + 1 modulo its rows, every second row a stranger; returns which row went where."""
    rows = len(batch["example_id"])
    places = {row: (row + 1) % rows for row in range(0, rows, 2)}
    result = {key: value.copy() for key, value in strangers.items()}
    for row, place in places.items():
        for key in result:
            result[key][place] = batch[key][row]
    return result, places


@functools.cache
def start(name):
    ours = made(name)
    params = nest(harness.drawn(harness.shapes(ours)).items())
    batch = ours.batch("padded", 0)
    return ours, params, batch, harness.outputs(ours.outputs, params, batch)


def variants(ours, batch):
    """(what changed, the batch, row -> its place there)."""
    rows = {row: row for row in range(len(batch["example_id"]))}
    mixed, places = moved(littered(batch), ours.batch("padded", 9))
    yield "alone", {key: value[2:3] for key, value in batch.items()}, {2: 0}
    yield "littered", littered(batch), rows
    yield "littered, among strangers", mixed, places
    if (
        "image" not in batch
    ):  # on a larger canvas cells at the border see other zeros: tests/systems/test_detr.py
        more = longer(batch, ours.config.data.text_length)
        yield "longer", more, rows
        yield "longer and littered", littered(more), rows


def compare(ours, batch, base, other_batch, other, places, what):
    masks, other_masks = ours.masks(batch), ours.masks(other_batch)
    pairs = []
    for key in base:
        for row, place in places.items():
            if base[key].ndim:  # a number for the whole batch belongs to no row
                real = masks[key][row] if key in masks else ...
                other_real = other_masks[key][place] if key in other_masks else ...
                pairs.append((f"row {row} {key}", other[key][place][other_real], base[key][row][real]))
    return bounds.forward(pairs, what=what)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_depend_on_the_example_alone(name):
    ours, params, batch, base = start(name)
    for what, other_batch, places in variants(ours, batch):
        other = harness.outputs(ours.outputs, params, other_batch)
        print(
            f"{what}: {compare(ours, batch, base, other_batch, other, places, what):.2g} of what is allowed"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:1])
def test_gradients_do_not_depend_on_padding(name):
    ours, params, batch, _ = start(name)
    weights = harness.projections(ours.outputs, params, batch, ours.masks(batch))
    more = littered(longer(batch, ours.config.data.text_length))
    wide = harness.projections(ours.outputs, params, more, ours.masks(more))
    for key, weight in weights.items():
        wide[key] = np.zeros_like(wide[key])
        wide[key][tuple(slice(n) for n in weight.shape)] = weight
    base, _ = harness.gradients(ours.outputs, params, batch, weights)
    other, _ = harness.gradients(ours.outputs, params, more, wide)
    print(f"{bounds.gradients((path, other[path], base[path]) for path in base):.2g} of what is allowed")


@pytest.mark.parametrize("mask", ["text_mask", "patch_mask"])
def test_a_mask_that_is_not_heeded_is_seen(mask):
    ours, params, batch, base = start(PLAIN[0].name)
    other_batch = {**batch, mask: np.ones_like(batch[mask])}
    other = harness.outputs(ours.outputs, params, other_batch)
    with pytest.raises(bounds.Mismatch, match="row 0 pooled|row 2 pooled"):
        compare(ours, batch, base, batch, other, {row: row for row in range(5)}, mask)
