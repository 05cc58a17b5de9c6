# SPDX-License-Identifier: Apache-2.0
"""DETR's matching cost and losses against the original's golden values, naive loops in float64, and torch's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vlp_jax.objectives import boxes, detection
from vlp_jax.types import Term

WEIGHTS = {"box_class": 1.0, "box_l1": 5.0, "giou": 2.0}

# Compiled once a shape: op by op these tests take five times as long.
losses = jax.jit(detection.losses, static_argnames="no_object")
metrics, matching_cost = jax.jit(detection.metrics), jax.jit(detection.matching_cost)


@pytest.fixture(scope="module")
def golden(specs):
    with np.load(specs / "goldens_detr.npz") as file:
        found = dict(file)
    # Stored as [layer, batch, ...], the last layer last.
    outputs = [jnp.asarray(np.swapaxes(found[name], 0, 1)) for name in ("pred_logits", "pred_boxes")]
    return found, (*outputs, found["tgt_boxes"], found["tgt_labels"].astype(np.int32))


def scipy_assignment(cost, labels):
    """[batch, layer, target]: the optimum by scipy; the first targets are the valid ones."""
    cost, found = np.asarray(cost), np.full((*cost.shape[:2], labels.shape[1]), -1, np.int32)
    for image, layer in np.ndindex(*cost.shape[:2]):
        query, target = linear_sum_assignment(cost[image, layer][:, : (labels[image] >= 0).sum()])
        found[image, layer, target] = query
    return found


def test_golden_matching(golden):
    found, case = golden
    cost = matching_cost(*case)
    assert cost.dtype == jnp.float32
    assignment = scipy_assignment(cost, case[3])
    np.testing.assert_array_equal(assignment[:, -1], found["match_query_for_target"])
    giou = boxes.pairwise_giou(boxes.to_corners(case[1][0, -1]), boxes.to_corners(case[2][0]))
    np.testing.assert_allclose(giou, found["giou_pred0_tgt0"], rtol=1e-6, atol=1e-7)


def test_golden_losses(golden):
    found, case = golden
    assignment, valid = scipy_assignment(matching_cost(*case), case[3]), np.ones(3, bool)
    summed = dict.fromkeys(WEIGHTS, 0.0)
    for layer, suffix in enumerate(["_0", "_1", ""]):
        one = slice(layer, layer + 1)
        terms = losses(case[0][:, one], case[1][:, one], *case[2:], assignment[:, one], valid)
        for name, theirs in {"box_class": "ce", "box_l1": "bbox", "giou": "giou"}.items():
            expected = found[f"loss_{theirs}{suffix}"]
            np.testing.assert_allclose(terms[name].mean(), expected, rtol=1e-6)
            summed[name] += expected
        logged = metrics(case[0][:, layer], case[3], assignment[:, layer], valid)
        cardinality = found[f"loss_cardinality_error{suffix}"]
        np.testing.assert_allclose(logged["cardinality_error"].mean(), cardinality, rtol=1e-6)
    np.testing.assert_allclose(100 * logged["class_error"].mean(), found["loss_class_error"], rtol=1e-6)
    together = losses(*case, assignment, valid)
    for name, total in summed.items():
        np.testing.assert_allclose(together[name].mean(), total, rtol=1e-6)


def made(seed=0, batch=3, layers=2, queries=7, classes=5, targets=6, counts=(4, 0, 6), dtype=np.float32):
    """Outputs and targets; rubbish on padding targets."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, (batch, targets)).astype(np.int32)
    labels[np.arange(targets)[None] >= np.array(counts)[:, None]] = -1
    target_boxes = draw.uniform(0.1, 0.6, (batch, targets, 4)).astype(np.float32)
    target_boxes[labels < 0] = np.nan
    logits = jnp.asarray(draw.normal(0, 3, (batch, layers, queries, classes + 1)), dtype)
    centers = jnp.asarray(draw.uniform(0.05, 0.7, (batch, layers, queries, 4)), dtype)
    return logits, centers, target_boxes, labels


