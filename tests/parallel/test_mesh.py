# SPDX-License-Identifier: Apache-2.0
"""Meshes, presets and what a batch must divide by."""

import jax
import numpy as np
import pytest

from configs import common
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import processes, rules
from vlp_jax.types import UserError


def parallel(**changes):
    config = common.get_config().parallel
    config.update(changes)
    return config


@pytest.mark.parametrize(
    "preset, mesh, shape",
    [
        ("dp", (), (8, 1, 1)),
        ("fsdp", (), (1, 8, 1)),
        ("fsdp_tp", (), (1, 4, 2)),
        ("fsdp_tp", (2, -1, 2), (2, 2, 2)),
        ("dp", (8, 1, 1), (8, 1, 1)),
    ],
)
def test_mesh_of_a_preset(preset, mesh, shape):
    made = meshes.make_mesh(parallel(rules=preset, mesh=mesh))
    assert tuple(made.shape[axis] for axis in rules.MESH_AXES) == shape


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rules="fspd"), "Did you mean 'fsdp'"),
        (dict(mesh=(3, 1, 1)), "there are 8"),
        (dict(mesh=(3, -1, 1)), "there are 8"),
        (dict(mesh=(-1, -1, 1)), "at most one -1"),
        (dict(mesh=(8,)), "three sizes"),
        (dict(mesh=(0, 8, 1)), "three sizes"),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained(changes, words):
    with pytest.raises(UserError, match=words):
        meshes.make_mesh(parallel(**changes))


def test_a_preset_that_needs_more_devices_says_so():
    with pytest.raises(UserError, match="'fsdp_tp' needs at least 2 devices, but there are 1"):
        meshes.make_mesh(parallel(rules="fsdp_tp"), jax.devices()[:1])


def test_batch_sizes_that_do_not_divide_name_those_that_do():
    mesh = meshes.make_mesh(parallel())
    meshes.check_batch_size("config.train.batch_size", 32, mesh, accumulation=4)
    with pytest.raises(UserError, match="config.train.batch_size 36 .* Take 32 or 64"):
        meshes.check_batch_size("config.train.batch_size", 36, mesh, accumulation=4)
    with pytest.raises(UserError, match="Take 8 or 8"):
        meshes.check_batch_size("config.train.batch_size", 0, mesh)


def test_placed_rows_lie_along_data_and_fsdp():
    mesh = meshes.make_mesh(parallel(rules="fsdp_tp", mesh=(2, 2, 2)))
    rows = np.arange(16).reshape(8, 2)
    placed = meshes.placer(mesh)({"rows": rows})["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 2)}


def test_every_rule_names_an_axis_that_there_is():
    for preset, table in rules.PRESETS.items():
        assert dict(rules.rules(preset)).keys() >= table.keys()
        assert rules.MESHES[preset]


def test_processes_need_a_coordinator_and_a_number():
    with pytest.raises(UserError, match="from 0 to 3"), processes.joined(parallel(processes=4)):
        pass
    beyond = parallel(processes=4, coordinator="localhost:1", process=4)
    with pytest.raises(UserError, match="process 4"), processes.joined(beyond):
        pass
    with processes.joined(parallel()) as host:
        assert host == {"host": 0, "hosts": 1}
    assert jax.process_count() == 1
