# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: how often the masked word piece is the first guess, seeing the picture and blind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.text import Vocabulary
from vlp_jax.evaluation.oracle import Knowledge
from vlp_jax.evaluation.runner import fetch, picture_rows, ratio, withhold
from vlp_jax.types import Array, Batch, Params

TOP = 3  # guesses kept for the report


@dataclasses.dataclass(frozen=True)
class Guess:
    """A masked piece for the report: `guesses` are (word, probability), best first."""

    words: list[str]
    masked: list[bool]  # which of the words were not shown
    position: int  # which of them this is
    answer: str
    guesses: list[tuple[str, float]]
    blind: list[tuple[str, float]]
    picture: dict[str, np.ndarray]  # one row of the batch: patches, patch_positions, patch_mask, grid_size


class MaskedLanguage:
    """`mlm/accuracy` over all masked positions, `mlm/accuracy_visual` over words that only the picture tells.

    Args:
        system: has `predict["fill"]`.
        visual_ids: pieces that are visual words; none leaves the visual scores out.
        vocabulary, knowledge: for the oracle and the pictures; both may be left out.
        blind: whether to measure the twins without picture.
        pictures: how many `Guess` to keep in `examples`.
    """

    def __init__(
        self,
        system: Any,
        visual_ids: Iterable[int] = (),
        *,
        vocabulary: Vocabulary | None = None,
        knowledge: Knowledge | None = None,
        blind: bool = True,
        pictures: int = 0,
    ):
        self._fill = system.predict["fill"]
        self._visual = np.array(sorted(visual_ids), np.int64)
        self._vocabulary, self._knowledge = vocabulary, knowledge
        self._blind, self._pictures = blind, pictures
        self.begin()

    def begin(self) -> None:
        """Forgets the last pass."""
        self._right: dict[str, float] = {}
        self._count = self._visual_count = self._known = 0
        self.examples: list[Guess] = []

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Adds a batch; padding rows and unused positions count nothing."""
        names = ("example_id", "source_id", "image_id", "text_ids", "mlm_positions", "mlm_labels")
        rows = fetch({name: batch[name] for name in names})
        labels = np.where(rows["example_id"][:, None] >= 0, rows["mlm_labels"], -1)
        used, visual = labels >= 0, np.isin(labels, self._visual)
        self._count += int(used.sum())
        self._visual_count += int(visual.sum())
        seeing = fetch(_best(self._fill(params, batch)["logits"]))
        blind = fetch(_best(self._fill(params, withhold(batch))["logits"])) if self._blind else None
        for name, guesses in (("", seeing), ("_blind", blind)):
            if guesses is not None:
                right = guesses[1][..., 0] == labels
                self._add("accuracy" + name, (right & used).sum())
                self._add("accuracy_visual" + name, (right & visual).sum())
        if self._vocabulary is not None and self._knowledge is not None:
            self._ask_oracle(rows, visual)
        if self._vocabulary is not None and len(self.examples) < self._pictures:
            self._keep(rows, labels, visual, batch, seeing, blind)

    def result(self, params: Params) -> dict[str, float]:
        """Returns the accuracies; the oracle's over the visual words of which the scene tells."""
        counts = {"accuracy": self._count, "accuracy_visual": self._visual_count}
        counts["accuracy_visual_oracle"] = self._known
        scores = {}
        for name, right in self._right.items():
            count = counts[name.removesuffix("_blind")]
            if count:
                scores[f"mlm/{name}"] = ratio(right, count)
        return scores

    def _add(self, name: str, right: float) -> None:
        self._right[name] = self._right.get(name, 0.0) + float(right)

    def _ask_oracle(self, rows: dict[str, np.ndarray], visual: np.ndarray) -> None:
        live = rows["example_id"] >= 0
        self._knowledge.load(rows["source_id"][live], rows["image_id"][live])
        for row in np.flatnonzero(visual.any(axis=1)):
            words, word_of = self._vocabulary.words(rows["text_ids"][row])
            for slot in np.flatnonzero(visual[row]):
                position = int(word_of[rows["mlm_positions"][row, slot]])
                source, image = int(rows["source_id"][row]), int(rows["image_id"][row])
                guess = self._knowledge.guess(words, position, source, image)
                if guess is not None:
                    self._known += 1
                    self._add("accuracy_visual_oracle", guess)

    def _keep(
        self, rows: dict, labels: np.ndarray, visual: np.ndarray, batch: Batch, seeing: tuple, blind: Any
    ) -> None:
        """Keeps one masked piece of a row, from as many rows as the report shows; visual words come first."""
        value = (labels >= 0) + visual.astype(int)
        best = value.argmax(axis=1)
        worth = value.max(axis=1)
        chosen = np.argsort(-worth, kind="stable")[: self._pictures - len(self.examples)]
        chosen = chosen[worth[chosen] > 0]
        for row, picture in zip(chosen, picture_rows(batch, chosen), strict=True):
            slot = int(best[row])
            words, word_of = self._vocabulary.words(rows["text_ids"][row])
            hidden = {int(word_of[p]) for p in rows["mlm_positions"][row][labels[row] >= 0]}
            self.examples.append(
                Guess(
                    words,
                    [place in hidden for place in range(len(words))],
                    int(word_of[rows["mlm_positions"][row, slot]]),
                    self._vocabulary.word(int(labels[row, slot])),
                    self._named(seeing, row, slot),
                    self._named(blind, row, slot) if blind is not None else [],
                    picture,
                )
            )

    def _named(self, guesses: tuple, row: int, slot: int) -> list[tuple[str, float]]:
        pairs = zip(guesses[1][row, slot], guesses[0][row, slot], strict=True)
        return [(self._vocabulary.word(int(piece)), float(chance)) for piece, chance in pairs]


@jax.jit
def _best(logits: Array) -> tuple[Array, Array]:
    """The probabilities and ids of the best guesses, [batch, mask, TOP]."""
    return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), min(TOP, logits.shape[-1]))
