# SPDX-License-Identifier: Apache-2.0
"""Host batches by tf.data: step -> rows -> records, text, boxes and masks in numpy -> pictures decoded in parallel.

Everything is a function of (config, step, host): nothing is shuffled in a buffer and no iterator state is saved.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vlp_jax.data import augment, detection, grid, image, order, parts
from vlp_jax.data import spec as specification
from vlp_jax.data.rows import Chooser, Rows
from vlp_jax.data.source import AGAIN, Source, open_sources
from vlp_jax.types import UserError


def batches(
    config: Any, *, split: str = "train", start: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the training batches from step `start` on, endlessly, as `spec.spec` says.

    Args:
        config: reads seed, train.batch_size (global) and data.
        split: of the data.
        start: first step.
        host, hosts: this host's slice of the rows of each global batch.

    Raises:
        UserError: unusable data or config; also later, from the iterator, for a damaged record.
    """
    maker = _Maker(config, split)
    share = _share(config.train.batch_size, "train.batch_size", hosts)

    def rows(step: int) -> tuple[Rows, Any]:
        return maker.chooser.step(step, host * share, share)

    return maker.stream(rows, start, None, share, config.seed)


def evaluation_batches(
    config: Any, *, split: str, batch_size: int, examples: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one pass over a split's pairs, or pictures, in a fixed shuffled order; the last batch is filled up.

    Words are masked at `config.evaluation.mask_rate` and pictures keep `config.evaluation.max_patches`, whatever
    training does. A padding row repeats a real picture and text, with -1 for its ids and labels and no boxes. Masks and
    dropped patches depend on the pair and the picture only, so they are the same in every evaluation. With several
    canvases, pictures that need the same one stand together.

    Args:
        config: reads data, evaluation.mask_rate and evaluation.max_patches.
        split: of the data.
        batch_size: global.
        examples: how many of them, evenly spread; 0 = all.
        host, hosts: this host's slice of the rows of each global batch.

    Raises:
        UserError: as `batches`.
    """
    config = evaluation_config(config)
    maker = _Maker(config, split)
    share = _share(batch_size, "evaluation.batch_size", hosts)
    chosen = order.spread(maker.chooser.examples, examples)
    sizes, places = maker.chooser.one_pass(chosen, batch_size)

    def rows(step: int) -> tuple[Rows, Any]:
        return maker.chooser.evaluation(chosen, places[step, host * share : (host + 1) * share]), sizes[step]

    return maker.stream(rows, 0, len(places), share, 0)


def examples(config: Any, split: str) -> int:
    """How many pairs, in runs without texts pictures, a whole pass over a split has.

    Raises:
        UserError: as `batches`.
    """
    config = evaluation_config(config)
    return Chooser(config, open_sources(config.data.dir, split)).examples


def evaluation_config(config: Any) -> Any:
    """Returns a copy for evaluation, its mask rate and patch slots, pictures as they are: what `spec` needs."""
    config = config.copy_and_resolve_references()
    config.data.update(buckets=(), randaugment=(), crop=(), image_sizes=(), size_crop=0.0, flip=0.0)
    config.data.mask_rate = config.evaluation.mask_rate
    if config.evaluation.max_patches >= 0:
        config.data.max_patches = config.evaluation.max_patches
    return config


def _share(batch_size: int, key: str, hosts: int) -> int:
    if batch_size < 1 or batch_size % hosts:
        near = max(1, round(batch_size / hosts)) * hosts
        raise UserError(
            f"{key}={batch_size} does not divide over {hosts} hosts. Possible near it: {near}. Change {key}."
        )
    return batch_size // hosts


class _Maker:
    """The opened data and what is needed to make batches of it."""

    def __init__(self, config: Any, split: str):
        self.config, self.data = config, config.data
        specification.spec(config, 1)  # refuses what does not fit before files are opened
        self.sources = open_sources(config.data.dir, split)
        opened = [source for _, source, _ in self.sources]
        self.parts = [parts.KINDS[name](config, opened) for name in config.data.inputs]
        self.chooser = Chooser(config, self.sources)
        self.fields = [
            tuple(dict.fromkeys(field for part in self.parts for field in part.fields(source)))
            for source in opened
        ]

    def source(self, number: int) -> Source:
        return self.sources[number][1]

    def make(self, rows: Rows, size: Any, seed: int) -> dict[str, np.ndarray]:
        """Everything of a batch but the pixels, the bytes of its pictures, and what is to be done to them."""
        count = len(rows.record)
        records, texts = np.empty(count, object), [""] * count
        height, width, example = (np.empty(count, np.int64) for _ in range(3))
        with_texts = "text" in self.data.inputs
        for one in np.unique(rows.source):
            here = np.flatnonzero(rows.source == one)
            source, record, caption = self.source(one), rows.record[here], rows.caption[here]
            height[here], width[here] = source.heights[record], source.widths[record]
            example[here] = source.pair(record, caption) if with_texts else record
            for place, number, read in zip(here, caption, source.read(record, self.fields[one]), strict=True):
                records[place] = read
                if with_texts:
                    texts[place] = read["captions"][number]
        ids = {"example_id": example, "image_id": rows.record, "source_id": rows.source}
        made = {key: np.where(rows.real, value, -1).astype(np.int32) for key, value in ids.items()}
        plans = self._plans(rows, height, width, texts)
        content = parts.Content(rows, records, height, width, texts, size, seed, plans)
        for part in self.parts:
            made |= part.arrays(content)
        return made

    def _plans(self, rows: Rows, height: np.ndarray, width: np.ndarray, texts: list[str]) -> Any:
        """What happens to the pictures of a grid; none whose text mentions a side is mirrored."""
        if "grid" not in self.data.inputs:
            return None
        made = detection.plan(grid.rule(self.data), rows.draw, height, width)
        still = np.fromiter(map(augment.mentions_side, texts), bool, len(texts))
        return dataclasses.replace(made, mirrored=made.mirrored & ~still)

    def stream(
        self, rows: Callable[[int], tuple[Rows, Any]], start: int, stop: int | None, share: int, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of the steps in [start, stop); `rows` gives a step's rows and its patch slots or canvas."""
        # tensorflow keeps a Python function for ever; what it needs is taken from here, and let go of with the
        # stream. At exit too: a thread that still wants to call Python then would end the process by an abort.
        running = {"make": lambda step: self.make(*rows(int(step)), seed)}
        running["iterator"] = self._dataset(running, start, stop, share).as_numpy_iterator()
        stream = self._checked(running, rows, start, share)
        weakref.finalize(stream, running.clear)
        return stream

    def _dataset(self, running, start, stop, share):
        import tensorflow as tf

        types = self._types(share)

        @tf.autograph.experimental.do_not_convert  # which would write a file into /tmp for each stream
        def host_part(step):
            def flat(step):
                if "make" not in running:
                    raise StopIteration  # nobody listens any more; tensorflow says nothing of this one
                arrays = running["make"](step)
                return [arrays[key] for key in types]

            tensors = tf.numpy_function(flat, [step], [kind for kind, _ in types.values()], stateful=False)
            return {
                key: tf.ensure_shape(tensor, shape)
                for (key, (_, shape)), tensor in zip(types.items(), tensors, strict=True)
            }

        @tf.autograph.experimental.do_not_convert
        def picture_part(row):
            for part in self.parts:
                row = part.row(row)
            return row

        @tf.autograph.experimental.do_not_convert
        def last_part(batch):
            for part in self.parts:
                batch = part.together(batch)
            return batch

        options = tf.data.Options()
        options.deterministic = True
        threads = self.data.threads
        if threads:
            options.threading.private_threadpool_size = threads
        dataset = tf.data.Dataset.range(start, 2**62 if stop is None else stop).map(host_part)
        dataset = (
            dataset.prefetch(1).unbatch().map(picture_part, num_parallel_calls=threads or tf.data.AUTOTUNE)
        )
        dataset = dataset.batch(share, drop_remainder=True).map(last_part)
        return dataset.prefetch(self.data.prefetch).with_options(options)

    def _types(self, share: int) -> dict[str, tuple[Any, tuple[int | None, ...]]]:
        """Type and shape of all that the host part makes; the number of patch slots differs between buckets."""
        import tensorflow as tf

        later = {key for part in self.parts for key in part.later}
        types = {
            key: (entry.dtype, entry.shape)
            for key, entry in specification.spec(self.config, share).items()
            if key not in later
        }
        for key in {"patch_positions", "patch_mask"} & types.keys():
            kind, (rows, _, *rest) = types[key]
            types[key] = kind, (rows, None, *rest)
        types |= {
            key: (kind, (share, *shape)) for part in self.parts for key, (kind, shape) in part.extra.items()
        }
        return {
            key: (tf.string if kind is object else tf.as_dtype(kind), shape)
            for key, (kind, shape) in types.items()
        }

    def _checked(self, running, rows, step: int, share: int) -> Iterator[dict[str, np.ndarray]]:
        import tensorflow as tf

        while True:
            try:
                batch = next(running["iterator"])
            except StopIteration:
                return
            except tf.errors.OpError as error:
                self._explain(rows(step))
                raise RuntimeError(f"step {step} of the data pipeline failed: {error.message}") from error
            size = batch["image"].shape[1:3] if "image" in batch else batch["patch_mask"].shape[1]
            specification.check(batch, specification.spec(self.config, share, size))
            yield batch
            step += 1

    def _explain(self, chosen: tuple[Rows, Any]) -> None:
        """Makes a failed batch again in Python, where a UserError is not wrapped, and looks at each picture."""
        rows, size = chosen
        contents = self.make(rows, size, 0)["contents"]
        for number, record, content in zip(rows.source, rows.record, contents, strict=True):
            source = self.source(number)
            found = image.decoded(content, f"The picture in {source.where(record)}").shape[:2]
            stated = (int(source.heights[record]), int(source.widths[record]))
            if found != stated:
                raise UserError(
                    f"The picture in {source.where(record)} has {found[0]} x {found[1]} pixels; the index states "
                    f"{stated[0]} x {stated[1]}. {AGAIN}"
                )
