# SPDX-License-Identifier: Apache-2.0
"""Dropout: the generator against jax's own, rates, independence of neighbours, rows and keys, any sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.layers.dropout import Dropout, keep_mask, threefry, uniform_bits


def test_threefry_equals_that_of_jax():
    key = jnp.array([0x13198A2E, 0x03707344], jnp.uint32)
    count = np.random.default_rng(0).integers(0, 2**32, 2000, np.uint32)
    ours = jnp.concatenate(threefry((key[0], key[1]), count[:1000], count[1000:]))
    np.testing.assert_array_equal(ours, threefry_2x32(jnp.asarray(key), jnp.asarray(count)))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_rate_and_mean(rate):
    x = Dropout(rate).apply({}, jnp.ones((1000, 1000)), True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose((x == 0).mean(), rate, atol=2e-3)
    np.testing.assert_allclose(x.mean(), 1.0, atol=3e-3)
    assert len(np.unique(x)) == 2


def test_the_mean_is_exact_in_bfloat16():
    x = Dropout(0.1).apply(
        {}, jnp.full((64, 256), 3, jnp.bfloat16), True, rngs={"dropout": jax.random.key(0)}
    )
    assert set(np.unique(np.asarray(x, np.float32))) == {0.0, float(jnp.bfloat16(3 / 0.9))}


def test_no_dropout_without_training_or_rate():
    x = jnp.ones((3, 4))
    assert Dropout(0.5).apply({}, x, False) is x and Dropout(0.0).apply({}, x, True) is x


def test_a_traced_rate_gives_the_same_mask():
    shape = (4, 64)
    traced = jax.jit(keep_mask, static_argnums=2)(jax.random.key(3), 0.1, shape)
    np.testing.assert_array_equal(traced, keep_mask(jax.random.key(3), 0.1, shape))


def test_bits_are_uniform_and_all_neighbours_independent():
    shape = (64, 64, 256)
    numbers = np.asarray(uniform_bits(jax.random.key(7), shape))
    share = np.bincount(numbers.reshape(-1) >> 24, minlength=256) / numbers.size * 256
    assert np.abs(share - 1).max() < 5 / np.sqrt(numbers.size / 256)
    other = np.asarray(uniform_bits(jax.random.key(8), shape))
    signs = {name: x.astype(np.float64) / 2**31 - 1 for name, x in (("this", numbers), ("other", other))}
    this, far = signs["this"], 5 / 3 / np.sqrt(numbers.size)  # five deviations of a product of two uniforms
    shifted = [np.roll(this, shift, axis) for axis in range(3) for shift in (1, 2, 4, 64 if axis == 2 else 3)]
    for second in [*shifted, signs["other"]]:
        assert abs((this * second).mean()) < far
    for bit in range(32):
        ones = ((numbers >> np.uint32(bit)) & 1).mean()
        assert abs(ones - 0.5) < 2.5 / np.sqrt(numbers.size)
    assert len(np.unique(numbers[..., 0])) > 64 * 64 - 10


def test_rows_drop_as_many_as_chance_says():
    dropped = 768 - np.asarray(keep_mask(jax.random.key(1), 0.1, (4096, 768))).sum(-1)
    assert abs(dropped.mean() - 76.8) < 0.6
    assert 0.94 < dropped.std() / np.sqrt(768 * 0.1 * 0.9) < 1.06


def test_the_mask_is_the_same_however_it_is_sharded():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    shape, key = (8, 3, 32), jax.random.key(5)
    sharding = NamedSharding(mesh, PartitionSpec("rows", None, "columns"))
    spread = jax.jit(lambda: keep_mask(key, 0.3, shape), out_shardings=sharding)()
    np.testing.assert_array_equal(spread, keep_mask(key, 0.3, shape))
