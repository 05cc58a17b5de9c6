# SPDX-License-Identifier: Apache-2.0
"""Object detection: COCO's average precision and recall of boxes, computed by `pycocotools`.

Every query counts with its best real class, however sure "no object" is: no threshold, no suppression (DETR, A.5).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlp_jax.evaluation.runner import fetch, ratio
from vlp_jax.types import Array, Batch, Params

# In the order of COCOeval.stats. AP: mean over IoU 0.50 ... 0.95; sizes: below 32^2, 96^2 pixels of area, above.
SCORES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
# The ids of COCO's 80 classes in their order: 1 ... 90 without ten that were never used.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is in a picture, and how large it was before any resizing.

    `boxes` are x, y, width, height in pixels [n, 4], `labels` categories [n], -1 = one that the model does not know;
    `crowd` [n] is 1 for a region where detections count neither way; `area` [n], of the masks, tells the size class.
    """

    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray

    @classmethod
    def of(cls, record: Mapping[str, Any], classes: Mapping[str, int]) -> Objects:
        """Reads a record of prepared data; without "box_area" a box has its own area, without "box_crowd" none is.

        Args:
            record: with "height", "width", "boxes" and "box_names".
            classes: name -> category; another name becomes -1.
        """
        boxes = np.asarray(record["boxes"], np.float64).reshape(-1, 4)
        labels = np.array([classes.get(name, -1) for name in record["box_names"]], np.int64)
        crowd = np.asarray(record.get("box_crowd", np.zeros(len(boxes))), np.int64)
        area = np.asarray(record.get("box_area", boxes[:, 2] * boxes[:, 3]), np.float64)
        return cls(int(record["height"]), int(record["width"]), boxes, labels, crowd, area)


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a model says of a picture: scores [query], labels [query], boxes x, y, width, height in pixels [query, 4]."""

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


# (source_id, rows of the split) -> what is in these pictures
Truth = Callable[[int, Sequence[int]], Sequence[Objects]]


class Detection:
    """`detection/ap`, `ap50`, `ap75`, by size, and `ar_1`, `ar_10`, `ar_100`, by size: fractions of 1.

    A score that there is nothing to measure by (no small object, no object at all) is left out. Padding rows count
    nothing, and a picture that comes twice counts once. Objects of a category that the model does not know (label -1)
    take no part; `detection/unknown_objects` is their share, if there are any.

    Args:
        system: `predict["boxes"]` gives "class_logits" [batch, query, class + 1] and "boxes" [batch, query, 4], cx cy
            w h as fractions of the picture, of the last layer.
        truth: looks pictures up.
        categories: the category of the truth for each class of the model, e.g. `COCO_IDS` for 80 classes judged by raw
            ids; -1 = none, never counted; () = the same numbers.
    """

    def __init__(self, system: Any, truth: Truth, categories: Sequence[int] = ()):
        self._boxes, self._truth = system.predict["boxes"], truth
        self._categories = np.asarray(categories, np.int64)
        self.begin()

    def begin(self) -> None:
        """Forgets the last pass."""
        self.objects: dict[tuple[int, int], Objects] = {}  # by (source, row), for pictures in the report, too
        self.detections: dict[tuple[int, int], Detections] = {}

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Keeps what is said of each new picture of the batch."""
        rows = fetch({name: batch[name] for name in ("example_id", "source_id", "image_id")})
        out = self._boxes(params, batch)
        scores, labels = fetch(best_class(out["class_logits"]))
        boxes = fetch(out["boxes"])
        if len(self._categories):
            labels = self._categories[labels]
        new: dict[tuple[int, int], int] = {}
        for row in np.flatnonzero(rows["example_id"] >= 0):
            key = (int(rows["source_id"][row]), int(rows["image_id"][row]))
            if key not in self.detections:
                new.setdefault(key, int(row))
        for source in sorted({source for source, _ in new}):
            images = sorted(image for other, image in new if other == source)
            for image, truth in zip(images, self._truth(source, images), strict=True):
                row = new[source, image]
                placed = absolute(boxes[row], truth.height, truth.width)
                self.objects[source, image] = truth
                self.detections[source, image] = Detections(scores[row], labels[row], placed)

    def result(self, params: Params) -> dict[str, float]:
        """Returns the scores of all pictures of the pass."""
        keys = sorted(self.objects)
        pictures = [self.objects[key] for key in keys]
        scores = average_precision(pictures, [self.detections[key] for key in keys])
        total = sum(len(picture.labels) for picture in pictures)
        unknown = sum(int(np.sum(picture.labels < 0)) for picture in pictures)
        if unknown:
            scores["unknown_objects"] = ratio(unknown, total)
        return {f"detection/{name}": value for name, value in scores.items()}


