# SPDX-License-Identifier: Apache-2.0
"""Word-patch alignment against the golden values of the original code and a naive loop."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.objectives import transport


def golden_inputs():
    b, i, d = np.meshgrid(np.arange(2), np.arange(5), np.arange(4), indexing="ij")
    text = np.sin(1.0 + b + 2 * i + 3 * d).astype(np.float32)
    b, j, d = np.meshgrid(np.arange(2), np.arange(6), np.arange(4), indexing="ij")
    image = np.cos(0.5 + b + 2 * j + 3 * d).astype(np.float32)
    text_mask, image_mask = np.ones((2, 5), bool), np.ones((2, 6), bool)
    text_mask[0, [0, 4]] = text_mask[1, [0, 2, 3, 4]] = False
    image_mask[:, 0] = image_mask[1, [4, 5]] = False
    return text, image, text_mask, image_mask


def test_golden_values_of_the_original():
    text, image, text_mask, image_mask = golden_inputs()
    cost = transport.cosine_cost(text, image, text_mask, image_mask)
    np.testing.assert_allclose(
        cost[0, 1, 1:6], [1.83234239, 1.99766529, 0.08132172, 1.73984706, 1.97526193], rtol=2e-6
    )
    plan = transport.transport_plan(cost, text_mask, image_mask)
    np.testing.assert_allclose(jnp.sum(cost * plan, (1, 2)), [0.84930640, 1.30836427], rtol=1e-5)
    np.testing.assert_allclose(plan.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(plan[0].sum(0)[1:], 1 / 5, rtol=1e-4)
    np.testing.assert_allclose(plan[0].sum(1)[1:4], 1 / 3, rtol=1e-4)


def naive_plan(cost, beta, iterations):
    """IPOT on one pair without masks, by the loops of the paper's algorithm 1."""
    n, m = cost.shape
    plan, sigma, kernel = np.ones((n, m)), np.full(m, 1 / m), np.exp(-cost / beta)
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (n * (q @ sigma))
        sigma = 1 / (m * (q.T @ delta))
        plan = delta[:, None] * q * sigma[None]
    return plan


def test_padding_changes_nothing_and_the_naive_loop_agrees():
    draw = np.random.default_rng(0)
    cost = draw.uniform(0, 2, (1, 4, 7)).astype(np.float32)
    masks = np.ones((1, 4), bool), np.ones((1, 7), bool)
    plan = transport.transport_plan(cost, *masks)
    # The original's order: scale the patches first.
    np.testing.assert_allclose(
        plan[0].T, naive_plan(cost[0].T.astype(np.float64), 0.5, 50), rtol=1e-4, atol=1e-6
    )
    padded = np.pad(cost, ((0, 0), (0, 3), (0, 2)), constant_values=9.0)
    wide = np.pad(masks[0], ((0, 0), (0, 3))), np.pad(masks[1], ((0, 0), (0, 2)))
    np.testing.assert_allclose(
        transport.transport_plan(padded, *wide)[:, :4, :7], plan, rtol=1e-5, atol=1e-12
    )


def test_gradient_is_finite_with_an_empty_caption_and_zero_features():
    text, image, text_mask, image_mask = golden_inputs()
    text_mask[1] = False
    text[0, 1] = 0.0

    def loss(text, image):
        return transport.word_patch_alignment(text, image, text_mask, image_mask, jnp.array([1, 0])).sum

    value, grads = jax.value_and_grad(loss, (0, 1))(text, image)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_sign_and_count():
    text, image, text_mask, image_mask = golden_inputs()
    term = transport.word_patch_alignment(text, image, text_mask, image_mask, jnp.array([1, 0]))
    np.testing.assert_allclose(term.sum, 0.84930640 - 1.30836427, rtol=1e-5)
    term = transport.word_patch_alignment(text, image, text_mask, image_mask, jnp.array([-1, 0]))
    np.testing.assert_allclose([term.sum, term.count], [-1.30836427, 1], rtol=1e-5)


def test_alignable_text_drops_first_and_last():
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(transport.alignable_text(mask), [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
