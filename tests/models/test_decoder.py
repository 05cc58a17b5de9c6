# SPDX-License-Identifier: Apache-2.0
"""Encoder, query decoder and detection heads: masks, auxiliary outputs, one result for every loop and mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests.parity.harness import QUICK_TO_COMPILE, drawn
from vlp_jax.models.decoder import Decoder, ObjectQueries
from vlp_jax.models.detection_heads import BoxHead, ClassHead
from vlp_jax.models.encoder import Encoder
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training.paths import flatten, nest


@dataclasses.dataclass(frozen=True)
class Size:
    """What a test varies."""

    width: int = 48
    num_heads: int = 3
    mlp_width: int = 80
    depth: int = 3
    queries: int = 7
    classes: int = 5
    rows: int = 3
    tokens: int = 13


SMALL, OTHER = Size(), Size(32, 4, 56, 2, 11, 9, 2, 30)
EVEN = Size(32, 4, 64, 2, 6, 4, 8, 12)  # what eight devices divide


class Detector(nn.Module):
    """The parts as a system puts them together."""

    size: Size
    dropout: float = 0.0
    unroll: int = 1
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, positions, mask, train=False):
        size = self.size
        options = dict(dropout=self.dropout, dtype=self.dtype, unroll=self.unroll, remat=self.remat)
        shape = (size.depth, size.num_heads, size.mlp_width)
        memory = Encoder(*shape, **options, name="encoder")(x, positions, mask, train=train)
        place = ObjectQueries(size.queries, size.width, name="queries")()
        content = jnp.zeros((x.shape[0], *place.shape[1:]))
        decoder = Decoder(*shape, **options, name="decoder")
        features = decoder(content, place, memory, positions, mask, train=train)
        logits = ClassHead(size.classes, self.dtype, name="classes")(features)
        return {"features": features, "logits": logits, "boxes": BoxHead(name="boxes")(features)}


def example(size, seed=0):
    """Tokens, positions and a mask that leaves a third of some rows out."""
    draw = np.random.default_rng(seed)
    shape = (size.rows, size.tokens, size.width)
    x, positions = (draw.normal(size=shape).astype(np.float32) for _ in range(2))
    real = np.arange(size.rows) % 2 * (size.tokens // 3) + size.tokens - size.tokens // 3
    return x, positions, np.arange(size.tokens)[None] < real[:, None]


def random_params(size):
    boxed = jax.eval_shape(lambda: Detector(size).init(jax.random.key(0), *example(size)))
    shapes = {path: leaf.shape for path, leaf in flatten(nn.unbox(boxed)["params"])}
    return nest(drawn(shapes).items())


def quick(function, static=()):
    """Compiled with little effort, as the fast lane's programs are."""
    return jax.jit(function, static_argnames=static, compiler_options=QUICK_TO_COMPILE)


@functools.cache
def compiled(size, train, options):
    module = Detector(size, **dict(options))

    def apply(params, key, *inputs):
        return module.apply({"params": params}, *inputs, train, rngs={"dropout": key})

    return quick(apply)


def run(size, params, inputs, train=False, seed=0, **options):
    apply = compiled(size, train, tuple(options.items()))
    return jax.tree.map(np.asarray, apply(params, jax.random.key(seed), *inputs))


def loss_and_gradient(size, params, inputs, **options):
    weight = np.random.default_rng(1).normal(size=(size.rows, size.depth, size.queries, size.width))

    def total(params):
        rngs = {"dropout": jax.random.key(7)}
        out = Detector(size, **options).apply({"params": params}, *inputs, True, rngs=rngs)
        return (
            jnp.mean(out["features"] * weight.astype(np.float32))
            + jnp.mean(out["boxes"] ** 2)
            + jnp.mean(jax.nn.logsumexp(out["logits"], axis=-1))
        )

    return quick(jax.value_and_grad(total))(params)


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def test_padding_and_batch_mates_change_nothing():
    params, (x, positions, mask) = random_params(SMALL), example(SMALL)
    base = run(SMALL, params, (x, positions, mask))
    noise = np.where(mask[..., None], 0, 1e4).astype(np.float32)
    assert_close(run(SMALL, params, (x + noise, positions - noise, mask)), base, 0)
    more = ((0, 0), (0, 5))
    longer = [np.pad(a, (*more, (0, 0)), constant_values=3.0) for a in (x, positions)]
    assert_close(run(SMALL, params, (*longer, np.pad(mask, more))), base)
    alone = run(SMALL, params, (x[1:2], positions[1:2], mask[1:2]))
    assert_close(alone, {name: value[1:2] for name, value in base.items()})
    heeded = run(SMALL, params, (x + noise, positions, np.ones_like(mask)))
    assert np.abs(heeded["features"] - base["features"])[0].max() > 0.1