@jax.jit
def best_class(class_logits: Array) -> tuple[Array, Array]:
    """The probability and index of the best class but the last, "no object": each [..., query]."""
    chances = jax.nn.softmax(class_logits.astype(jnp.float32))[..., :-1]
    return jnp.max(chances, axis=-1), jnp.argmax(chances, axis=-1)


def absolute(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """`cx cy w h` as fractions -> x, y, width, height in pixels of a picture of this size; [..., 4]."""
    boxes = np.asarray(boxes, np.float64) * (width, height, width, height)
    return np.concatenate([boxes[..., :2] - 0.5 * boxes[..., 2:], boxes[..., 2:]], axis=-1)


def average_precision(truth: Sequence[Objects], found: Sequence[Detections]) -> dict[str, float]:
    """COCO's twelve numbers by the names of `SCORES`; those that nothing can be measured by are left out.

    The mean is over the categories that the truth has; detections of others, and those with a score or box that is
    not finite, count nothing. Of a picture at most 100 detections a category count. Equal scores keep their order.

    Args:
        truth, found: of the same pictures, in an order that fixes how detections of equal score are ranked.
    """
    names = sorted({int(label) for picture in truth for label in picture.labels if label >= 0})
    if not names:
        return {}
    evaluation = COCOeval(iouType="bbox")
    # pycocotools reports to standard output, which is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.cocoGt, evaluation.cocoDt = _truth(truth, names), _found(found, names)
        evaluation.params.imgIds, evaluation.params.catIds = list(range(len(truth))), names
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 where no object of this size is.
    return {name: float(value) for name, value in zip(SCORES, evaluation.stats, strict=True) if value >= 0}


def _truth(pictures: Sequence[Objects], names: Collection[int]) -> COCO:
    rows = [
        {
            "image_id": number,
            "category_id": int(label),
            "bbox": box.tolist(),
            "iscrowd": int(crowd),
            "area": float(area),
        }
        for number, picture in enumerate(pictures)
        for box, label, crowd, area in zip(
            picture.boxes, picture.labels, picture.crowd, picture.area, strict=True
        )
        if label >= 0
    ]
    return _index(rows, len(pictures), names)


def _found(pictures: Sequence[Detections], names: Collection[int]) -> COCO:
    rows = []
    for number, picture in enumerate(pictures):
        known = np.isin(picture.labels, list(names))
        known &= np.isfinite(picture.scores) & np.isfinite(picture.boxes).all(-1)
        for query in np.flatnonzero(known):
            box = picture.boxes[query].tolist()
            row = {"image_id": number, "category_id": int(picture.labels[query]), "bbox": box}
            rows.append(row | {"score": float(picture.scores[query]), "area": box[2] * box[3]})
    return _index(rows, len(pictures), names)


def _index(rows: list[dict[str, Any]], pictures: int, names: Collection[int]) -> COCO:
    """Numbers annotations from 1: pycocotools takes a match with number 0 for none."""
    table = COCO()
    table.dataset = {
        "images": [{"id": number} for number in range(pictures)],
        "categories": [{"id": name} for name in names],
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }
    table.createIndex()
    return table
