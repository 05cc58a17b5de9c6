# SPDX-License-Identifier: Apache-2.0
"""ViLT's and BERT's references against transformers: three layers, three heads, odd grids, padding, every head."""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from unittest import mock

import jax
import numpy as np
import pytest

from vlp_jax.convert.proof import bert, references, vilt
from vlp_jax.convert.proof.settings import Settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
harness = importlib.import_module("tests.convert.proof.harness")
port = importlib.import_module("tests.parity.vilt_transformers")

CLASSES = (
    "ViltModel",
    "ViltForMaskedLM",
    "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification",
    "ViltForImageAndTextRetrieval",
    "ViltForTokenClassification",
)
HEADS_OF = dict(zip(CLASSES, ("", "mlm", "answer", "pair", "rank", "tag"), strict=True))


# ViLT


def vilt_net(name: str) -> torch.nn.Module:
    rows = 3 if name == "ViltForImagesAndTextClassification" else 2
    config = transformers.ViltConfig(
        **harness.SIZES,
        **harness.PICTURE,
        **harness.TEXT,
        num_labels=harness.ANSWERS,
        modality_type_vocab_size=rows,
        num_images=2,
    )
    return harness.prepared(getattr(transformers, name)(config))


def vilt_outputs(net: torch.nn.Module, name: str) -> dict:
    """Parts of ViLT's port; those of the body are of the first picture."""
    batch, body = harness.example(), getattr(net, "vilt", net)
    views = [batch, {**batch, **{key[:-2]: value for key, value in batch.items() if key.endswith("_1")}}]
    pixels, masks = zip(*map(port.pictures, views), strict=True)
    text = {
        "input_ids": torch.tensor(batch["text_ids"]).long(),
        "attention_mask": torch.tensor(batch["text_mask"]).long(),
    }
    first = text | {"pixel_values": pixels[0], "pixel_mask": masks[0]}
    with mock.patch("torch.multinomial", lambda p, count, **_: torch.arange(int(count)) % len(p)):
        out = body(**first, output_hidden_states=True)
        if HEADS_OF[name] == "pair":
            size = np.max([picture.shape[2:] for picture in pixels], 0)

            def whole(x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))

            first["pixel_values"] = torch.stack([whole(picture) for picture in pixels], 1)
            first["pixel_mask"] = torch.stack([whole(mask) for mask in masks], 1)
        logits = net(**first).logits if HEADS_OF[name] else None
    embedded, *layers = (port.aligned(x, batch) for x in out.hidden_states)
    modality = body.embeddings.token_type_embeddings.weight
    parts = {f"layer {i}": x for i, x in enumerate(layers)}
    parts["text_embed"] = embedded[:, : harness.PIECES] - modality[0]
    parts["patch_embed"] = embedded[:, harness.PIECES :] - modality[1]
    parts["norm"] = port.aligned(out.last_hidden_state, batch)
    parts |= {"pooled": out.pooler_output} if out.pooler_output is not None else {}
    return parts | ({HEADS_OF[name]: logits} if HEADS_OF[name] else {})


@pytest.mark.parametrize("name", CLASSES)
def test_vilt_of_transformers(name):
    net = vilt_net(name)
    harness.check(
        harness.run(harness.arrays(net), vilt.vilt_transformers),
        vilt_outputs(net, name),
        harness.token_masks(),
    )


@pytest.mark.parametrize("age", ["4.x", "5.x tied"])
def test_vilt_vocabulary_head_by_age(age):
    net = vilt_net("ViltForMaskedLM")
    tensors = harness.arrays(net)
    if age == "4.x":
        tensors["mlm_score.bias"] = tensors.pop("mlm_score.decoder.bias")
        tensors["vilt.embeddings.text_embeddings.position_ids"] = np.arange(harness.LENGTH)[None]
    else:
        del tensors["mlm_score.decoder.weight"]
        net.mlm_score.decoder.weight = net.vilt.embeddings.text_embeddings.word_embeddings.weight
    harness.check(
        harness.run(tensors, vilt.vilt_transformers),
        vilt_outputs(net, "ViltForMaskedLM"),
        harness.token_masks(),
    )


@pytest.mark.parametrize(
    "kind, head",
    [
        ("ViltForMaskedLM", "mlm_score"),
        ("ViltForQuestionAnswering", "vqa_classifier"),
        ("ViltForImagesAndTextClassification", "nlvr2_classifier"),
        ("ViltForImageAndTextRetrieval", "rank_output"),
    ],
)
def test_vilt_of_its_authors(kind, head):
    net = vilt_net(kind)
    tensors = harness.timm_names(harness.arrays(net), "vilt.", "transformer.")
    tensors = harness.renamed(
        tensors, ("vilt.embeddings.", ""), ("vilt.", ""), ("mlm_score.decoder.bias", "mlm_score.bias")
    )
    tensors = {
        head + name.removeprefix("classifier") if name.startswith("classifier") else name: value
        for name, value in tensors.items()
    }
    wanted = vilt_outputs(net, kind)
    if kind in ("ViltForMaskedLM", "ViltForImageAndTextRetrieval"):  # the port has no matching head
        draw = np.random.default_rng(3)
        tensors["itm_score.fc.weight"] = draw.normal(size=(2, harness.WIDTH)).astype(np.float32)
        tensors["itm_score.fc.bias"] = draw.normal(size=2).astype(np.float32)
        wanted["itm"] = (
            wanted["pooled"].detach().numpy() @ tensors["itm_score.fc.weight"].T
            + tensors["itm_score.fc.bias"]
        )
    tensors["text_embeddings.position_ids"] = np.arange(harness.LENGTH)[None]
    assert f"{head}.weight" in tensors or f"{head}.bias" in tensors or f"{head}.3.weight" in tensors
    harness.check(harness.run(tensors, vilt.vilt_original), wanted, harness.token_masks())


