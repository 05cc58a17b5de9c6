# SPDX-License-Identifier: Apache-2.0
"""Token ids against transformers' pure Python BERT tokenizer, and the SentencePiece road."""

import hashlib
import json

import numpy as np
import pytest

from vlp_jax.data import text
from vlp_jax.types import UserError

SCENES = [
    f"{count} {colour} {shape}s, left of a {material} box."
    for count in ("two", "three")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("cube", "ball", "cone")
    for material in ("rubber", "metal")
]
HARD = [
    "",
    "   ",
    "naïve café, São Paulo!",
    "a\tb\nc\x00d",
    "中国 the 'best' co-op (e.g. 3.5kg)",
    "x" * 101 + " " + "y" * 100,
    "a [MASK] dog",
    "emoji \U0001f600 joined\u200bword",
    "\ufffd\ufffd",
    "don't STOP—now…",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    text.train(iter(SCENES), path, 300)
    return text.Vocabulary.load(path)


@pytest.fixture
def bert(realdata):
    return text.Vocabulary.load(realdata / "bert-base-uncased-vocab.txt")


def captions(realdata) -> list[str]:
    rows = (realdata / "coco/coco_val2017_one_caption_per_image.tsv").read_text(encoding="utf-8").splitlines()
    found = [row.split("\t")[2] for row in rows]
    for split in ("train", "val"):
        content = json.loads((realdata / f"coco/annotations/captions_{split}2017.json").read_text())
        found += [annotation["caption"] for annotation in content["annotations"]]
    found += [json.loads(row)["sentence"] for row in (realdata / "nlvr2/dev.json").read_text().splitlines()]
    return found


def test_word_piece_equals_transformers_on_every_caption(realdata, bert):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    oracle = legacy.BertTokenizerLegacy(str(realdata / "bert-base-uncased-vocab.txt"))
    texts = captions(realdata) + HARD
    assert len(texts) > 5000
    ours = bert.tokenize(texts)
    for caption, ids in zip(texts, ours, strict=True):
        assert ids == oracle.encode(caption, add_special_tokens=False), caption


def test_word_piece_equals_transformers_fast(realdata, bert):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.BertTokenizer(str(realdata / "bert-base-uncased-vocab.txt"))
    texts = captions(realdata)[:2000]
    batch = oracle(texts, padding="max_length", truncation=True, max_length=16)
    ours = bert.encode(texts, 16)
    np.testing.assert_array_equal(ours["text_ids"], batch["input_ids"])
    np.testing.assert_array_equal(ours["text_mask"], np.array(batch["attention_mask"], bool))


def test_bert_special_ids(bert):
    assert (bert.size, bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (30522, 0, 100, 101, 102, 103)
    encoded = bert.encode(["playing unaffable tunes"], 10)
    starts = [bert.pieces[i].startswith("##") for i in encoded["text_ids"][0]]
    np.testing.assert_array_equal(encoded["text_word_start"][0], ~np.array(starts) & encoded["text_mask"][0])
    assert bert.decode(encoded["text_ids"][0]) == "playing unaffable tunes"


@pytest.mark.parametrize("kind", ["bert", "model"])
def test_cut_keeps_the_end_mark(kind, request):
    vocabulary = request.getfixturevalue(kind)
    encoded = vocabulary.encode(["red " * 50, "red", ""], 8)
    ids, mask = encoded["text_ids"], encoded["text_mask"]
    assert ids.dtype == np.int32 and ids.shape == (3, 8)
    assert (ids[:, 0] == vocabulary.cls).all()
    assert ids[0, 7] == vocabulary.sep and mask[0].all()
    assert list(mask.sum(1)) == [8, 3, 2]
    assert ids[1, 2] == vocabulary.sep and ids[2, 1] == vocabulary.sep
    assert (ids[~mask] == vocabulary.pad).all() and not encoded["text_word_start"][~mask].any()


def test_bad_text_does_not_crash(model):
    encoded = model.encode([*HARD, b"caf\xff\xfe", "lone \ud800 surrogate", "nul\x00"], 24)
    assert (encoded["text_ids"] >= 0).all() and (encoded["text_ids"] < model.size).all()


def test_bad_text_does_not_crash_word_piece(bert):
    encoded = bert.encode([b"caf\xff\xfe", "lone \ud800 surrogate"], 24)
    assert list(encoded["text_mask"].sum(1)) == [3, 6]  # BERT drops the replacement character


def test_trained_ids_and_whole_words(model):
    assert model.pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (model.pad, model.unk, model.cls, model.sep, model.mask) == (0, 1, 2, 3, 4)
    assert list(np.flatnonzero(model.special)) == [0, 1, 2, 3, 4]
    for word in "two three red green blue yellow cubes balls cones left of a rubber metal box".split():
        ids = model.tokenize([word])[0]
        assert len(ids) == 1 and model.word(ids[0]) == word
    assert model.tokenize(["TWO Red"]) == model.tokenize(["two red"])


def test_sentence_piece_word_starts(model):
    encoded = model.encode(["two red cubes, left purple."], 24)
    pieces = [
        model.pieces[i]
        for i, real in zip(encoded["text_ids"][0], encoded["text_mask"][0], strict=True)
        if real
    ]
    starts = encoded["text_word_start"][0][: len(pieces)]
    words = [p for p, s in zip(pieces, starts, strict=True) if s]
    assert words[:6] == ["[CLS]", "▁two", "▁red", "▁cubes", ",", "▁left"]
    assert words[-2:] == [".", "[SEP]"]
    assert not any(s for p, s in zip(pieces, starts, strict=True) if p in "purple")
    assert model.decode(encoded["text_ids"][0]) == "two red cubes , left purple ."


def test_mask_in_a_text_is_the_mask_piece(model):
    ids = model.tokenize(["two [MASK] cubes"])[0]
    assert ids == [*model.tokenize(["two"])[0], model.mask, *model.tokenize(["cubes"])[0]]


def test_training_is_deterministic(tmp_path):
    digests = set()
    for name in ("a.model", "b.model"):
        text.train(iter(SCENES), tmp_path / name, 200)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["cannot be read"]),
        ("vocabulary.json", b"{}", ["suffix", ".model"]),
        ("vocab.txt", b"[PAD]\n[UNK]\nthe\n", ["lacks", "[CLS], [SEP], [MASK]"]),
        ("vocab.txt", b"\xff\xfe\n", ["UTF-8"]),
        ("vocabulary.model", b"nonsense", ["SentencePiece"]),
        ("vocabulary.model", b"", ["SentencePiece"]),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        text.Vocabulary.load(tmp_path / name)
    assert all(word in str(error.value) for word in [name, *words])


def test_bad_training(tmp_path):
    for texts, size in ([], 100), (SCENES, 10):
        with pytest.raises(UserError):
            text.train(texts, tmp_path / "v.model", size)
    with pytest.raises(UserError, match="suffix"):
        text.train(SCENES, tmp_path / "v.txt", 100)
    assert not list(tmp_path.iterdir())


def test_too_short_length(model):
    with pytest.raises(UserError, match="no room"):
        model.encode(["a"], 2)
