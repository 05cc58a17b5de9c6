# SPDX-License-Identifier: Apache-2.0
"""Which word pieces a masked language model must guess: whole words, 80/10/10, stateless by seed and key.

Follows the whole-word collator of transformers 4.2.1, which made ViLT's released weights.
"""

from __future__ import annotations

import numpy as np

from vlp_jax.data import order

_GROUPS, _KINDS, _WORDS = 0xC0, 0xC1, 0xC2  # what a random number is for
MASKED, REPLACED = 0.8, 0.1  # shares of the chosen pieces; the rest stays as it is


def slots(rate: float, length: int) -> int:
    """Returns how many pieces can be chosen in a text of `length`: max(1, round(rate x length))."""
    return max(1, round(rate * length))


def choose(
    text_mask: np.ndarray,
    text_word_start: np.ndarray,
    special: np.ndarray,
    *,
    rate: float,
    counts_padding: bool,
    seed: int,
    keys: np.ndarray,
) -> np.ndarray:
    """Picks whole words at random until the target is reached; a word that does not fit is passed over.

    The target is max(1, round(rate x n)) with n the pieces of the text, [CLS] and [SEP] included.

    Args:
        text_mask, text_word_start: bool [B, L].
        special: bool [B, L], True on [CLS], [SEP], [UNK], which are no candidates.
        rate: share of the pieces.
        counts_padding: the original's quirk. Each padding position is a candidate too and n is L; picks on
            padding are dropped. The rate is kept on average, but a short text often has no masked piece.
        seed: of the run.
        keys: uint [B], one number for the choices of each text.

    Returns:
        bool [B, L], True where a piece is chosen.
    """
    batch, length = text_mask.shape
    candidate = np.where(text_mask, ~special, counts_padding)
    size = np.full(batch, length) if counts_padding else text_mask.sum(1)
    target = np.maximum(1, np.rint(rate * size)).astype(np.int64)
    # A word is its start and what follows; the first candidate always starts one, padding is a word each.
    start = candidate & (text_word_start | ~text_mask | (np.cumsum(candidate, 1) == 1))
    group = np.where(candidate, np.cumsum(start, 1) - 1, length)  # `length` gathers what is no candidate
    flat = group + np.arange(batch)[:, None] * (length + 1)
    sizes = np.bincount(flat.ravel(), minlength=batch * (length + 1)).reshape(batch, length + 1)[:, :length]

    lots = order.uniform(seed, _GROUPS, np.asarray(keys)[:, None], np.arange(length))
    turns = np.argsort(np.where(sizes > 0, lots, 2.0), axis=1)
    ordered = np.take_along_axis(sizes, turns, 1)
    taken = np.zeros(batch, np.int64)
    picked = np.zeros((batch, length), bool)
    for turn in range(int((sizes > 0).sum(1).max(initial=0))):
        fits = (ordered[:, turn] > 0) & (taken + ordered[:, turn] <= target)
        taken += ordered[:, turn] * fits
        picked[:, turn] = fits
    words = np.zeros((batch, length + 1), bool)
    np.put_along_axis(words, turns, picked, 1)
    return np.take_along_axis(words, group, 1) & candidate & text_mask


def corrupt(
    encoded: dict[str, np.ndarray],
    special: np.ndarray,
    mask_id: int,
    *,
    rate: float,
    counts_padding: bool,
    seed: int,
    keys: np.ndarray,
) -> dict[str, np.ndarray]:
    """Makes the targets of masked language modelling for a batch of encoded texts.

    Each chosen piece is, on its own and not with its word, [MASK] in 80 %, a random piece of the vocabulary
    in 10 % and left as it is in 10 % of the cases.

    Args:
        encoded: text_ids int32 [B, L], text_mask and text_word_start bool [B, L].
        special: bool [vocabulary], pieces that are never chosen.
        mask_id: id of [MASK].
        rate, counts_padding, seed, keys: as in `choose`.

    Returns:
        int32 [B, slots(rate, L)] each: mlm_positions ascending (0 where unused), mlm_inputs (what the model
        sees there; [CLS] where unused, so that writing it to position 0 is harmless), mlm_labels (-1 where
        unused).
    """
    ids = encoded["text_ids"]
    length = ids.shape[1]
    chosen = choose(
        encoded["text_mask"],
        encoded["text_word_start"],
        special[ids],
        rate=rate,
        counts_padding=counts_padding,
        seed=seed,
        keys=keys,
    )
    count = slots(rate, length)
    positions = np.sort(np.where(chosen, np.arange(length), length), 1)[:, :count]
    used = positions < length
    positions = np.where(used, positions, 0)
    originals = np.take_along_axis(ids, positions, 1)
    keys = np.asarray(keys)[:, None]
    kind = order.uniform(seed, _KINDS, keys, positions)
    random = (order.mix(seed, _WORDS, keys, positions) % np.uint64(len(special))).astype(np.int32)
    inputs = np.where(kind < MASKED, mask_id, np.where(kind < MASKED + REPLACED, random, originals))
    return {
        "mlm_positions": positions.astype(np.int32),
        "mlm_inputs": np.where(used, inputs, ids[:, :1]).astype(np.int32),
        "mlm_labels": np.where(used, originals, -1).astype(np.int32),
    }
