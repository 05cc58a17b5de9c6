# SPDX-License-Identifier: Apache-2.0
"""AdamW against torch and against the algorithm of transformers 4.2.1 written out in float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from vlp_jax.training import optimizer
from vlp_jax.types import UserError

STEPS = 20


def settings(**changes):
    config = common.get_config().optimizer
    config.update({"lr": 1e-2, "warmup": 0.2, "weight_decay": 0.1, **changes})
    return config


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "body": {"dense": {"kernel": draw(5, 3), "bias": draw(3)}, "norm": {"scale": draw(3)}},
        "head": {"kernel": draw(3, 2), "bias": draw(2)},
        "stem": {"frozen": {"kernel": draw(4)}},
    }


def make_grads():
    rng = np.random.default_rng(1)
    # Some gradients are small enough that the place of eps matters.
    scale = lambda path: 1e-7 if "norm" in str(path) else 1.0  # noqa: E731
    return [
        jax.tree.map_with_path(
            lambda path, x: (scale(path) * rng.normal(size=x.shape)).astype(np.float32), make_params()
        )
        for _ in range(STEPS)
    ]


def run(config, grads, steps=None):
    tx = optimizer.make(config, steps or STEPS)
    params, update = make_params(), jax.jit(tx.update)
    state = tx.init(params)
    for step, grad in enumerate(grads):
        params, state, info = update(grad, state, params, jnp.int32(step))
    return params, state, info


def flat(tree):
    return {"/".join(k.key for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def rate(config, step):
    warmup = int(config.warmup * STEPS)
    return config.lr * min(step / warmup, (STEPS - step) / (STEPS - warmup))


def test_uncorrected_is_the_algorithm_of_transformers_4_2_1():
    config = settings(no_decay=("bias$", "norm/scale$"), lr_multipliers=(("^head/", 10.0), ("kernel$", 3.0)))
    ours = flat(run(config, make_grads())[0])
    for path, start in flat(make_params()).items():
        p, m, v = start.astype(np.float64), 0.0, 0.0
        if "frozen" in path:
            np.testing.assert_array_equal(ours[path], start)
            continue
        decay = 0.0 if path.endswith(("bias", "norm/scale")) else 0.1
        factor = 10.0 if path.startswith("head") else 3.0 if path.endswith("kernel") else 1.0
        for step, grads in enumerate(make_grads()):
            g, lr = flat(grads)[path].astype(np.float64), rate(config, step) * factor
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g * g
            size = lr * np.sqrt(1 - config.b2 ** (step + 1)) / (1 - config.b1 ** (step + 1))
            p = p - size * m / (np.sqrt(v) + config.eps)
            p = p - lr * decay * p
        np.testing.assert_allclose(ours[path], p, rtol=1e-6, atol=2e-7, err_msg=path)


def test_corrected_is_torch_adamw():
    torch = pytest.importorskip("torch")
    config = settings(eps_placement="corrected", no_decay=("bias$",), lr_multipliers=(("^head/", 10.0),))
    ours = flat(run(config, make_grads())[0])
    tensors = {
        path: torch.nn.Parameter(torch.tensor(x, dtype=torch.float64))
        for path, x in flat(make_params()).items()
        if "frozen" not in path
    }
    groups = [
        {"params": [p], "weight_decay": 0.0 if path.endswith("bias") else 0.1} for path, p in tensors.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
    for step, grads in enumerate(make_grads()):
        for group, (path, p) in zip(adamw.param_groups, tensors.items(), strict=True):
            group["lr"] = rate(config, step) * (10.0 if path.startswith("head") else 1.0)
            p.grad = torch.tensor(flat(grads)[path], dtype=torch.float64)
        adamw.step()
    for path, p in tensors.items():
        np.testing.assert_allclose(ours[path], p.detach().numpy(), rtol=1e-6, atol=2e-7, err_msg=path)


def test_the_two_places_of_eps_differ_where_gradients_are_small():
    one = flat(run(settings(), make_grads())[0])["body/norm/scale"]
    other = flat(run(settings(eps_placement="corrected"), make_grads())[0])["body/norm/scale"]
    assert np.abs(one - other).max() > 1e-3


def test_clipping_is_by_the_global_norm_without_frozen_parameters():
    config = settings(weight_decay=0.0, clip_norm=0.5)
    tx, params = optimizer.make(config, STEPS), make_params()
    grads = jax.tree.map(np.ones_like, params)
    numbers = sum(x.size for path, x in flat(params).items() if "frozen" not in path)
    _, state, info = tx.update(grads, tx.init(params), params, jnp.int32(3))
    np.testing.assert_allclose(info["grad_norm"], np.sqrt(numbers), rtol=1e-6)
    np.testing.assert_allclose(info["lr"], rate(config, 3), rtol=1e-6)
    clipped = 0.5 / np.sqrt(numbers) * (1 - config.b1)
    for leaf in jax.tree.leaves(state["m"]):
        np.testing.assert_allclose(leaf, clipped, rtol=1e-5)
    small = jax.tree.map(lambda x: 1e-3 * x, grads)
    _, state, _ = tx.update(small, tx.init(params), params, jnp.int32(3))
    np.testing.assert_allclose(jax.tree.leaves(state["m"])[0], 1e-3 * (1 - config.b1), rtol=1e-5)


def test_count_and_rate_are_apart():
    tx, params = optimizer.make(settings(), STEPS), make_params()
    _, state, info = tx.update(make_grads()[0], tx.init(params), params, jnp.int32(7))
    assert int(state["count"]) == 1
    np.testing.assert_allclose(info["lr"], rate(settings(), 7), rtol=1e-6)


def test_state_keeps_its_structure_and_frozen_parameters_have_no_moments():
    tx, params = optimizer.make(settings(), STEPS), make_params()
    before = tx.init(params)
    assert set(before["m"]) == {"body", "head"}
    _, after, _ = tx.update(make_grads()[0], before, params, jnp.int32(0))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (before, after)]
    assert shapes[0] == shapes[1]
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    new, state, _ = tx.update(half, tx.init(half), half, jnp.int32(1))
    assert {x.dtype for x in jax.tree.leaves(state["m"])} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}


def test_moments_keep_the_boxes_of_parameters():
    box = nn.LogicallyPartitioned(jnp.ones((4, 2)), ("embed", "mlp"))
    state = optimizer.make(settings(), STEPS).init({"dense": {"kernel": box, "bias": jnp.ones(2)}})
    assert isinstance(state["m"]["dense"]["kernel"], nn.LogicallyPartitioned)
    assert state["v"]["dense"]["kernel"].names == ("embed", "mlp")


def test_describe_counts_tensors_and_matches():
    config = settings(no_decay=("bias$", "nothing"), lr_multipliers=(("^head/", 10.0),))
    text = optimizer.make(config, STEPS).describe(make_params())
    assert "decayed            3 tensors             24 numbers" in text
    assert "not decayed        2 tensors              5 numbers" in text
    assert "lr multiplied      2 tensors              8 numbers" in text
    assert "frozen             1 tensors              4 numbers" in text
    assert "no_decay 'nothing' matches 0 tensors" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_decay": ("(bias",)}, "no_decay holds '\\(bias'"),
        ({"frozen": ("*",)}, "frozen holds"),
        ({"lr_multipliers": (("(x", 2.0),)}, "lr_multipliers holds"),
        ({"lr_multipliers": ("head", 2.0)}, "possible: \\(regular expression, factor\\)"),
        ({"eps_placement": "uncorected"}, "Did you mean 'uncorrected'"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        optimizer.make(settings(**changes), STEPS)
