# SPDX-License-Identifier: Apache-2.0
"""DETR as a system: steps, one loss on every mesh, what padding may change, what is counted, what stays frozen."""

import functools
import re

import jax
import numpy as np
import pytest

from configs import detr as detr_configs
from tests.examples import changed, detr_config, random_detr_batch
from tests.parity import harness
from tests.parity.harness import QUICK_TO_COMPILE
from vlp_jax import systems
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.paths import flatten, nest
from vlp_jax.training.state import initial_state
from vlp_jax.training.step import make_train_step
from vlp_jax.types import BOXES_LEFT_OUT, Term, UserError

ROWS = 8
PRESETS = [
    pytest.param("dp", marks=pytest.mark.learn),
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param("fsdp_tp", marks=pytest.mark.learn),
]


class Run:
    """A state on a mesh and its compiled step."""

    def __init__(self, config, devices=None):
        self.config = config
        system = systems.get("detr").build(config)
        optimizer = optimizers.make(config.optimizer, 10)
        self.mesh, self.preset = meshes.make_mesh(config.parallel, devices), config.parallel.rules
        make = initial_state(config, system, optimizer, random_detr_batch(config, ROWS))
        with shard.context(self.mesh, self.preset):
            target = shard.abstract(make, self.mesh, self.preset)
            self.state = shard.concrete(make, target)
        shardings = (shard.shardings(target), shard.replicated(self.mesh))
        step = make_train_step(config, system, optimizer)
        self.step = jax.jit(step, out_shardings=shardings, compiler_options=QUICK_TO_COMPILE)

    def take(self, batch):
        """The metrics of a step as numbers."""
        with shard.context(self.mesh, self.preset):
            self.state, metrics = self.step(self.state, meshes.placer(self.mesh)(batch))
        return {name: float(v.mean() if isinstance(v, Term) else v) for name, v in metrics.items()}

    def params(self):
        """By path, as numpy."""
        return {path: np.asarray(x) for path, x in flatten(self.state.params)}


@functools.cache
def reference():
    run = Run(detr_config(), jax.devices()[:1])
    return run, [run.take(random_detr_batch(run.config, ROWS, seed)) for seed in range(2)]


@functools.cache
def drawn():
    """A system, random parameters far from their start, and its loss, compiled."""
    config = detr_config()
    system = systems.get("detr").build(config)
    shapes = shard.shapes(lambda: system.init(jax.random.key(0), random_detr_batch(config, 1))[0])
    params = nest(harness.drawn({path: leaf.shape for path, leaf in flatten(shapes)}).items())

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def loss(batch):
        out = system.loss(params, {}, batch, jax.random.key(0))
        return out.terms, out.metrics

    return config, system, params, loss