def exact(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)


def naive_giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    wide = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
    high = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
    both = max(wide, 0) * max(high, 0)
    union = aw * ah + bw * bh - both
    wide = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    high = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    return both / union - (wide * high - union) / (wide * high)


def naive_cost(logits, centers, target_boxes, labels):
    logits, centers, target_boxes = exact(logits), exact(centers), exact(target_boxes)
    cost = np.zeros((*logits.shape[:3], labels.shape[1]))
    for b, layer, q, t in np.argwhere(np.ones(cost.shape)):
        if labels[b, t] >= 0:
            row = np.exp(logits[b, layer, q])
            one, other = centers[b, layer, q], target_boxes[b, t]
            cost[b, layer, q, t] = 5 * np.abs(one - other).sum() - (row / row.sum())[labels[b, t]]
            cost[b, layer, q, t] -= 2 * naive_giou(one, other)
    return cost


def naive_losses(logits, centers, target_boxes, labels, assignment, valid, no_object=0.1):
    """The sum over layers of each layer's means, as the original computes them on one device."""
    logits, centers, target_boxes = exact(logits), exact(centers), exact(target_boxes)
    totals, number = dict.fromkeys(WEIGHTS, 0.0), max(1, (labels[valid] >= 0).sum())
    for layer in range(logits.shape[1]):
        cross, weights = 0.0, 0.0
        for b in np.flatnonzero(valid):
            query_target = {assignment[b, layer, t]: t for t in np.flatnonzero(labels[b] >= 0)}
            query_target.pop(-1, None)
            for q in range(logits.shape[2]):
                t = query_target.get(q)
                label, weight = (logits.shape[3] - 1, no_object) if t is None else (labels[b, t], 1.0)
                row = logits[b, layer, q]
                cross += weight * (np.log(np.exp(row).sum()) - row[label])
                weights += weight
                if t is not None:
                    one, other = centers[b, layer, q], target_boxes[b, t]
                    totals["box_l1"] += np.abs(one - other).sum() / number
                    totals["giou"] += (1 - naive_giou(one, other)) / number
        totals["box_class"] += cross / weights if weights else 0.0
    return totals


