# SPDX-License-Identifier: Apache-2.0
"""The files beside exported weights, read by transformers itself: models and pictures."""

from __future__ import annotations

import json
import logging
import os
import re
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers: nothing here is to be fetched

import numpy as np
import pytest

from tests.convert.folders import config_of, written
from vlp_jax.convert import hub
from vlp_jax.data import image
from vlp_jax.types import UserError

# Class -> the heads of a model that fits it.
FITTING = {
    "ViltModel": {},
    "ViltForMaskedLM": dict(mlm=True),
    "ViltForQuestionAnswering": dict(answer=7),
    "ViltForImagesAndTextClassification": dict(pair=3),
    "ViltForImageAndTextRetrieval": dict(rank=True),
    "ViltForTokenClassification": dict(tag=5, pooler=False),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture
def warnings():
    """What transformers logs while a test runs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield lines
    logging.getLogger("transformers").removeHandler(handler)


# Which class


@pytest.mark.parametrize(
    "heads, wanted, dropped, chosen",
    [
        *((heads, "", [], name) for name, heads in FITTING.items()),
        *((heads, name, [], name) for name, heads in FITTING.items()),
        (dict(mlm=True, itm=True), "", ["itm"], "ViltForMaskedLM"),
        (dict(mlm=True, itm=True), "", ["itm_head"], "ViltForMaskedLM"),
        (dict(mlm=True, itm=True), "", ["itm", "mlm_head"], "ViltModel"),
        (dict(mlm=True, rank=True), "", ["mlm"], "ViltForImageAndTextRetrieval"),
        (dict(mlm=True, rank=True), "ViltModel", ["mlm", "rank"], "ViltModel"),
        (dict(tag=3), "", ["pooler"], "ViltForTokenClassification"),
        ({}, "", ["mpp"], "ViltModel"),
    ],
)
def test_the_class_follows_the_heads(heads, wanted, dropped, chosen):
    assert hub.choose(config_of(**heads).model.heads, wanted, dropped) == chosen


@pytest.mark.parametrize(
    "heads, wanted, dropped, said",
    [
        (dict(mlm=True, itm=True), "", [], "--as=ViltForMaskedLM --drop=itm"),
        (dict(mlm=True, itm=True, mpp=True), "", ["mpp"], "--as=ViltForMaskedLM --drop=itm,mpp"),
        (dict(mlm=True, itm=True), "", [], "itm: no class of transformers"),
        (dict(mlm=True, rank=True), "", [], "rank: ViltForImageAndTextRetrieval"),
        (dict(mlm=True), "ViltModel", [], "mlm: ViltForMaskedLM"),
        (dict(tag=3), "", [], "--as=ViltForTokenClassification --drop=pooler"),
        (dict(mlm=True), "ViltForQuestionAnswering", [], "needs answer, which is not in this checkpoint"),
        (dict(mlm=True), "ViltForQuestionAnswering", [], "Possible: ViltModel, ViltForMaskedLM."),
        (dict(mlm=True), "ViltForMaskedLM", ["mlm"], "needs mlm, which is dropped"),
        (dict(pooler=False, mlm=True), "", [], "ViltForMaskedLM needs pooler"),
        (dict(pooler=False), "", [], "Kept are: no heads. Possible: no class"),
        (dict(mlm=True), "ViltForMaskedLm", [], "Did you mean 'ViltForMaskedLM'?"),
        (dict(mlm=True), "", ["itn_head"], "Did you mean 'itm'?"),
    ],
)
def test_heads_without_a_place_are_listed(heads, wanted, dropped, said):
    with pytest.raises(UserError) as error:
        hub.choose(config_of(**heads).model.heads, wanted, dropped)
    assert said in str(error.value)


# The model


def network(transformers, content: dict, std: float):
    """A network of this config.json, all weights drawn anew, the decoder apart from the word table."""
    import torch

    torch.manual_seed(3)
    settings = {
        key: value for key, value in content.items() if key not in ("architectures", "model_type", "dtype")
    }
    net = getattr(transformers, content["architectures"][0])(transformers.ViltConfig(**settings)).eval()
    if hasattr(net, "mlm_score"):
        decoder = net.mlm_score.decoder
        decoder.weight = torch.nn.Parameter(torch.zeros_like(decoder.weight))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(float(parameter.ndim == 1), std)  # 1 for norms; biases of 1 do no harm
    return net


def logits(net, ids=None) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(4)
    pairs = (2,) if net.config.num_images == 2 else ()
    size = (2, *pairs, 3, 48, 64)
    inputs = dict(
        input_ids=torch.randint(3, 60, (2, 9), generator=generator),
        attention_mask=torch.ones(2, 9, dtype=torch.long),
        pixel_values=torch.rand(size, generator=generator) * 2 - 1,
        pixel_mask=torch.ones(size[:-3] + size[-2:], dtype=torch.long),
    )
    raster = lambda p, count, **_: torch.arange(int(count)) % len(p)  # noqa: E731  transformers shuffles patches
    with torch.no_grad(), mock.patch("torch.multinomial", raster):
        out = net(**inputs)
    return (out.logits if hasattr(out, "logits") else out.pooler_output).numpy()


def test_every_size_has_its_place(transformers):
    content = hub.config_json(config_of(pair=3), "ViltForImagesAndTextClassification", ["a", "b", "c"])
    shapes = {
        name: tuple(value.shape) for name, value in network(transformers, content, 0.1).state_dict().items()
    }
    body, layer = "vilt.embeddings", "vilt.encoder.layer"
    assert shapes[f"{body}.text_embeddings.word_embeddings.weight"] == (61, 30)
    assert shapes[f"{body}.text_embeddings.position_embeddings.weight"] == (11, 30)
    assert shapes[f"{body}.text_embeddings.token_type_embeddings.weight"] == (3, 30)
    assert shapes[f"{body}.token_type_embeddings.weight"] == (3, 30)
    assert shapes[f"{body}.position_embeddings"] == (1, 26, 30)
    assert shapes[f"{body}.patch_embeddings.projection.weight"] == (30, 3, 8, 8)
    assert shapes[f"{layer}.2.intermediate.dense.weight"] == (44, 30)
    assert shapes[f"{layer}.0.attention.attention.key.bias"] == (30,)
    assert f"{layer}.3.output.dense.bias" not in shapes
    assert shapes["classifier.3.weight"] == (3, 60)
    assert content["num_attention_heads"] == 5 and content["hidden_act"] == "gelu"


@pytest.mark.parametrize("name", FITTING)
def test_transformers_loads_every_class_whole(transformers, tmp_path, name):
    from safetensors.torch import save_file

    config = config_of(**FITTING[name])
    count = max(config.model.heads[head] for head in (*hub.LABELLED,))
    labels = [f"name {i}" for i in range(count)] if count else None
    written(tmp_path, config, name, labels)
    net = network(transformers, json.loads((tmp_path / "config.json").read_bytes()), std=0.3)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(value.equal(state[key]) for key, value in loaded.state_dict().items())
    assert np.array_equal(logits(loaded), logits(net))
    if labels:
        assert loaded.config.id2label == dict(enumerate(labels))
        assert loaded.config.label2id[labels[-1]] == count - 1
        assert loaded.config.num_labels == count
    assert loaded.config.image_size == 40 and loaded.config.hidden_dropout_prob == 0.1
    assert loaded.config.pad_token_id == 2 and loaded.config.layer_norm_eps == 1e-12


def test_the_decoder_stays_apart_from_the_word_table(transformers, tmp_path, warnings):
    from safetensors.torch import save_file

    made = written(tmp_path, config_of(mlm=True), "ViltForMaskedLM")
    net = network(transformers, json.loads(made.files["config.json"]), std=0.3)
    save_file({key: value.clone() for key, value in net.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = transformers.ViltForMaskedLM.from_pretrained(tmp_path)
    assert loaded.mlm_score.decoder.weight.equal(net.mlm_score.decoder.weight)
    assert len(warnings) == 1 and "will NOT tie them" in warnings[0]
    assert any("will NOT tie them" in note for note in made.notes)
    # As the note advises: no warning, and apart for good.
    warnings.clear()
    loaded = transformers.ViltForMaskedLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    loaded.tie_weights()
    assert loaded.mlm_score.decoder.weight.equal(net.mlm_score.decoder.weight)
    assert not warnings


def test_the_epsilon_is_the_better_one_and_the_note_mends_it(transformers):
    config = config_of(mlm=True)
    config.model.width, config.model.fusion.num_heads, config.model.fusion.mlp_width = 128, 4, 512
    content = hub.config_json(config, "ViltForMaskedLM", None)

    def made(**change):
        return network(transformers, content | change, std=0.02)

    exact = made()
    for name, part in exact.named_modules():
        if re.search(r"layernorm", name):
            part.eps = 1e-6
    wanted = logits(exact)
    ours, other = (
        np.abs(logits(made(**change)) - wanted).max() for change in ({}, dict(layer_norm_eps=1e-6))
    )
    assert 0 < ours < other / 10
    model = made()
    exec(re.search(r"`(.*)`", hub.epsilon_note(config))[1], {"model": model})
    assert np.array_equal(logits(model), wanted)


@pytest.mark.parametrize("epsilons", [(1e-5, 1e-5, 1e-5), (1e-12, 1e-12, 1e-6), (1e-6, 1e-5, 1e-4)])
def test_the_note_names_every_epsilon_that_has_no_place(transformers, epsilons):
    config = config_of(mlm=True)
    config.model.text_embed.eps, config.model.fusion.eps, config.model.heads.eps = epsilons
    note = hub.epsilon_note(config)
    assert bool(note) == (len(set(epsilons)) > 1)
    assert all(f"{eps:g}" in note for eps in set(epsilons)) or not note
    model = network(transformers, hub.config_json(config, "ViltForMaskedLM", None), std=0.1)
    if note:
        exec(re.search(r"`(.*)`", note)[1], {"model": model})
    norms = {name: part.eps for name, part in model.named_modules() if hasattr(part, "eps")}
    assert norms.pop("vilt.embeddings.text_embeddings.LayerNorm") == epsilons[0]
    assert norms.pop("mlm_score.transform.LayerNorm") == epsilons[2]
    assert set(norms.values()) == {epsilons[1]} and len(norms) == 7


def test_what_transformers_cannot_say_is_refused_or_noted():
    config = config_of(answer=7)
    config.model.gelu = "sigmoid"
    with pytest.raises(UserError, match=r"config.model.gelu=exact.*2.9e-5"):
        hub.config_json(config, "ViltForQuestionAnswering", None)
    config.model.gelu = "tanh"
    made = hub.files(config, "ViltForQuestionAnswering", None, None)
    assert json.loads(made.files["config.json"])["hidden_act"] == "gelu_pytorch_tanh"
    assert any("exact always" in note for note in made.notes)
    assert any("LABEL_0" in note for note in made.notes) and any("--vocab" in note for note in made.notes)
    with pytest.raises(UserError, match="7 classes, but there are 2 labels"):
        hub.config_json(config, "ViltForQuestionAnswering", ["yes", "no"])
    config = config_of(pair=2)
    config.model.modalities = 2
    with pytest.raises(UserError, match="Possible: 3 or more"):
        hub.config_json(config, "ViltForImagesAndTextClassification", None)
    assert any(
        "2 labels" in note for note in hub.files(config_of(rank=True), "ViltModel", ["a", "b"], None).notes
    )


# Pictures


def put_together(batch: dict, patch: int) -> np.ndarray:
    """uint8 [height, width, 3] from the patches of a batch of one."""
    rows, columns = batch["grid_size"][0]
    patches = batch["patches"][0][: rows * columns].reshape(rows, columns, patch, patch, 3)
    return patches.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


@pytest.mark.slow
def test_pictures_are_those_of_our_pipeline(transformers, tmp_path, realdata):
    from PIL import Image

    config = config_of()
    config.data.image_size, config.data.patch_size, config.model.patch_embed.patch_size = 192, 16, 16
    written(tmp_path, config, "ViltModel")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    rule = image.layout(config.data)
    files = (
        sorted((realdata / "cc_images").glob("*.jpg"))[:6]
        + sorted((realdata / "coco" / "val2017").glob("*.jpg"))[:2]
    )
    assert len({Image.open(file).size for file in files}) > 4
    for file in files:
        given = processor(Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"][0]
        ours = put_together(image.load(file.read_bytes(), rule), rule.patch)
        assert given.shape == (3, *ours.shape[:2])
        levels = (given.transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(levels - np.rint(levels)).max() < 1e-3  # neither blurred nor normalised in another way
        # Resizing sums in float32, where PIL has integers: see data/resample.py.
        away = np.abs(np.rint(levels) - ours)
        assert away.max() <= 1 and away.mean() < 1e-3, (file.name, away.max(), away.mean())


@pytest.mark.parametrize("limit, noted", [(0, False), (int(1333 / 800 * 48), False), (48, True), (640, True)])
def test_a_long_side_of_another_rule_is_noted(limit, noted):
    config = config_of()
    config.data.image_limit = limit
    assert any("longer side" in note for note in hub.files(config, "ViltModel", None, None).notes) == noted
