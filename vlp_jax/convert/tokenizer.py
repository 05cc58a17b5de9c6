# SPDX-License-Identifier: Apache-2.0
"""A vocabulary as transformers wants it in a folder: WordPiece as its BertTokenizer, SentencePiece as a tokenizer.json.

The ids must be those of `data/text.py`, which this package may not import: both follow the same two libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.types import UserError

LARGEST = 64 << 20  # bytes of a vocabulary
# Role -> the names that it may have in a vocabulary.
SPECIAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def files(path: Path, length: int, rows: int) -> tuple[dict[str, bytes | dict], str]:
    """Returns the tokenizer of a vocabulary for transformers, and a note (or "").

    Args:
        length: most pieces of a text, [CLS] and [SEP] included.
        rows: of the word table.

    Raises:
        UserError: the file cannot be read, is no vocabulary, or has more pieces than rows.
    """
    try:
        if path.suffix not in (".txt", ".model") or (path.exists() and not path.is_file()):
            raise OSError(0, "it is not such a file")  # a pipe would be waited for
        if path.stat().st_size > LARGEST:
            raise OSError(0, f"it has more than {LARGEST} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"The vocabulary {path} cannot be used: {error.strerror}. "
            "Possible: .txt (WordPiece) or .model (SentencePiece). Correct --vocab."
        ) from error
    if path.suffix == ".model":
        return _sentence_piece(path, content, length, rows)
    try:
        pieces = [line.rstrip("\r") for line in content.decode("utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"The vocabulary {path} is not UTF-8 at byte {error.start}. A .txt has one piece a line. Fetch it again."
        ) from error
    special = _special(path, pieces, rows)
    settings = _settings(special, length) | {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "strip_accents": None,  # as lower-casing: yes
        "tokenize_chinese_chars": True,
    }
    ids = {piece: i for i, piece in enumerate(pieces)}
    return {
        "vocab.txt": content,
        "tokenizer.json": _word_piece(ids, special),
        "tokenizer_config.json": settings,
    }, ""


def _special(path: Path, pieces: Sequence[str], rows: int) -> dict[str, str]:
    """Role -> its name in these pieces."""
    known = set(pieces)
    found = {role: next((name for name in names if name in known), "") for role, names in SPECIAL.items()}
    if len(pieces) > rows or not all(found.values()):
        lacking = [SPECIAL[role][0] for role, name in found.items() if not name]
        raise UserError(
            f"The vocabulary {path} does not fit: it has {len(pieces)} pieces for {rows} rows of the word table"
            + (f" and lacks {', '.join(lacking)}" if lacking else "")
            + ". Needed is the one that the model was trained with. Give it to --vocab."
        )
    return found


def _settings(special: Mapping[str, str], length: int) -> dict[str, Any]:
    return {
        "processor_class": "ViltProcessor",
        "model_max_length": length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _framed(tokenizer: Any, special: Mapping[str, str]) -> bytes:
    """Adds the special pieces, [CLS] and [SEP] around a text, and writes `tokenizer.json`."""
    from tokenizers import processors

    first, last = special["cls_token"], special["sep_token"]
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
    )
    return tokenizer.to_str().encode()


def _word_piece(ids: dict[str, int], special: Mapping[str, str]) -> bytes:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=special["unk_token"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=None, lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _framed(tokenizer, special)


_SAME = (
    "tokenizer.json gives the ids of the SentencePiece model: on {count} texts made of its pieces now; when this was "
    "written on 5,000 captions and every single code point. They differ where an accent follows a letter of another "
    "form (full-width, Roman numeral), or accents stand in an unusual order."
)
_DIFFERENT = (
    "The folder has no tokenizer: {path} {why}, which transformers' tokenizers cannot do alike. "
    "Make text_ids with this package, or give a vocab.txt."
)


def _sentence_piece(path: Path, content: bytes, length: int, rows: int) -> tuple[dict, str]:
    """A byte-pair model of the library `tokenizers`; no files but a note where ids would differ."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protocol

    model, parsed = sentencepiece.SentencePieceProcessor(), protocol.ModelProto()
    try:
        model.LoadFromSerializedProto(content or b"empty")  # which takes no bytes at all for an unset model
        parsed.ParseFromString(content)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"The vocabulary {path} is no SentencePiece model ({len(content)} bytes). Copy it again."
        ) from error
    pieces = [piece.piece for piece in parsed.pieces]
    special = _special(path, pieces, rows)
    why = _unlike(parsed, protocol)
    if why:
        return {}, _DIFFERENT.format(path=path, why=why)
    try:
        built = _byte_pairs(parsed, special)
        written = _framed(built, special)
        count, different = _compare(
            built, model, [one.piece for one in parsed.pieces if one.type == one.NORMAL]
        )
    except Exception as error:  # the library raises no narrower type
        raise UserError(
            f"The vocabulary {path} is damaged: no tokenizer can be built of it ({error}). Copy it again."
        ) from error
    if different is not None:
        return {}, _DIFFERENT.format(path=path, why=f"cuts {different!r} in a way")
    settings = _settings(special, length) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": written, "tokenizer_config.json": settings}, _SAME.format(count=count)


