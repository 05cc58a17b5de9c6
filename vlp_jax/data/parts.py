# SPDX-License-Identifier: Apache-2.0
"""The parts that batches are put together of, by `config.data.inputs`: what each makes on the host and in the graph.

A part has `fields` (what it reads of records), `extra` (arrays for the graph alone: name -> type and shape of a row),
`later` (keys of the spec that the graph makes), and three functions: `arrays` on the host, for a batch; `row` in
tensorflow, for one picture; `together` in tensorflow, for a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data import augment, categories, corrupt, detection, grid, image
from vlp_jax.data.facts import load_vocabulary
from vlp_jax.data.rows import Rows
from vlp_jax.data.source import AGAIN, Source
from vlp_jax.types import UserError

Row = dict[str, Any]  # name -> tensor


@dataclasses.dataclass(frozen=True)
class Content:
    """What a batch is made from.

    Attributes:
        rows: which examples.
        records: the fields that are read of each.
        height, width: int64 [rows], of the pictures.
        texts: of each row; "" in runs without.
        size: of the batch: patch slots, or rows and columns of its canvas.
        seed: of the masks.
        plans: what happens to the pictures of a grid.
    """

    rows: Rows
    records: Sequence[dict[str, Any]]
    height: np.ndarray
    width: np.ndarray
    texts: Sequence[str]
    size: Any
    seed: int
    plans: detection.Plans | None = None

    def contents(self) -> np.ndarray:
        """The bytes of the pictures, object [rows]."""
        found = np.empty(len(self.records), object)
        found[:] = [record["image"] for record in self.records]
        return found


class Part:
    """A part that reads nothing and makes nothing."""

    later: tuple[str, ...] = ()
    extra: dict[str, tuple[Any, tuple[int | None, ...]]] = {}

    def fields(self, source: Source) -> tuple[str, ...]:
        """What is read of the records of a source."""
        return ()

    def row(self, row: Row) -> Row:
        """Makes, of a row's tensors, the pixels."""
        return row

    def together(self, batch: Row) -> Row:
        """Makes what is quicker made for a whole batch."""
        return batch


class Text(Part):
    """Word pieces, and those that are masked."""

    def __init__(self, config: Any, sources: Sequence[Source]):
        self._data = config.data
        self._vocabulary = load_vocabulary(
            sources[0].vocabulary_path, sources[0].manifest["vocabulary"]["sha256"]
        )

    def fields(self, source: Source) -> tuple[str, ...]:
        return ("captions",)

    def arrays(self, content: Content) -> dict[str, np.ndarray]:
        """The keys of the spec."""
        encoded = self._vocabulary.encode(content.texts, self._data.text_length)
        masks = corrupt.corrupt(
            encoded,
            self._vocabulary.special,
            self._vocabulary.mask,
            rate=self._data.mask_rate,
            counts_padding=self._data.mask_counts_padding,
            seed=content.seed,
            keys=content.rows.key,
        )
        masks["mlm_labels"][~content.rows.real] = -1
        return encoded | masks


class Patches(Part):
    """Pictures cut into patches."""

    later = ("patches",)

    def __init__(self, config: Any, sources: Sequence[Source]):
        self._rule, self._changes = image.layout(config.data), augment.rule(config.data)
        self.extra = augment.keys(self._changes) | {"chosen": (np.int32, (None,))}

    def fields(self, source: Source) -> tuple[str, ...]:
        return ("image",)

    def arrays(self, content: Content) -> dict[str, np.ndarray]:
        """Which patches, and what is to be done to the pixels."""
        rule = dataclasses.replace(self._rule, slots=content.size)
        sizes = content.height, content.width
        made = augment.plan(self._changes, rule, content.rows.draw, *sizes, content.texts)
        return made | {"contents": content.contents()}

    def row(self, row: Row) -> Row:
        import tensorflow as tf

        plan, chosen = {key: row.pop(key) for key in augment.keys(self._changes)}, row.pop("chosen")
        patches = image.cut(augment.apply(plan, self._changes), chosen, self._rule.patch)
        return row | {"patches": tf.ensure_shape(patches, [None, 3 * self._rule.patch**2])}


class Grid(Part):
    """Whole pictures on a canvas."""

    later = ("image", "image_mask")

    def __init__(self, config: Any, sources: Sequence[Source]):
        self._crops = grid.rule(config.data).crop > 0
        self.extra = grid.keys(self._crops)

    def fields(self, source: Source) -> tuple[str, ...]:
        return ("image",)

    def arrays(self, content: Content) -> dict[str, np.ndarray]:
        """What is to be done to the pixels."""
        return grid.plan(content.plans, content.size, self._crops) | {"contents": content.contents()}

    def row(self, row: Row) -> Row:
        import tensorflow as tf

        plan = {key: row.pop(key) for key in self.extra}
        picture = tf.ensure_shape(grid.apply(plan, self._crops), [None, None, 3])
        return row | {"image": picture, "size": plan["after"]}

    def together(self, batch: Row) -> Row:
        import tensorflow as tf

        return batch | {"image_mask": grid.mask(batch.pop("size"), tf.shape(batch["image"])[1:3])}


class Boxes(Part):
    """What is to be found in pictures on a canvas."""

    def __init__(self, config: Any, sources: Sequence[Source]):
        manifests = [(source.directory, source.manifest) for source in sources]
        names = categories.of_data(config.data.categories, manifests)
        self._labels = {name: number for number, name in enumerate(names) if name}
        self._sources, self._slots = sources, int(config.data.max_boxes)

    def fields(self, source: Source) -> tuple[str, ...]:
        crowd = ("box_crowd",) if "box_crowd" in source.manifest["fields"] else ()
        return ("boxes", "box_names", *crowd)

    def arrays(self, content: Content) -> dict[str, np.ndarray]:
        """The keys of the spec; a padding row has no boxes."""
        boxes, names, crowd, count = [], [], [], []
        for row, record in enumerate(content.records):
            number = len(record["boxes"])
            # A set of several files may mark crowds in some of them only.
            crowds = record.get("box_crowd") or [0] * number
            if not number == len(record["box_names"]) == len(crowds):
                rows = content.rows
                raise UserError(
                    f"The {self._sources[rows.source[row]].where(rows.record[row])} has {number} boxes, "
                    f"{len(record['box_names'])} names of boxes and {len(crowds)} marks of crowds. Each box has one of "
                    f"both. {AGAIN}"
                )
            number = number if content.rows.real[row] else 0
            boxes.append(record["boxes"][:number])
            names += record["box_names"][:number]
            crowd += crowds[:number]
            count.append(number)
        labels = np.array([self._labels.get(name, -1) for name in names], np.int64)
        picture = np.repeat(np.arange(len(count)), count)
        return detection.targets(
            np.concatenate(boxes), picture, np.array(crowd, bool), labels, content.plans, self._slots
        )


KINDS = {"text": Text, "patches": Patches, "grid": Grid, "boxes": Boxes}