@pytest.mark.slow
def test_an_auxiliary_output_is_that_of_a_shorter_decoder():
    params, inputs = random_params(SMALL), example(SMALL)
    whole = run(SMALL, params, inputs)["features"]
    assert whole.shape == (SMALL.rows, SMALL.depth, SMALL.queries, SMALL.width)
    encoder = Encoder(SMALL.depth, SMALL.num_heads, SMALL.mlp_width)
    memory = quick(encoder.apply, "train")({"params": params["encoder"]}, *inputs, train=False)
    place = params["queries"]["table"][None]
    content = jnp.zeros((SMALL.rows, SMALL.queries, SMALL.width))
    for depth in range(1, SMALL.depth + 1):
        cut = dict(
            params["decoder"], layers=jax.tree.map(lambda a, n=depth: a[:n], params["decoder"]["layers"])
        )
        decoder = Decoder(depth, SMALL.num_heads, SMALL.mlp_width)
        out = quick(decoder.apply, "train")({"params": cut}, content, place, memory, *inputs[1:], train=False)
        assert_close(out[:, -1], whole[:, depth - 1])


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_a_row_without_memory_is_finite_in_value_and_gradient(dropout):
    params, (x, positions, mask) = random_params(SMALL), example(SMALL)
    mask[2] = False
    out = run(SMALL, params, (x, positions, mask))
    assert all(np.isfinite(value).all() for value in out.values())
    value, gradient = loss_and_gradient(SMALL, params, (x, positions, mask), dropout=dropout)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    other = run(SMALL, params, (x[[0, 1, 0]], positions, mask))
    np.testing.assert_array_equal(other["features"][2], out["features"][2])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"unroll": 2}, {"remat": True}])
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.learn)])
def test_loops_and_rematerialisation_change_neither_value_nor_gradient(options, dropout):
    params, inputs = random_params(EVEN), example(EVEN)
    first = looped(dropout)
    assert_close(loss_and_gradient(EVEN, params, inputs, dropout=dropout, **options), first)


@functools.cache
def looped(dropout):
    return loss_and_gradient(EVEN, random_params(EVEN), example(EVEN), dropout=dropout)