def test_two_steps_of_the_smoke_config():
    _, history = reference()
    for metrics in history:
        assert all(np.isfinite(value) for value in metrics.values()) and metrics["skipped"] == 0
        total = metrics["box_class"] + 5 * metrics["box_l1"] + 2 * metrics["giou"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert history[0]["loss"] != history[1]["loss"]


@pytest.mark.parametrize("preset", PRESETS)
def test_eight_devices_have_the_loss_of_one(preset):
    run = Run(detr_config(parallel__rules=preset))
    history = [run.take(random_detr_batch(run.config, ROWS, seed)) for seed in range(2)]
    for ours, one in zip(history, reference()[1], strict=True):
        for name in one:
            np.testing.assert_allclose(ours[name], one[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_accumulation_has_the_loss_and_gradient_of_the_whole_batch():
    parts = Run(detr_config(train__accumulation=4), jax.devices()[:2])
    one, four = reference()[1][0], parts.take(random_detr_batch(parts.config, ROWS))
    assert one.keys() == four.keys()
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=2e-5, atol=1e-6, err_msg=name)


def values(found):
    return {name: (float(term.sum), float(term.count)) for part in found for name, term in part.items()}


@pytest.mark.slow
def test_padding_rows_count_nothing():
    config, _, _, loss = drawn()
    batch = random_detr_batch(config, 4, 1)
    more = random_detr_batch(config, ROWS, 2)
    for key, value in batch.items():
        more[key][:4] = value
    more["example_id"][4:] = -1
    expected = values(loss(batch))
    for name, (total, count) in values(loss(more)).items():
        np.testing.assert_allclose((total, count), expected[name], rtol=1e-5, err_msg=name)


def test_what_is_left_out_is_counted_by_reason():
    config, _, _, loss = drawn()
    batch = random_detr_batch(config, 4)
    batch["example_id"][3] = -1
    found, left = values(loss(batch)), batch["boxes_left_out"][:3].sum(0)
    every = left.sum() + batch["box_mask"][:3].sum()
    assert [found[f"left_out/{why}"] for why in BOXES_LEFT_OUT] == [(count, every) for count in left]


def test_more_targets_than_queries_are_counted_and_unknown_classes_too():
    config, system, params, _ = drawn()
    params = dict(params) | {"object_queries": {"table": params["object_queries"]["table"][:3]}}
    few = detr_config(model__object_queries__queries=3)
    batch = random_detr_batch(config, 6)
    batch["box_labels"][5, 0] = 99  # five boxes, one of no class that there is
    loss = jax.jit(systems.get("detr").build(few).loss, compiler_options=QUICK_TO_COMPILE)
    found = values([loss(params, {}, batch, jax.random.key(0)).metrics])
    assert found["targets_left_out"] == (2, 14) and found["targets_unknown"] == (1, 15)
    assert found["queries_matched"] == (0 + 1 + 2 + 3 + 3 + 3, 18)


def test_an_objective_of_zero_is_off_and_the_matching_stays():
    config = detr_config(objectives__giou=0.0, objectives__box_l1=0.0)
    batch = random_detr_batch(config, 2)
    loss = systems.get("detr").build(config).loss
    out = jax.eval_shape(lambda: loss(drawn()[2], {}, batch, jax.random.key(0)))
    assert set(out.terms) == {"box_class"} and {"giou_last", "box_l1_last"} <= set(out.metrics)


@pytest.mark.slow
def test_pictures_without_any_box_have_a_finite_loss_and_gradient():
    config, system, params, _ = drawn()
    batch = random_detr_batch(config, 2)
    batch["box_mask"][:], batch["box_labels"][:], batch["boxes"][:] = False, -1, 0

    def total(params):
        out = system.loss(params, {}, batch, jax.random.key(0))
        return sum(term.mean() for term in out.terms.values()), out.terms

    grads, terms = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK_TO_COMPILE)(params)
    found = values([terms])
    assert found["box_l1"] == found["giou"] == (0, 0) and found["box_class"][0] > 0
    assert all(np.isfinite(x).all() for _, x in flatten(grads))
    assert not any(np.any(x) for path, x in flatten(grads) if path.startswith("heads/box"))
    assert np.any(grads["heads"]["class"]["dense"]["kernel"])


def predicted(image, mask):
    config, system, params, _ = drawn()
    return system.predict["boxes"](params, {"image": image, "image_mask": mask})


def on_canvas(image, mask, rows, columns):
    around = [(0, 0), (0, rows - image.shape[1]), (0, columns - image.shape[2])]
    return np.pad(image, [*around, (0, 0)]), np.pad(mask, around)


@pytest.mark.slow
def test_padding_changes_nothing_beyond_the_cells_that_see_it():
    """As in DETR: what lies under the mask is not read, but a cell at the border sees that zeros follow, or nothing.

    Between two canvases that both go on for more than a cell sees beyond the picture there is no difference at all.
    """
    batch = random_detr_batch(drawn()[0], 2)
    image, mask = batch["image"], batch["image_mask"]
    one, far, farther = ((image, mask), on_canvas(image, mask, 104, 112), on_canvas(image, mask, 120, 160))
    littered = np.where(far[1][..., None], far[0], 99).astype(np.uint8), far[1]
    near, wide, wider, dirty = (predicted(*pictures) for pictures in (one, far, farther, littered))
    for name in ("class_logits", "boxes"):
        np.testing.assert_array_equal(dirty[name], wide[name])
        np.testing.assert_allclose(wider[name], wide[name], rtol=0, atol=1e-5)
    assert np.abs(near["class_logits"] - wide["class_logits"]).max() > 1e-5


def test_predictions_do_not_depend_on_batch_mates():
    batch = random_detr_batch(drawn()[0], 3)
    whole = predicted(batch["image"], batch["image_mask"])
    for row in range(3):
        alone = predicted(*(batch[key][row : row + 1] for key in ("image", "image_mask")))
        np.testing.assert_allclose(alone["class_logits"][0], whole["class_logits"][row], atol=1e-5)
        np.testing.assert_allclose(alone["boxes"][0], whole["boxes"][row], atol=1e-5)
    assert whole["class_logits"].shape == (3, 6, 5) and whole["boxes"].shape == (3, 6, 4)


@pytest.mark.slow
def test_frozen_parts_stay_and_the_backbone_learns_at_a_tenth_of_the_rate():
    released = detr_configs.get_config("variant=r50").optimizer
    changes = dict(optimizer__frozen=released.frozen, optimizer__lr_multipliers=released.lr_multipliers)
    # Without clipping, decay and warm-up the first update of Adam is the rate times a sign.
    run = Run(
        detr_config(optimizer__warmup=0.0, optimizer__weight_decay=0.0, optimizer__drops=(0.9,), **changes),
        jax.devices()[:1],
    )
    before = run.params()
    run.take(random_detr_batch(run.config, ROWS))
    moved = {path: np.abs(x - before[path]).max() for path, x in run.params().items()}
    lr = run.config.optimizer.lr
    for path, distance in moved.items():
        if re.search(r"(^|/)frozen/|resnet/(stem|stage1)/", path):
            assert distance == 0, path
        else:
            rate = lr * (0.1 if path.startswith("grid_embed/resnet/") else 1)
            # Less where a gradient is as small as Adam's epsilon: of the biases of queries and keys.
            least = 0.0 if re.search(r"(query|key)/bias$", path) else 0.9
            assert least * rate <= distance <= 1.01 * rate, path
    assert {path.split("/")[2] for path in moved if path.startswith("grid_embed/resnet/")} > {
        "stem",
        "stage1",
    }


@pytest.mark.slow
def test_half_precision_is_finite_and_near():
    run = Run(detr_config(model__dtype="bfloat16"), jax.devices()[:1])
    history = [run.take(random_detr_batch(run.config, ROWS, seed)) for seed in range(2)]
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert history[0]["loss"] == pytest.approx(reference()[1][0]["loss"], rel=0.03)
    assert all(x.dtype == np.float32 for x in run.params().values())


@pytest.mark.parametrize(
    "changes, facts, words",
    [
        ({}, {}, "config.model.heads.classes is -1"),
        (dict(model__heads__classes=4), dict(classes=5), "is 4, but the data has classes 5"),
        (dict(model__encoder__num_heads=3), dict(classes=4), "config.model.encoder.num_heads 3"),
        (dict(model__decoder__num_heads=0), dict(classes=4), "config.model.decoder.num_heads 0"),
        (
            dict(model__width=126, model__encoder__num_heads=2, model__decoder__num_heads=2),
            dict(classes=4),
            "124 or 128",
        ),
        (dict(model__grid_embed__depths=(2,)), dict(classes=4), "needs one of both"),
        (dict(model__grid_embed__depths=(2, 0)), dict(classes=4), "needs one of both"),
        (
            dict(model__grid_embed__depths=(), model__grid_embed__widths=()),
            dict(classes=4),
            "needs one of both",
        ),
        (dict(model__grid_embed__widths=(64, 126)), dict(classes=4), "not all multiples of 4"),
        (dict(model__grid_embed__stem_width=0), dict(classes=4), "stem_width of 0"),
        (
            dict(data__inputs=("text", "grid")),
            dict(classes=4),
            "lacks boxes: the system detr reads grid, boxes",
        ),
    ],
)
def test_what_does_not_fit_is_explained(changes, facts, words):
    config = changed(detr_configs.get_config("variant=tiny"), changes)
    with pytest.raises(UserError, match=words):
        systems.get("detr").resolve(config, facts)


def test_r50_has_the_parameters_of_the_original():
    config = systems.get("detr").resolve(detr_configs.get_config("variant=r50"), {"classes": 91})
    system = systems.get("detr").build(config)
    batch = random_detr_batch(config, 1, size=(64, 64))
    shapes = shard.shapes(lambda: system.init(jax.random.key(0), batch)[0])
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(shapes)}
    statistics = sum(size for path, size in sizes.items() if re.search("(^|/)frozen/", path))
    assert statistics == 106_240 and sum(sizes.values()) - statistics == 41_524_768
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    trained = {path: size for path, size in sizes.items() if not optimizer.group(path).frozen}
    assert sum(trained.values()) == 41_302_368
    slow = sum(size for path, size in trained.items() if optimizer.group(path).multiplier == 0.1)
    assert slow == 23_232_512 and all(optimizer.group(path).decayed for path in trained)