# BERT


def bert_net(name: str) -> torch.nn.Module:
    return harness.prepared(
        getattr(transformers, name)(transformers.BertConfig(**harness.SIZES, **harness.TEXT))
    )


def bert_outputs(net: torch.nn.Module) -> dict:
    batch = harness.example()
    parts = {"text_embed": getattr(net, "bert", net).embeddings(torch.tensor(batch["text_ids"]).long())}
    if hasattr(net, "cls"):
        parts["mlm"] = net.cls.predictions(torch.tensor(batch["features"]))
    return parts


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_bert_of_transformers(name):
    net = bert_net(name)
    tensors, wanted = harness.arrays(net), bert_outputs(net)
    harness.check(harness.run(tensors, bert.bert_transformers), wanted, {})
    old = harness.renamed(
        tensors, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
    )
    old = {name: value for name, value in old.items() if not name.endswith("decoder.bias")}
    if "cls.predictions.bias" in old:  # 4.x: one tensor by two names
        old["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
    harness.check(harness.run(old, bert.bert_transformers), wanted, {})


def test_bert_with_its_decoder_tied(tmp_path):
    net = bert_net("BertForPreTraining")
    net.cls.predictions.decoder.weight = net.bert.embeddings.word_embeddings.weight
    net.cls.predictions.bias = net.cls.predictions.decoder.bias
    tensors = harness.on_disk(net, tmp_path)
    assert not any("decoder" in name for name in tensors)
    harness.check(harness.run(tensors, bert.bert_transformers), bert_outputs(net), {})


def test_bert_of_google():
    net = bert_net("BertForPreTraining")
    net.cls.predictions.decoder.weight = net.bert.embeddings.word_embeddings.weight
    net.cls.predictions.bias = net.cls.predictions.decoder.bias
    tensors = {}
    for name, value in harness.arrays(net).items():
        name = name.replace(".", "/").replace("LayerNorm/weight", "LayerNorm/gamma")
        name = name.replace("LayerNorm/bias", "LayerNorm/beta").replace("_embeddings/weight", "_embeddings")
        name = name.replace("predictions/bias", "predictions/output_bias")
        name = name.replace("seq_relationship/", "seq_relationship/output_").replace("layer/", "layer_")
        if name.endswith("/weight") and "seq_relationship" not in name:
            name, value = name.replace("/weight", "/kernel"), value.T
        if "decoder" not in name:
            tensors[name] = value
    harness.check(harness.run(tensors, bert.bert_google), bert_outputs(net), {})


# What the tests above must see, and what a source may hand over


@pytest.mark.parametrize(
    "change, seen",
    [
        ({"eps": 1e-12}, "layer 0"),
        ({"text_eps": 1e-6}, "text_embed"),
        ({"head_eps": 1e-6}, "mlm"),
        ({"gelu": "tanh"}, "layer 0"),
        ({"num_heads": 4}, "layer 0"),
    ],
)
def test_every_setting_shows(change, seen):
    net = vilt_net("ViltForMaskedLM")
    found = harness.run(
        harness.arrays(net), vilt.vilt_transformers, dataclasses.replace(harness.SETTINGS, **change)
    )
    wanted = vilt_outputs(net, "ViltForMaskedLM")
    assert harness.difference(found[seen], wanted[seen], harness.token_masks().get(seen)) > 2e-5


def test_the_epsilon_of_deep_heads_shows(monkeypatch):
    monkeypatch.setattr(vilt, "CLASSIFIER_EPS", 1e-6)
    net = vilt_net("ViltForQuestionAnswering")
    found = harness.run(harness.arrays(net), vilt.vilt_transformers)
    assert harness.difference(found["answer"], vilt_outputs(net, "ViltForQuestionAnswering")["answer"]) > 2e-5


def test_half_precision_and_frozen_arrays_are_read():
    tensors = {
        name: value.astype(jax.numpy.bfloat16)
        for name, value in harness.arrays(bert_net("BertForMaskedLM")).items()
    }
    for value in tensors.values():
        value.setflags(write=False)
    whole = {name: value.astype(np.float32) for name, value in tensors.items()}
    found, wanted = harness.run(tensors, bert.bert_transformers), harness.run(whole, bert.bert_transformers)
    assert set(found) == {"text_embed", "mlm"}
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_tensors_are_read_once_and_not_kept():
    tensors, asked, alive, references_to = harness.arrays(vilt_net("ViltForQuestionAnswering")), [], [], []

    def get(name):
        asked.append(name)
        alive.append(sum(reference() is not None for reference in references_to))
        copy = tensors[name].copy()
        references_to.append(weakref.ref(copy))
        return copy

    vilt.vilt_transformers(get, tensors.keys(), harness.SETTINGS, harness.example())
    # Of the head its first weight is looked at before, for its shape.
    assert sorted([*tensors, "classifier.0.weight"]) == sorted(asked)
    assert max(alive) < 2 * 16  # a block has 16


@pytest.mark.parametrize("names", [(), ("model.embed_tokens.weight",), ("head.weight", "cls_token")])
def test_an_unknown_file_has_no_reference(names):
    assert references.find(names) is None


@pytest.mark.parametrize("change", [{"gelu": "quick"}, {"num_heads": 0}])
def test_settings_refuse_what_cannot_run(change):
    with pytest.raises(ValueError, match="possible are exact, tanh"):
        Settings(**({"num_heads": harness.HEADS} | change))