def _byte_pairs(parsed: Any, special: Mapping[str, str]) -> Any:
    """The same pieces, merged in the order of their scores: any two pieces that make a third."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {one.piece: i for i, one in enumerate(parsed.pieces)}
    score = {one.piece: one.score for one in parsed.pieces if one.type == one.NORMAL}
    pairs = ((-score[whole], whole[:at], whole[at:]) for whole in score for at in range(1, len(whole)))
    merges = [pair[1:] for pair in sorted(pairs) if pair[1] in score and pair[2] in score]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=special["unk_token"], fuse_unk=True))
    tokenizer.normalizer = _normalizer(parsed.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _unlike(parsed: Any, protocol: Any) -> str:
    """What in a SentencePiece model goes beyond what `data/text.py` trains; "" if nothing."""
    trainer, rule = parsed.trainer_spec, parsed.normalizer_spec
    piece = protocol.ModelProto.SentencePiece
    plain = {piece.NORMAL, piece.UNKNOWN, piece.CONTROL}
    reasons = {
        "is not trained as byte pairs": trainer.model_type != trainer.BPE,
        "has pieces of bytes or of its user": any(one.type not in plain for one in parsed.pieces),
        "treats blanks in its own way": not (
            rule.add_dummy_prefix and rule.remove_extra_whitespaces and rule.escape_whitespaces
        )
        or trainer.treat_whitespace_as_suffix,
        "normalises text in its own way": not rule.precompiled_charsmap,
    }
    return next((reason for reason, true in reasons.items() if true), "")


def _normalizer(charsmap: bytes) -> Any:
    """Lower case, then SentencePiece's map of characters, then single blanks.

    `Precompiled` replaces a character together with the marks that follow it: TM with the selector of its emoji would
    lose the selector. So what belongs together is composed first, and a control character, which the map takes away,
    put before all that is not ASCII. `Strip` would take U+0085 too, which SentencePiece keeps.
    """
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"(?<=.)(?=[^\x00-\x7f])"), "\x01"),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex("^ | $"), ""),
        ]
    )


def _compare(tokenizer: Any, model: Any, pieces: list[str]) -> tuple[int, str | None]:
    """Encodes texts made of pieces with both: how many, and the first with other ids, if any."""
    words = [piece.replace("\u2581", " ") for piece in pieces]
    texts = words + [first + second for first, second in zip(words, words[::-1], strict=True)]
    texts += ["".join(words[at::97]) for at in range(97)] + [
        "\u2122\ufe0f e\u0301 \u00bd\u3000\uff21\u00df \u4e16"
    ]
    ours = model.encode([text.lower() for text in texts], out_type=int)
    theirs = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return len(texts), next((t for t, a, b in zip(texts, ours, theirs, strict=True) if a != b), None)
