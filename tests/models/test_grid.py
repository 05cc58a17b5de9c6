# SPDX-License-Identifier: Apache-2.0
"""Grid features against transformers' ResNet and DETR's own positions; masks, padding, frozen parts, devices."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests.parity import bounds
from vlp_jax.layers.position import sine_positions
from vlp_jax.models.grid import DEPTHS, GridEmbedder, ResNet, grid_mask, normalized
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training.paths import flatten

# (depths, widths, stem width): one that has stages of one block and of two, and the layout of ResNet-50, narrow.
SMALL = ((1, 2, 1, 3), (16, 32, 64, 128), 8)
NARROW = (DEPTHS[50], (32, 64, 128, 256), 16)
DETR_FROZEN = r"(^|/)(stem|stage1)/|(^|/)frozen/"
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def converted(tensors, depths, kernel=lambda w: w.transpose(2, 3, 1, 0), stack=np.stack):
    """Tensors by the names of transformers' ResNetModel in our tree; all but the counters must be used."""
    left = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}

    def unit(name):
        frozen = {ours: left.pop(f"{name}.normalization.{theirs}") for ours, theirs in NORM.items()}
        return {"kernel": kernel(left.pop(f"{name}.convolution.weight")), "frozen": frozen}

    params = {"stem": unit("embedder.embedder")}
    for stage, depth in enumerate(depths):
        blocks = []
        for layer in range(depth):
            name = f"encoder.stages.{stage}.layers.{layer}"
            blocks.append({f"conv{place + 1}": unit(f"{name}.layer.{place}") for place in range(3)})
        blocks[0]["shortcut"] = unit(f"encoder.stages.{stage}.layers.0.shortcut")
        params[f"stage{stage + 1}"] = own = {"first": blocks[0]}
        if depth > 1:
            own["rest"] = jax.tree.map(lambda *x: stack(x), *blocks[1:], is_leaf=lambda x: type(x) is tuple)
    assert not left, sorted(left)
    return params


