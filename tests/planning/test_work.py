# SPDX-License-Identifier: Apache-2.0
"""FLOPs of traced programs against sums by hand, and of ViLT against its published sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from configs import vilt
from vlp_jax.data import spec
from vlp_jax.planning import chips, estimate, work
from vlp_jax.systems import vilt as system


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products():
    assert work.flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    heads = work.flops(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), shape(2, 4, 6, 8), shape(2, 4, 9, 8))
    assert heads == 2 * 2 * 4 * 6 * 9 * 8


def test_convolution():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    # 4 x 4 places, 10 features, each from a 2 x 2 window of 3 of the 6 channels.
    assert work.flops(convolve, shape(1, 8, 8, 6), shape(2, 2, 3, 10)) == 2 * 16 * 10 * 4 * 3


def test_loops_branches_and_functions_inside_functions():
    x, w, one = shape(4, 4), shape(4, 4), 2 * 4**3

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jax.jit(product))(x, w), None), x, None, length=7)[0]

    assert work.flops(scanned, x, w) == 7 * one
    assert work.flops(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: scanned(x, w), x), x, w) == 21 * one
    branch = work.flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w)
    assert branch == 2 * one
    # Forward and backward of one product are three products, which is why a training step counts three forwards.
    assert work.flops(jax.grad(lambda w, x: (product(x, w) ** 2).sum(), argnums=(0, 1)), w, x) == 3 * one


def test_selections_are_no_work():
    def pick(ids, table, w):
        with jax.named_scope("select"):
            rows = jax.jit(lambda ids: jax.nn.one_hot(ids, 11) @ table)(ids)
        return rows @ w

    ids = jax.ShapeDtypeStruct((5,), jnp.int32)
    assert work.flops(pick, ids, shape(11, 4), shape(4, 6)) == 2 * 5 * 4 * 6


def figures(argument: str, **changes: object) -> dict:
    config = vilt.get_config(argument)
    config.train.batch_size = 8
    config.model.update(changes)
    config = system.resolve(config, estimate.facts(config))
    return estimate.analytic(config, system, spec.spec(config, 8), chips.find("v5e:2x4"))


def test_vilt_has_its_published_size_and_the_flops_that_its_sizes_imply():
    found = figures("variant=b32")
    # Kim et al. 2021, table 6: 87.4 million parameters in the model without its word embeddings.
    assert found["parameters_blocks_and_patch_projection"] == 87_414_528
    width, depth, vocabulary, tokens, patches = 768, 12, 30522, 40 + 1 + 200, 200
    stack = depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)
    masked = spec.spec(vilt.get_config("variant=b32"), 1)["mlm_positions"].shape[1]
    words = 2 * masked * (width**2 + width * vocabulary)
    # Two passes of the stack over one embedding of the picture; under 1 per cent is for the other heads, positions and
    # alignment.
    expected = 3 * (2 * stack + 2 * patches * 3 * 32**2 * width + words)
    per_pair = found["useful_flops_per_step"] / found["batch_size"]
    assert expected < per_pair < 1.01 * expected
    assert found["useful_flops_per_step"] <= found["flops_per_step"] < 1.1 * found["useful_flops_per_step"]


def test_flops_depend_neither_on_how_the_layers_run_nor_on_what_is_kept():
    fusion = vilt.get_config("variant=tiny,smoke").model.fusion
    ways = [{}, {"unroll": 4}, {"fusion": {**fusion.to_dict(), "remat": True}}]
    counted = {figures("variant=tiny,smoke", **changes)["flops_per_step"] for changes in ways}
    assert len(counted) == 1 and counted.pop() > 0


def test_state_is_cut_by_the_preset():
    def held(rules: str) -> tuple[int, int]:
        config = vilt.get_config("variant=tiny,smoke")
        config.train.batch_size, config.parallel.rules = 8, rules
        config = system.resolve(config, estimate.facts(config))
        found = estimate.analytic(config, system, spec.spec(config, 8), chips.find("v5e:2x4"))
        return found["state_bytes_per_device"], found["parameters"]

    whole, parameters = held("dp")
    cut, _ = held("fsdp")
    # Parameters and two moments in float32, and a few numbers; only vectors of odd size stay whole under fsdp.
    assert 12 * parameters <= whole < 12 * parameters + 100
    assert 12 * parameters / 8 < cut < 1.1 * 12 * parameters / 8


def test_facts_are_supposed_only_where_the_config_leaves_them_open():
    config = vilt.get_config("variant=tiny")
    assert estimate.facts(config)["vocab_size"] == 30522
    config.model.text_embed.vocab_size = 99
    assert estimate.facts(config)["vocab_size"] == 99
    assert system.resolve(config, estimate.facts(config)).model.text_embed.vocab_size == 99
