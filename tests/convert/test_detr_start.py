# SPDX-License-Identifier: Apache-2.0
"""DETR as a start of a run, and every file that is none of ours: refused with what is wrong and what to do."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest

from tests.convert.detr_files import HEADS, checkpoint_of, config_of, file, parameters, plan, tensors
from tests.convert.files import Memory
from vlp_jax.convert import engine, importing, start, tables
from vlp_jax.convert.sources import safetensors_file
from vlp_jax.convert.tables import detr
from vlp_jax.training.paths import flatten, nest
from vlp_jax.types import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(checkpoint of ours, its config, its parameters)."""
    config = config_of()
    params = parameters(config)
    return checkpoint_of(tmp_path_factory.mktemp("detr") / "ours", config, params), config, params


# What does not fit

LAYER3 = "backbone.0.body.layer3.0"


@pytest.mark.parametrize(
    "beside, said",
    [
        (HEADS | {"d_model": 256}, "says d_model 256, but .* has 24"),
        (HEADS | {"num_queries": 100}, "says num_queries 100"),
        (HEADS | {"dilation": True}, "dilation is True"),
        (HEADS | {"backbone_kwargs": {"output_stride": 16}}, "backbone_kwargs.output_stride is 16"),
        (HEADS | {"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
        (
            HEADS | {"backbone_config": {"depths": [3, 4, 6, 3]}},
            r"says backbone_config.depths \(3, 4, 6, 3\)",
        ),
        (
            HEADS | {"encoder_attention_heads": 5},
            "width 24 is not divisible by config.model.encoder.num_heads 5",
        ),
        (HEADS | {"decoder_attention_heads": 0}, "decoder_attention_heads is 0"),
    ],
)
def test_another_config_beside_it_is_refused(beside, said, made, tmp_path):
    with pytest.raises(UserError, match=said):
        plan(file(tmp_path, made[2], beside))


def test_whatever_is_missing_or_moved_is_one_report(made, tmp_path):
    path = file(tmp_path, made[2], **{"backbone.0.body.layer4.1.bn2.running_var": None})
    with pytest.raises(
        UserError, match=r"missing     backbone.0.body.layer4.1.bn2.running_var: other layers"
    ):
        plan(path)
    path = file(tmp_path, made[2], **{f"{LAYER3}.conv3.weight": None})
    with pytest.raises(
        UserError, match=rf"missing     \S*stage3/first/conv3/kernel .*no {LAYER3}.conv3.weight"
    ):
        plan(path)
    content = tensors(made[2])
    for name in [name for name in content if "layer4.1." in name]:
        del content[name]
    safetensors_file.write(tmp_path / "gap.safetensors", content)
    with pytest.raises(UserError, match=r"missing     backbone.0.body.layer4.1.conv1.weight"):
        plan(tmp_path / "gap.safetensors")
    swapped = {
        name.replace("layer2.0", "?").replace("layer3.0", "layer2.0").replace("?", "layer3.0"): x
        for name, x in tensors(made[2]).items()
    }
    safetensors_file.write(tmp_path / "swapped.safetensors", swapped)
    with pytest.raises(UserError, match="does not fit in .* places") as error:
        plan(tmp_path / "swapped.safetensors")
    assert "mis-shaped" in str(error.value)


def test_a_stage_with_fewer_blocks_is_another_network(made, tmp_path):
    content = {name: x for name, x in tensors(made[2]).items() if "layer4.2." not in name}
    safetensors_file.write(tmp_path / "detr.safetensors", content)
    (tmp_path / "config.json").write_text(json.dumps(HEADS))
    assert plan(tmp_path / "detr.safetensors").config.model.grid_embed.depths == (1, 2, 1, 2)
    with pytest.raises(UserError, match="stage4/rest/conv1/kernel: .1, .* in the file, .2, "):
        plan(tmp_path / "detr.safetensors", config_of())


def test_no_query_and_a_truncated_file_are_named(made, tmp_path):
    with pytest.raises(UserError, match="object_queries.queries is 0"):
        plan(file(tmp_path, made[2], **{"query_embed.weight": np.zeros((0, 24), np.float32)}))
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array) for name, array in tensors(made[2]).items()}
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth"
        torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[:-9999])
        with pytest.raises(UserError, match=path.name):
            conversion = plan(path)
            importing.fill(conversion)


