# SPDX-License-Identifier: Apache-2.0
"""BERT's layouts with the names that transformers really gives, and one BERT told in all of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.convert.tables import matcher
from tests.convert.tables.matcher import DEPTH, HEADS, HIDDEN, VOCABULARY, WIDTH
from vlp_jax.convert.tables import bert, vit

TABLES = {table.name: table for table in bert.TABLES}
ALL = [*bert.TABLES, *vit.TABLES]
BODY, WHOLE = "BERT of transformers without its head for masked words", "BERT of transformers"
GOOGLE = "BERT of Google (TensorFlow)"
LENGTH = 16  # as the text positions of matcher.ours()


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


EMBEDDING = {
    "text_embed/word": draw(0, VOCABULARY, WIDTH),
    "text_embed/position": draw(1, LENGTH, WIDTH),
    "text_embed/segment": draw(2, 2, WIDTH),
    "text_embed/norm/scale": draw(3, WIDTH),
    "text_embed/norm/bias": draw(4, WIDTH),
}
PREDICTION = {
    "heads/mlm/dense/kernel": draw(5, WIDTH, WIDTH),
    "heads/mlm/dense/bias": draw(6, WIDTH),
    "heads/mlm/norm/scale": draw(7, WIDTH),
    "heads/mlm/norm/bias": draw(8, WIDTH),
    "heads/mlm/decoder/kernel": EMBEDDING["text_embed/word"].T,
    "heads/mlm/decoder/bias": draw(9, VOCABULARY),
}


def in_transformers(name: str):
    """A model of transformers that holds these parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        max_position_embeddings=LENGTH,
    )
    model = getattr(transformers, name)(config).eval()

    def put(parameter, x: np.ndarray) -> None:
        assert parameter.shape == x.shape
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(x.copy()))

    embeddings = getattr(model, "bert", model).embeddings
    for table in ("word", "position"):
        put(getattr(embeddings, f"{table}_embeddings").weight, EMBEDDING[f"text_embed/{table}"])
    put(embeddings.token_type_embeddings.weight, EMBEDDING["text_embed/segment"])
    put(embeddings.LayerNorm.weight, EMBEDDING["text_embed/norm/scale"])
    put(embeddings.LayerNorm.bias, EMBEDDING["text_embed/norm/bias"])
    if name != "BertModel":
        head = model.cls.predictions
        put(head.transform.dense.weight, PREDICTION["heads/mlm/dense/kernel"].T)
        put(head.transform.dense.bias, PREDICTION["heads/mlm/dense/bias"])
        put(head.transform.LayerNorm.weight, PREDICTION["heads/mlm/norm/scale"])
        put(head.transform.LayerNorm.bias, PREDICTION["heads/mlm/norm/bias"])
        put(head.bias, PREDICTION["heads/mlm/decoder/bias"])
    return model


def memory(name: str) -> dict[str, np.ndarray]:
    return {key: x.detach().numpy() for key, x in in_transformers(name).state_dict().items()}


def google() -> dict[str, np.ndarray]:
    """Google's file, with the state of its optimizer as a training run leaves it."""
    e, p = EMBEDDING, PREDICTION
    file = {
        "bert/embeddings/word_embeddings": e["text_embed/word"],
        "bert/embeddings/position_embeddings": e["text_embed/position"],
        "bert/embeddings/token_type_embeddings": e["text_embed/segment"],
        "bert/embeddings/LayerNorm/gamma": e["text_embed/norm/scale"],
        "bert/embeddings/LayerNorm/beta": e["text_embed/norm/bias"],
        "bert/pooler/dense/kernel": draw(20, WIDTH, WIDTH),
        "bert/pooler/dense/bias": draw(21, WIDTH),
        "cls/predictions/transform/dense/kernel": p["heads/mlm/dense/kernel"],
        "cls/predictions/transform/dense/bias": p["heads/mlm/dense/bias"],
        "cls/predictions/transform/LayerNorm/gamma": p["heads/mlm/norm/scale"],
        "cls/predictions/transform/LayerNorm/beta": p["heads/mlm/norm/bias"],
        "cls/predictions/output_bias": p["heads/mlm/decoder/bias"],
        "cls/seq_relationship/output_weights": draw(22, 2, WIDTH),
        "cls/seq_relationship/output_bias": draw(23, 2),
    }
    for i in range(DEPTH):
        for part in (
            "attention/self/query/kernel",
            "attention/self/query/bias",
            "attention/output/dense/kernel",
            "attention/output/LayerNorm/gamma",
            "intermediate/dense/kernel",
            "output/dense/bias",
            "output/LayerNorm/beta",
        ):
            file[f"bert/encoder/layer_{i}/{part}"] = draw(30, 3)
    return file


