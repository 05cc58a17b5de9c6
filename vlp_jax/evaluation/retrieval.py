# SPDX-License-Identifier: Apache-2.0
"""Zero-shot retrieval: every text of a gallery is scored with every picture by the matching head.

The gallery holds no two pictures such that a caption of one is true of the other, so that each text has one answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp_jax.evaluation.oracle import Knowledge
from vlp_jax.evaluation.runner import fetch, progress, withhold
from vlp_jax.parallel.mesh import placer
from vlp_jax.parallel.shard import replicated
from vlp_jax.types import Array, Batch, Params

CUTS = (1, 5, 10)
FEATURE_BYTES = 1 << 30  # of text and of picture features on a device at a time


def recall(scores: np.ndarray, gold: np.ndarray, cuts: tuple[int, ...] = CUTS) -> dict[int, float]:
    """The share of queries (rows) with a gold item (column) among the first K, for each K of `cuts`.

    Without ties this is the published R@K: the rank of the best gold item, counted from 0, is below K. Among
    equal scores every order is equally likely, so a query counts with its probability of a hit; sorting instead
    would give a model that scores all alike 1 or 0, as the order of the files happens to be. NaN ranks last.

    Args:
        scores: [queries, items], higher is better.
        gold: bool [queries, items]; each query has at least one.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.max(np.where(gold, scores, -np.inf), axis=1, keepdims=True)
    above = np.sum(scores > best, axis=1)
    tied_gold = np.sum(gold & (scores == best), axis=1)
    tied_wrong = np.sum(~gold & (scores == best), axis=1)
    rows = list(zip(above.tolist(), tied_gold.tolist(), tied_wrong.tolist(), strict=True))
    return {
        cut: sum(_hit(cut - ahead, right, wrong) for ahead, right, wrong in rows) / len(rows) for cut in cuts
    }


def _hit(places: int, right: int, wrong: int) -> float:
    """The probability that `places` draws out of right + wrong items hold a right one."""
    if places <= 0:
        return 0.0
    places = min(places, right + wrong)
    return 1.0 - math.comb(wrong, places) / math.comb(right + wrong, places)


class Gallery:
    """Pictures with their texts, taken as they come if they agree with the rule above.

    Args:
        size: how many pictures; 0 = all that fit.
        knowledge: says which caption is true of which picture.
        captions: texts a picture; 0 = all that fit.
    """

    def __init__(self, size: int, knowledge: Knowledge, captions: int = 1):
        self._size, self._knowledge, self._captions = size, knowledge, captions
        self.pictures: dict[tuple[int, int], int] = {}  # (source, image) -> column
        self.texts: list[str] = []
        self.picture_of: list[int] = []  # for each text its picture's column

    def admit(self, source: int, image: int, example: int) -> tuple[bool, bool]:
        """Returns whether the pair brings a new text, and whether a new picture with it."""
        old, know = self.pictures.get((source, image)), self._knowledge
        if old is None and self._size and len(self.pictures) >= self._size:
            return False, False
        if old is not None and self._captions and self.picture_of.count(old) >= self._captions:
            return False, False
        text = know.caption(source, example)
        others = [key for key in self.pictures if key != (source, image)]
        if any(know.is_true(text, *other) for other in others):
            return False, False
        new = old is None
        if new:
            if any(know.is_true(known, source, image) for known in self.texts):
                return False, False
            old = self.pictures[source, image] = len(self.pictures)
        self.texts.append(text)
        self.picture_of.append(old)
        return True, new

    @property
    def full(self) -> bool:
        """Whether no further pair could be admitted."""
        enough = bool(self._size) and len(self.pictures) >= self._size
        return enough and bool(self._captions) and len(self.texts) >= self._size * self._captions

    def gold(self) -> np.ndarray:
        """bool [texts, pictures]: whose text it is."""
        return np.array(self.picture_of)[:, None] == np.arange(len(self.pictures))[None]


