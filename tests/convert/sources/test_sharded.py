# SPDX-License-Identifier: Apache-2.0
"""Weights in several files: transformers' own shards, and every index that misleads."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tests.convert.sources import hostile_files as hostile
from vlp_jax.convert.sources import open_source, safetensors_file

INDEX = "model.safetensors.index.json"
FIRST = {"a": np.arange(3, dtype=np.float32), "b": np.zeros((2, 2), np.int64)}
SECOND = {"c": np.ones((1, 4), np.float16)}
MAP = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    safetensors_file.write(tmp_path / "one.safetensors", FIRST)
    safetensors_file.write(tmp_path / "two.safetensors", SECOND)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": -5}, "weight_map": MAP}))
    return tmp_path


def test_shards_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=99
    )
    torch.manual_seed(0)
    model = transformers.ViltModel(config)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with open_source(tmp_path) as source:
        assert source.container == "safetensors" and len(source.files) > 2
        assert source.path == tmp_path / INDEX
        saved = {name: source.read(name) for name in source.tensors}
    assert set(saved) <= set(expected) and len(saved) >= len(expected) - 2  # position numbers are not saved
    assert all(np.array_equal(expected[name], saved[name]) for name in saved)


def test_a_folder_an_index_and_a_lying_total(folder):
    hostile.assert_equal(folder, FIRST | SECOND)
    hostile.assert_equal(folder / INDEX, FIRST | SECOND)
    with open_source(folder) as source:
        assert source.files == (folder / "one.safetensors", folder / "two.safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../one.safetensors", "/one.safetensors", "", ".", "..", "a\\b", "x/one", "a\0b", 3, None, "\x1b[2J"],
)
def test_a_shard_outside_the_folder(folder, shard):
    inner = folder / "inner"
    inner.mkdir()
    (inner / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    hostile.refused(inner, "'a' is said to be in .*no file name of its folder")


@pytest.mark.parametrize(
    ("weight_map", "pattern"),
    [
        (
            MAP | {"d": "three.safetensors"},
            r"names 3 shards and 1 of them are not beside it: three.safetensors",
        ),
        (MAP | {"d": "x" * 300}, "names 3 shards and 1"),
        (MAP | {"d": "two.safetensors"}, r"1 tensors of the index are not in their shards: 'd' in two"),
        (MAP | {"b": "two.safetensors"}, "'b' belongs to 'two.safetensors' and lies in one.safetensors too"),
        (MAP | {"d": INDEX}, "not"),
        ({}, 'has no "weight_map"'),
        ([], 'has no "weight_map"'),
        ({str(number): f"{number}" for number in range(501)}, "501 shards are more"),
        ({"a\n": "one.safetensors"}, "a tensor is called"),
    ],
)
def test_an_index_that_misleads(folder, weight_map, pattern):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hostile.refused(folder, pattern)


def test_a_tensor_in_two_shards(folder):
    safetensors_file.write(folder / "two.safetensors", SECOND | {"a": FIRST["a"]})
    hostile.refused(folder, "'a' belongs to 'one.safetensors' and lies in two.safetensors too")


def test_a_tensor_that_the_index_forgets(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with open_source(folder) as source:
        assert list(source.tensors) == ["a"] and source.skipped["b (one.safetensors)"] == "not in the index"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "the key 'a' twice"),
        ('{"weight_map": ' + '{"a":' * 100_000, "not JSON"),
        ('{"weight_map"', "not JSON"),
        ("[1]", 'has no "weight_map"'),
    ],
)
def test_an_index_that_is_broken(folder, text, pattern):
    (folder / INDEX).write_text(text)
    hostile.refused(folder, pattern)


def test_a_broken_shard_closes_the_others(folder):
    (folder / "two.safetensors").write_bytes(b"\x10")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        hostile.refused(folder, "two.safetensors")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
