# SPDX-License-Identifier: Apache-2.0
"""ViLT as a system: which parameters there are, what its outputs may depend on, what its objectives see."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import vilt as vilt_configs
from tests.convert.files import parameters
from tests.examples import random_batch, vilt_config
from vlp_jax import systems
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training.paths import nest
from vlp_jax.types import UserError


@pytest.fixture(scope="module")
def made():
    config = vilt_config()
    system = systems.get("vilt").build(config)
    mesh = meshes.make_mesh(config.parallel, jax.devices()[:1])
    batch = random_batch(config, 6)
    with shard.context(mesh, "dp"):
        make = lambda: system.init(jax.random.key(0), batch)[0]  # noqa: E731
        return config, system, shard.concrete(make, shard.abstract(make, mesh, "dp")), batch


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_b32_has_the_parameters_of_the_original():
    config = systems.get("vilt").resolve(vilt_configs.get_config("variant=b32"), {"vocab_size": 30522})
    system = systems.get("vilt").build(config)
    batch = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in b32_batch().items()}
    params = jax.eval_shape(
        lambda: system.init(
            jax.random.key(0), {k: jax.numpy.zeros(v.shape, v.dtype) for k, v in batch.items()}
        )
    )[0]
    assert count(params) == 135_660_092
    assert count(params["text_embed"]) == 23_474_688
    blocks = count(params["fusion"]["stack"]) + count(params["patch_embed"]["projection"])
    assert blocks == 87_414_528
    assert {name: count(head) for name, head in params["heads"].items()} == {
        "pooler": 590_592,
        "mlm": 24_063_546,
        "itm": 1_538,
    }


def b32_batch():
    config = vilt_configs.get_config("variant=b32")
    return random_batch(config, 1)


def test_masked_patches_add_their_head_and_vector():
    plain, masked = (
        jax.eval_shape(
            lambda c=config: systems.get("vilt").build(c).init(jax.random.key(0), random_batch(c, 2))[0]
        )
        for config in (vilt_config(), vilt_config(objectives__mpp=1.0))
    )
    assert set(masked["heads"]) - set(plain["heads"]) == {"mpp"}
    assert set(masked["patch_embed"]) - set(plain["patch_embed"]) == {"mask_vector"}


def test_outputs_do_not_depend_on_batch_mates_padding_or_patch_order(made):
    _, system, params, batch = made
    whole = system.predict["match"](params, batch)["match_logits"]
    for row in range(3):
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(
            system.predict["match"](params, alone)["match_logits"][0], whole[row], atol=2e-5
        )
    other = dict(batch)
    other["patches"] = np.where(batch["patch_mask"][..., None], batch["patches"], 255 - batch["patches"])
    other["text_ids"] = np.where(batch["text_mask"], batch["text_ids"], 7)
    np.testing.assert_array_equal(system.predict["match"](params, other)["match_logits"], whole)
    order = np.random.default_rng(0).permutation(12)
    turned = {**batch, **{k: batch[k][:, order] for k in ("patches", "patch_positions", "patch_mask")}}
    np.testing.assert_allclose(system.predict["match"](params, turned)["match_logits"], whole, atol=2e-5)


def test_encode_then_fuse_is_match(made):
    _, system, params, batch = made
    features = {
        **system.predict["encode_text"](params, batch),
        **system.predict["encode_image"](params, batch),
    }
    fused = system.predict["fuse"](params, features)["match_logits"]
    np.testing.assert_allclose(fused, system.predict["match"](params, batch)["match_logits"], atol=1e-6)
    plan = system.predict["match"](params, batch, plan=True)["plan"]
    assert plan.shape == (6, 16, 12)
    words = np.maximum(batch["text_mask"].sum(-1) - 2, 0)
    # Rows sum to 1 / number of words once the plan has converged; a plan never has mass on padding.
    np.testing.assert_allclose(plan.sum((1, 2))[words > 0], 1, atol=1e-3)
    assert not np.asarray(plan)[~np.broadcast_to(batch["patch_mask"][:, None], plan.shape)].any()


def test_mlm_reads_the_corrupted_text_and_itm_the_exchanged_one(made):
    config, system, params, batch = made
    with shard.context(meshes.make_mesh(config.parallel, jax.devices()[:1]), "dp"):
        prepared = jax.jit(system.prepare)(batch, jax.random.key(3))
        out = jax.jit(system.loss)(params, {}, prepared, jax.random.key(4))
    logits = system.predict["fill"](params, batch)["logits"]
    labels = batch["mlm_labels"]
    log_chance = jax.nn.log_softmax(logits)[
        np.arange(6)[:, None], np.arange(labels.shape[1]), np.maximum(labels, 0)
    ]
    np.testing.assert_allclose(out.terms["mlm"].sum, -log_chance[labels >= 0].sum(), rtol=1e-5)
    assert out.terms["mlm"].count == (labels >= 0).sum()
    partner = np.asarray(prepared["pair_example_id"])
    pairs = {**batch, "text_ids": batch["text_ids"][partner], "text_mask": batch["text_mask"][partner]}
    chance = jax.nn.log_softmax(system.predict["match"](params, pairs)["match_logits"])
    matched = np.asarray(prepared["matched"])
    np.testing.assert_array_equal(matched == 1, partner == np.arange(6))
    np.testing.assert_allclose(out.terms["itm"].sum, -chance[np.arange(6), matched].sum(), rtol=1e-5)


def test_padding_word_has_no_gradient(made):
    config, system, params, batch = made
    with shard.context(meshes.make_mesh(config.parallel, jax.devices()[:1]), "dp"):
        prepared = jax.jit(system.prepare)(batch, jax.random.key(3))
        grads = jax.jit(jax.grad(lambda p: system.loss(p, {}, prepared, jax.random.key(4)).terms["itm"].sum))(
            params
        )
    assert not grads["text_embed"]["word"][0].any() and grads["text_embed"]["word"][2].any()


@pytest.mark.parametrize(
    "changes, facts, words",
    [
        ({}, {}, "config.model.text_embed.vocab_size is -1"),
        (
            dict(model__text_embed__vocab_size=50),
            dict(vocab_size=60),
            "is 50, but the data has vocab_size 60",
        ),
        (dict(data__image_size=100), dict(vocab_size=60), "Take 96 or 112"),
        (
            dict(model__fusion__num_heads=3),
            dict(vocab_size=60),
            "not divisible by config.model.fusion.num_heads 3",
        ),
        (
            dict(model__text_embed__length=20),
            dict(vocab_size=60),
            "length is 20, but the data has text_length 28",
        ),
        (dict(model__patch_embed__patch_size=8), dict(vocab_size=60), "is 8, but the data has patch_size 16"),
    ],
)
def test_what_does_not_fit_is_explained(changes, facts, words):
    config = vilt_configs.get_config("variant=tiny")
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(UserError, match=words):
        systems.get("vilt").resolve(config, facts)


def test_unknown_system_lists_and_hints():
    with pytest.raises(UserError, match="Did you mean 'vilt'"):
        systems.get("vlit")


@pytest.fixture(scope="module")
def with_all_heads():
    """A ViLT with every head, its parameters and a batch with two pictures a text."""
    classes = dict(model__heads__rank=True, model__heads__answer=7, model__heads__pair=2)
    config = vilt_config(**classes, model__modalities=3)
    system = systems.get("vilt").build(config)
    batch = random_batch(config, 3)
    second = random_batch(config, 3, seed=1)
    for name in ("patches", "patch_positions", "patch_mask", "grid_size"):
        batch[f"{name}_1"] = second[name]
    return config, system, nest(parameters(config).items()), batch


def test_heads_of_fine_tuned_weights_give_their_logits(with_all_heads):
    _, system, params, batch = with_all_heads
    assert set(params["heads"]) == {"pooler", "mlm", "itm", "rank", "answer", "pair"}
    assert system.predict["answer"](params, batch)["logits"].shape == (3, 7)
    # Of two heads for matching the one that retrieval has left counts, beside a score of 0.
    logits = system.predict["match"](params, batch)["match_logits"]
    pooled = system.predict["embed"](params, batch)["pooled"]
    rank = params["heads"]["rank"]["dense"]
    np.testing.assert_allclose(
        logits[:, 1], (np.asarray(pooled) @ rank["kernel"])[:, 0] + rank["bias"], rtol=1e-5, atol=1e-6
    )
    assert not np.asarray(logits[:, 0]).any()


def test_a_pair_knows_its_first_picture_from_its_second(with_all_heads):
    _, system, params, batch = with_all_heads
    logits = system.predict["classify"](params, batch)["logits"]
    assert logits.shape == (3, 2)
    swapped = {name: x for name, x in batch.items()}
    for name in ("patches", "patch_positions", "patch_mask", "grid_size"):
        swapped[name], swapped[f"{name}_1"] = batch[f"{name}_1"], batch[name]
    assert np.abs(logits - system.predict["classify"](params, swapped)["logits"]).max() > 1e-5
    third = jax.tree.map(lambda x: x, params)
    modality = params["fusion"]["modality"] + np.array([[0.0], [0.0], [1.0]], np.float32)
    third["fusion"] = {
        **params["fusion"],
        "modality": modality * np.linspace(0.5, 2, modality.shape[1], dtype=np.float32),
    }
    assert np.abs(logits - system.predict["classify"](third, batch)["logits"]).max() > 1e-5


def test_word_pieces_are_tagged_without_a_pooler():
    config = vilt_config(
        objectives__mlm=0.0,
        objectives__itm=0.0,
        objectives__wpa=0.0,
        model__heads__tag=5,
        model__heads__pooler=False,
    )
    system = systems.get("vilt").build(config)
    batch = random_batch(config, 2)
    params = nn.unbox(jax.jit(system.init)(jax.random.key(0), batch)[0])
    assert set(params["heads"]) == {"tag"} and "embed" not in system.predict and "match" not in system.predict
    assert system.predict["classify"](params, batch)["token_logits"].shape == (2, 16, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__heads__pooler=False), "heads.pooler is off, but the heads itm read"),
        (dict(model__heads__pair=2), "set config.model.modalities to 3"),
    ],
)
def test_heads_that_lack_what_they_read_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        vilt_config(**changes)
