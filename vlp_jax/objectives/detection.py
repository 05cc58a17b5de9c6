# SPDX-License-Identifier: Apache-2.0
"""Set prediction of objects (DETR, Carion et al., ECCV 2020): matching cost, losses and what is logged.

Each decoder layer is matched anew. Classes 0 ... class - 1, then "no object"; boxes are `cx cy w h` in [0, 1].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vlp_jax.objectives.boxes import giou, pairwise_giou, to_corners
from vlp_jax.objectives.classification import accuracy, cross_entropy
from vlp_jax.types import Array, Term

CLASS_COST, L1_COST, GIOU_COST = 1.0, 5.0, 2.0
NO_OBJECT = 0.1  # weight of "no object" in the cross entropy, an object having 1 (eos_coef of the original)


def detection(
    class_logits: Float[Array, "batch layer query logit"],
    boxes: Float[Array, "batch layer query 4"],
    target_boxes: Float[Array, "batch target 4"],
    box_labels: Int[Array, "batch target"],
    valid: Bool[Array, "batch"],
    no_object: float = NO_OBJECT,
) -> tuple[dict[str, Term], dict[str, Term]]:
    """Matches and returns `(terms, metrics)`: those of `losses`, those of `metrics`, and the terms of the last layer.

    Args:
        class_logits: of the decoder layers, "no object" last.
        boxes: of the same queries.
        target_boxes: in any order, padding in between allowed.
        box_labels: -1 = padding. A class that there is no logit for is left out, and counted: "targets_unknown".
        valid: rows that are no padding; others count nothing.
        no_object: weight of the last class, above 0.
    """
    named = (box_labels >= 0) & valid[:, None]
    target_boxes, labels = packed(target_boxes, box_labels, valid, class_logits.shape[-1] - 1)
    assignment = assign(class_logits, boxes, target_boxes, labels)
    known = (target_boxes, labels)
    terms = losses(class_logits, boxes, *known, assignment, valid, no_object)
    last = losses(class_logits[:, -1:], boxes[:, -1:], *known, assignment[:, -1:], valid, no_object)
    found = metrics(class_logits[:, -1], labels, assignment[:, -1], valid)
    found["targets_unknown"] = Term(_count(named) - _count(labels >= 0), _count(named))
    return terms, found | {f"{name}_last": term for name, term in last.items()}


def packed(
    target_boxes: Float[Array, "batch target 4"],
    box_labels: Int[Array, "batch target"],
    valid: Bool[Array, "batch"],
    classes: int,
) -> tuple[Float[Array, "batch target 4"], Int[Array, "batch target"]]:
    """Moves the targets that count to the front, in their order; the others become label -1 and box 0 0 0 0."""
    real = (box_labels >= 0) & (box_labels < classes) & valid[:, None]
    order = jnp.argsort(~real, axis=1, stable=True)
    labels = jnp.where(real, box_labels, -1)
    target_boxes = jnp.where(real[..., None], target_boxes.astype(jnp.float32), 0.0)
    return jnp.take_along_axis(target_boxes, order[..., None], 1), jnp.take_along_axis(labels, order, 1)


def matching_cost(
    class_logits: Float[Array, "batch layer query logit"],
    boxes: Float[Array, "batch layer query 4"],
    target_boxes: Float[Array, "batch target 4"],
    box_labels: Int[Array, "batch target"],
) -> Float[Array, "batch layer query target"]:
    """What it costs that a query stands for a target: 5 L1 - probability of the class - 2 GIoU; 0 for padding.

    float32, no gradient.
    """
    real = box_labels >= 0
    boxes, target_boxes = boxes.astype(jnp.float32), target_boxes.astype(jnp.float32)
    target_boxes = jnp.where(real[..., None], target_boxes, 0.0)[:, None]  # the same for all layers
    probability = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)
    # A product with one-hot columns: a gather along the minor axis is slow on a TPU.
    onehot = (jnp.arange(class_logits.shape[-1])[None, :, None] == box_labels[:, None, :]).astype(jnp.float32)
    named = jnp.einsum("blqc,bct->blqt", probability, onehot, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sum(jnp.abs(boxes[..., :, None, :] - target_boxes[..., None, :, :]), axis=-1)
    target_corners = jnp.broadcast_to(to_corners(target_boxes), (*boxes.shape[:2], *target_boxes.shape[2:]))
    overlap = pairwise_giou(to_corners(boxes), target_corners)
    cost = L1_COST * distance - CLASS_COST * named - GIOU_COST * overlap
    return jax.lax.stop_gradient(jnp.where(real[:, None, None], cost, 0.0))


def assign(
    class_logits: Float[Array, "batch layer query logit"],
    boxes: Float[Array, "batch layer query 4"],
    target_boxes: Float[Array, "batch target 4"],
    box_labels: Int[Array, "batch target"],
) -> Int[Array, "batch layer target"]:
    """The query of each target in each layer, at the least total cost; -1 for padding and for those left out.

    Targets as `packed` gives them.
    """
    from vlp_jax.objectives.matching import match

    cost = matching_cost(class_logits, boxes, target_boxes, box_labels)
    batch, layer, query, target = cost.shape
    valid = jnp.repeat(jnp.sum(box_labels >= 0, axis=1, dtype=jnp.int32), layer)
    return match(cost.reshape(batch * layer, query, target), valid).reshape(batch, layer, target)


def losses(
    class_logits: Float[Array, "batch layer query logit"],
    boxes: Float[Array, "batch layer query 4"],
    target_boxes: Float[Array, "batch target 4"],
    box_labels: Int[Array, "batch target"],
    assignment: Int[Array, "batch layer target"],
    valid: Bool[Array, "batch"],
    no_object: float = NO_OBJECT,
) -> dict[str, Term]:
    """The terms "box_class", "box_l1" and "giou", each a sum over the layers of the layer's mean over the global batch.

    "box_class" is the mean of the cross entropy under weights, over the sum of the weights. Every layer has the same
    sum: of n targets and N queries it matches min(n, N), whichever they are. So one count serves all layers, and it
    follows from the batch alone, as accumulation needs it. Sum and count are in units of `no_object`: a count is then
    never below 1 and the clamp of a term's mean never acts.
    "box_l1" (over four coordinates) and "giou" (1 - GIoU) are per target, those left out included, as the original.

    Args:
        class_logits, boxes: of the queries.
        target_boxes, box_labels: -1 = padding, else below the number of classes.
        assignment: the query of each target, -1 = none; min(targets, queries) of a row differ and are >= 0.
        valid: rows that are no padding.
        no_object: weight of the last class, above 0.
    """
    queries, classes = class_logits.shape[2], class_logits.shape[3] - 1
    real = (box_labels >= 0) & valid[:, None]
    hit = _hits(assignment, real, queries)
    taken = jnp.any(hit, axis=2)
    objects = jnp.where(taken, jnp.sum(jnp.where(hit, box_labels[:, None, :, None], 0), axis=2), -1)
    nothing = jnp.where(taken | ~valid[:, None, None], -1, classes)
    named, empty = cross_entropy(class_logits, objects), cross_entropy(class_logits, nothing)
    matched = jnp.sum(jnp.minimum(jnp.sum(real, axis=1), queries), dtype=jnp.float32)
    unmatched = queries * _count(valid) - matched

    # The targets come to the queries and not the other way: no gradient is scattered.
    target_boxes = jnp.where(real[..., None], target_boxes.astype(jnp.float32), 0.0)
    onehot = hit.astype(jnp.float32)
    wanted = jnp.einsum("bltq,btd->blqd", onehot, target_boxes, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sum(jnp.abs(boxes.astype(jnp.float32) - wanted), axis=-1)
    apart = 1.0 - giou(to_corners(boxes), to_corners(wanted))
    targets = _count(real)
    return {
        "box_class": Term(named.sum / no_object + empty.sum, matched / no_object + unmatched),
        "box_l1": Term(jnp.sum(jnp.where(taken, distance, 0.0)), targets),
        "giou": Term(jnp.sum(jnp.where(taken, apart, 0.0)), targets),
    }


def metrics(
    class_logits: Float[Array, "batch query logit"],
    box_labels: Int[Array, "batch target"],
    assignment: Int[Array, "batch target"],
    valid: Bool[Array, "batch"],
) -> dict[str, Term]:
    """What is logged of one layer.

    "class_error": share of the matched queries whose best class, "no object" among them, is not the target's;
    "cardinality_error": |queries that name an object - targets| a picture; "targets" a picture; "targets_left_out":
    share of the targets without a query, there being more of them than queries; "queries_matched": share.
    """
    queries, classes = class_logits.shape[1], class_logits.shape[2] - 1
    real = (box_labels >= 0) & valid[:, None]
    hit = _hits(assignment[:, None], real, queries)[:, 0]
    taken = jnp.any(hit, axis=1)
    right = accuracy(
        class_logits, jnp.where(taken, jnp.sum(jnp.where(hit, box_labels[..., None], 0), axis=1), -1)
    )
    guessed = jnp.sum(jnp.argmax(class_logits, axis=-1) != classes, axis=1)
    wrong_by = jnp.abs(guessed - jnp.sum(real, axis=1)).astype(jnp.float32)
    targets, pictures, matched = _count(real), _count(valid), _count(taken)
    return {
        "class_error": Term(right.count - right.sum, right.count),
        "cardinality_error": Term(jnp.sum(jnp.where(valid, wrong_by, 0.0)), pictures),
        "targets": Term(targets, pictures),
        "targets_left_out": Term(targets - matched, targets),
        "queries_matched": Term(matched, queries * pictures),
    }


def _hits(assignment: Array, real: Array, queries: int) -> Array:
    """bool [batch, layer, target, query]: which query stands for which target."""
    return (assignment[..., None] == jnp.arange(queries)[None, None, None]) & real[:, None, :, None]


def _count(these: Array) -> Array:
    return jnp.sum(these, dtype=jnp.float32)
