# SPDX-License-Identifier: Apache-2.0
"""Host batches by tf.data: step -> rows -> records, text and masks in numpy -> pictures decoded in parallel.

Everything is a function of (config, step, host): nothing is shuffled in a buffer and no iterator state is saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import corrupt, image, order
from vlp_jax.data import spec as specification
from vlp_jax.data.source import Source, open_sources, parse_spec, read_manifest
from vlp_jax.data.text import Vocabulary
from vlp_jax.files import digest
from vlp_jax.types import UserError, closest

INDEXES = ("pairs", "pictures")
_CAPTION = 0x3C  # separates this use of a draw from others
_FOR_PICTURES = ("contents", "size", "chosen")  # what the decoding needs, next to the keys of a batch


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
    size = config.train.batch_size
    share = _share(size, "train.batch_size", hosts)

    def rows(step: int) -> Rows:
        return maker.training_rows(step * size + host * share + np.arange(share))

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
    pairs = order.spread(sum(source.pairs for _, source, _ in maker.sources), examples)

    def rows(step: int) -> Rows:
        return maker.evaluation_rows(pairs, step * batch_size + host * share + np.arange(share))

    return maker.stream(rows, 0, -(-len(pairs) // batch_size), share, 0)


def evaluation_config(config: Any) -> Any:
    """Returns a copy with the mask rate and the patch slots of evaluation: what `spec` needs for its batches."""
    config = config.copy_and_resolve_references()
    config.data.mask_rate = config.evaluation.mask_rate
    if config.evaluation.max_patches >= 0:
        config.data.max_patches = config.evaluation.max_patches
    return config


def facts(config: Any) -> dict[str, Any]:
    """Returns what a run takes from its data; reads manifests and the vocabulary, no record.

    Returns:
        vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id; visual_words and visual_ids (pieces that are one);
        manifest_sha256 (of a mixture: over all); vocabulary_path, vocabulary_sha256; sources: name -> {directory,
        dataset, weight, manifest_sha256, splits: name -> {records, pairs}}.

    Raises:
        UserError: a directory, manifest or vocabulary that cannot be used.
    """
    sources, words, first = {}, set(), None
    for name, directory, weight in parse_spec(config.data.dir):
        manifest, digest = read_manifest(directory)
        first = first or (directory, manifest)
        splits = {
            split: {"records": entry["records"], "pairs": entry["pairs"]}
            for split, entry in manifest["splits"].items()
        }
        sources[name or manifest["dataset"]] = {
            "directory": str(directory),
            "dataset": manifest["dataset"],
            "weight": weight,
            "manifest_sha256": digest,
            "splits": splits,
        }
        words.update(manifest.get("visual_words", ()))
    directory, manifest = first
    vocabulary = load_vocabulary(directory / manifest["vocabulary"]["file"], manifest["vocabulary"]["sha256"])
    digests = [source["manifest_sha256"] for source in sources.values()]
    together = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {
        "vocab_size": vocabulary.size,
        "pad_id": vocabulary.pad,
        "unk_id": vocabulary.unk,
        "cls_id": vocabulary.cls,
        "sep_id": vocabulary.sep,
        "mask_id": vocabulary.mask,
        "visual_words": sorted(words),
        "visual_ids": [
            i for i in np.flatnonzero(vocabulary.word_start).tolist() if vocabulary.word(i) in words
        ],
        "manifest_sha256": digests[0] if len(digests) == 1 else together,
        "vocabulary_path": str(vocabulary.path),
        "vocabulary_sha256": manifest["vocabulary"]["sha256"],
        "sources": sources,
    }


def load_vocabulary(path: Path, sha256: str) -> Vocabulary:
    """Loads a vocabulary after a look at its digest.

    Raises:
        UserError: it is unreadable, or not the file that the manifest states.
    """
    vocabulary = Vocabulary.load(path)
    if digest(path) != sha256:
        raise UserError(
            f"The vocabulary {path} is not the one that the manifest beside it states: its sha256 differs. Token "
            "ids would change their meaning. Put the right file back or prepare the data again."
        )
    return vocabulary


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
        data = self.data = config.data
        if data.index not in INDEXES:
            raise UserError(
                f"data.index='{data.index}' is unknown.{closest(data.index, INDEXES)} "
                f"Possible: {', '.join(INDEXES)}. Choose one of them."
            )
        self.config, self.seed = config, config.seed
        self.rule = image.layout(data)
        specification.spec(config, 1)  # refuses what does not fit before files are opened
        self.sources = open_sources(data.dir, split)
        first = self.sources[0][1]
        self.vocabulary = load_vocabulary(first.vocabulary_path, first.manifest["vocabulary"]["sha256"])
        self.weights = [weight for _, _, weight in self.sources]
        self.pictures = [np.flatnonzero(source.captions) for _, source, _ in self.sources]

    def source(self, number: int) -> Source:
        return self.sources[number][1]

    def training_rows(self, positions: np.ndarray) -> Rows:
        by_pair = self.data.index == "pairs"
        sizes = [
            source.pairs if by_pair else len(pictures)
            for (_, source, _), pictures in zip(self.sources, self.pictures, strict=True)
        ]
        number, _, row, draw = order.order(self.seed, positions, sizes, self.weights)
        record, caption = np.empty_like(row), np.empty_like(row)
        for one in np.unique(number):
            here = number == one
            if by_pair:
                record[here], caption[here] = self.source(one).locate(row[here])
            else:
                record[here] = self.pictures[one][row[here]]
                among = self.source(one).captions[record[here]].astype(np.uint64)
                caption[here] = (order.mix(draw[here], _CAPTION) % among).astype(np.int64)
        return Rows(number, record, caption, draw, positions, np.ones(len(positions), bool))

    def evaluation_rows(self, pairs: np.ndarray, places: np.ndarray) -> Rows:
        real = places < len(pairs)
        pair = pairs[np.minimum(places, len(pairs) - 1)]
        ends = np.cumsum([source.pairs for _, source, _ in self.sources])
        number = np.searchsorted(ends, pair, side="right")
        record, caption = np.empty_like(pair), np.empty_like(pair)
        for one in np.unique(number):
            here = number == one
            before = ends[one] - self.source(one).pairs
            record[here], caption[here] = self.source(one).locate(pair[here] - before)
        return Rows(number, record, caption, order.mix(number, record), pair, real)

    def make(self, rows: Rows, seed: int) -> dict[str, np.ndarray]:
        """Everything of a batch but the pixels, and the bytes, sizes and chosen patches of its pictures."""
        count = len(rows.record)
        contents, texts = np.empty(count, object), [""] * count
        height, width, pair = (np.empty(count, np.int64) for _ in range(3))
        for one in np.unique(rows.source):
            here = np.flatnonzero(rows.source == one)
            source, record, caption = self.source(one), rows.record[here], rows.caption[here]
            height[here], width[here] = source.heights[record], source.widths[record]
            pair[here] = source.pair(record, caption)
            for place, number, read in zip(here, caption, source.read(record), strict=True):
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
        return (
            encoded | masks | ids | image.plan(height, width, rows.draw, self.rule) | {"contents": contents}
        )

    def stream(
        self, rows: Callable[[int], Rows], start: int, stop: int | None, share: int, seed: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of the steps in [start, stop)."""
        expected = specification.spec(self.config, share)
        # tensorflow keeps a Python function for ever; what it needs is taken from here, and let go of with the
        # stream. At exit too: a thread that still wants to call Python then would end the process by an abort.
        running = {"make": lambda step: self.make(rows(int(step)), seed)}
        running["iterator"] = self._dataset(running, start, stop, share, expected).as_numpy_iterator()
        stream = self._checked(running, rows, start, expected)
        weakref.finalize(stream, running.clear)
        return stream

    def _dataset(self, running, start, stop, share, expected):
        import tensorflow as tf

        made = {key: entry for key, entry in expected.items() if key != "patches"}
        types = {key: (tf.as_dtype(entry.dtype), entry.shape) for key, entry in made.items()}
        types |= {"contents": (tf.string, (share,)), "size": (tf.int32, (share, 2))}
        types["chosen"] = (tf.int32, (share, self.rule.slots))

        def host_part(step):
            def flat(step):
                arrays = running["make"](step)
                return [arrays[key] for key in types]

            tensors = tf.numpy_function(flat, [step], [kind for kind, _ in types.values()], stateful=False)
            return {
                key: tf.ensure_shape(tensor, shape)
                for (key, (_, shape)), tensor in zip(types.items(), tensors, strict=True)
            }

        def picture_part(row):
            contents, size, chosen = (row.pop(key) for key in _FOR_PICTURES)
            patches = image.cut(image.resize(image.decode(contents), size), chosen, self.rule.patch)
            return row | {"patches": tf.ensure_shape(patches, expected["patches"].shape[1:])}

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

    def _checked(self, running, rows, step, expected) -> Iterator[dict[str, np.ndarray]]:
        import tensorflow as tf

        while True:
            try:
                batch = next(running["iterator"])
            except StopIteration:
                return
            except tf.errors.OpError as error:
                self._explain(rows(step))
                raise RuntimeError(f"step {step} of the data pipeline failed: {error.message}") from error
            specification.check(batch, expected)
            yield batch
            step += 1

    def _explain(self, rows: Rows) -> None:
        """Makes a failed batch again in Python, where a UserError is not wrapped, and looks at each picture."""
        contents = self.make(rows, 0)["contents"]
        for number, record, content in zip(rows.source, rows.record, contents, strict=True):
            image.decoded(content, f"The picture in {self.source(number).where(record)}")
