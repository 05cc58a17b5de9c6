# SPDX-License-Identifier: Apache-2.0
"""The first 50 losses of DETR against a training in PyTorch, and the step at which a match is first another one."""

from __future__ import annotations

import functools
import importlib
import re

import jax
import numpy as np
import pytest

from tests.parity import bounds, detr, harness
from vlp_jax.objectives.detection import assign

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
oracles = importlib.import_module("tests.parity.oracle")
transformers = importlib.import_module("tests.parity.detr_transformers")
reference = importlib.import_module("tests.parity.detr_reference")

LOSSES, DIFFERENT_BATCHES = 50, 8
# Relative, of the total and of each term; the second one from the step on at which a match differs. Two queries may
# stand equally well for a target, and then rounding decides what both sides learn from there on.
BOUNDS = 1e-4, 1e-3
# The released variants' groups; decay that shows what it spares; a rate that falls within the run; a picture with more
# targets than queries.
LR, DECAY, DROP = 2e-4, 0.05, 40
CHANGES = dict(
    train__steps=60, optimizer__lr=LR, optimizer__weight_decay=DECAY, optimizer__warmup=0.0,
    optimizer__frozen=(r"(^|/)frozen/", r"^grid_embed/resnet/(stem|stage1)/"),
    optimizer__lr_multipliers=((r"^grid_embed/resnet/", 0.1),), model__object_queries__queries=4,
    model__grid_embed__depths=(1, 2, 2), model__grid_embed__widths=(16, 32, 48),
)  # fmt: skip
# No gradient but rounding, which Adam makes as large as any: a key's bias moves all scores alike, and the first
# self-attention mixes values that are all alike.
IDLE = re.compile(r"k_proj\.bias|decoder\.layers\.0\.self_attn\.[qk]_proj")


def net_of(ours):
    """Random weights. Queries and heads are drawn larger: else all queries would say the same."""
    oracle = transformers.build(ours.config, quiet=False)
    with torch.no_grad():
        oracle.net.model.query_position_embeddings.weight.mul_(10)
        for head in (oracle.net.class_labels_classifier, oracle.net.bbox_predictor):
            for parameter in head.parameters():
                parameter.mul_(3)
    return oracle


@functools.cache
def batches():
    """Pictures come again: the network learns them, and matches change on the way."""
    ours = detr.build(CHANGES)
    return [ours.batch("pretraining", step % DIFFERENT_BATCHES) for step in range(LOSSES)]


@functools.cache
def our_training():
    """Metrics of each step, assignments before each, the last parameters."""
    ours = detr.build(CHANGES)
    oracle = net_of(ours)
    params = harness.parameters(ours, oracle.rows, {}, oracles.tensors(oracle.net))
    assignments = []

    @jax.jit
    def matches(params, batch):
        out = ours.outputs(params, batch)
        return assign(out["logits"], out["boxes"], batch["boxes"], batch["box_labels"])

    look = lambda params, batch: assignments.append(np.asarray(matches(params, batch)))  # noqa: E731
    history, trained = harness.train(ours, params, batches(), look)
    return history, assignments, trained


def compare(**fault):
    """Raises Mismatch where losses are apart; returns the largest ratio to the bound, the first flip, the network."""
    history, own_matches, _ = our_training()
    oracle = net_of(detr.build(CHANGES))
    recipe = reference.Recipe(**(dict(lr=LR, weight_decay=DECAY, drop=DROP) | fault))
    theirs, matches = reference.train(oracle.net, recipe, batches())
    same = [np.array_equal(own, other) for own, other in zip(own_matches, matches, strict=True)]
    flip = same.index(False) if False in same else LOSSES
    words = (
        f"first flipped match: step {flip} of {LOSSES}"
        if flip < LOSSES
        else f"no flipped match in {LOSSES} steps"
    )
    rows = [
        (f"step {step} {name}", abs(own[name] - value), BOUNDS[step >= flip] * abs(value))
        for step, (own, other) in enumerate(zip(history, theirs, strict=True))
        for name, value in other.items()
    ]
    return bounds.judge(f"losses, {words}", rows), words, oracle


@pytest.mark.slow
def test_first_losses_equal_pytorchs():
    ratio, words, oracle = compare()
    history, assignments, trained = our_training()
    first, last = history[0]["loss"], history[-1]["loss"]
    print(f"at most {ratio:.2g} of what is allowed; {words}; loss {first:.2f} to {last:.2f}")
    assert last < 0.7 * first, "little was learned"
    later = zip(assignments, assignments[DIFFERENT_BATCHES:], strict=False)
    assert sum((one != other).any() for one, other in later) > LOSSES // 2, (
        "hardly any match changed on the way"
    )
    assert all(step["targets_left_out"] > 0 for step in history)

    start = oracles.tensors(net_of(detr.build(CHANGES)).net)
    before = {name: value for name, _, value in harness.by_source(oracle.rows, trained, start)}
    pairs = list(harness.by_source(oracle.rows, trained, oracles.tensors(oracle.net)))
    still = {name for name, own, _ in pairs if np.array_equal(own, before[name])}
    assert still == {name for name in before if name.startswith(reference.FROZEN) or "normalization" in name}
    # Adam divides by the size of a gradient: where that is small, rounding moves as far as learning does.
    moved = bounds.movements([pair for pair in pairs if not IDLE.search(pair[0])], before, bound=2e-2)
    print(f"trained parameters: at most {moved:.2g} of what is allowed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        dict(backbone=1.0),
        dict(weight_decay=0.0),
        dict(spared=("bias", "norm", "query_position")),
        dict(clip=1.0),
        dict(drop=30),
        dict(no_object=0.2),
        dict(class_cost=0.0),
        dict(rematched=False),
        dict(frozen=()),
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_another_recipe_is_seen(fault):
    with pytest.raises(bounds.Mismatch) as caught:
        compare(**fault)
    print(str(caught.value).splitlines()[:2])