class Retrieval:
    """`image_retrieval/r1`, r5, r10 (a text looks for its picture) and `text_retrieval/...` (the other way).

    Texts and pictures are embedded once, in the pass; then `fuse` scores all pairs in batches of one size, gathered
    on the device. Features wait on the host and go to the device in chunks of at most `FEATURE_BYTES`.
    The blind twin has one withheld picture in the place of all.

    Args:
        system: has `predict["encode_text"]`, `["encode_image"]` and `["fuse"]`.
        mesh: the devices.
        knowledge: says which caption is true of which picture.
        gallery, captions: see `Gallery`.
        batch_size: pairs scored at a time; must divide over the mesh.
        blind: whether to measure the twins without picture.
    """

    def __init__(
        self,
        system: Any,
        mesh: Mesh,
        knowledge: Knowledge,
        *,
        gallery: int = 100,
        captions: int = 1,
        batch_size: int = 256,
        blind: bool = True,
    ):
        self._encode_text, self._encode_image = system.predict["encode_text"], system.predict["encode_image"]
        self._score = jax.jit(_pair_scorer(system.predict["fuse"]))
        self._mesh, self._place, self._knowledge = mesh, placer(mesh), knowledge
        self._arguments = (gallery, knowledge, captions)
        self._batch_size, self._blind = batch_size, blind
        self.begin()

    def begin(self) -> None:
        """Forgets the last pass."""
        self.gallery = Gallery(*self._arguments)
        self._texts: list[dict[str, np.ndarray]] = []
        self._images: list[dict[str, np.ndarray]] = []
        self._withheld: dict[str, np.ndarray] = {}

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Admits what fits of the batch and keeps its features."""
        if self.gallery.full:
            return
        rows = fetch({name: batch[name] for name in ("example_id", "source_id", "image_id")})
        live = rows["example_id"] >= 0
        self._knowledge.load(rows["source_id"][live], rows["image_id"][live])
        texts, images = [], []
        for row in np.flatnonzero(live):
            new_text, new_picture = self.gallery.admit(
                int(rows["source_id"][row]), int(rows["image_id"][row]), int(rows["example_id"][row])
            )
            texts += [row] * new_text
            images += [row] * new_picture
        if texts:
            self._texts.append(_take(fetch(self._encode_text(params, batch)), texts))
        if images:
            if self._blind and not self._withheld:
                self._withheld = _take(fetch(self._encode_image(params, withhold(batch))), images[:1])
            self._images.append(_take(fetch(self._encode_image(params, batch)), images))

    def result(self, params: Params) -> dict[str, float]:
        """Scores all pairs and returns the recalls; the oracle's only if every picture has a scene."""
        if not self.gallery.texts:
            return {}
        texts, images, gold = _join(self._texts), _join(self._images), self.gallery.gold()
        scores = {"": self._matrix(params, texts, images)}
        if self._blind:
            column = self._matrix(params, texts, self._withheld)
            scores["_blind"] = np.broadcast_to(column, gold.shape)
        if all(self._knowledge.knows_scenes(*picture) for picture in self.gallery.pictures):
            # Of the other pictures a text is not true: that is how the gallery was chosen.
            own = [list(self.gallery.pictures)[column] for column in self.gallery.picture_of]
            texts_and_pictures = zip(self.gallery.texts, own, strict=True)
            true = np.array([self._knowledge.is_true(text, *picture) for text, picture in texts_and_pictures])
            scores["_oracle"] = (gold & true[:, None]).astype(np.float32)
        results = {}
        for name, matrix in scores.items():
            for task, table, right in (("image", matrix, gold), ("text", matrix.T, gold.T)):
                for cut, value in recall(table, right).items():
                    results[f"{task}_retrieval/r{cut}{name}"] = value
        return results

    def _matrix(self, params: Params, texts: Mapping, images: Mapping) -> np.ndarray:
        """Match minus no match for every pair, [texts, pictures]."""
        scores = np.empty((_length(texts), _length(images)), np.float32)
        with progress("retrieve", "pairs", scores.size) as bar:
            for rows, text_features in self._chunks(texts):
                for columns, image_features in self._chunks(images):
                    tile = scores[rows, columns]
                    features = (params, text_features, image_features)
                    tile[...] = self._pairs(features, tile.shape, bar).reshape(tile.shape)
        return scores

    def _chunks(self, columns: Mapping[str, np.ndarray]) -> Iterator[tuple[slice, dict[str, Array]]]:
        """Puts `FEATURE_BYTES` of features at a time on every device, all chunks of one size."""
        length, total = _length(columns), sum(column.nbytes for column in columns.values())
        chunk = min(length, max(1, FEATURE_BYTES * length // total))
        for start in range(0, length, chunk):
            # The last one is filled up from the front, so that one program scores all.
            rows = np.arange(start, start + chunk) % length
            features = {name: column[rows] for name, column in columns.items()}
            yield slice(start, start + chunk), jax.device_put(features, replicated(self._mesh))

    def _pairs(self, features: tuple, shape: tuple[int, int], bar: Any) -> np.ndarray:
        """Scores the pairs of a tile in batches of one size, the last one filled up."""
        found, pairs, size = [], np.arange(shape[0] * shape[1]), self._batch_size
        for first in range(0, len(pairs), size):
            batch = np.resize(pairs[first : first + size], size)
            mine = np.split(batch, jax.process_count())[jax.process_index()]
            index = {"text": np.int32(mine // shape[1]), "image": np.int32(mine % shape[1])}
            found.append(self._score(*features, self._place(index)))
            # A short queue, so that the bar is true and memory bounded.
            found[max(0, len(found) - 8)].block_until_ready()
            bar.update(min(size, len(pairs) - first))
        return np.concatenate(fetch(found))[: len(pairs)]


def _pair_scorer(fuse: Any) -> Any:
    """Makes of `fuse` a function of all features and the two indices of each pair."""

    def score(params: Params, texts: Mapping, images: Mapping, index: Mapping) -> Array:
        features = {k: v[index["text"]] for k, v in texts.items()}
        features |= {k: v[index["image"]] for k, v in images.items()}
        logits = fuse(params, features)["match_logits"].astype(jnp.float32)
        return logits[..., 1] - logits[..., 0]

    return score


def _take(columns: Mapping[str, np.ndarray], rows: list[int]) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _length(columns: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(columns.values())))