@pytest.mark.parametrize(
    "names, said",
    [
        ({"layer1.0.conv1.weight": (8, 8, 3, 3), "layer1.0.conv2.weight": (8, 8, 3, 3)}, "ResNet-18 or 34"),
        (
            {
                "layer1.0.conv1.weight": (8, 8, 1, 1),
                "layer1.0.conv2.weight": (8, 2, 3, 3),
                "layer1.0.conv3.weight": (32, 8, 1, 1),
            },
            "ResNeXt",
        ),
    ],
)
def test_other_resnets_are_refused_with_the_reason(names, said):
    shapes = {"conv1.weight": (8, 3, 7, 7), **names}
    source = Memory({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "net")
    with pytest.raises(UserError, match=said):
        engine.recognise(source, detr.TABLES)


@pytest.mark.parametrize(
    "name, said",
    [("transformer.encoder.norm.weight", "pre_norm"), ("backbone.1.row_embed.weight", "learned positions")],
)
def test_other_detrs_are_refused_with_the_reason(name, said, made):
    source = Memory({**tensors(made[2]), name: np.zeros(24, np.float32)}, "detr")
    with pytest.raises(UserError, match=said):
        engine.recognise(source, detr.TABLES)


# As a start


def begun(config, path):
    """(what the run starts with by path, what was drawn)."""
    config.init_from = str(path)
    shapes = importing.shapes(config)
    draw = np.random.default_rng(5)
    drawn = {path: jax.numpy.asarray(draw.normal(size=shape), np.float32) for path, shape in shapes.items()}
    return dict(flatten(start.parameters(config, nest(drawn.items())))), drawn


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="vlp_jax")
    return caplog


@pytest.mark.parametrize("source", ["file", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_four_classes_and_other_queries_start_from_a_detr(source, made, told, tmp_path):
    path = made[0] if source == "checkpoint" else file(tmp_path, made[2])
    config = config_of(model__heads__classes=4, model__object_queries__queries=9)
    found, drawn = begun(config, path)
    for end in ("kernel", "bias"):
        assert np.array_equal(found[f"heads/class/dense/{end}"], drawn[f"heads/class/dense/{end}"])
        assert f"fresh: heads/class/dense/{end} (which of its 5 classes" in told.text
    queries = np.concatenate([made[2]["object_queries/table"], drawn["object_queries/table"][7:]])
    assert np.array_equal(found["object_queries/table"], queries)
    assert all(
        np.array_equal(found[path], made[2][path])
        for path in made[2]
        if "class" not in path and "queries" not in path
    )
    fewer, _ = begun(config_of(model__object_queries__queries=3), path)
    assert np.array_equal(fewer["object_queries/table"], made[2]["object_queries/table"][:3])
    assert np.array_equal(fewer["heads/class/dense/bias"], made[2]["heads/class/dense/bias"])


def test_a_resnet_starts_the_backbone_and_the_rest_is_fresh(made, told, tmp_path):
    content = {
        name.removeprefix("backbone.0.body."): x for name, x in tensors(made[2]).items() if "backbone" in name
    }
    safetensors_file.write(tmp_path / "resnet.safetensors", {**content, "fc.bias": np.zeros(3, np.float32)})
    found, drawn = begun(config_of(), tmp_path / "resnet.safetensors")
    for path, array in found.items():
        wanted = made[2] if path.startswith("grid_embed/resnet/") else drawn
        assert np.array_equal(array, wanted[path]), path
    assert "fresh: grid_embed/projection/kernel (a ResNet has nothing of it)" in told.text
    assert "fresh: heads/box/out/bias" in told.text


def test_another_number_of_heads_than_the_original_s_is_refused(made, tmp_path):
    path = file(tmp_path, made[2], beside={})
    with pytest.raises(UserError, match="has 8 attention heads, but config.model.encoder.num_heads is 3"):
        begun(config_of(), path)


def test_the_tables_of_a_system_do_not_clash():
    for table in tables.get("detr").TABLES:
        assert len({source for row in table.rows for source in row.sources}) == sum(
            len(row.sources) for row in table.rows
        )
