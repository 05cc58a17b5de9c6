# SPDX-License-Identifier: Apache-2.0
"""Distributions of a prepared split: sizes of all pictures from the index, lengths and words of the texts read."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data import image
from vlp_jax.data.text import Vocabulary

BINS = 12  # of a histogram
WORDS = 10  # most frequent unknown words that are kept
_TEXTS_KEPT = 100_000  # different texts that are counted by themselves; the rest by a hash only
_WORDS_KEPT = 100_000
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How often each value occurs.

    Attributes:
        values: [n], ascending, all different.
        counts: int64 [n], all above 0.
    """

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray | None = None) -> Distribution:
        """Gathers equal values; `counts` says how often each is there, once if not given."""
        different, where = np.unique(values, return_inverse=True)
        counts = np.bincount(where, counts, len(different)).astype(np.int64)
        return cls(different[counts > 0], counts[counts > 0])

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of all does not exceed."""
        ends = np.cumsum(self.counts)
        return self.values[np.searchsorted(ends, share * ends[-1] * (1 - 1e-12))].item()

    def above(self, limit: float) -> float:
        """The share of values above a limit."""
        return float(self.counts[self.values > limit].sum() / self.counts.sum())

    def summary(self, edges: np.ndarray) -> dict[str, Any]:
        """minimum, median, p99, maximum, mean, and a histogram: edges [n + 1], counts [n]; the last bin is open."""
        bins = np.clip(np.searchsorted(edges, self.values, side="right") - 1, 0, len(edges) - 2)
        return {
            "minimum": self.values[0].item(),
            "median": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "maximum": self.values[-1].item(),
            "mean": float((self.values * self.counts).sum() / self.counts.sum()),
            "edges": edges.tolist(),
            "counts": np.bincount(bins, self.counts, len(edges) - 1).astype(int).tolist(),
        }


def edges(distributions: Sequence[Distribution]) -> np.ndarray:
    """Bounds of bins for all of them together, so that their histograms can stand side by side.

    Whole numbers where the values are; the rarest thousandth at the upper end shares the last bin.
    """
    joined = Distribution.of(
        np.concatenate([one.values for one in distributions]),
        np.concatenate([one.counts for one in distributions]).astype(np.float64),
    )
    low, high = joined.values[0].item(), joined.quantile(0.999)
    if joined.values.dtype.kind == "f":
        return np.linspace(low, max(high, low + 1e-6), BINS + 1)
    step = max(1, -(-(int(high) - int(low) + 1) // BINS))
    return low + step * np.arange(-(-(int(high) - int(low) + 1) // step) + 1)


def pictures(
    height: np.ndarray, width: np.ndarray, rule: image.Layout
) -> tuple[dict[str, Distribution], list]:
    """Sides, aspect and patch tokens of all pictures of a split.

    Args:
        height, width: pixels, integers [records].
        rule: how pictures become patches.

    Returns:
        Distributions of shorter, longer (pixels), aspect (longer by shorter) and tokens (patches after resizing, all
        that ViLT's rule gives), and the most common sizes [[height, width, share], ...].
    """
    sizes = Distribution.of(height.astype(np.int64) << 32 | width)  # few are different
    tall, wide = sizes.values >> 32, sizes.values & (2**32 - 1)
    shorter, longer = np.minimum(tall, wide), np.maximum(tall, wide)
    rows, columns = image.resized_size(tall, wide, rule.shorter, rule.longer, rule.patch)
    found = {
        "shorter": shorter,
        "longer": longer,
        "aspect": longer / shorter,
        "tokens": rows * columns // rule.patch**2,
    }
    often = np.argsort(-sizes.counts, kind="stable")[:3]
    common = [[int(tall[i]), int(wide[i]), float(sizes.counts[i] / len(height))] for i in often]
    return {name: Distribution.of(values, sizes.counts) for name, values in found.items()}, common


class Texts:
    """Counts over the texts of a split, given some at a time; memory is 8 bytes a text and a bounded rest.

    Attributes:
        records: of how many, counted by the caller.
        texts: how many were given.
        empty: texts without a single piece.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.records = self.texts = self.empty = self._pieces = self._unknown = 0
        self._lengths = np.zeros(0, np.int64)
        self._hashes: list[np.ndarray] = []
        self._often: collections.Counter[str] = collections.Counter()
        self._unknown_words: collections.Counter[str] = collections.Counter()
        self._word_is_unknown: dict[str, bool] = {}

    def add(self, texts: Sequence[str]) -> list[int]:
        """Takes some texts; returns which of them have no piece."""
        if not texts:
            return []
        ids = self.vocabulary.tokenize(texts)
        counts = np.bincount([len(row) + 2 for row in ids], minlength=len(self._lengths))
        counts[: len(self._lengths)] += self._lengths
        self._lengths = counts
        self.texts += len(ids)
        empty = [number for number, row in enumerate(ids) if not row]
        self.empty += len(empty)
        self._pieces += sum(map(len, ids))
        unknown = [row.count(self.vocabulary.unk) for row in ids]
        self._unknown += sum(unknown)
        self._hashes.append(np.array([hash(text) for text in texts], np.int64))
        for text in texts:
            if text in self._often or len(self._often) < _TEXTS_KEPT:
                self._often[text] += 1
        self._count_words([text for text, count in zip(texts, unknown, strict=True) if count])
        return empty

    def _count_words(self, texts: list[str]) -> None:
        words = [word for text in texts for word in _WORD.findall(text.lower())]
        new = [word for word in dict.fromkeys(words) if word not in self._word_is_unknown]
        new = new[: max(0, _WORDS_KEPT - len(self._word_is_unknown))]
        for word, ids in zip(new, self.vocabulary.tokenize(new) if new else [], strict=True):
            self._word_is_unknown[word] = self.vocabulary.unk in ids
        self._unknown_words.update(word for word in words if self._word_is_unknown.get(word))

    def lengths(self) -> Distribution:
        """Word pieces of the texts, [CLS] and [SEP] included."""
        return Distribution.of(np.arange(len(self._lengths)), self._lengths)

    def summary(self, length: int) -> dict[str, Any]:
        """What is said of the texts, except their lengths.

        Args:
            length: data.text_length, for the share that is cut.
        """
        hashes = np.sort(np.concatenate(self._hashes))
        text, times = self._often.most_common(1)[0]
        return {
            "records": self.records,
            "texts": self.texts,
            "empty": self.empty,
            "cut": self.lengths().above(length),
            "unknown": self._unknown / max(1, self._pieces),
            "unknown_words": [[word, count] for word, count in self._unknown_words.most_common(WORDS)],
            "duplicates": float((hashes[1:] == hashes[:-1]).sum() / self.texts),
            "most_frequent": {"text": text[:200], "times": times},
        }
