# SPDX-License-Identifier: Apache-2.0
"""Exports: what transformers loads computes what ours does, the original's names are all there, and bits come back."""

from __future__ import annotations

import contextlib
import importlib
import json
import re

import numpy as np
import pytest

from tests.convert import files
from vlp_jax import cli
from vlp_jax.convert import command, exporting, importing
from vlp_jax.convert.proof import comparison, lines
from vlp_jax.convert.sources import open_source
from vlp_jax.files import LABELS
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import nest
from vlp_jax.types import UserError

BOUND, SILENT = lines.BOUND, dict(objectives__mlm=0.0, objectives__itm=0.0, objectives__wpa=0.0)
ALIKE = {f"model__{part}__eps": 2e-3 for part in ("text_embed", "fusion", "heads")}
UNLIKE = {"model__text_embed__eps": 2e-3, "model__fusion__eps": 2e-2, "model__heads__eps": 5e-2}
# Class -> what of our config makes a model that fits it.
QUICK = ("ViltForMaskedLM", "ViltForImagesAndTextClassification", "pretraining", "VQA")  # the others are slow
FITTING = {
    "ViltModel": SILENT,
    "ViltForMaskedLM": {**SILENT, "objectives__mlm": 1.0},
    "ViltForQuestionAnswering": {**SILENT, "model__heads__answer": 7},
    "ViltForImagesAndTextClassification": {**SILENT, "model__heads__pair": 2, "model__modalities": 3},
    "ViltForImageAndTextRetrieval": {**SILENT, "model__heads__rank": True},
    "ViltForTokenClassification": {**SILENT, "model__heads__tag": 5, "model__heads__pooler": False},
}
PRETRAINED = {"objectives__mlm": 1.0, "objectives__itm": 1.0}
# The original's files (vilt_module.py): kind -> our config, what it has besides text, transformer and pooler.
MLM = ("bias", "transform.dense.", "transform.LayerNorm.", "decoder.weight")
MPP = ("transform.dense.", "transform.LayerNorm.", "decoder.")
RELEASED = {
    "pretraining": (PRETRAINED, [*(f"mlm_score.{name}" for name in MLM), "itm_score.fc."]),
    "pretraining with masked patches": (
        {**PRETRAINED, "objectives__mpp": 1.0},
        [
            *(f"mlm_score.{name}" for name in MLM),
            "itm_score.fc.",
            *(f"mpp_score.{name}" for name in MPP),
            "transformer.mask_token",
        ],
    ),
    "VQA": (
        FITTING["ViltForQuestionAnswering"],
        [f"vqa_classifier.{number}." for number in (0, 1, 3)],
    ),
    "NLVR2": (
        FITTING["ViltForImagesAndTextClassification"],
        [f"nlvr2_classifier.{number}." for number in (0, 1, 3)],
    ),
    "retrieval": (
        {**FITTING["ViltForImageAndTextRetrieval"], "model__heads__itm": True},
        ["itm_score.fc.", "rank_output."],
    ),
}
BODY = (
    *(f"text_embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")),
    *("text_embeddings.LayerNorm.", "token_type_embeddings.weight", "pooler.dense."),
    *("transformer.cls_token", "transformer.pos_embed", "transformer.patch_embed.proj.", "transformer.norm."),
)
BLOCK = ("norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2.")


def made(folder, seed=0, names=(), **changes):
    """Writes a checkpoint of ours with random parameters; returns (its folder, config, parameters)."""
    config = files.config_of(**changes)
    params = files.parameters(config, seed)
    meta = {"config": config.to_dict(), "facts": {}, "step": 0, "metrics": {}, "finite": True}
    assets = {LABELS: json.dumps(names)} if names else {}
    checkpoint.write(folder / "ours", nest(params.items()), meta, assets)
    return folder / "ours", config, params


def given(source, target, form="hf", proof=False, **wishes):
    """Exports by the command's own function; returns the target."""
    options = command.Options([str(source)], str(target), proof=proof)
    command.give(options, exporting.Wishes("vilt", form, **wishes))
    return target


def check_round_trip(path, config, params):
    """What is imported again without a config has the same bits, and the same settings."""
    wishes = importing.Wishes("vilt", cli.load_config("vilt:variant=b32"))
    with contextlib.ExitStack() as stack:
        conversion = importing.plan(importing.open_all(stack, [str(path)]), wishes)
        again = importing.fill(conversion)
    assert not conversion.plan.fresh and not conversion.plan.copied and not conversion.plan.resized
    assert again.keys() == params.keys()
    for name, array in params.items():
        assert np.array_equal(again[name].view(np.uint32), array.view(np.uint32)), name
    ours, theirs = config.model.to_dict(), conversion.config.model.to_dict()
    for model in (ours, theirs):
        for key in ("unroll", "dropout", "token_multiple"):  # how a run computes, not what
            del model[key]
        model["fusion"].pop("remat")
    assert ours == theirs
    return conversion


