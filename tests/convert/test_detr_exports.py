# SPDX-License-Identifier: Apache-2.0
"""DETR on its way out: bits come back, transformers loads it, and what has no place is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.convert.detr_files import NAMES, checkpoint_of, config_of, file, parameters, plan
from vlp_jax import cli
from vlp_jax.convert import command, exporting, importing
from vlp_jax.convert.proof import detection
from vlp_jax.convert.sources import open_source
from vlp_jax.convert.tables import detr
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten
from vlp_jax.types import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(checkpoint of ours, its config, its parameters)."""
    config = config_of()
    params = parameters(config)
    return checkpoint_of(tmp_path_factory.mktemp("detr") / "ours", config, params), config, params


def given(source, target, form, proof=False, **wishes):
    options = command.Options([str(source)], str(target), proof=proof)
    command.give(options, exporting.Wishes("detr", form, **wishes))
    return target


@pytest.mark.parametrize("form", [pytest.param("original", marks=pytest.mark.slow), "hf"])
def test_what_was_written_comes_back(form, made, tmp_path, capsys):
    source, config, params = made
    target = given(source, tmp_path / "theirs", form)
    assert "bit for bit the same" in capsys.readouterr().out
    with open_source(target / exporting.WEIGHTS) as opened:
        wishes = importing.Wishes("detr", cli.load_config(detr.CONFIG))
        again = importing.plan([opened], wishes)
        read = importing.fill(again)
    assert list(again.labels) == NAMES and not again.plan.fresh
    assert again.config.data.image_size == (64 if form == "hf" else 800)  # no place in the authors' files
    for path, array in params.items():
        assert np.array_equal(read[path].view(np.uint32), array.view(np.uint32)), path
    one, other = (made.model.to_dict() for made in (config, again.config))
    for model in (one, other):
        del model["unroll"], model["dropout"]
    assert one == other


@pytest.mark.slow
def test_a_conversion_and_its_way_back_by_the_command(made, tmp_path, capsys):
    pytest.importorskip("torch")
    source = file(tmp_path, made[2])
    options = command.Options([str(source)], str(tmp_path / "made"))
    command.bring(options, importing.Wishes("detr", cli.load_config(detr.CONFIG)))
    out = capsys.readouterr().out
    assert "read as: DETR as released" in out and "DIFFERENT" not in out
    assert any(line.startswith("  logits") and "equal" in line for line in out.splitlines())
    found, meta, _ = checkpoint.open_for_inference(tmp_path / "made")
    assert meta["config"]["model"]["encoder"]["num_heads"] == 3
    leaves = dict(flatten(found))
    assert all(np.array_equal(leaves[path], array) for path, array in made[2].items())


@pytest.mark.slow
def test_transformers_loads_all_of_it_and_computes_the_same(made, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.convert import detectors

    source, config, params = made
    target = given(source, tmp_path / "theirs", "hf", class_name="DetrForObjectDetection")
    net, info = transformers.DetrForObjectDetection.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    batch = detection.random_batch()
    found, wanted = detection.run_ours(config, params, batch), detectors.outputs(net.eval(), batch)
    assert np.abs(found["logits"] - wanted["logits"]).max() <= 1e-4
    assert np.abs(found["boxes"] - wanted["boxes"]).max() <= 1e-5
    assert net.config.id2label == {0: "N/A", 1: "net", 2: "boat", 3: "N/A", 4: "eel"}
    processor = json.loads((target / "preprocessor_config.json").read_text())
    own = transformers.DetrImageProcessorPil(**processor)
    assert own.size["shortest_edge"] == 64 and processor["image_mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    "changes, wishes, said",
    [
        ({"model__grid_embed__stem_width": 16}, {"form": "hf"}, "--format=original"),
        ({"model__decoder__eps": 1e-6}, {"form": "hf"}, "transformers has 1e-05 in every norm"),
        ({}, {"form": "hf", "class_name": "DetrForSegmentation"}, "no other place"),
        ({}, {"form": "hf", "drop": ("box",)}, "needs both heads"),
        ({}, {"form": "original", "drop": ("box",)}, "no such head"),
        ({}, {"form": "original", "vocab": "vocab.txt"}, "reads no text"),
    ],
)
def test_what_has_no_place_is_refused(changes, wishes, said, made, tmp_path):
    config = config_of(**changes)
    checkpoint_of(tmp_path / "ours", config, made[2])
    with pytest.raises(UserError, match=said):
        given(tmp_path / "ours", tmp_path / "theirs", **wishes)
    assert not (tmp_path / "theirs").exists()


def test_a_file_of_another_family_is_refused_by_its_config(made, tmp_path):
    target = given(made[0], tmp_path / "theirs", "hf")
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {"model_type": "table-transformer"}))
    with pytest.raises(UserError, match="says model_type 'table-transformer'"):
        plan(target)
