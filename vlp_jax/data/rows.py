# SPDX-License-Identifier: Apache-2.0
"""Which picture and which of its texts stand at which position of a run, and with which random numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlp_jax.data import buckets, detection, grid, image, order
from vlp_jax.data.source import Source
from vlp_jax.types import UserError, closest

INDEXES = ("pairs", "pictures")
_CAPTION = 0x3C  # separates this use of a draw from others


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which examples a batch holds, and the numbers that their stateless choices are keyed by, all [rows].

    Attributes:
        source, record, caption: where the example lies; caption is 0 in runs without texts.
        draw: uint, for what is done to the picture.
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
        """Reads seed, train.batch_size and data (inputs, index, buckets or canvases, and what says how large pictures are).

        Raises:
            UserError: an unknown data.index, sizes in data.buckets or data.canvases that do not fit, or a source
                without captions.
        """
        data = config.data
        self._texts, self._grid = "text" in data.inputs, "grid" in data.inputs
        _check_index(data, self._texts)
        for name, source, _ in sources:
            _check_source(name, source, self._texts)
        self._by_pair, self._seed = data.index == "pairs", config.seed
        self._sources = [source for _, source, _ in sources]
        self._pictures = [
            np.flatnonzero(source.captions) if self._texts else np.arange(len(source))
            for source in self._sources
        ]
        self._sizes = [
            source.pairs if self._by_pair else len(pictures)
            for source, pictures in zip(self._sources, self._pictures, strict=True)
        ]
        weights = [weight for _, _, weight in sources]
        self._weights = weights if all(weights) else self._sizes
        self._batch_size = config.train.batch_size
        self._room = self._rooms(data)
        self._plan = None
        if len(self._room) > 1 or data.buckets:
            self._plan = buckets.Buckets(
                self._room, self._batch_size, sum(self._sizes), config.seed, self._extents
            )

    def _rooms(self, data: Any) -> tuple:
        """The sizes that a batch may have: patch slots, or rows and columns of canvases."""
        if self._grid:
            self._rule = grid.rule(data)
            for source in self._sources:
                name = f"the split {source.split} of {source.directory}"
                grid.check(data, source.heights, source.widths, name)
            return grid.canvases(data)
        self._rule = image.layout(data)
        sizes = buckets.check(data.buckets, self._rule)
        if sizes and data.crop:
            raise UserError(
                f"data.buckets={tuple(data.buckets)} and data.crop={tuple(data.crop)} exclude each other: crops all "
                "have the same number of patches. Set one of them to ()."
            )
        return sizes or (self._rule.slots,)

    @property
    def examples(self) -> int:
        """Pairs of all sources, in runs without texts pictures: what an evaluation goes over."""
        return sum(self._counts())

    def _counts(self) -> list[int]:
        return [source.pairs if self._texts else len(source) for source in self._sources]

    def step(self, step: int, first: int, share: int) -> tuple[Rows, Any]:
        """Returns rows `first` to `first + share` of a training step, and the patch slots or the canvas of its batch."""
        if self._plan is None:
            return self.training(step * self._batch_size + first + np.arange(share)), self._room[-1]
        size, positions = self._plan.batch(step)
        return self.training(positions[first : first + share]), size

    def training(self, positions: np.ndarray) -> Rows:
        """Returns the rows at global positions, int64 [n]."""
        number, record, caption, draw = self._locate(positions)
        return Rows(number, record, caption, draw, positions, np.ones(len(positions), bool))

    def one_pass(self, examples: np.ndarray, batch_size: int) -> tuple[list, np.ndarray]:
        """Cuts a list of examples into the batches of an evaluation.

        With several canvases, pictures that need the same one stand together.

        Returns:
            the patch slots or the canvas of each batch; int64 [batches, batch_size], places in the list, its length
            and more where a row of the last batch is empty.
        """
        count = -(-len(examples) // batch_size)
        places = np.arange(count * batch_size).reshape(count, batch_size)
        if len(self._room) == 1:
            return [self._room[0]] * count, places
        rows = self.evaluation(examples, np.arange(len(examples)))
        extents = self._extent(rows.source, rows.record, rows.draw)
        which, places = buckets.fill(extents, self._room, batch_size)
        return [self._room[one] for one in which], places

    def evaluation(self, examples: np.ndarray, places: np.ndarray) -> Rows:
        """Returns the rows at `places` of a list of examples; places behind its end are padding."""
        real = places < len(examples)
        example = examples[np.minimum(places, len(examples) - 1)]
        counts = self._counts()
        ends = np.cumsum(counts)
        number = np.searchsorted(ends, example, side="right")
        record, caption = np.empty_like(example), np.zeros_like(example)
        for one in np.unique(number):
            here = number == one
            inside = example[here] - (ends[one] - counts[one])
            if self._texts:
                record[here], caption[here] = self._sources[one].locate(inside)
            else:
                record[here] = inside
        return Rows(number, record, caption, order.mix(number, record), example, real)

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        number, _, row, draw = order.order(self._seed, positions, self._sizes, self._weights)
        record, caption = np.empty_like(row), np.zeros_like(row)
        for one in np.unique(number):
            here, source = number == one, self._sources[one]
            if self._by_pair:
                record[here], caption[here] = source.locate(row[here])
            else:
                record[here] = self._pictures[one][row[here]]
            if self._texts and not self._by_pair:
                among = source.captions[record[here]].astype(np.uint64)
                caption[here] = (order.mix(draw[here], _CAPTION) % among).astype(np.int64)
        return number, record, caption, draw

    def _extents(self, positions: np.ndarray) -> np.ndarray:
        """How many patches the pictures at these positions keep, int64 [n], or their rows and columns, [n, 2]."""
        number, record, _, draw = self._locate(positions)
        return self._extent(number, record, draw)

    def _extent(self, number: np.ndarray, record: np.ndarray, draw: np.ndarray) -> np.ndarray:
        height, width = np.empty(len(number), np.int64), np.empty(len(number), np.int64)
        for one in np.unique(number):
            here, source = number == one, self._sources[one]
            height[here], width[here] = source.heights[record[here]], source.widths[record[here]]
        if self._grid:
            return detection.plan(self._rule, draw, height, width).size
        return buckets.tokens(height, width, self._rule)


def _check_index(data: Any, texts: bool) -> None:
    if data.index not in INDEXES:
        raise UserError(
            f"data.index='{data.index}' is unknown.{closest(data.index, INDEXES)} "
            f"Possible: {', '.join(INDEXES)}. Choose one of them."
        )
    if not texts and data.index != "pictures":
        raise UserError(
            f"data.index='{data.index}' is over pictures with their texts, and data.inputs={tuple(data.inputs)} holds no "
            "text. Possible without: pictures. Set data.index=pictures, or put text into data.inputs."
        )


def _check_source(name: str, source: Source, texts: bool) -> None:
    if texts and not source.pairs:
        raise UserError(
            f"The split {source.split} of {source.directory} ({name}) has {len(source)} pictures and no "
            "caption; a run over pairs needs captions. Prepare the data with captions, or choose another."
        )
    if "image_1" in source.manifest.get("fields", ()):
        raise UserError(
            f"{source.directory} ({name}) holds pairs of pictures; a run reads one picture with each text. "
            "Prepare the data with a column image instead of image_0 and image_1."
        )