def loaded(folder, name):
    """The network that transformers makes of a folder, which must hold all of it and no more."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    net, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return net.eval()


def apart(net, config, params):
    """The largest max|d| / max(1, max|theirs|) of a network of transformers and ours, and the parts that were compared."""
    models = importlib.import_module("tests.convert.models")
    batch = comparison.random_batch(config)
    ours = comparison.run_ours(config, params, batch, alone=False)
    theirs = models.of_vilt(net, batch)
    return max(models.ratios(ours, theirs, batch).values()), set(theirs)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FITTING],
)
def test_transformers_computes_what_ours_does(name, tmp_path, capsys):
    count = {"ViltForQuestionAnswering": 7, "ViltForImagesAndTextClassification": 2}.get(name, 0)
    names = [f"class {number}" for number in range(count)]
    source, config, params = made(tmp_path, names=names, **FITTING[name], **ALIKE)
    target = given(source, tmp_path / "theirs")
    ratio, parts = apart(loaded(target, name), config, params)
    assert ratio <= BOUND
    assert len(parts) == 3 + config.model.fusion.depth + (name != "ViltForTokenClassification") + (
        name != "ViltModel"
    )
    conversion = check_round_trip(target, config, params)
    assert list(conversion.labels) == names
    assert f"{name}: {target}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViltForMaskedLM", "ViltModel"])
def test_epsilons_that_differ_are_set_as_the_note_says(name, tmp_path, capsys):
    source, config, params = made(tmp_path, **FITTING[name], **UNLIKE)
    target = given(source, tmp_path / "theirs", proof=name == "ViltForMaskedLM")
    said = capsys.readouterr().out
    net = loaded(target, name)
    before, _ = apart(net, config, params)
    exec(re.search(r"`(\[setattr.*?)`", said)[1], {"model": net})
    after, _ = apart(net, config, params)
    assert after <= BOUND < before / 10
    assert "with one epsilon, 0.002, transformers' outputs differ from ours by" in said
    check_round_trip(target, config, params)


def test_the_epsilons_of_the_original_come_back(tmp_path):
    source, config, params = made(tmp_path, **FITTING["ViltForQuestionAnswering"])
    assert (config.model.fusion.eps, config.model.text_embed.eps) == (1e-6, 1e-12)
    check_round_trip(given(source, tmp_path / "theirs"), config, params)


@pytest.mark.slow
def test_the_tanh_gelu_is_kept(tmp_path):
    source, config, params = made(tmp_path, **FITTING["ViltForMaskedLM"], **ALIKE, model__gelu="tanh")
    target = given(source, tmp_path / "theirs")
    assert apart(loaded(target, "ViltForMaskedLM"), config, params)[0] <= BOUND
    check_round_trip(target, config, params)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in RELEASED],
)
def test_the_original_s_names_are_all_there(kind, tmp_path, capsys):
    changes, heads = RELEASED[kind]
    source, config, params = made(tmp_path, **changes)
    target = given(source, tmp_path / "theirs", "original", proof=kind == "NLVR2")
    stems = [*BODY, *heads]
    stems += [f"transformer.blocks.{i}.{part}" for i in range(config.model.fusion.depth) for part in BLOCK]
    wanted = {stem + end for stem in stems for end in (("weight", "bias") if stem.endswith(".") else ("",))}
    with open_source(target / exporting.WEIGHTS) as file:
        assert set(file.tensors) == wanted
        width, patch = config.model.width, config.model.patch_embed.patch_size
        assert file.tensors["transformer.patch_embed.proj.weight"].shape == (width, 3, patch, patch)
        assert file.tensors["transformer.blocks.0.attn.qkv.weight"].shape == (3 * width, width)
        assert file.tensors["transformer.pos_embed"].shape == (1, 1 + config.model.patch_embed.grid**2, width)
    check_round_trip(target, config, params)
    assert "bit for bit the same" in capsys.readouterr().out


# Heads without a place


@pytest.mark.parametrize(
    "changes, wishes, said",
    [
        (PRETRAINED, {}, "--as=ViltForMaskedLM --drop=itm"),
        ({**PRETRAINED, "objectives__mpp": 1.0}, {"drop": ("itm",)}, "--as=ViltForMaskedLM --drop=itm,mpp"),
        ({**PRETRAINED, "model__heads__rank": True}, {"class_name": "ViltModel"}, "--drop=mlm,itm,rank"),
        (FITTING["ViltModel"], {"class_name": "ViltForMaskedLM"}, "needs mlm"),
        (FITTING["ViltModel"], {"form": "original", "drop": ("itm",)}, "no such head"),
        (FITTING["ViltForTokenClassification"], {"form": "original"}, "no place    heads/tag/dense/bias"),
        (FITTING["ViltForTokenClassification"], {"form": "hg"}, "Did you mean 'hf'?"),
    ],
)
def test_what_has_no_place_is_refused_with_the_way_out(changes, wishes, said, tmp_path):
    source, _, _ = made(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        given(source, tmp_path / "theirs", **wishes)
    assert said in str(error.value)
    assert not (tmp_path / "theirs").exists()


def test_dropped_heads_are_left_away(tmp_path):
    source, config, params = made(tmp_path, **PRETRAINED, **ALIKE)
    target = given(source, tmp_path / "theirs", drop=("itm",))
    kept = {path: array for path, array in params.items() if not path.startswith("heads/itm/")}
    ratio, parts = apart(loaded(target, "ViltForMaskedLM"), config, params)
    assert ratio <= BOUND and "mlm" in parts
    config.model.heads.itm = False
    check_round_trip(target, config, kept)
    bare = given(source, tmp_path / "bare", drop=("itm", "mlm_head"))
    with open_source(bare / exporting.WEIGHTS) as file:
        assert "embeddings.cls_token" in file.tensors and not any("score" in name for name in file.tensors)
    loaded(bare, "ViltModel")
    old = given(source, tmp_path / "old", "original", drop=("mlm",))
    with open_source(old / exporting.WEIGHTS) as file:
        assert {name.split(".")[0] for name in file.tensors if "score" in name} == {"itm_score"}


def test_a_changed_bit_ends_the_export_and_leaves_nothing(tmp_path, monkeypatch):
    source, _, _ = made(tmp_path, **FITTING["ViltModel"])
    fill = importing.fill

    def flipped(conversion):
        params = fill(conversion)
        params["fusion/norm/scale"].view(np.uint32)[3] ^= 1
        return params

    monkeypatch.setattr(importing, "fill", flipped)
    with pytest.raises(command.Stop, match="fusion/norm/scale"):
        given(source, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
