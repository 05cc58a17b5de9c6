# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of exported folders, read by transformers: their ids against those of our own vocabulary."""

from __future__ import annotations

import io
import os
import random
import re
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers: nothing here is to be fetched

import numpy as np
import pytest
import tokenizers

from tests.convert.folders import config_of, written
from vlp_jax.convert import hub, tokenizer
from vlp_jax.data import text as our_text
from vlp_jax.types import UserError

ODD = [
    "",
    " ",
    "  two  blanks ",
    "[MASK]",
    "a [MASK] on a [MASK].",
    "[mask]",
    "x[MASK]y",
    "[CLS]a[SEP]",
    "[PAD]",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m",
    "\u2122\ufe0f \u203c\ufe0f 2\ufe0f\u20e3",
    "\u2581\u2581a\u2581b",
    "\u65e5\u672c\u8a9e \u4e16\u754c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f466!",
    "\u0130stanbul \u1e9e \u00df \u03a3\u03c2",
    "a\u00a0b\u3000c\td\ne\r\nf\x85g\u200bh\u200d",
    "\x00\x01\x7f",
    "\ud800 lone",
    "\uff21\uff22\uff23 \u00bd \u2167 \ufb01",
    "x" * 300,
    "word " * 200,
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \uc548\ub155 \u1100\u1161",
]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def captions(realdata) -> list[str]:
    lines = (realdata / "coco" / "coco_val2017_one_caption_per_image.tsv").read_text("utf-8").splitlines()
    return [line.rpartition("\t")[2] for line in lines]


def same_ids(transformers, folder: Path, vocabulary: Path, texts: list[str], length: int) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # as ours does with lone surrogates
    wanted = our_text.Vocabulary.load(vocabulary).encode(texts, length)
    read = [
        transformers.ViltProcessor.from_pretrained(folder).tokenizer,
        transformers.AutoProcessor.from_pretrained(folder).tokenizer,
        transformers.AutoTokenizer.from_pretrained(folder),
    ]
    for reader in read:
        assert reader.model_max_length == length
        given = reader(texts, padding="max_length", truncation=True, return_tensors="np")
        assert np.array_equal(given["attention_mask"], wanted["text_mask"])
        wrong = np.flatnonzero((given["input_ids"] != wanted["text_ids"]).any(1))
        assert not len(wrong), [texts[row] for row in wrong[:3]]
        assert not given["token_type_ids"].any()
        ids = (
            reader.pad_token_id,
            reader.unk_token_id,
            reader.cls_token_id,
            reader.sep_token_id,
            reader.mask_token_id,
        )
        ours = our_text.Vocabulary.load(vocabulary)
        assert ids == (ours.pad, ours.unk, ours.cls, ours.sep, ours.mask)


def random_texts(count: int, seed: int) -> list[str]:
    """Letters, blanks, accents, ligatures, emoji and other scripts in any order."""
    draw = random.Random(seed)
    characters = (
        "abc ABC \u00e9\u00fc\u00df\u1e9e\u0130\ufb01\u212b\u3000\u00a0\t\n\u200b\u200d\u2581 .,!?'-012\u4e00\u03a3"
        "\U0001f600\U0001f1e6\U0001f468\ufe0f\u1100\u1161\uff9e\uff8a\u0e33\u0cc6\u2122\u00bd\x85"
    )
    return ["".join(draw.choices(characters, k=draw.randrange(20))) for _ in range(count)]


def test_word_pieces_get_our_ids(transformers, tmp_path, realdata, captions):
    vocabulary = realdata / "bert-base-uncased-vocab.txt"
    config = config_of()
    config.model.text_embed.vocab_size = 30522
    written(tmp_path, config, "ViltModel", vocabulary=vocabulary)
    texts = captions[:2000] + ODD + random_texts(2000, 0)
    same_ids(transformers, tmp_path, vocabulary, texts, config.data.text_length)
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # as other programs read it
    ours = our_text.Vocabulary.load(vocabulary)
    texts = captions[:500] + [text for text in ODD if "\ud800" not in text]
    framed = [[ours.cls, *ids, ours.sep] for ids in ours.tokenize(texts)]
    assert [encoding.ids for encoding in alone.encode_batch_fast(texts)] == framed
    (tmp_path / "tokenizer.json").unlink()  # vocab.txt alone is enough, as in older folders
    same_ids(transformers, tmp_path, vocabulary, texts, config.data.text_length)


