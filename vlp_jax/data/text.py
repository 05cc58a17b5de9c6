# SPDX-License-Identifier: Apache-2.0
"""Text to token ids: WordPiece (`vocab.txt`) or SentencePiece (`.model`), chosen by the file; its training.

Both lower-case, both give [CLS] text [SEP]. Whole-word masking and word-patch alignment need the word starts.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vlp_jax.files import save
from vlp_jax.types import UserError

# Role -> accepted piece names; the second is how models trained elsewhere spell it.
SPECIAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
SPACE_MARK = "\u2581"  # SentencePiece writes a blank before a word as this character
CONTINUED = "##"  # WordPiece: the piece goes on with the word before it
LONGEST_WORD = 100  # characters; BERT makes longer words [UNK]
SUFFIXES = ".txt (WordPiece) or .model (SentencePiece)"


class Vocabulary:
    """Pieces of a vocabulary and the way from text to their ids.

    Attributes:
        path: the file it came from.
        size: number of pieces.
        pad, unk, cls, sep, mask: ids of the special pieces.
        pieces: the pieces as written in the file, by id.
        word_start: bool [size], True where a piece begins a word.
        special: bool [size], True for the five special pieces.
    """

    def __init__(
        self,
        path: Path,
        pieces: list[str],
        word_start: np.ndarray,
        special: dict[str, int],
        tokenize: Callable[[list[str]], list[list[int]]],
    ):
        self.path = path
        self.pieces = pieces
        self.size = len(pieces)
        self.word_start = word_start
        self.pad, self.unk = special["pad"], special["unk"]
        self.cls, self.sep, self.mask = special["cls"], special["sep"], special["mask"]
        self.special = np.zeros(self.size, bool)
        self.special[list(special.values())] = True
        self._tokenize = tokenize

    @staticmethod
    def load(path: str | os.PathLike) -> Vocabulary:
        """Reads `vocab.txt` or a SentencePiece `.model`.

        Raises:
            UserError: no such file, an unknown suffix, an unreadable file, or one without the special pieces.
        """
        path = Path(path)
        if path.suffix not in (".txt", ".model"):
            raise UserError(
                f"The vocabulary {path} has an unknown suffix. Possible: {SUFFIXES}. Choose another file."
            )
        try:
            if path.exists() and not path.is_file():
                raise OSError(0, "it is no file")  # a pipe would be waited for
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"The vocabulary {path} cannot be read: {error.strerror}. Needed is a file {SUFFIXES}. "
                "Check the path, or prepare the data again."
            ) from error
        return _word_piece(path, content) if path.suffix == ".txt" else _sentence_piece(path, content)

    def encode(self, texts: Sequence[str | bytes], length: int) -> dict[str, np.ndarray]:
        """Turns n texts into [CLS] text [SEP] of `length` ids, cut in front of [SEP], padded behind it.

        Returns:
            text_ids int32 [n, length], text_mask bool [n, length] (True = not padding),
            text_word_start bool [n, length] (False on padding).

        Raises:
            UserError: `length` leaves no room for a piece.
        """
        if length < 3:
            raise UserError(
                f"A text length of {length} leaves no room for text between [CLS] and [SEP]. Give 3 or more."
            )
        ids = np.full((len(texts), length), self.pad, np.int32)
        lengths = np.empty(len(texts), np.int64)
        ids[:, 0] = self.cls
        for row, tokens in enumerate(self.tokenize(texts)):
            tokens = tokens[: length - 2]
            end = 1 + len(tokens)
            ids[row, 1:end] = tokens
            ids[row, end] = self.sep
            lengths[row] = end + 1
        mask = np.arange(length) < lengths[:, None]
        return {"text_ids": ids, "text_mask": mask, "text_word_start": self.word_start[ids] & mask}

    def tokenize(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """Returns the ids of each text, neither cut nor framed; a special piece spelt out is that piece."""
        return self._tokenize([_clean(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns readable text; padding, [CLS] and [SEP] are left out."""
        return " ".join(word for word in self.words(ids)[0] if word)

    def words(self, ids: Iterable[int]) -> tuple[list[str], np.ndarray]:
        """Returns the words of one text and, for each of its ids, the number of its word, int64 [n].

        Padding, [CLS] and [SEP] belong to no word: -1.
        """
        words: list[str] = []
        word_of = []
        for piece in (int(i) for i in ids):
            framing = piece in (self.pad, self.cls, self.sep)
            if not framing:
                if self.word_start[piece] or not words:
                    words.append("")
                words[-1] += self.word(piece)
            word_of.append(-1 if framing else len(words) - 1)
        return words, np.array(word_of, np.int64)

    def word(self, piece: int) -> str:
        """Returns a piece without the mark that says how it is joined."""
        return self.pieces[piece].removeprefix(CONTINUED).removeprefix(SPACE_MARK)


