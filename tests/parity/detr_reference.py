# SPDX-License-Identifier: Apache-2.0
"""DETR's training in PyTorch, written from its description: matching by scipy, losses, groups, clipping, schedule.

Of facebookresearch/detr (models/detr.py, models/matcher.py, engine.py, main.py), for one process. The network is
transformers' (detr_transformers.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

from tests.parity.detr_transformers import BACKBONE, forward

FROZEN = (f"{BACKBONE}.embedder.", f"{BACKBONE}.encoder.stages.0.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What main.py sets; the defaults are its own, but for the length of the run."""

    lr: float = 1e-4
    backbone: float = 0.1  # of `lr`
    weight_decay: float = 1e-4
    clip: float = 0.1
    drop: int = 0  # the step from which on the rate is a tenth; 0 = never
    no_object: float = 0.1
    box_l1: float = 5.0
    giou: float = 2.0
    class_cost: float = 1.0
    rematched: bool = True  # each layer on its own outputs
    frozen: tuple[str, ...] = FROZEN
    spared: tuple[str, ...] = ()  # parts of names without weight decay: none


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Centre and size to two corners."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of each of `first` with each of `second`, `[first, second]`, both as corners."""
    area = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (first, second)]
    first, second = first[:, None], second[None]
    both = (torch.min(first[..., 2:], second[..., 2:]) - torch.max(first[..., :2], second[..., :2])).clamp(
        min=0
    )
    around = torch.max(first[..., 2:], second[..., 2:]) - torch.min(first[..., :2], second[..., :2])
    union = area[0][:, None] + area[1][None] - both.prod(-1)
    return both.prod(-1) / union - (around.prod(-1) - union) / around.prod(-1)


def targets(batch: Mapping) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels and boxes of each picture, without padding."""
    masked = zip(batch["box_labels"], batch["boxes"], batch["box_mask"], strict=True)
    return [(torch.tensor(labels[mask]).long(), torch.tensor(boxes[mask])) for labels, boxes, mask in masked]


@torch.no_grad()
def matched(recipe: Recipe, logits: torch.Tensor, boxes: torch.Tensor, batch: Mapping) -> list[np.ndarray]:
    """(queries, targets) of each picture, `logits` and `boxes` being those of one layer."""
    pairs = []
    for row, (labels, wanted) in enumerate(targets(batch)):
        cost = recipe.box_l1 * torch.cdist(boxes[row], wanted, p=1)
        cost -= recipe.class_cost * logits[row].softmax(-1)[:, labels]
        cost -= recipe.giou * generalized_iou(corners(boxes[row]), corners(wanted))
        pairs.append(np.stack(linear_sum_assignment(cost.numpy())))
    return pairs


def losses(
    recipe: Recipe, logits: torch.Tensor, boxes: torch.Tensor, batch: Mapping
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The terms, each a sum over the layers of `[batch, layer, query, ...]`, and the query of each target.

    Boxes count over the number of targets of the whole batch, those that find no query included; the cross entropy
    over the sum of its weights. The assignment is `[batch, layer, target]`, -1 where there is none.
    """
    wanted, count = targets(batch), max(1, int(batch["box_mask"].sum()))
    weights = torch.ones(logits.shape[-1])
    weights[-1] = recipe.no_object
    terms = {name: torch.zeros(()) for name in ("box_class", "box_l1", "giou")}
    assignment = np.full((*logits.shape[:2], batch["box_mask"].shape[1]), -1)
    for layer in range(logits.shape[1]):
        judged = layer if recipe.rematched else -1
        pairs = matched(recipe, logits[:, judged], boxes[:, judged], batch)
        classes = torch.full(logits.shape[:1] + logits.shape[2:3], logits.shape[-1] - 1)
        for row, (queries, numbers) in enumerate(pairs):
            labels, true = wanted[row]
            assignment[row, layer, numbers] = queries
            classes[row, queries] = labels[numbers]
            found, true = boxes[row, layer, queries], true[numbers]
            terms["box_l1"] = terms["box_l1"] + functional.l1_loss(found, true, reduction="sum") / count
            overlap = generalized_iou(corners(found), corners(true)).diagonal()
            terms["giou"] = terms["giou"] + (1 - overlap).sum() / count
        entropy = functional.cross_entropy(logits[:, layer].flatten(0, 1), classes.flatten(), weights)
        terms["box_class"] = terms["box_class"] + entropy
    return terms, assignment


def groups(net: nn.Module, recipe: Recipe) -> list[dict]:
    """The optimizer's: rest and backbone; what is frozen is in none and asks for no gradient."""
    made = []
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(recipe.frozen))
        rate = recipe.lr * (recipe.backbone if name.startswith(BACKBONE) else 1.0)
        decay = 0.0 if any(part in name for part in recipe.spared) else recipe.weight_decay
        if parameter.requires_grad:
            made.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return made


def train(
    net: nn.Module, recipe: Recipe, batches: Sequence[Mapping]
) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Takes the recipe's steps on `net`: the loss and its terms before each, and the assignments that they rest on."""
    optimizer = torch.optim.AdamW(groups(net, recipe), betas=(0.9, 0.999), eps=1e-8)
    milestones = [recipe.drop] if recipe.drop else []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    history, assignments = [], []
    for batch in batches:
        outputs = forward(net, batch)
        terms, assignment = losses(recipe, outputs["logits"], outputs["boxes"], batch)
        loss = terms["box_class"] + recipe.box_l1 * terms["box_l1"] + recipe.giou * terms["giou"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        history.append({name: term.item() for name, term in {**terms, "loss": loss}.items()})
        assignments.append(assignment)
    return history, assignments
