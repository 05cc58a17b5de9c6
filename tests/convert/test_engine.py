# SPDX-License-Identifier: Apache-2.0
"""Names matched with parameters: every way not to fit is one line of one sorted report, before a tensor is read."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.convert.files import Memory, config_of, parameters, tensors
from vlp_jax.convert import engine, importing, writing
from vlp_jax.convert.tables import Row, Table, bert, vilt, vit
from vlp_jax.types import UserError

BLOCK = "transformer.blocks.{}.mlp.fc1.weight"


@pytest.fixture(scope="module")
def config():
    return config_of()


@pytest.fixture(scope="module")
def params(config):
    return parameters(config)


def checked(config, *sources, table=None):
    readings = [engine.match(one, table or engine.recognise(one, vilt.TABLES)) for one in sources]
    return engine.check(readings, importing.shapes(config), vilt.HEADS, vilt.RESIZE)


def refused(config, *sources, table=None) -> list[str]:
    """The lines of the report."""
    with pytest.raises(UserError) as error:
        checked(config, *sources, table=table)
    lines = [line for line in str(error.value).splitlines() if not line.startswith(("nowhere", "Give"))]
    faults = [line for line in lines if not line.startswith("...")]
    assert faults == sorted(faults) and faults, error.value
    return lines


def test_what_is_written_is_read_bit_for_bit(config, params):
    plan = checked(config, Memory(tensors(params)))
    found = plan.fill({}, importing.Resizer(vilt.RESIZE))
    assert found.keys() == params.keys() and not plan.fresh and not plan.resized
    for path, array in params.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_nothing_is_read_before_all_is_checked(config, params):
    assert not checked(config, Memory(tensors(params), sealed=True)).fresh


def test_wrappers_and_half_precision(config, params):
    wrapped = {f"module.{name}": x.astype(np.float16) for name, x in tensors(params).items()}
    found = checked(config, Memory(wrapped)).fill({}, importing.Resizer(vilt.RESIZE))
    for path, array in params.items():
        np.testing.assert_array_equal(found[path], array.astype(np.float16).astype(np.float32), err_msg=path)


def test_a_report_lists_every_fault_sorted(config, params):
    content = tensors(params)
    del content["pooler.dense.bias"]
    del content[BLOCK.format(1)]
    content["transformer.blocks.0.attn.gate"] = np.zeros(3, np.float32)
    content["transformer.norm.weight"] = np.zeros(47, np.float32)
    content["transformer.blocks.2.norm1.bias"] = np.zeros(50, np.float32)
    content["transformer.cls_token"] = np.zeros((1, 2, 48), np.float32)
    lines = refused(config, Memory(content, sealed=True))
    report = "\n".join(lines)
    for expected in (
        "missing     heads/pooler/dense/bias [48]: no pooler.dense.bias in nowhere/memory",
        "missing     patch_embed/class_token",
        f"missing     {BLOCK.format(1)}: other layers have it",
        "mis-shaped  fusion/norm/scale: [47] in the file, [48] here",
        "mis-shaped  transformer.blocks.2.norm1.bias [50]: layer 0 has [48]",
        "mis-shaped  transformer.cls_token [1, 2, 48]: ",
        "unexpected  transformer.blocks.0.attn.gate [3]: ViLT as released has no such tensor",
    ):
        assert expected in report, report


def test_the_reader_s_reason_stands_beside_a_missing_name(config, params):
    content = tensors(params)
    source = Memory({name: x for name, x in content.items() if name != "pooler.dense.bias"})
    source.skipped = {"pooler.dense.bias": "a quantized tensor"}
    assert any("a quantized tensor" in line for line in refused(config, source))


def test_a_long_report_is_cut(config, params):
    content = tensors(params) | {f"stranger.{number}": np.zeros(1, np.float32) for number in range(90)}
    lines = refused(config, Memory(content))
    assert len(lines) == engine.SHOWN + 1 and lines[-1] == "... and 50 more"


def test_a_head_is_whole_or_not_there(config, params):
    content = tensors(params)
    without = {name: x for name, x in content.items() if not name.startswith("itm_score")}
    plan = checked(config, Memory(without))
    assert plan.fresh == dict.fromkeys(
        ("heads/itm/dense/bias", "heads/itm/dense/kernel"), "no file has this head"
    )
    half = {name: x for name, x in content.items() if name != "itm_score.fc.bias"}
    assert any("heads/itm/dense/bias" in line for line in refused(config, Memory(half)))


def test_a_head_that_the_config_lacks_is_left_unread(params):
    plan = checked(config_of(objectives__itm=0.0), Memory(tensors(params)))
    assert set(plan.unused) == {"heads/itm/dense/bias", "heads/itm/dense/kernel"}
    assert "heads/itm/dense/bias" not in plan.fill({}, importing.Resizer(vilt.RESIZE))


def test_two_files_may_not_hold_the_same(config, params):
    lines = refused(config, Memory(tensors(params), "one"), Memory(tensors(params), "other"))
    assert "doubled     fusion/norm/bias: in nowhere/one and nowhere/other" in lines


def test_one_file_does_not_excuse_what_another_lacks(config, params):
    shapes = {path: x.shape for path, x in params.items() if path.startswith(("patch_embed", "fusion/"))}
    body = {path: x for path, x in params.items() if path in shapes and path != "fusion/modality"}
    shapes.pop("fusion/modality")
    timm = {
        n: writing.written(row, layer, body) for n, row, layer in writing.written_names(vit.TABLES[0], shapes)
    }
    words = {path: x for path, x in params.items() if path.startswith(("text_embed", "heads/mlm"))}
    table = dataclasses.replace(bert.TABLES[1], copies=())
    rows = writing.written_names(table, {path: x.shape for path, x in words.items()})
    text = {name: writing.written(row, layer, words) for name, row, layer in rows}
    text["bert.encoder.layer.0.attention.self.query.weight"] = np.zeros((48, 48), np.float32)
    plan = checked(config, Memory(timm, "vit"), Memory(text, "bert"))
    assert {path.split("/")[1] for path in plan.fresh if path.startswith("heads/")} == {"pooler", "itm"}
    del timm["norm.weight"]
    lines = refused(config, Memory(timm, "vit"), Memory(text, "bert"))
    assert lines == ["missing     fusion/norm/scale [48]: no norm.weight in nowhere/vit"]


def test_two_names_of_one_tensor_must_agree(config, params):
    table = Table("two names", (Row(("first", "second"), "fusion/norm/bias"),), marks=("first",))
    wanted = {"fusion/norm/bias": (48,)}
    array = params["fusion/norm/bias"]

    def fill(second: np.ndarray) -> np.ndarray:
        reading = engine.match(Memory({"first": array, "second": second}), table)
        plan = engine.check([reading], wanted, vilt.HEADS, ())
        return plan.fill({}, importing.Resizer({}))["fusion/norm/bias"]

    np.testing.assert_array_equal(fill(array), array)
    with pytest.raises(UserError, match="first and second are two names of one tensor, but they differ"):
        fill(array + 1)


def test_an_unknown_layout_lists_the_known_ones():
    with pytest.raises(UserError) as error:
        engine.recognise(Memory({"encoder.weight": np.zeros(2), "a": np.zeros(1)}), vilt.TABLES)
    message = str(error.value)
    assert "2 tensors: a, encoder.weight" in message
    assert all(table.name in message for table in vilt.TABLES)


def test_what_has_no_place_in_a_layout_is_named(config, params):
    shapes = {path: x.shape for path, x in params.items()} | {"heads/tag/dense/bias": (5,)}
    with pytest.raises(UserError, match=r"no place    heads/tag/dense/bias \[5\]"):
        writing.written_names(vilt.ORIGINAL, shapes)
    names = [name for name, _, _ in writing.written_names(vilt.ORIGINAL, shapes, drop="^heads/(tag|itm)/")]
    assert not any(name.startswith("itm_score") for name in names)


def test_sizes_are_those_of_the_arrays(config, params):
    reading = engine.match(Memory(tensors(params)), vilt.ORIGINAL)
    found = {key: size(reading.shapes) for key, size in {**vilt.SIZES, **vilt.WHOLE}.items()}
    for key, value in found.items():
        node = config
        for name in key.split("."):
            node = node[name]
        assert value == node, key
    assert sum(map(math.prod, reading.shapes.values())) == sum(x.size for x in params.values())


@pytest.mark.parametrize("shape", [(5,), (64,), (3, 65), (130, 7), (2, 3, 70), (2, 3, 4, 129)])
def test_copies_by_stripes_are_copies(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for turned in (array, array.T, array.astype(np.float16).T):
        target = engine._aligned(turned.shape)
        assert target.ctypes.data % 64 == 0
        engine._copy(turned, target)
        np.testing.assert_array_equal(target, turned)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_name(config, params, value):
    content = tensors(params)
    content["transformer.blocks.1.mlp.fc1.weight"][3, 5] = value
    with pytest.raises(UserError, match="transformer.blocks.1.mlp.fc1.weight holds values that are infinite"):
        checked(config, Memory(content)).fill({}, importing.Resizer(vilt.RESIZE))


def test_a_layer_written_with_a_leading_zero_is_a_stranger(config, params):
    content = tensors(params) | {"transformer.blocks.01.norm1.bias": np.zeros(48, np.float32)}
    assert any(
        line.startswith("unexpected  transformer.blocks.01") for line in refused(config, Memory(content))
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("token_type_embeddings.weight", (2, 40)),
        ("text_embeddings.position_embeddings.weight", (16, 40)),
        ("text_embeddings.position_embeddings.weight", (16,)),
    ],
)
def test_only_the_axes_that_may_change_are_resized(config, params, name, shape):
    content = tensors(params) | {name: np.zeros(shape, np.float32)}
    assert any(line.startswith("mis-shaped") for line in refused(config, Memory(content)))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64])
def test_weights_are_floating_point_numbers(config, params, dtype):
    content = tensors(params)
    content["pooler.dense.weight"] = content["pooler.dense.weight"].astype(dtype)
    lines = refused(config, Memory(content))
    assert any(line.startswith(f"mis-typed   pooler.dense.weight {np.dtype(dtype)}: ") for line in lines)