def _clean(text: str | bytes) -> str:
    """Bad bytes become U+FFFD and lone surrogates '?', because both tokenizers refuse them."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _special_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    found = {
        role: next((ids[name] for name in names if name in ids), None) for role, names in SPECIAL.items()
    }
    missing = [names[0] for role, names in SPECIAL.items() if found[role] is None]
    if missing:
        raise UserError(
            f"The vocabulary {path} lacks {', '.join(missing)}. Its {len(ids)} pieces must contain "
            f"{', '.join(names[0] for names in SPECIAL.values())}. Choose or train another file."
        )
    return found


def _word_piece(path: Path, content: bytes) -> Vocabulary:
    """BERT's WordPiece: lower-case, accents stripped, Chinese characters apart."""
    import tokenizers

    try:
        pieces = [line.rstrip("\r") for line in content.decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"The vocabulary {path} is not UTF-8 text at byte {error.start}. "
            "A .txt vocabulary has one piece a line. Fetch the file again."
        ) from error
    if pieces and not pieces[-1]:
        pieces.pop()
    ids = {piece: i for i, piece in enumerate(pieces)}  # of doubled pieces the last counts, as in BERT
    special = _special_ids(path, ids)
    model = tokenizers.models.WordPiece(
        ids,
        unk_token=pieces[special["unk"]],
        max_input_chars_per_word=LONGEST_WORD,
        continuing_subword_prefix=CONTINUED,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([pieces[i] for i in special.values()])

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    word_start = np.array([not piece.startswith(CONTINUED) for piece in pieces])
    return Vocabulary(path, pieces, word_start, special, tokenize)


def _sentence_piece(path: Path, content: bytes) -> Vocabulary:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content or b"empty")  # which takes no bytes at all for an unset model
        pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"The vocabulary {path} is no SentencePiece model ({len(content)} bytes: {error}). "
            "Copy it again, or prepare the data again."
        ) from error
    special = _special_ids(path, {piece: i for i, piece in enumerate(pieces)})
    names = {pieces[i]: i for i in special.values()}
    split = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def tokenize(texts: list[str]) -> list[list[int]]:
        """The pieces between special names are encoded in one call, because calls cost more than text."""
        parts = [split.split(text) for text in texts]
        plain = iter(model.encode([part.lower() for row in parts for part in row[::2]], out_type=int))
        rows = []
        for row in parts:
            rows.append(list(next(plain)))
            for name in row[1::2]:
                rows[-1] += [names[name], *next(plain)]
        return rows

    return Vocabulary(path, pieces, _sentence_piece_starts(pieces, special), special, tokenize)


def _sentence_piece_starts(pieces: list[str], special: dict[str, int]) -> np.ndarray:
    """A word starts at the mark and at punctuation; [UNK] goes on, for its blank is a piece of its own."""

    def punctuation(piece: str) -> bool:
        return all(unicodedata.category(character)[0] in "PS" for character in piece)

    word_start = np.array([piece.startswith(SPACE_MARK) or punctuation(piece) for piece in pieces])
    word_start[list(special.values())] = True
    word_start[special["unk"]] = False
    return word_start


_TRAINER = {
    "model_type": "bpe",
    "hard_vocab_limit": False,
    "num_threads": 1,
    "character_coverage": 1.0,
    "required_chars": "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-",
    "normalization_rule_name": "nmt_nfkc_cf",  # NFKC and case folding
    "max_sentence_length": 1 << 16,
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "pad_piece": "[PAD]",
    "unk_piece": "[UNK]",
    "bos_piece": "[CLS]",
    "eos_piece": "[SEP]",
    "control_symbols": ["[MASK]"],
    "minloglevel": 2,
}


def train(texts: Iterable[str], path: str | os.PathLike, size: int) -> None:
    """Trains a SentencePiece model on texts and writes it to `path` (.model) by rename.

    Byte pairs, not unigrams: those drop whole words of a small closed vocabulary, while merging goes on
    until every word is one piece or `size` is reached. Letters and digits are always pieces, so that a word
    never seen is spelt. One thread: the same texts give the same bytes.

    Raises:
        UserError: a wrong suffix, no text, or a size below the number of characters.
    """
    import sentencepiece

    path = Path(path)
    if path.suffix != ".model":
        raise UserError(
            f"A trained vocabulary cannot be called {path.name}. Possible suffix: .model. Rename it."
        )
    written = io.BytesIO()
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for text in texts:
            count += 1
            yield _clean(text)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted(),
            model_writer=written,
            vocab_size=size,
            **_TRAINER,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"No vocabulary of {size} pieces can be made of {count} texts ({error}). Possible "
            "are sizes from the number of different characters + 5. Give texts, or a larger size."
        ) from error
    save(path, written.getvalue())
