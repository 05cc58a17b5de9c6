# SPDX-License-Identifier: Apache-2.0
"""Image-text matching: is this the picture's own text? Half of the rows get the text of another picture."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.text import Vocabulary
from vlp_jax.evaluation.oracle import Knowledge
from vlp_jax.evaluation.runner import fetch, picture_rows, ratio, withhold
from vlp_jax.types import Array, Batch, Params

PAIR = "pair_"  # `System.prepare` puts the exchanged texts under these names


@dataclasses.dataclass(frozen=True)
class Decision:
    """A judged pair for the report; `probability` is that of "matched"."""

    text: str
    matched: bool
    probability: float
    picture: dict[str, np.ndarray]

    @property
    def right(self) -> bool:
        """Whether the pair was judged as it is."""
        return (self.probability > 0.5) == self.matched


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The transport plan of a true pair for the report: `plan` is [words, patches]."""

    words: list[str]
    visual: list[bool]
    plan: np.ndarray
    picture: dict[str, np.ndarray]


class Matching:
    """`itm/accuracy`, its blind twin, and the accuracy of one that knows what is true of the picture.

    That oracle stays below 1 where a text happens to be true of the picture that it was exchanged to.

    Args:
        system: has `predict["match"]` and `prepare`.
        vocabulary, knowledge: for the pictures and the oracle; both may be left out.
        visual_ids: pieces that are visual words, shown as such.
        blind: whether to measure the twin without picture.
        pictures: how many decisions of each kind, and how many plans, to keep.
        seed: of the exchange; a pass with equal batches exchanges equally.
    """

    def __init__(
        self,
        system: Any,
        *,
        vocabulary: Vocabulary | None = None,
        knowledge: Knowledge | None = None,
        visual_ids: Any = (),
        blind: bool = True,
        pictures: int = 0,
        seed: int = 0,
    ):
        self._match, self._exchange = system.predict["match"], jax.jit(_exchanged(system.prepare))
        self._vocabulary, self._knowledge = vocabulary, knowledge
        self._visual = frozenset(int(piece) for piece in visual_ids)
        self._blind, self._pictures, self._seed = blind, pictures, seed
        self.begin()

    def begin(self) -> None:
        """Forgets the last pass."""
        self._count, self._known = 0, 0
        self._right = {"accuracy": 0, "accuracy_blind": 0, "accuracy_oracle": 0}
        self.right: list[Decision] = []
        self.wrong: list[Decision] = []
        self.alignments: list[Alignment] = []

    def update(self, params: Params, batch: Batch, index: int) -> None:
        """Exchanges texts within the batch and judges each pair; rows with `matched` -1 count nothing."""
        pairs = self._exchange(batch, jax.random.fold_in(jax.random.key(self._seed), index))
        names = ("example_id", "source_id", "image_id", "text_ids", "matched", "partner")
        rows = fetch({name: pairs[name] for name in names})
        used, truth = rows["matched"] >= 0, rows["matched"] == 1
        self._count += int(used.sum())
        chance = fetch(_matched(self._match(params, pairs)["match_logits"]))
        self._right["accuracy"] += int((((chance > 0.5) == truth) & used).sum())
        if self._blind:
            blind = fetch(_matched(self._match(params, withhold(pairs))["match_logits"]))
            self._right["accuracy_blind"] += int((((blind > 0.5) == truth) & used).sum())
        if self._knowledge is not None:
            self._ask_oracle(rows, used)
        if self._vocabulary is not None and self._pictures:
            self._keep(rows, used, chance, pairs)
            if not self.alignments:
                self._align(params, batch)

    def result(self, params: Params) -> dict[str, float]:
        """Returns the accuracies; the oracle's only if every picture has a scene."""
        wanted = {"accuracy": True, "accuracy_blind": self._blind}
        wanted["accuracy_oracle"] = bool(self._count) and self._known == self._count
        return {f"itm/{name}": ratio(self._right[name], self._count) for name in wanted if wanted[name]}

    def _ask_oracle(self, rows: dict[str, np.ndarray], used: np.ndarray) -> None:
        know, source, image = self._knowledge, rows["source_id"], rows["image_id"]
        know.load(source[used], image[used])
        for row in np.flatnonzero(used):
            if know.knows_scenes(int(source[row]), int(image[row])):
                partner = rows["partner"][row]
                caption = know.caption(int(source[partner]), int(rows["example_id"][partner]))
                self._known += 1
                true = know.is_true(caption, int(source[row]), int(image[row]))
                self._right["accuracy_oracle"] += int(true == (rows["matched"][row] == 1))

    def _keep(self, rows: dict, used: np.ndarray, chance: np.ndarray, batch: Batch) -> None:
        """Keeps right decisions, matched and not in turn, and the wrong ones."""
        truth = rows["matched"] == 1
        right = ((chance > 0.5) == truth) & used
        yes, no = np.flatnonzero(right & truth), np.flatnonzero(right & ~truth)
        turns = sorted([*enumerate(yes), *enumerate(no)])
        turns = np.array([row for _, row in turns], np.int64)
        for kept, candidates in ((self.right, turns), (self.wrong, np.flatnonzero(used & ~right))):
            chosen = candidates[: self._pictures - len(kept)]
            for row, picture in zip(chosen, picture_rows(batch, chosen), strict=True):
                text = self._vocabulary.decode(rows["text_ids"][row])
                kept.append(Decision(text, bool(truth[row]), float(chance[row]), picture))

    def _align(self, params: Params, batch: Batch) -> None:
        """Asks for the plans of the first true pairs, where the system has plans."""
        if "plan" not in inspect.signature(self._match).parameters:
            return
        rows = fetch({name: batch[name] for name in ("example_id", "image_id", "text_ids")})
        live = np.flatnonzero(rows["example_id"] >= 0)
        _, first = np.unique(rows["image_id"][live], return_index=True)
        chosen = live[np.sort(first)][: self._pictures]
        plans = fetch(self._match(params, batch, plan=True)["plan"])
        for row, picture in zip(chosen, picture_rows(batch, chosen), strict=True):
            words, word_of = self._vocabulary.words(rows["text_ids"][row])
            visual, plan = [False] * len(words), np.zeros((len(words), plans.shape[-1]), np.float32)
            for place in np.flatnonzero(word_of >= 0):
                plan[word_of[place]] += plans[row, place]
                visual[word_of[place]] |= int(rows["text_ids"][row, place]) in self._visual
            self.alignments.append(Alignment(words, visual, plan, picture))


def _exchanged(prepare: Any) -> Any:
    """Makes of `System.prepare` a function that returns the batch with the exchanged texts in place.

    The rows are numbered for the draw, so that "partner" says from which row of the batch a text came.
    """

    def exchange(batch: Batch, rng: Array) -> dict[str, Array]:
        number = jnp.arange(batch["example_id"].shape[0], dtype=jnp.int32)
        number = jnp.where(batch["example_id"] >= 0, number, -1)
        drawn = prepare({**batch, "example_id": number}, rng)
        texts = {name.removeprefix(PAIR): value for name, value in drawn.items() if name.startswith(PAIR)}
        partner = texts.pop("example_id")
        return {**batch, **texts, "matched": drawn["matched"], "partner": partner}

    return exchange


@jax.jit
def _matched(logits: Array) -> Array:
    """The probability that a pair is matched."""
    return jax.nn.softmax(logits.astype(jnp.float32))[..., 1]