@pytest.mark.slow
def test_dropout_acts_at_training_only_and_differs_by_layer():
    params, inputs = random_params(EVEN), example(EVEN)
    base = run(EVEN, params, inputs)
    assert_close(run(EVEN, params, inputs, dropout=0.3), base, 0)
    assert_close(run(EVEN, params, inputs, train=True), base)
    one, again, two = (run(EVEN, params, inputs, True, seed, dropout=0.3)["features"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).mean() > 0.05
    # Layers that are equal in all parameters, fed by the same queries, still drop different things.
    zeros = jax.tree.map(np.zeros_like, params["decoder"]["layers"])
    zeros = {**zeros, "norm3": params["decoder"]["layers"]["norm3"]}
    zeros["mlp"]["out"]["bias"] = np.ones_like(zeros["mlp"]["out"]["bias"])
    zeros["norm3"] = {"scale": np.ones_like(zeros["norm3"]["scale"]), "bias": zeros["norm3"]["bias"] * 0}
    layers = run(
        EVEN, {**params, "decoder": {**params["decoder"], "layers": zeros}}, inputs, True, dropout=0.3
    )
    assert (np.abs(layers["features"][:, 0] - layers["features"][:, 1]) > 1e-3).mean() > 0.2


def test_a_causal_mask_hides_what_comes_later():
    """The decoder with words: content is given, positions are in it."""
    draw = np.random.default_rng(0)
    params = random_params(SMALL)["decoder"]
    decoder = Decoder(SMALL.depth, SMALL.num_heads, SMALL.mlp_width)
    words = draw.normal(size=(SMALL.rows, SMALL.queries, SMALL.width)).astype(np.float32)
    memory, _, mask = example(SMALL)
    apply = quick(decoder.apply, "train")
    causal = np.tril(np.ones((1, SMALL.queries, SMALL.queries), bool))

    def decode(words, self_mask):
        return apply({"params": params}, words, None, memory, None, mask, self_mask, train=False)

    changed = words.copy()
    changed[:, 4:] += 1.0
    np.testing.assert_array_equal(decode(words, causal)[:, :, :4], decode(changed, causal)[:, :, :4])
    assert np.abs(decode(words, causal) - decode(changed, causal))[:, :, 4:].min(axis=(0, 1, 3)).max() > 0
    assert np.abs(decode(words, None) - decode(changed, None))[:, 0, :4].max() > 1e-2
    full = decode(words, np.ones_like(causal))
    assert_close(full, decode(words, None))
    assert_close(full[:, :, -1][:, :1], decode(words, causal)[:, :, -1][:, :1])


def test_heads_are_shared_by_layers_and_boxes_stay_in_float32():
    params, inputs = random_params(SMALL), example(SMALL)
    out = run(SMALL, params, inputs, dtype=jnp.bfloat16)
    exact = run(SMALL, params, inputs)
    assert out["features"].dtype == jnp.bfloat16 and out["logits"].dtype == out["boxes"].dtype == np.float32
    for name in out:
        far = np.asarray(out[name], np.float32) - exact[name]
        assert np.sqrt(np.mean(far**2)) < 0.03 * np.sqrt(np.mean(exact[name] ** 2)), name
    assert out["logits"].shape == (SMALL.rows, SMALL.depth, SMALL.queries, SMALL.classes + 1)
    assert len(np.unique(out["boxes"] * 256 % 1)) > out["boxes"].size / 2
    swapped = exact["features"][:, ::-1]
    logits = ClassHead(SMALL.classes).apply({"params": params["classes"]}, swapped)
    assert_close(logits, exact["logits"][:, ::-1])


def test_initial_values_are_those_of_detr():
    size = Size(width=256, num_heads=8, mlp_width=2048, depth=2, queries=100, classes=91, rows=1, tokens=3)
    module, inputs = Detector(size), example(size)
    boxed = jax.jit(lambda: module.init(jax.random.key(0), *inputs), compiler_options=QUICK_TO_COMPILE)()
    params = dict(flatten(jax.tree.map(np.asarray, nn.unbox(boxed)["params"])))
    bounds = {
        "attention/query/kernel": 0.0765,
        "attention/key/kernel": 0.0765,
        "attention/value/kernel": 0.0765,
        "attention/out/kernel": (6 / 512) ** 0.5,
        "mlp/hidden/kernel": (6 / 2304) ** 0.5,
        "mlp/out/kernel": (6 / 2304) ** 0.5,
        "mlp/hidden/bias": 1 / 16,
        "mlp/out/bias": 2048**-0.5,
        "classes/dense/kernel": 1 / 16,
        "classes/dense/bias": 1 / 16,
        "boxes/hidden1/kernel": 1 / 16,
        "boxes/out/bias": 1 / 16,
    }
    seen = set()
    for path, value in params.items():
        for ending in (ending for ending in bounds if path.endswith(ending)):
            seen.add(ending)
            most = np.abs(value).max()
            assert most <= bounds[ending] * 1.001 and (value.size < 99 or most > 0.93 * bounds[ending]), path
            if value.size > 9999:
                np.testing.assert_allclose(value.std(), bounds[ending] / 3**0.5, rtol=0.01, err_msg=path)
        if "attention" in path and path.endswith("bias"):
            assert not value.any(), path
        if path.startswith("encoder/layers/attention/q") and path.endswith("kernel"):
            assert value.shape == (2, 256, 256) and np.abs(value[0] - value[1]).max() > 0.1
    assert seen == bounds.keys()
    table = params["queries/table"]
    assert abs(table.std() - 1) < 0.02 and abs(table.mean()) < 0.02 and np.abs(table).max() > 3
    # 18,069,856 parameters beside DETR's backbone, 1x1 projection included, with six layers each.
    count = sum(value.size * (3 if "/layers/" in path else 1) for path, value in params.items())
    assert count + 2048 * 256 + 256 == 18_069_856


@functools.cache
def on_mesh(preset, dropout, devices=8):
    """Loss, gradient and one kernel's shard of a training step."""
    parallel = common.get_config().parallel
    parallel.rules = preset
    mesh = meshes.make_mesh(parallel, jax.devices()[:devices])
    inputs = dict(zip(("x", "positions", "mask"), example(EVEN), strict=True))

    def make():
        return Detector(EVEN).init(jax.random.key(0), *example(EVEN))

    def total(params, inputs):
        rngs = {"dropout": jax.random.key(3)}
        out = Detector(EVEN, dropout).apply(params, **inputs, train=True, rngs=rngs)
        return sum(jnp.mean(jnp.sin(value * 3)) for value in out.values())

    wanted = shard.shardings(shard.abstract(make, mesh, preset))
    params = jax.device_put({"params": random_params(EVEN)}, wanted)
    with shard.context(mesh, preset):
        placed = meshes.placer(mesh)(inputs)
        value, gradient = quick(jax.value_and_grad(total))(params, placed)
    kernel = params["params"]["decoder"]["layers"]["cross_attention"]["query"]["kernel"]
    return jax.tree.map(np.asarray, (value, gradient)), kernel.addressable_shards[0].data.shape


PIECES = {"dp": (2, 32, 32), "fsdp": (2, 4, 32), "fsdp_tp": (2, 8, 16)}


@pytest.mark.learn
@pytest.mark.parametrize("preset, dropout", [("fsdp_tp", 0.0)] + [(name, 0.2) for name in PIECES])
def test_eight_devices_have_the_loss_and_gradient_of_one(preset, dropout):
    (one, wanted), _ = on_mesh("dp", dropout, 1)
    (value, gradient), shape = on_mesh(preset, dropout)
    assert shape == PIECES[preset]
    np.testing.assert_allclose(value, one, rtol=1e-5)
    size = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(wanted)))
    far = jax.tree.map(lambda a, b: np.linalg.norm(a - b), gradient, wanted)
    assert max(jax.tree.leaves(far)) < 1e-5 * size
