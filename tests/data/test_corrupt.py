# SPDX-License-Identifier: Apache-2.0
"""Whole-word masking against the published collator's lines and its known statistics."""

import math
import random
import time

import numpy as np
import pytest

from vlp_jax.data import corrupt

LENGTH = 40
VOCABULARY = 1000
PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = np.arange(VOCABULARY) < 5
RATE = 0.15


def batch(count, words, length=LENGTH):
    """`count` equal texts: words as lists of their numbers of pieces; pieces are numbered from 10 on."""
    ids = [CLS, *range(10, 10 + sum(words)), SEP]
    starts = [True, *(piece == 0 for word in words for piece in range(word)), True]
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    mask = np.arange(length) < len(ids)
    start = np.zeros(length, bool)
    start[: len(starts)] = starts
    return {
        "text_ids": np.tile(row, (count, 1)),
        "text_mask": np.tile(mask, (count, 1)),
        "text_word_start": np.tile(start, (count, 1)),
    }


def masked(encoded, *, seed=0, keys=None, counts_padding=False, rate=RATE):
    keys = np.arange(len(encoded["text_ids"])) if keys is None else keys
    return corrupt.corrupt(
        encoded, SPECIAL, MASK, rate=rate, counts_padding=counts_padding, seed=seed, keys=keys
    )


def collator(tokens, rate, generator):
    """The lines of transformers 4.2.1's `_whole_word_mask`, with its shuffle."""
    candidates = []
    for place, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if len(candidates) >= 1 and token.startswith("##"):
            candidates[-1].append(place)
        else:
            candidates.append([place])
    generator.shuffle(candidates)
    target = max(1, int(round(len(tokens) * rate)))
    chosen = []
    for places in candidates:
        if len(chosen) >= target:
            break
        if len(chosen) + len(places) > target:
            continue
        chosen += places
    return chosen


def share_without_mask(output):
    return (output["mlm_labels"] < 0).all(1).mean()


@pytest.mark.parametrize("words", [6, 8, 10, 12, 15])
def test_original_quirk_leaves_short_texts_without_mask(words):
    """Published statistics: n words, six picks among 38 candidates."""
    published = {6: 0.328, 8: 0.215, 10: 0.136, 12: 0.083, 15: 0.037}[words]
    exact = math.comb(38 - words, 6) / math.comb(38, 6)
    assert abs(exact - published) < 5e-4
    count = 20_000
    output = masked(batch(count, [1] * words), counts_padding=True)
    assert abs(share_without_mask(output) - exact) < 4 * math.sqrt(exact * (1 - exact) / count)
    effective = (output["mlm_labels"] >= 0).sum() / count / words
    assert abs(effective - 6 / 38) < 0.004


@pytest.mark.parametrize("words", [6, 10, 20, 38])
def test_without_the_quirk_the_target_is_met(words):
    output = masked(batch(500, [1] * words))
    target = max(1, round(RATE * (words + 2)))
    assert ((output["mlm_labels"] >= 0).sum(1) == target).all()
    assert share_without_mask(output) == 0
    places = output["mlm_positions"][:, :target]
    assert places.min() == 1 and places.max() == words


@pytest.mark.parametrize("words", [[1, 3, 2, 1, 1, 4], [2, 2, 2], [5], [1, 1, 7, 1, 1, 1, 2, 3, 1, 1, 1, 6]])
@pytest.mark.parametrize("counts_padding", [False, True])
def test_distribution_equals_the_collator(words, counts_padding):
    """How often each position is chosen, and how many at once, against the published lines."""
    count = 6000
    encoded = batch(count, words)
    output = masked(encoded, counts_padding=counts_padding)
    used = output["mlm_labels"] >= 0
    ours = np.bincount(output["mlm_positions"][used], minlength=LENGTH) / count
    ours_number = np.bincount(used.sum(1), minlength=10) / count
    tokens = ["[CLS]", *("##b" if piece else "a" for word in words for piece in range(word)), "[SEP]"]
    tokens += ["[PAD]"] * (LENGTH - len(tokens)) if counts_padding else []
    generator = random.Random(0)
    real = sum(words) + 1
    theirs, theirs_number = np.zeros(LENGTH), np.zeros(10)
    for _ in range(count):
        chosen = [place for place in collator(tokens, RATE, generator) if place < real]
        theirs[chosen] += 1 / count
        theirs_number[len(chosen)] += 1 / count
    margin = 5 * math.sqrt(0.5 / count)
    np.testing.assert_allclose(ours, theirs, atol=margin)
    np.testing.assert_allclose(ours_number, theirs_number, atol=margin)


