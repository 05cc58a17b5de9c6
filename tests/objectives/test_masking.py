# SPDX-License-Identifier: Apache-2.0
"""Corrupted texts and masked patches against plain loops."""

import jax
import numpy as np

from tests.examples import random_batch, vilt_config
from vlp_jax.objectives import masking

NAMES = ("text_ids", "mlm_positions", "mlm_inputs", "mlm_labels")


def test_corrupted_text_and_gathered_features_against_loops():
    batch = random_batch(vilt_config(), 9, seed=3)
    batch["mlm_inputs"] = np.where(batch["mlm_labels"] >= 0, batch["mlm_labels"] % 7, 0).astype(np.int32)
    wanted = batch["text_ids"].copy()
    for row, slot in zip(*np.nonzero(batch["mlm_labels"] >= 0), strict=True):
        wanted[row, batch["mlm_positions"][row, slot]] = batch["mlm_inputs"][row, slot]
    np.testing.assert_array_equal(masking.corrupted_text(*(batch[name] for name in NAMES)), wanted)
    features = np.random.default_rng(0).normal(size=(9, 16, 3)).astype(np.float32)
    rows = np.arange(9)[:, None]
    picked = masking.at_positions(features, batch["mlm_positions"])
    np.testing.assert_array_equal(picked, features[rows, batch["mlm_positions"]])


def test_masked_patches_have_the_rates_of_the_original():
    valid = np.ones((200, 100), bool)
    valid[:, 60:] = False
    chosen, hidden = masking.patch_mask(jax.random.key(0), valid)
    assert not chosen[:, 60:].any() and not (hidden & ~chosen).any()
    np.testing.assert_allclose(chosen[:, :60].mean(), 0.15, atol=0.01)
    np.testing.assert_allclose(hidden.sum() / chosen.sum(), 0.8, atol=0.03)


def test_colour_bins_are_floored_means_of_each_channel():
    patches = np.zeros((1, 2, 12), np.uint8)
    patches[0, 0] = np.array([[255, 10, 0], [255, 11, 0], [255, 11, 1], [254, 11, 2]]).reshape(-1)
    bins = masking.patch_color_bins(patches, np.array([[True, False]]))
    np.testing.assert_array_equal(bins[0], [[254, 10, 0], [-1, -1, -1]])
