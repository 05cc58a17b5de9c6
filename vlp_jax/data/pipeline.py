# SPDX-License-Identifier: Apache-2.0
"""Host batches by tf.data: step -> rows -> records, text and masks in numpy -> pictures decoded in parallel.

Everything is a function of (config, step, host): nothing is shuffled in a buffer and no iterator state is saved.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vlp_jax.data import augment, corrupt, image, order
from vlp_jax.data import spec as specification
from vlp_jax.data.facts import load_vocabulary
from vlp_jax.data.rows import Chooser, Rows
from vlp_jax.data.source import AGAIN, Source, open_sources
from vlp_jax.types import UserError

_READ = ("image", "captions")  # of a record


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

    def rows(step: int) -> tuple[Rows, int]:
        return maker.chooser.step(step, host * share, share)

    return maker.stream(rows, start, None, share, config.seed)


def evaluation_batches(
    config: Any, *, split: str, batch_size: int, examples: int = 0, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Yields one pass over a split's pairs in a fixed shuffled order; the last batch is filled up.

    Words are masked at `config.evaluation.mask_rate` and pictures keep `config.evaluation.max_patches`, whatever
    training does. A padding row repeats a real one, with -1 for its ids and labels. Masks and dropped patches depend on the pair
    and the picture only, so they are the same in every evaluation.

    Args:
        config: reads data, evaluation.mask_rate and evaluation.max_patches.
        split: of the data.
        batch_size: global.
        examples: how many pairs, evenly spread; 0 = all.
        host, hosts: this host's slice of the rows of each global batch.

    Raises:
        UserError: as `batches`.
    """
    config = evaluation_config(config)
    maker = _Maker(config, split)
    share = _share(batch_size, "evaluation.batch_size", hosts)
    pairs = order.spread(maker.chooser.pairs, examples)

    def rows(step: int) -> tuple[Rows, int]:
        places = step * batch_size + host * share + np.arange(share)
        return maker.chooser.evaluation(pairs, places), maker.rule.slots

    return maker.stream(rows, 0, -(-len(pairs) // batch_size), share, 0)


def evaluation_config(config: Any) -> Any:
    """Returns a copy for evaluation, its mask rate and patch slots, pictures as they are: what `spec` needs."""
    config = config.copy_and_resolve_references()
    config.data.update(buckets=(), randaugment=(), crop=(), flip=0.0)
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
        self.rule = image.layout(config.data)
        self.changes = augment.rule(config.data)
        specification.spec(config, 1)  # refuses what does not fit before files are opened
        self.sources = open_sources(config.data.dir, split)
        self.chooser = Chooser(config, self.sources)
        first = self.sources[0][1]
        self.vocabulary = load_vocabulary(first.vocabulary_path, first.manifest["vocabulary"]["sha256"])

    def source(self, number: int) -> Source:
        return self.sources[number][1]

    def make(self, rows: Rows, slots: int, seed: int) -> dict[str, np.ndarray]:
        """Everything of a batch but the pixels, the bytes of its pictures, and what is to be done to them."""
        count = len(rows.record)
        contents, texts = np.empty(count, object), [""] * count
        height, width, pair = (np.empty(count, np.int64) for _ in range(3))
        for one in np.unique(rows.source):
            here = np.flatnonzero(rows.source == one)
            source, record, caption = self.source(one), rows.record[here], rows.caption[here]
            height[here], width[here] = source.heights[record], source.widths[record]
            pair[here] = source.pair(record, caption)
            for place, number, read in zip(here, caption, source.read(record, _READ), strict=True):
                contents[place], texts[place] = read["image"], read["captions"][number]
        encoded = self.vocabulary.encode(texts, self.data.text_length)
        masks = corrupt.corrupt(
            encoded,
            self.vocabulary.special,
            self.vocabulary.mask,
            rate=self.data.mask_rate,
            counts_padding=self.data.mask_counts_padding,
            seed=seed,
            keys=rows.key,
        )
        masks["mlm_labels"][~rows.real] = -1
        ids = {"example_id": pair, "image_id": rows.record, "source_id": rows.source}
        ids = {key: np.where(rows.real, value, -1).astype(np.int32) for key, value in ids.items()}
        rule = dataclasses.replace(self.rule, slots=slots)
        pictures = augment.plan(self.changes, rule, rows.draw, height, width, texts)
        return encoded | masks | ids | pictures | {"contents": contents}

    def stream(
        self, rows: Callable[[int], tuple[Rows, int]], start: int, stop: int | None, share: int, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of the steps in [start, stop); `rows` gives a step's rows and patch slots."""
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
            chosen, plan = row.pop("chosen"), {key: row.pop(key) for key in augment.keys(self.changes)}
            patches = image.cut(augment.apply(plan, self.changes), chosen, self.rule.patch)
            return row | {"patches": tf.ensure_shape(patches, [None, 3 * self.rule.patch**2])}

        options = tf.data.Options()
        options.deterministic = True
        threads = self.data.threads
        if threads:
            options.threading.private_threadpool_size = threads
        dataset = tf.data.Dataset.range(start, 2**62 if stop is None else stop).map(host_part)
        dataset = (
            dataset.prefetch(1).unbatch().map(picture_part, num_parallel_calls=threads or tf.data.AUTOTUNE)
        )
        return dataset.batch(share, drop_remainder=True).prefetch(self.data.prefetch).with_options(options)

    def _types(self, share: int) -> dict[str, tuple[Any, tuple[int | None, ...]]]:
        """Type and shape of all that the host part makes; the number of patch slots differs between buckets."""
        import tensorflow as tf

        made = specification.spec(self.config, share)
        types = {
            key: (tf.as_dtype(entry.dtype), entry.shape) for key, entry in made.items() if key != "patches"
        }
        for key in ("patch_positions", "patch_mask"):
            kind, (rows, _, *rest) = types[key]
            types[key] = kind, (rows, None, *rest)
        for key, (kind, shape) in augment.keys(self.changes).items():
            types[key] = (tf.string if kind is object else tf.as_dtype(kind)), (share, *shape)
        return types | {"chosen": (tf.int32, (share, None))}

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
            slots = batch["patch_mask"].shape[1]
            specification.check(batch, specification.spec(self.config, share, slots))
            yield batch
            step += 1

    def _explain(self, chosen: tuple[Rows, int]) -> None:
        """Makes a failed batch again in Python, where a UserError is not wrapped, and looks at each picture."""
        rows, slots = chosen
        contents = self.make(rows, slots, 0)["contents"]
        for number, record, content in zip(rows.source, rows.record, contents, strict=True):
            source = self.source(number)
            found = image.decoded(content, f"The picture in {source.where(record)}").shape[:2]
            stated = (int(source.heights[record]), int(source.widths[record]))
            if found != stated:
                raise UserError(
                    f"The picture in {source.where(record)} has {found[0]} x {found[1]} pixels; the index states "
                    f"{stated[0]} x {stated[1]}. {AGAIN}"
                )