def test_words_are_whole():
    words = [1, 3, 2, 1, 4, 1, 2, 1, 1, 3]
    output = masked(batch(2000, words), rate=0.3)
    ends = np.cumsum([1, *words])
    for positions, labels in zip(output["mlm_positions"], output["mlm_labels"], strict=True):
        chosen = set(positions[labels >= 0].tolist())
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            assert len(chosen & set(range(start, end))) in (0, end - start)


def test_eighty_ten_ten_for_each_piece():
    output = masked(batch(20_000, [2] * 15))
    used = output["mlm_labels"] >= 0
    inputs, labels = output["mlm_inputs"][used], output["mlm_labels"][used]
    total = len(labels)
    same = (inputs == labels).mean()
    assert total > 50_000
    assert abs((inputs == MASK).mean() - 0.8) < 0.01
    assert abs(same - 0.1) < 0.007
    replaced = inputs[(inputs != MASK) & (inputs != labels)]
    assert abs(len(replaced) / total - 0.1) < 0.007
    assert replaced.min() == 0 and replaced.max() == VOCABULARY - 1  # specials too, as in the original
    # Two pieces of one word are decided apart.
    kinds = np.where(inputs == MASK, 0, 1).reshape(-1, 2)
    assert abs((kinds[:, 0] != kinds[:, 1]).mean() - 2 * 0.8 * 0.2) < 0.02


def test_labels_are_the_originals_and_unused_slots_are_harmless():
    encoded = batch(300, [1] * 9)
    output = masked(encoded, counts_padding=True)
    used = output["mlm_labels"] >= 0
    assert output["mlm_labels"].shape == (300, 6) and all(
        value.dtype == np.int32 for value in output.values()
    )
    np.testing.assert_array_equal(
        np.take_along_axis(encoded["text_ids"], output["mlm_positions"], 1)[used], output["mlm_labels"][used]
    )
    assert (output["mlm_positions"][~used] == 0).all() and (output["mlm_inputs"][~used] == CLS).all()
    assert (np.diff(used.astype(int), axis=1) <= 0).all()  # used slots first
    written = encoded["text_ids"].copy()
    np.put_along_axis(written, output["mlm_positions"], output["mlm_inputs"], 1)
    assert (written[:, 0] == CLS).all() and (written[:, 10:] == encoded["text_ids"][:, 10:]).all()


def test_pure_function_of_seed_and_key():
    encoded = batch(64, [1, 2] * 6)
    keys = np.arange(100, 164)
    first = masked(encoded, keys=keys)
    rows = {key: value[30:40] for key, value in encoded.items()}
    part = masked(rows, keys=keys[30:40])
    for key in first:
        np.testing.assert_array_equal(first[key][30:40], part[key])
    assert (masked(encoded, keys=keys, seed=1)["mlm_positions"] != first["mlm_positions"]).any()
    assert (masked(encoded, keys=keys + 1)["mlm_positions"] != first["mlm_positions"]).any()


@pytest.mark.parametrize("counts_padding", [False, True])
def test_nothing_to_mask(counts_padding):
    for words, rate in (([], RATE), ([9], 0.1)):
        output = masked(batch(4, words), counts_padding=counts_padding, rate=rate)
        assert (output["mlm_labels"] == -1).all()
    empty = masked(batch(0, [1]), counts_padding=counts_padding)
    assert empty["mlm_labels"].shape == (0, 6)


def test_slots():
    assert [corrupt.slots(RATE, length) for length in (1, 5, 30, 32, 40)] == [1, 1, 4, 5, 6]


def test_speed():
    encoded = batch(512, [1, 2] * 6)
    masked(encoded)
    times = []
    for _ in range(5):
        start = time.process_time()
        masked(encoded)
        times.append(time.process_time() - start)
    assert min(times) / 512 < 30e-6  # measured: 3 microseconds a caption
