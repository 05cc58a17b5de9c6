# SPDX-License-Identifier: Apache-2.0
"""What is known of the examples without any model: captions, scenes, and which caption is true of which picture.

The oracles of the tasks guess from this; galleries are chosen with it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlp_jax.data import image as pictures


class Records(Protocol):
    """What is read of a prepared split (`data.source.Source`)."""

    def locate(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the record and the number of its caption for each pair."""

    def read(self, rows: Sequence[int], names: Sequence[str] = ()) -> list[Mapping[str, Any]]:
        """Returns records with "image", "captions" and, for drawn worlds, "scene" (json); () = all fields."""


class World(Protocol):
    """What a module of `data/datasets` may know about its scenes; photographs have neither function."""

    def truth(self, caption: str, scene: Any) -> bool | None:
        """Whether the caption is true of the scene, None where that cannot be told."""

    def fill(self, words: list[str], index: int, scene: Any) -> list[str]:
        """The words of the class of `words[index]` that make the caption true when put there; [] if unknown."""


class Knowledge:
    """Looks examples up by (source_id, row) and says what is true of them.

    Args:
        sources: the records of each source, in the order of `source_id`.
        worlds: for each source the module of its dataset (anything for photographs).
    """

    def __init__(self, sources: Sequence[Records], worlds: Sequence[World | Any]):
        self.sources = list(sources)
        self._truth = [getattr(world, "truth", None) for world in worlds]
        self._fill = [getattr(world, "fill", None) for world in worlds]
        self._texts: dict[tuple[int, int], tuple[list[str], Any]] = {}

    def load(self, source_ids: np.ndarray, image_ids: np.ndarray) -> None:
        """Reads the texts of these pictures in one go each source; without it they are read one by one."""
        for source in np.unique(source_ids):
            rows = np.unique(image_ids[source_ids == source])
            rows = [int(row) for row in rows if row >= 0 and (int(source), int(row)) not in self._texts]
            for row, record in zip(rows, self.sources[source].read(rows) if rows else [], strict=True):
                scene = record.get("scene")
                self._texts[int(source), row] = (
                    list(record["captions"]),
                    json.loads(scene) if scene else None,
                )

    def picture(self, source: int, image: int) -> np.ndarray:
        """A picture before any resizing, uint8 [height, width, 3]; the only method that data without texts serve."""
        record = self.sources[source].read([image], ("image",))[0]
        return pictures.decoded(record["image"], f"The picture of row {image}")

    def captions(self, source: int, image: int) -> list[str]:
        """All captions of a picture."""
        return self._record(source, image)[0]

    def caption(self, source: int, example: int) -> str:
        """The caption of a pair."""
        image, number = self.sources[source].locate(np.array([example]))
        return self.captions(source, int(image[0]))[int(number[0])]

    def knows_scenes(self, source: int, image: int) -> bool:
        """Whether truth can be told from a scene and not only from a picture's own captions."""
        return self._truth[source] is not None and self._record(source, image)[1] is not None

    def is_true(self, caption: str, source: int, image: int) -> bool:
        """Whether a caption is true of a picture.

        Photographs: whether it is, normalised, one of the picture's own captions.
        """
        captions, scene = self._record(source, image)
        known = self._truth[source](caption, scene) if self._truth[source] and scene is not None else None
        if known is not None:
            return bool(known)
        return normalise(caption) in {normalise(own) for own in captions}

    def guess(self, words: Sequence[str], index: int, source: int, image: int) -> float | None:
        """How likely one that knows the scene names `words[index]`, drawing among all that would be true.

        None where the scene does not tell (a photograph, a caption that was cut).
        """
        scene = self._record(source, image)[1]
        if self._fill[source] is None or scene is None:
            return None
        possible = self._fill[source](list(words), index, scene)
        if not possible:
            return None
        return 1.0 / len(possible) if words[index] in possible else 0.0

    def _record(self, source: int, image: int) -> tuple[list[str], Any]:
        if (source, image) not in self._texts:
            self.load(np.array([source]), np.array([image]))
        return self._texts[source, image]


@functools.lru_cache(maxsize=1 << 16)
def normalise(caption: str) -> str:
    """Lower case, letters and digits only, single blanks: captions that differ in nothing else are the same."""
    return " ".join(re.findall(r"\w+", caption.lower()))
