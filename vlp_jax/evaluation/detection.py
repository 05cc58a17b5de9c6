# SPDX-License-Identifier: Apache-2.0
"""Object detection: COCO's average precision and recall of boxes, computed by `pycocotools`.

Every query counts with its best real class, however sure "no object" is: no threshold, no suppression (DETR, A.5).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlp_jax.evaluation.runner import fetch, ratio, withhold
from vlp_jax.files import LABELS
from vlp_jax.types import Array, Batch, Params

# In the order of COCOeval.stats. AP: mean over IoU 0.50 ... 0.95; sizes: below 32^2, 96^2 pixels of area, above.
SCORES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
FIELDS = ("height", "width", "boxes", "box_names")  # of a record; and where the data have them:
MORE_FIELDS = ("box_crowd", "box_area")
SURE = 0.5  # what the report shows: the score of a box, and how far it covers the object of its name (IoU)


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


class Records(Protocol):
    """What is read of a prepared split (`data.source.Source`)."""

    manifest: Mapping[str, Any]

    def read(self, rows: Sequence[int], names: Sequence[str] = ()) -> list[Mapping[str, Any]]:
        """Returns the records of these rows with the fields named."""


def recorded(sources: Sequence[Records], names: Sequence[str]) -> Truth:
    """The truth as prepared records have it.

    Args:
        sources: in the order of `source_id`.
        names: of the classes; "" = a class that no object has.
    """
    classes = {name: number for number, name in enumerate(names) if name}

    def truth(source: int, rows: Sequence[int]) -> list[Objects]:
        there = sources[source].manifest.get("fields", ())
        fields = [*FIELDS, *(name for name in MORE_FIELDS if name in there)]
        return [Objects.of(record, classes) for record in sources[source].read(rows, fields)]

    return truth


def class_names(assets: Mapping[str, Path]) -> list[str]:
    """The names of the classes that a checkpoint keeps among its assets; [] if it keeps none."""
    return json.loads(assets[LABELS].read_text("utf-8")) if LABELS in assets else []


def called(names: Sequence[str], label: int) -> str:
    """The name of a class; "class 17" where it has none."""
    return (names[label] if 0 <= label < len(names) else "") or f"class {label}"


class Detection:
    """`detection/ap`, `ap50`, `ap75`, by size, and `ar_1`, `ar_10`, `ar_100`, by size: fractions of 1.

    The blind twins have what is said of one withheld picture in the place of all. `detection/padding` is the mean share
    of a picture's canvas that is padding: scores depend on it, so on the size of batches where they set the canvas.
    A score that there is nothing to measure by (no small object, no object at all) is left out. Padding rows count
    nothing, and a picture that comes twice counts once. Objects of a category that the model does not know (label -1)
    take no part; `detection/unknown_objects` is their share, if there are any.

    Args:
        system: `predict["boxes"]` gives "class_logits" [batch, query, class + 1] and "boxes" [batch, query, 4], cx cy
            w h as fractions of the picture, of the last layer.
        truth: looks pictures up.
        categories: the category of the truth for each class of the model, e.g. COCO's raw ids for 80 classes without
            gaps; -1 = none, never counted; () = the same numbers.
        blind: whether to measure the twins without picture.
    """

    def __init__(self, system: Any, truth: Truth, categories: Sequence[int] = (), *, blind: bool = True):
        self._boxes, self._truth, self._blind = system.predict["boxes"], truth, blind
        self._categories = np.asarray(categories, np.int64)
        self.begin()

    def begin(self) -> None:
        """Forgets the last pass."""
        self.objects: dict[tuple[int, int], Objects] = {}  # by (source, row), for pictures in the report, too
        self.detections: dict[tuple[int, int], Detections] = {}
        self._padding: list[float] = []
        self._withheld: Detections | None = None  # boxes as the model gives them

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Keeps what is said of each new picture of the batch."""
        rows = fetch({name: batch[name] for name in ("example_id", "source_id", "image_id")})
        said = self._say(params, batch)
        padding = fetch(padding_share(batch["image_mask"])) if "image_mask" in batch else None
        if self._blind and self._withheld is None:
            self._withheld = _row(self._say(params, withhold(batch)), 0)
        new: dict[tuple[int, int], int] = {}
        for row in np.flatnonzero(rows["example_id"] >= 0):
            key = (int(rows["source_id"][row]), int(rows["image_id"][row]))
            if key not in self.detections:
                new.setdefault(key, int(row))
        for source in sorted({source for source, _ in new}):
            images = sorted(image for other, image in new if other == source)
            for image, truth in zip(images, self._truth(source, images), strict=True):
                row = new[source, image]
                self.objects[source, image] = truth
                self.detections[source, image] = _placed(_row(said, row), truth)
                if padding is not None:
                    self._padding.append(float(padding[row]))

    def _say(self, params: Params, batch: Batch) -> Detections:
        """Of all rows, boxes as the model gives them."""
        out = self._boxes(params, batch)
        scores, labels = fetch(best_class(out["class_logits"]))
        labels = self._categories[labels] if len(self._categories) else labels
        return Detections(scores, labels, fetch(out["boxes"]))

    def result(self, params: Params) -> dict[str, float]:
        """Returns the scores of all pictures of the pass."""
        keys = sorted(self.objects)
        pictures = [self.objects[key] for key in keys]
        scores = average_precision(pictures, [self.detections[key] for key in keys])
        if self._withheld is not None:
            blind = average_precision(pictures, [_placed(self._withheld, picture) for picture in pictures])
            scores |= {f"{name}_blind": value for name, value in blind.items()}
        if self._padding:
            scores["padding"] = float(np.mean(self._padding))
        total = sum(len(picture.labels) for picture in pictures)
        unknown = sum(int(np.sum(picture.labels < 0)) for picture in pictures)
        if unknown:
            scores["unknown_objects"] = ratio(unknown, total)
        return {f"detection/{name}": value for name, value in scores.items()}

    def examples(self, count: int) -> list[tuple[tuple[int, int], Judged]]:
        """Up to `count` pictures that went worst and as many that went best, with their (source, row)."""
        judged = [(key, judge(self.objects[key], self.detections[key])) for key in sorted(self.objects)]
        judged = [(key, one) for key, one in judged if len(one.found) + len(one.right)]
        # Among equals the one with more to see.
        judged.sort(key=lambda item: (item[1].quality, -len(item[1].found)))
        best = sorted(judged[count:], key=lambda item: (-item[1].quality, -len(item[1].found)))
        return judged[:count] + best[:count]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A picture's known objects, whether each was found [n]; the boxes shown, whether each is right [m]."""

    objects: Objects
    found: np.ndarray
    said: Detections
    right: np.ndarray

    @property
    def quality(self) -> float:
        """F1: 1 where all objects are found and nothing else."""
        return ratio(2 * np.sum(self.right), len(self.found) + len(self.right))


