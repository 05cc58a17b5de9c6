# SPDX-License-Identifier: Apache-2.0
"""What shapes do not fix: where each value comes from, and which source of it counts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.convert.files import config_of, parameters, tensors
from vlp_jax import cli
from vlp_jax.convert import engine, settings, tables, writing
from vlp_jax.convert.sources import open_source, safetensors_file
from vlp_jax.convert.tables import vilt
from vlp_jax.types import UserError


@pytest.fixture
def found(tmp_path):
    """Writes a file and what stands beside it; gives the settings by key, and the config."""

    def found(beside=None, pictures=None, config=None):
        safetensors_file.write(tmp_path / "vilt.safetensors", tensors(parameters(config_of())))
        for name, content in (("config.json", beside), ("preprocessor_config.json", pictures)):
            if content is not None:
                (tmp_path / name).write_text(json.dumps(content))
        with open_source(tmp_path / "vilt.safetensors") as source:
            reading = engine.match(source, vilt.ORIGINAL)
            given = config is not None
            base = config if given else cli.load_config(vilt.CONFIG)
            made, values = settings.configure([reading], vilt, base, given)
        return {one.key: one for one in values}, made

    return found


HEADS = {"num_attention_heads": 3}


def test_shapes_defaults_and_the_file_beside_are_told_apart(found):
    values, config = found(HEADS | {"hidden_act": "gelu_new"})
    assert values["model.fusion.num_heads"].origin == "num_attention_heads in config.json"
    assert values["model.gelu"].value == "tanh" == config.model.gelu
    assert values["model.width"].origin.startswith("shapes in ")
    assert (
        values["model.fusion.eps"].origin == "default of ViLT as released" and config.model.fusion.eps == 1e-6
    )
    assert values["data.image_size"].value == 24


def test_heads_that_nobody_states_are_asked_for(found):
    with pytest.raises(UserError, match="a width of 48 is no multiple of 64") as error:
        found()
    assert '{"num_attention_heads": N}' in str(error.value)


def test_a_config_of_the_user_keeps_its_sizes(found):
    config = config_of(data__text_length=20, model__fusion__eps=1e-5)
    values, made = found(HEADS, config=config)
    assert made.model.text_embed.length == 20 and made.model.fusion.eps == 1e-5
    assert "model.fusion.eps" not in values


def test_the_picture_s_side_and_its_colors(found):
    pictures = {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    values, config = found(HEADS, pictures)
    assert (
        config.data.image_size == 32
        and values["data.image_size"].origin == "size in preprocessor_config.json"
    )
    assert values[settings.TRANSFORM].origin == "default of ViLT"
    values, _ = found(HEADS, pictures | {"image_mean": [0.485, 0.456, 0.406]})
    assert "has mean [0.485, 0.456, 0.406]" in values[settings.TRANSFORM].origin
    values, _ = found(HEADS | {"pretrained_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}}, {})
    assert "config.json has mean [0.4, 0.4, 0.4]" in values[settings.TRANSFORM].origin


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": -3}, "num_attention_heads is -3"),
        ({"num_attention_heads": [3]}, r"num_attention_heads is \[3\]"),
        (HEADS | {"hidden_act": "geluu"}, "Did you mean 'gelu'"),
        (HEADS | {"hidden_act": ["gelu"]}, "hidden_act is"),
        ("words", "holds no object"),
    ],
)
def test_what_cannot_be_is_named(found, beside, message):
    with pytest.raises(UserError, match=message):
        found(beside)


def test_null_says_nothing(found):
    assert found(HEADS | {"hidden_act": None})[0]["model.gelu"].origin.startswith("default of")


def test_another_model_s_names_are_not_taken_for_ours(tmp_path):
    config = config_of()
    params = {path: x for path, x in parameters(config).items() if path.startswith("text_embed")}
    table = tables.get("vilt").bert.TABLES[0]
    rows = writing.written_names(table, {path: x.shape for path, x in params.items()})
    content = {name: writing.written(row, layer, params) for name, row, layer in rows}
    content["bert.encoder.layer.0.attention.self.query.weight"] = np.zeros((48, 48), np.float32)
    safetensors_file.write(tmp_path / "model.safetensors", content)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    with open_source(tmp_path) as source, pytest.raises(UserError, match="says model_type 'electra'"):
        settings.beside(engine.match(source, table))


def test_a_table_is_found_by_the_name_of_its_file(tmp_path, monkeypatch):
    (tmp_path / "another.py").write_text("CONFIG = 'another'\nTABLES = ()\n")
    monkeypatch.setattr(tables, "__path__", [*tables.__path__, str(tmp_path)])
    assert tables.names() == ["another", "detr", "vilt"] and tables.get("another").CONFIG == "another"