def test_byte_pairs_get_our_ids(transformers, tmp_path, captions):
    vocabulary = tmp_path / "pieces.model"
    our_text.train(captions[:1500], vocabulary, 900)
    config = config_of()
    config.model.text_embed.vocab_size = 900
    config.data.text_length = 40
    made = written(tmp_path / "folder", config, "ViltModel", vocabulary=vocabulary)
    assert any("tokenizer.json gives the ids" in note for note in made.notes)
    texts = captions + ODD + random_texts(4000, 1)
    same_ids(transformers, tmp_path / "folder", vocabulary, texts, 40)


@pytest.mark.learn
def test_every_character_gets_our_ids(tmp_path, captions):
    our_text.train(captions[:1500], tmp_path / "pieces.model", 900)
    made, _ = tokenizer.files(tmp_path / "pieces.model", 40, 900)
    theirs = tokenizers.Tokenizer.from_str(made["tokenizer.json"].decode())
    ours = our_text.Vocabulary.load(tmp_path / "pieces.model")
    characters = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000 and code != 0x344]
    for texts in (characters, [f"a{character}b" for character in characters]):
        encoded = theirs.encode_batch_fast(texts, add_special_tokens=False)
        assert [encoding.ids for encoding in encoded] == ours.tokenize(texts)


def test_a_model_of_another_kind_gives_no_tokenizer(tmp_path, captions):
    import sentencepiece

    def train(**options):
        model = io.BytesIO()
        kinds = dict(pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=["<mask>"], minloglevel=2)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions[:400]), model_writer=model, vocab_size=300, **kinds | options
        )
        path = tmp_path / "other.model"
        path.write_bytes(model.getvalue())
        return tokenizer.files(path, 40, 300)

    for options, why in (
        (dict(model_type="unigram"), "byte pairs"),
        (dict(model_type="bpe", user_defined_symbols=["zebra"]), "of its user"),
        (dict(model_type="bpe", add_dummy_prefix=False), "blanks"),
        (dict(model_type="bpe", normalization_rule_name="identity"), "normalises"),
    ):
        files, note = train(**options)
        assert not files and why in note
    files, note = train(model_type="bpe")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


def test_ids_that_differ_leave_the_tokenizer_out(tmp_path, captions):
    our_text.train(captions[:400], tmp_path / "pieces.model", 300)
    with mock.patch.object(tokenizer, "_normalizer", lambda _: __import__("tokenizers").normalizers.NFC()):
        files, note = tokenizer.files(tmp_path / "pieces.model", 40, 300)
    assert not files and "has no tokenizer" in note


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("vocab.txt", None, "No such file"),
        ("vocab.json", b"{}", "not such a file. Possible: .txt"),
        ("vocab.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("vocab.txt", b"", "lacks [PAD], [UNK], [CLS], [SEP], [MASK]"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na", "lacks [MASK]"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + b"a\n" * 99, "104 pieces for 61 rows"),
        ("a.model", b"", "no SentencePiece model"),
        ("a.model", b"no model", "no SentencePiece model"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)):
        hub.files(config_of(), "ViltModel", None, tmp_path / name)


def test_damaged_models_are_refused_or_checked(tmp_path, captions):
    our_text.train(captions[:400], tmp_path / "pieces.model", 300)
    whole = (tmp_path / "pieces.model").read_bytes()
    draw = random.Random(0)
    for turn in range(60):
        content = bytearray(whole)
        for _ in range(5):
            content[draw.randrange(4000 if turn % 2 else len(content))] = draw.randrange(256)
        (tmp_path / "damaged.model").write_bytes(
            content[: draw.randrange(len(content))] if turn % 3 == 0 else content
        )
        try:
            files, note = tokenizer.files(tmp_path / "damaged.model", 40, 400)
        except UserError as error:
            assert "damaged.model" in str(error)  # and no other exception
        else:
            assert note and set(files) in (set(), {"tokenizer.json", "tokenizer_config.json"})


def test_a_vocabulary_with_a_piece_twice(transformers, tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "cat", "", "##s", "<mask>"]
    vocabulary.write_text("\r\n".join(pieces), "utf-8", newline="")
    written(tmp_path / "folder", config_of(), "ViltModel", vocabulary=vocabulary)
    same_ids(transformers, tmp_path / "folder", vocabulary, ["cats and dogs [MASK]", "<mask> cat"], 9)
