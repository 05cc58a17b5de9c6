# SPDX-License-Identifier: Apache-2.0
"""Which objects are in a picture, where, and how sure the model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data import grid, image
from vlp_jax.evaluation import detection
from vlp_jax.evaluation.frames import draw_boxes, of_classes
from vlp_jax.prediction import pictures
from vlp_jax.systems.base import System
from vlp_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The pictures, where each is drawn (None = nowhere), and the least score of a box."""

    images: Sequence[Path]
    targets: Sequence[Path | None]
    threshold: float


def check(images: Sequence[str], threshold: float, picture: str, overwrite: bool) -> Wanted:
    """Reads the flags of `predict`.

    Raises:
        UserError: a threshold that is no score, or as `pictures.check` and `pictures.targets`.
    """
    if not 0.0 <= threshold <= 1.0:
        raise UserError(
            f"--threshold={threshold} is no score. Possible: numbers from 0, which gives every box that the model has, "
            "to 1. Give one of these."
        )
    paths = pictures.check(images)
    return Wanted(paths, pictures.targets(paths, picture, overwrite), threshold)


def run(
    config: ConfigDict, system: System, params: Params, assets: Mapping[str, Path], wanted: Wanted
) -> Iterator[dict[str, Any]]:
    """Yields what is found in each picture, in their order, and draws it where that is wanted.

    Pictures go through the model one by one, so none is padded more than its own canvas asks for; each canvas of
    config.data.canvases that is needed is compiled once.

    Args:
        config: of the checkpoint; reads `data`.
        system: has `predict["boxes"]`.
        params: numpy arrays.
        assets: of the checkpoint; the names of the classes are among them.
        wanted: from `check`.

    Returns:
        for each picture {"image", "width", "height" (pixels), "boxes": [{"label", "score", "box": [x, y, width,
        height] in pixels}]}, surest first.

    Raises:
        UserError: a picture that cannot be used.
    """
    names, params = detection.class_names(assets), jax.device_put(params)
    for path, target in zip(wanted.images, wanted.targets, strict=True):
        picture = pictures.read(path)
        out = system.predict["boxes"](params, grid.load(picture.content, config.data))
        scores, labels = (np.asarray(each)[0] for each in detection.best_class(out["class_logits"]))
        boxes = detection.absolute(np.asarray(out["boxes"])[0], picture.height, picture.width)
        found = _sure(detection.Detections(scores, labels, boxes), wanted.threshold)
        if target:
            pixels = image.decoded(picture.content, str(path))
            pictures.save(draw_boxes(pixels, of_classes(found, names)), target)
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        yield {
            "image": str(path),
            "width": picture.width,
            "height": picture.height,
            "boxes": [
                {
                    "label": detection.called(names, label),
                    "score": round(score, 6),
                    "box": [round(side, 3) for side in box],
                }
                for label, score, box in rows
            ],
        }


def _sure(said: detection.Detections, threshold: float) -> detection.Detections:
    """Those of a score of `threshold` and more, surest first; what is no number is no box."""
    fine = np.isfinite(said.scores) & np.isfinite(said.boxes).all(-1)
    order = np.argsort(-np.where(fine, said.scores, -1.0), kind="stable")
    order = order[fine[order] & (said.scores[order] >= threshold)]
    return detection.Detections(said.scores[order], said.labels[order], said.boxes[order])
