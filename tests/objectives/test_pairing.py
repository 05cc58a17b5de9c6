# SPDX-License-Identifier: Apache-2.0
"""Partners of image-text matching: exactly half, never the own picture, uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.objectives.pairing import exchange


def draw(seed, image, source=None, valid=None):
    image = np.asarray(image, np.int32)
    source = np.zeros_like(image) if source is None else np.asarray(source, np.int32)
    valid = np.ones(image.shape, bool) if valid is None else np.asarray(valid)
    return [np.asarray(x) for x in jax.jit(exchange)(jax.random.key(seed), image, source, valid)]


@pytest.mark.parametrize("batch", [2, 7, 64])
def test_half_are_negative_with_texts_of_other_pictures(batch):
    for seed in range(5):
        image = np.random.default_rng(seed).permutation(batch)
        partner, matched = draw(seed, image)
        assert (matched == 0).sum() == batch - batch // 2
        np.testing.assert_array_equal(partner[matched == 1], np.arange(batch)[matched == 1])
        assert (image[partner] != image)[matched == 0].all()


def test_rows_of_one_picture_never_exchange():
    image = [5, 1, 5, 5, 2, 5, 1, 5]
    for seed in range(50):
        partner, matched = draw(seed, image)
        assert (np.take(image, partner) != image)[matched == 0].all()
        assert (matched == 0).sum() == 4


def test_same_number_in_two_sources_is_two_pictures():
    partner, matched = draw(0, [3, 3], [0, 1])
    assert sorted(matched) == [0, 0] or (matched == 0).sum() == 1
    assert (partner != [0, 1])[matched == 0].all()


def test_no_partner_stays_positive_and_padding_takes_no_part():
    _, matched = draw(0, [4, 4, 4, 4])
    np.testing.assert_array_equal(matched, 1)
    for seed in range(50):
        partner, matched = draw(seed, [0, 1, 2, 3, 4, 5], valid=np.arange(6) < 4)
        np.testing.assert_array_equal(matched[4:], -1)
        assert (matched[:4] == 0).sum() == 2 and (partner[:4] < 4).all()


@pytest.mark.slow
def test_partners_and_labels_are_uniform():
    image = jnp.array([0, 0, 1, 2, 3, 4])
    zeros, ones = jnp.zeros(6, jnp.int32), jnp.ones(6, bool)
    keys = jax.random.split(jax.random.key(1), 6000)
    partner, matched = jax.vmap(lambda k: exchange(k, image, zeros, ones))(keys)
    np.testing.assert_allclose((matched == 0).mean(0), 0.5, atol=0.03)
    for row, others in ((0, [2, 3, 4, 5]), (4, [0, 1, 2, 3, 5])):
        drawn = np.asarray(partner[:, row])[np.asarray(matched[:, row]) == 0]
        share = np.bincount(drawn, minlength=6)[others] / len(drawn)
        np.testing.assert_allclose(share, 1 / len(others), atol=0.03)