def reference(depths, widths, stem, seed=0):
    """transformers' ResNet with random weights and random statistics, as it evaluates."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=stem, hidden_sizes=list(widths), depths=list(depths), downsample_in_bottleneck=False
    )
    model = transformers.ResNetModel(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("normalization.weight"):
            tensor.uniform_(0.5, 1.2, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
        elif name.endswith("convolution.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return torch, model


def numbers(model, depths):
    return converted({name: tensor.numpy() for name, tensor in model.state_dict().items()}, depths)


@pytest.mark.parametrize("size", [(33, 47), (64, 97)])
@pytest.mark.parametrize(
    "layout, unroll",
    [
        (SMALL, 99),
        pytest.param(NARROW, 1, marks=pytest.mark.slow),
        pytest.param(NARROW, 99, marks=pytest.mark.slow),
    ],
)
def test_features_equal_those_of_transformers(layout, unroll, size):
    torch, model = reference(*layout)
    pixels = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    resnet = ResNet(*layout, unroll=unroll)
    ours = jax.jit(resnet.apply)({"params": numbers(model, layout[0])}, pixels)
    assert ours.shape[1:3] == tuple(math.ceil(n / 32) for n in size)
    bounds.forward([("features", ours, theirs.transpose(0, 2, 3, 1))])


@pytest.mark.parametrize("layout", [SMALL, pytest.param(NARROW, marks=pytest.mark.slow)])
def test_gradients_equal_those_of_torch_and_frozen_vectors_have_none(layout):
    torch, model = reference(*layout)
    draw = np.random.default_rng(1)
    pixels = draw.normal(size=(2, 33, 47, 3)).astype(np.float32)
    weight = draw.normal(size=(2, 2, 2, layout[1][-1])).astype(np.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("convolution.weight")
    features = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    (features * torch.tensor(weight.transpose(0, 3, 1, 2))).sum().backward()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    theirs = zeros | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = dict(flatten(converted({n: t.numpy() for n, t in theirs.items()}, layout[0])))
    params = numbers(model, layout[0])
    apply = ResNet(*layout).apply
    ours = jax.jit(jax.grad(lambda p: jnp.sum(apply({"params": p}, pixels) * weight)))(params)
    ours = dict(flatten(ours))
    frozen = {path for path in ours if re.search("(^|/)frozen/", path)}
    assert len(frozen) == 4 * (len(ours) - len(frozen)) and not any(np.any(ours[path]) for path in frozen)
    kernels = ours.keys() - frozen
    assert all(np.any(theirs[path]) for path in kernels)
    bounds.gradients((path, ours[path], theirs[path]) for path in sorted(kernels))


def shapes_of(depth):
    pixels = jnp.zeros((1, 32, 32, 3))
    return shard.shapes(lambda: ResNet(DEPTHS[depth]).init(jax.random.key(0), pixels)["params"])


@pytest.mark.parametrize("depth, total", [(50, 23_454_912), (101, 42_394_816), (152, 57_992_384)])
def test_parameter_totals_are_those_of_torchvision(depth, total):
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(shapes_of(depth))}
    kernels = {path: size for path, size in sizes.items() if path.endswith("/kernel")}
    assert sum(kernels.values()) == total
    if depth == 50:  # what DETR counts
        assert sum(sizes.values()) - total == 106_240
        assert sum(size for path, size in kernels.items() if re.search(DETR_FROZEN, path)) == 222_400
        trained = (size for path, size in sizes.items() if not re.search(DETR_FROZEN, path))
        assert sum(trained) == 23_232_512


def test_every_name_and_shape_of_resnet_50_has_its_place(specs):
    listed = json.loads((specs / "keys_hf_resnet50_ResNetModel.json").read_text())
    theirs = converted(
        {name: tuple(shape) for name, shape in listed.items()},
        DEPTHS[50],
        kernel=lambda shape: (*shape[2:], shape[1], shape[0]),
        stack=lambda shapes: (len(shapes), *shapes[0]),
    )
    ours = {path: leaf.shape for path, leaf in flatten(shapes_of(50))}
    assert ours == dict(flatten(theirs))


@pytest.mark.parametrize("size", [31, 33, 64, 65, 97, 100, 129])
def test_every_step_of_stride_two_rounds_up(size):
    make = lambda: ResNet(*SMALL).init_with_output(jax.random.key(0), jnp.zeros((1, size, 32, 3)))[0]  # noqa: E731
    assert jax.eval_shape(make).shape == (1, math.ceil(size / 32), 1, 128)


def test_positions_equal_those_of_detr(specs):
    with np.load(specs / "goldens_detr.npz") as golden:
        mask, expected = ~golden["pe_mask"], golden["pe_out_N128"].transpose(0, 2, 3, 1)
    ours = sine_positions(mask, 256)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_positions_equal_the_golden_values_of_four_channels():
    mask = np.ones((1, 2, 3), bool)
    mask[:, :, 2] = False
    ours = sine_positions(mask, 8)[0]
    np.testing.assert_allclose(ours[0, 0], [1e-06, -1, 0.031411, 0.999507] * 2, atol=2e-6)
    np.testing.assert_allclose(ours[0, 2], [0, 1, 0, 1, -3e-06, 1, 0.06279, 0.998027], atol=2e-6)
    assert np.isfinite(sine_positions(np.zeros((1, 2, 3), bool), 8)).all()


@pytest.mark.parametrize(
    "size, cells, sources",
    [
        (800, 25, range(0, 800, 32)),
        (750, 24, [31.25 * i // 1 for i in range(24)]),
        (480, 15, range(0, 480, 32)),
        (333, 11, [0, 30, 60, 90, 121, 151, 181, 211, 242, 272, 302]),
        (
            1333,
            42,
            [0, 31, 63, 95, 126, 158, 190, 222, 253, 285, 317, 349, 380, 412, 444, 476, 507, 539, 571],
        ),
    ],
)
def test_a_cell_takes_the_mask_of_its_first_pixel(size, cells, sources):
    assert cells == math.ceil(size / 32)
    for cell, source in enumerate(sources):
        pixel = np.arange(size) == source  # the one pixel that this cell, and no other, must show
        for mask, ours in (
            (pixel[None, :, None], (cells, 1)),
            (pixel[None, None, :], (1, cells)),
        ):
            np.testing.assert_array_equal(np.flatnonzero(grid_mask(mask, *ours)), [cell])


def test_the_mask_of_the_grid_equals_torchs_nearest():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    for rows, columns in [(800, 1333), (750, 1000), (333, 480), (31, 1), (608, 911)]:
        mask = draw.uniform(size=(2, rows, columns)) < 0.5
        grid = (math.ceil(rows / 32), math.ceil(columns / 32))
        theirs = torch.nn.functional.interpolate(torch.tensor(mask)[None].float(), size=grid)[0] > 0.5
        np.testing.assert_array_equal(grid_mask(mask, *grid), theirs.numpy())


def embedder(unroll=1, dtype=jnp.float32):
    return GridEmbedder(32, *SMALL, unroll=unroll, dtype=dtype)


def pictures(batch, rows, columns, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (batch, rows, columns, 3), np.uint8)
    return image, np.ones((batch, rows, columns), bool)


def drawn(net):
    """Random parameters, made without compiling: that would take longer than all that is done with them."""
    draw = np.random.default_rng(3)

    def one(path, leaf):
        if path[-1].key in ("scale", "variance"):
            return draw.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        wide = math.prod(leaf.shape[-4:-1]) if path[-1].key == "kernel" else 25
        return draw.normal(0, (1 / wide) ** 0.5, leaf.shape).astype(np.float32)

    made = shard.shapes(lambda: net.init(jax.random.key(0), *pictures(1, 32, 32)))
    return jax.tree_util.tree_map_with_path(one, made)


@pytest.fixture(scope="module")
def params():
    return drawn(embedder())


def test_pixels_are_normalised_and_padding_is_exactly_zero():
    image, mask = pictures(2, 4, 5)
    mask[0, :, 3:] = False
    out = np.asarray(normalized(image, mask))
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(out[mask], expected[mask], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[~mask], 0)


def test_padding_is_not_seen_inside_a_picture(params):
    image, mask = pictures(1, 160, 160)
    wide = [np.pad(x, [(0, 0), (0, 64), (0, 96)] + [(0, 0)] * (x.ndim - 3)) for x in (image, mask)]
    littered = [np.where(wide[1][..., None], wide[0], 77), wide[1]]
    run = jax.jit(embedder().apply)
    features, positions, real = run(params, image, mask)
    more, more_positions, more_real = (x.reshape(7, 8, *x.shape[2:]) for x in run(params, *wide))
    for one, other in zip(run(params, *wide), run(params, *littered), strict=True):
        np.testing.assert_array_equal(one, other)
    expected = np.zeros((7, 8), bool)
    expected[:5, :5] = True
    np.testing.assert_array_equal(more_real, expected)
    assert real.all() and positions.shape == (1, 25, 32)
    np.testing.assert_allclose(more_positions[:5, :5], positions.reshape(5, 5, 32), atol=1e-6)
    # A cell of this network sees at most 117 pixels to its right: of 160 pixels, cell 0 sees no padding.
    features = features.reshape(5, 5, 32)
    np.testing.assert_allclose(more[0, 0], features[0, 0], atol=1e-5)
    assert np.abs(more[4, 4] - features[4, 4]).max() > 1e-3


def test_half_precision_stays_near_single(params):
    image, mask = pictures(2, 64, 97)
    single, half = (
        jax.jit(embedder(dtype=dtype).apply)(params, image, mask) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half[0].dtype == half[1].dtype == jnp.bfloat16
    distance = np.linalg.norm(np.asarray(half[0], np.float32) - single[0]) / np.linalg.norm(single[0])
    assert distance < 0.02
    np.testing.assert_allclose(np.asarray(half[1], np.float32), single[1], atol=4e-3)


def on_devices(preset, devices):
    """Loss, gradients and the placed parameters of a network of two stages, on some of the eight devices."""
    net = GridEmbedder(32, (1, 2), (32, 64), 8)
    image, mask = pictures(8, 33, 47)
    mask[::2, 20:] = False

    def loss(params, image, mask):
        features, positions, real = net.apply(params, image, mask)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(features + positions), 0.0))

    config = common.get_config().parallel
    config.rules = preset
    mesh = meshes.make_mesh(config, jax.devices()[:devices])
    with shard.context(mesh, preset):
        target = shard.abstract(lambda: net.init(jax.random.key(0), image[:1], mask[:1]), mesh, preset)
        params = jax.device_put(drawn(net), shard.shardings(target))
        batch = meshes.placer(mesh)({"image": image, "mask": mask})
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch["image"], batch["mask"])
    return float(value), dict(flatten(grads)), dict(flatten(params))


@pytest.fixture(scope="module")
def on_one_device():
    return on_devices("dp", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, ways",
    [
        pytest.param("dp", 1, marks=pytest.mark.slow),
        ("fsdp", 8),
        pytest.param("fsdp_tp", 4, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_what_one_gives(preset, ways, on_one_device):
    value, grads, params = on_devices(preset, 8)
    np.testing.assert_allclose(value, on_one_device[0], rtol=1e-5)
    bounds.gradients((path, grads[path], theirs) for path, theirs in on_one_device[1].items())
    for path, leaf in params.items():
        cut = leaf.size // leaf.addressable_shards[0].data.size
        assert cut == (ways if path.endswith("/kernel") else 1), path
