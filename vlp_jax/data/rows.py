# SPDX-License-Identifier: Apache-2.0
"""Which picture and which of its texts stand at which position of a run, and with which random numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlp_jax.data import buckets, image, order
from vlp_jax.data.source import Source
from vlp_jax.types import UserError, closest

INDEXES = ("pairs", "pictures")
_CAPTION = 0x3C  # separates this use of a draw from others


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which examples a batch holds, and the numbers that their stateless choices are keyed by, all [rows].

    Attributes:
        source, record, caption: where the example lies.
        draw: uint, for the choice of patches.
        key: uint, for masking.
        real: bool, False on the rows that fill up the last batch of an evaluation.
    """

    source: np.ndarray
    record: np.ndarray
    caption: np.ndarray
    draw: np.ndarray
    key: np.ndarray
    real: np.ndarray


class Chooser:
    """Positions to rows, for the sources of a run."""

    def __init__(self, config: Any, sources: list[tuple[str, Source, float]]):
        """Reads seed, train.batch_size and data (index, buckets, and what says how many patches a picture has).

        Raises:
            UserError: an unknown data.index, sizes in data.buckets that do not fit, or a source without captions.
        """
        data = config.data
        if data.index not in INDEXES:
            raise UserError(
                f"data.index='{data.index}' is unknown.{closest(data.index, INDEXES)} "
                f"Possible: {', '.join(INDEXES)}. Choose one of them."
            )
        for name, source, _ in sources:
            if not source.pairs:
                raise UserError(
                    f"The split {source.split} of {source.directory} ({name}) has {len(source)} pictures and no "
                    "caption; a run over pairs needs captions. Prepare the data with captions, or choose another."
                )
            if "image_1" in source.manifest.get("fields", ()):
                raise UserError(
                    f"{source.directory} ({name}) holds pairs of pictures; a run reads one picture with each text. "
                    "Prepare the data with a column image instead of image_0 and image_1."
                )
        self._by_pair, self._seed = data.index == "pairs", config.seed
        self._sources = [source for _, source, _ in sources]
        self._pictures = [np.flatnonzero(source.captions) for source in self._sources]
        self._sizes = [
            source.pairs if self._by_pair else len(pictures)
            for source, pictures in zip(self._sources, self._pictures, strict=True)
        ]
        weights = [weight for _, _, weight in sources]
        self._weights = weights if all(weights) else self._sizes
        self._rule = image.layout(data)
        self._batch_size = config.train.batch_size
        self._plan = None
        if sizes := buckets.check(data.buckets, self._rule):
            if data.crop:
                raise UserError(
                    f"data.buckets={tuple(data.buckets)} and data.crop={tuple(data.crop)} exclude each other: crops all "
                    "have the same number of patches. Set one of them to ()."
                )
            self._plan = buckets.Buckets(
                sizes, self._batch_size, sum(self._sizes), config.seed, self._patches
            )

    @property
    def pairs(self) -> int:
        """Pairs of all sources."""
        return sum(source.pairs for source in self._sources)

    def step(self, step: int, first: int, share: int) -> tuple[Rows, int]:
        """Returns rows `first` to `first + share` of a training step, and how many slots its pictures have."""
        if self._plan is None:
            return self.training(step * self._batch_size + first + np.arange(share)), self._rule.slots
        slots, positions = self._plan.batch(step)
        return self.training(positions[first : first + share]), slots

    def training(self, positions: np.ndarray) -> Rows:
        """Returns the rows at global positions, int64 [n]."""
        number, record, caption, draw = self._locate(positions)
        return Rows(number, record, caption, draw, positions, np.ones(len(positions), bool))

    def evaluation(self, pairs: np.ndarray, places: np.ndarray) -> Rows:
        """Returns the rows at `places` of a list of pairs; places behind its end are padding."""
        real = places < len(pairs)
        pair = pairs[np.minimum(places, len(pairs) - 1)]
        ends = np.cumsum([source.pairs for source in self._sources])
        number = np.searchsorted(ends, pair, side="right")
        record, caption = np.empty_like(pair), np.empty_like(pair)
        for one in np.unique(number):
            here = number == one
            before = ends[one] - self._sources[one].pairs
            record[here], caption[here] = self._sources[one].locate(pair[here] - before)
        return Rows(number, record, caption, order.mix(number, record), pair, real)

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        number, _, row, draw = order.order(self._seed, positions, self._sizes, self._weights)
        record, caption = np.empty_like(row), np.empty_like(row)
        for one in np.unique(number):
            here, source = number == one, self._sources[one]
            if self._by_pair:
                record[here], caption[here] = source.locate(row[here])
            else:
                record[here] = self._pictures[one][row[here]]
                among = source.captions[record[here]].astype(np.uint64)
                caption[here] = (order.mix(draw[here], _CAPTION) % among).astype(np.int64)
        return number, record, caption, draw

    def _patches(self, positions: np.ndarray) -> np.ndarray:
        """How many patches the pictures at these positions keep, int64 [n]."""
        number, record, _, _ = self._locate(positions)
        count = np.empty(len(positions), np.int64)
        for one in np.unique(number):
            here, source = number == one, self._sources[one]
            heights, widths = source.heights[record[here]], source.widths[record[here]]
            count[here] = buckets.tokens(heights.astype(np.int64), widths.astype(np.int64), self._rule)
        return count