def same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(arrays[path], x, err_msg=path)


def old_names(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The hub's oldest files: gamma and beta, and the buffer of positions."""
    renamed = {
        re.sub(
            r"LayerNorm\.(weight|bias)", lambda m: f"LayerNorm.{dict(weight='gamma', bias='beta')[m[1]]}", key
        ): x
        for key, x in file.items()
    }
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in file else ""
    return renamed | {f"{prefix}embeddings.position_ids": np.arange(LENGTH)[None]}


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_transformers_files_give_our_arrays(name, where, old, tmp_path):
    if where == "disk":
        in_transformers(name).save_pretrained(tmp_path)
        safetensors = pytest.importorskip("safetensors.numpy")
        file = safetensors.load_file(tmp_path / "model.safetensors")
        assert "cls.predictions.decoder.weight" not in file
    else:
        file = memory(name)
    file = old_names(file) if old else file
    assert old is False or any(key.endswith("LayerNorm.gamma") for key in file)
    table = BODY if name == "BertModel" else WHOLE
    assert matcher.recognised(ALL, file) == [table]
    same(matcher.checked(TABLES[table], file), EMBEDDING | ({} if table == BODY else PREDICTION))


def test_a_body_behind_its_prefix_is_read_too():
    file = {f"bert.{key}": x for key, x in memory("BertModel").items()}
    assert matcher.recognised(ALL, file) == [BODY]
    same(matcher.checked(TABLES[BODY], file), EMBEDDING)


def test_a_decoder_of_its_own_is_not_replaced_by_the_word_table():
    own = draw(40, VOCABULARY, WIDTH)
    file = memory("BertForMaskedLM") | {"cls.predictions.decoder.weight": own}
    arrays = matcher.checked(TABLES[WHOLE], file)
    np.testing.assert_array_equal(arrays["heads/mlm/decoder/kernel"], own.T)


@pytest.mark.parametrize("kept", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
def test_the_bias_has_two_names(kept):
    names = {"cls.predictions.bias", "cls.predictions.decoder.bias"}
    file = {key: x for key, x in memory("BertForMaskedLM").items() if key not in names - {kept}}
    same(matcher.checked(TABLES[WHOLE], file), EMBEDDING | PREDICTION)


@pytest.mark.parametrize("trained", [False, True])
def test_google_files_give_our_arrays(trained):
    file = google()
    if trained:
        file |= {f"{key}/adam_{moment}": x for key, x in google().items() for moment in "mv"}
        file["global_step"] = np.int64(3)
    assert matcher.recognised(ALL, file) == [GOOGLE]
    same(matcher.checked(TABLES[GOOGLE], file), EMBEDDING | PREDICTION)


def test_a_cut_head_is_noticed():
    file = memory("BertForMaskedLM")
    body = {key: x for key, x in file.items() if key.startswith("bert.")}
    # Without its mark the head is not known at all, so that what is left of it is left over ...
    rest = body | {"cls.predictions.bias": file["cls.predictions.bias"]}
    assert matcher.recognised(ALL, rest) == [BODY]
    assert matcher.read(TABLES[BODY], rest).unexpected == ["cls.predictions.bias"]
    # ... and with it, what is missing may not be fresh.
    rest = body | {"cls.predictions.transform.dense.weight": file["cls.predictions.transform.dense.weight"]}
    assert matcher.recognised(ALL, rest) == [WHOLE]
    with pytest.raises(AssertionError):
        matcher.checked(TABLES[WHOLE], rest)


@pytest.mark.parametrize("name", ["Roberta", "DistilBert", "Albert", "Electra"])
def test_another_text_model_is_no_bert(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=30, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS)
    sizes |= dict(Roberta={"type_vocab_size": 1}, Electra={"embedding_size": 8}).get(name, {})
    if name == "DistilBert":
        sizes = dict(vocab_size=30, dim=WIDTH, n_layers=1, n_heads=HEADS, hidden_dim=8)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    file = {key: x.numpy() for key, x in model.state_dict().items()}
    if name == "Electra":  # its names are BERT's and two more
        left = matcher.read(TABLES[BODY], file).unexpected
        assert left == ["embeddings_project.weight", "embeddings_project.bias"]
    else:
        assert matcher.recognised(ALL, file) == []