def judge(objects: Objects, detections: Detections, least: float = SURE, overlap: float = SURE) -> Judged:
    """Says for a reader what is right: surest first, a box takes the object of its name that it covers best.

    Boxes with a score of `least` and more are judged, of a picture with objects at least the surest; one that lies in
    a crowd of its name is neither right nor wrong and left out, as is an object of an unknown name.
    """
    real = (objects.labels >= 0) & (objects.crowd == 0)
    known, crowd = _objects(objects, real), _objects(objects, (objects.labels >= 0) & (objects.crowd > 0))
    order = np.argsort(-np.nan_to_num(detections.scores, nan=-1.0), kind="stable")
    fine = np.isfinite(detections.scores) & np.isfinite(detections.boxes).all(-1)
    order = order[fine[order]]
    shown = order[detections.scores[order] >= least]
    if not len(shown) and len(known.labels):
        shown = order[:1]
    found, right, kept = np.zeros(len(known.labels), bool), [], []
    for query in shown:
        box, same = detections.boxes[query], known.labels == detections.labels[query]
        ious = np.where(same & ~found, _iou(box, known.boxes), 0.0)
        hit = bool(len(ious)) and ious.max() >= overlap
        if hit:
            found[np.argmax(ious)] = True
        elif np.any((crowd.labels == detections.labels[query]) & (_inside(box, crowd.boxes) >= overlap)):
            continue
        kept.append(query)
        right.append(hit)
    return Judged(known, found, _row(detections, np.array(kept, np.int64)), np.array(right, bool))


def _objects(objects: Objects, rows: np.ndarray) -> Objects:
    columns = {name: getattr(objects, name)[rows] for name in ("boxes", "labels", "crowd", "area")}
    return dataclasses.replace(objects, **columns)


def _row(detections: Detections, row: int | np.ndarray) -> Detections:
    return Detections(detections.scores[row], detections.labels[row], detections.boxes[row])


def _placed(said: Detections, picture: Objects) -> Detections:
    """In pixels of a picture, from fractions of it."""
    return dataclasses.replace(said, boxes=absolute(said.boxes, picture.height, picture.width))


def _shared(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that a box has in common with each of others; x, y, width, height."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=-1)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    shared = _shared(box, others)
    return shared / np.maximum(np.prod(box[2:]) + np.prod(others[:, 2:], axis=-1) - shared, 1e-9)


def _inside(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    return _shared(box, others) / max(float(np.prod(box[2:])), 1e-9)


@jax.jit
def padding_share(image_mask: Array) -> Array:
    """The share of each canvas that lies outside of its picture, [batch]."""
    return 1.0 - jnp.mean(image_mask, axis=(1, 2), dtype=jnp.float32)


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