CASES = {
    "some": dict(),
    "bfloat16": dict(dtype=jnp.bfloat16),
    "more targets than queries": dict(queries=3, counts=(4, 1, 6)),
    "no target at all": dict(counts=(0, 0, 0)),
    "a single layer": dict(layers=1),
    "other weight": dict(no_object=0.5),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("valid", [(True, True, True), (True, True, False)])
def test_against_naive_loops(name, valid):
    options, valid = dict(CASES[name]), np.array(valid)
    no_object = options.pop("no_object", 0.1)
    case = made(**options)
    cost = matching_cost(*case)
    np.testing.assert_allclose(cost, naive_cost(*case), rtol=1e-5, atol=2e-6)
    assignment = scipy_assignment(cost, case[3])
    terms = losses(*case, assignment, valid, no_object)
    for key, expected in naive_losses(*case, assignment, valid, no_object).items():
        np.testing.assert_allclose(terms[key].mean(), expected, rtol=1e-5, err_msg=key)


def test_nothing_to_count_is_zero_and_has_no_gradient():
    case, valid = made(counts=(0, 0, 0)), np.zeros(3, bool)
    none = np.full((3, 2, 6), -1, np.int32)

    def total(logits, centers):
        return sum(term.mean() for term in losses(logits, centers, *case[2:], none, valid).values())

    value, grads = jax.value_and_grad(total, (0, 1))(*case[:2])
    assert value == 0 and not any(np.any(g) for g in grads)
    assert all(term.count == 0 for term in losses(*case, none, valid).values())
    logged = metrics(case[0][:, -1], case[3], none[:, -1], valid)
    assert all(term.sum == 0 and term.count == 0 for term in logged.values())


@pytest.mark.parametrize("valid", [(True, True, True, True), (True, False, True, True)])
def test_micro_batches_add_up_to_the_whole(valid):
    case, valid = made(batch=4, counts=(6, 0, 1, 3), queries=5, layers=3), np.array(valid)
    assignment = scipy_assignment(matching_cost(*case), case[3])
    whole = losses(*case, assignment, valid)
    parts = [losses(*(x[rows] for x in (*case, assignment, valid))) for rows in (slice(0, 2), slice(2, 4))]
    for name, term in whole.items():
        assert sum(float(part[name].count) for part in parts) == pytest.approx(float(term.count))
        np.testing.assert_allclose(sum(float(part[name].sum) for part in parts), term.sum, rtol=1e-6)


def test_counts_follow_from_the_batch_alone():
    """So that accumulation knows them before the first forward pass; 10 and 1 are the weights 1 and 0.1."""
    case, valid = made(queries=5), np.ones(3, bool)
    terms = losses(*case, np.full((3, 2, 6), -1, np.int32), valid)
    assert terms["box_class"].count == 10 * (4 + 0 + 5) + (1 + 5 + 0)
    assert terms["box_l1"].count == terms["giou"].count == 10
    tiny = made(batch=1, queries=1, counts=(0,))
    term = losses(*tiny, np.full((1, 2, 6), -1, np.int32), np.ones(1, bool))["box_class"]
    assert term.count == 1  # and not 0.1, which a clamp at 1 would spoil


def test_counting_costs_no_matching():
    """Accumulation counts all micro-batches first: what remains when only counts are wanted has no loop."""

    def counts(*case):
        return {name: term.count for name, term in detection.detection(*case)[0].items()}

    case = (*made(), np.ones(3, bool))
    assert "while" in jax.jit(detection.detection).lower(*case).as_text()
    assert "while" not in jax.jit(counts).lower(*case).compile().as_text()


def test_gradients_against_torch():
    torch = pytest.importorskip("torch")
    logits, centers, target_boxes, labels = made(batch=2, counts=(4, 2), queries=6)
    assignment = scipy_assignment(matching_cost(logits, centers, target_boxes, labels), labels)

    def ours(logits, centers):
        case = (target_boxes, labels, assignment, np.ones(2, bool))
        return sum(WEIGHTS[n] * term.mean() for n, term in losses(logits, centers, *case).items())

    x, y = (torch.tensor(np.asarray(v), requires_grad=True) for v in (logits, centers))
    weight = torch.ones(6)
    weight[-1] = 0.1
    total = 0.0
    for layer in range(2):
        classes = torch.full((2, 6), 5)
        chosen, wanted = [], []
        for b, t in np.argwhere(labels >= 0):
            classes[b, assignment[b, layer, t]] = int(labels[b, t])
            chosen.append(y[b, layer, assignment[b, layer, t]])
            wanted.append(torch.tensor(target_boxes[b, t]))
        chosen, wanted = torch.stack(chosen), torch.stack(wanted)
        total = total + torch.nn.functional.cross_entropy(x[:, layer].reshape(-1, 6), classes.ravel(), weight)
        total = total + 5 * (chosen - wanted).abs().sum() / 6
        (a0, a1), (b0, b1) = ((v[:, :2] - v[:, 2:] / 2, v[:, :2] + v[:, 2:] / 2) for v in (chosen, wanted))
        both = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
        union = (a1 - a0).prod(-1) + (b1 - b0).prod(-1) - both
        around = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
        total = total + 2 * (1 - both / union + (around - union) / around).sum() / 6
    total.backward()
    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(logits, centers)
    np.testing.assert_allclose(value, total.item(), rtol=1e-6)
    for found, tensor in zip(grads, (x, y), strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-4, atol=1e-6)


def test_degenerate_predictions_and_targets_stay_finite():
    logits, centers, target_boxes, labels = made()
    target_boxes = np.where(labels[..., None] >= 0, 0.0, target_boxes).astype(np.float32)
    centers = jnp.zeros_like(centers)
    case = (logits, centers, target_boxes, labels)
    cost = matching_cost(*case)
    assert np.isfinite(cost).all()
    rest = (target_boxes, labels, scipy_assignment(cost, labels), np.ones(3, bool))

    def total(logits, centers):
        return sum(term.mean() for term in losses(logits, centers, *rest).values())

    assert all(
        np.isfinite(g).all() for g in jax.tree.leaves(jax.value_and_grad(total, (0, 1))(logits, centers))
    )


def test_metrics():
    labels = np.array([[1, 0, 2], [-1, -1, -1], [3, -1, -1]], np.int32)
    assignment = np.array([[1, 0, -1], [-1, -1, -1], [0, -1, -1]], np.int32)
    best = np.array([[0, 4], [4, 4], [4, 3]])  # 4 is "no object"
    logits = 9.0 * np.eye(5, dtype=np.float32)[best]
    found = metrics(logits, labels, assignment, np.ones(3, bool))
    expected = {
        "class_error": (2, 3),  # target 0 of the first picture is right
        "cardinality_error": (2 + 0 + 0, 3),
        "targets": (4, 3),
        "targets_left_out": (1, 4),
        "queries_matched": (3, 6),
    }
    assert {name: (float(t.sum), float(t.count)) for name, t in found.items()} == expected
    padded = metrics(logits, labels, assignment, np.array([True, True, False]))
    assert (float(padded["targets"].sum), float(padded["cardinality_error"].count)) == (3, 2)


def test_packed_keeps_the_order_and_drops_what_does_not_count():
    labels = np.array([[-1, 2, 9, 0], [1, 1, -1, 1]], np.int32)
    target_boxes = np.arange(32, dtype=np.float32).reshape(2, 4, 4)
    found, kept = detection.packed(target_boxes, labels, np.array([True, False]), 3)
    np.testing.assert_array_equal(kept, [[2, 0, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(found[0], [target_boxes[0, 1], target_boxes[0, 3], [0] * 4, [0] * 4])
    assert not np.any(found[1])


def test_the_whole_is_its_parts():
    """Matching in the compiled step; holes among the targets, unknown classes, a padding row, too many targets."""
    logits, centers, target_boxes, labels = made(batch=4, counts=(4, 0, 6, 5), queries=5)
    labels[0, 1], labels[2, 3], valid = -1, 17, np.array([True, True, True, False])
    run = jax.jit(detection.detection)
    terms, logged = run(logits, centers, target_boxes, labels, valid)
    known = detection.packed(target_boxes, labels, valid, 5)
    known = tuple(map(np.asarray, known))
    cost = matching_cost(logits, centers, *known)
    assignment = scipy_assignment(cost, known[1])
    for name, expected in naive_losses(logits, centers, *known, assignment, valid).items():
        np.testing.assert_allclose(terms[name].mean(), expected, rtol=1e-5, err_msg=name)
    last = naive_losses(logits[:, -1:], centers[:, -1:], *known, assignment[:, -1:], valid)
    for name, expected in last.items():
        np.testing.assert_allclose(logged[f"{name}_last"].mean(), expected, rtol=1e-5, err_msg=name)
    assert (float(logged["targets_unknown"].sum), float(logged["targets_unknown"].count)) == (1, 9)
    assert isinstance(logged["targets_left_out"], Term)
    crowded = run(*made(counts=(6, 6, 6), queries=2), np.ones(3, bool))[1]
    assert (float(crowded["targets_left_out"].sum), float(crowded["targets_left_out"].count)) == (12, 18)


def test_no_gradient_flows_through_the_matching():
    case = made()
    total = jax.grad(lambda x, y: jnp.sum(matching_cost(x, y, *case[2:])), (0, 1))(*case[:2])
    assert not any(np.any(g) for g in total)
