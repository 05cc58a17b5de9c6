# SPDX-License-Identifier: Apache-2.0
"""The command `evaluate`: its flags, what it refuses, and a whole evaluation of a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import detr, vilt
from tests.data import prepared
from vlp_jax import cli, evaluate, systems
from vlp_jax.data import facts as data_facts
from vlp_jax.data import spec
from vlp_jax.evaluation import full
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard
from vlp_jax.training import optimizer as optimizers
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.state import initial_state
from vlp_jax.types import UserError


def test_places(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "50"
    step.mkdir(parents=True)
    run = str(tmp_path / "run")
    assert full.find(run, "", "") == full.Places(Path(run), Path(run), Path(run))
    found = full.find("", str(step), "")
    assert (found.checkpoint, found.run) == (step, Path(run))
    assert found.target == step.with_name("50.evaluation") and not found.target.exists()
    assert full.find("", str(step), str(tmp_path / "a" / "b")).target == tmp_path / "a" / "b"


@pytest.mark.parametrize(
    "workdir, checkpoint, said",
    [
        ("", "", "neither"),
        ("a", "b", "both"),
        ("nowhere", "", "nowhere does not exist"),
        ("", "FILE", "is no folder"),
    ],
)
def test_wrong_places(tmp_path, workdir, checkpoint, said):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=said):
        full.find(workdir, checkpoint.replace("FILE", str(file)), "")


def test_no_place_for_results(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        full.find(str(tmp_path), "", str(tmp_path / "file" / "below"))


def test_config_of_a_pod_runs_here():
    config = vilt.get_config("variant=tiny")
    config.parallel.mesh, config.parallel.processes, config.evaluation.batch_size = (16, 16, 1), 64, 100
    here = full.local_config(config.to_dict(), "DIR", {"evaluation": {"younger": 3}, "train": {"steps": -5}})
    assert here.evaluation.younger == 3 and here.train.steps == config.train.steps
    assert here.data.dir == "DIR" and here.parallel.processes == 1
    mesh = meshes.make_mesh(here.parallel)
    meshes.check_batch_size("evaluation.batch_size", here.evaluation.batch_size, mesh)
    assert here.evaluation.batch_size == 104


def test_another_vocabulary_is_refused():
    facts = {"vocabulary_sha256": "b" * 64, "vocabulary_path": "vocab.txt"}
    full.check_vocabulary({}, facts)
    full.check_vocabulary({"vocabulary_sha256": "b" * 64}, facts)
    with pytest.raises(UserError, match="vocab.txt .* is not the one"):
        full.check_vocabulary({"vocabulary_sha256": "a" * 64}, facts)


def test_classes_are_those_of_the_checkpoint(tmp_path):
    """A detector has no use for the vocabulary of the data, and its classes are not numbered as the data's."""
    config = detr.get_config("variant=tiny")
    (tmp_path / "labels.json").write_text('["", "cat", "dog"]')
    meta = {"facts": {"vocabulary_sha256": "a" * 64}}
    facts = {"vocabulary_sha256": "b" * 64, "categories": ["dog", "cat"], "classes": 2, "sources": {}}
    there = full.understood(config, meta, {"labels.json": tmp_path / "labels.json"}, facts)
    assert there == facts | {"categories": ["", "cat", "dog"], "classes": 3}
    assert full.understood(config, meta, {}, facts) == facts
    with pytest.raises(UserError, match="knows cat, dog, .* has owl, "):
        full.understood(
            config, meta, {"labels.json": tmp_path / "labels.json"}, facts | {"categories": ["", "owl"]}
        )
    with pytest.raises(UserError, match="is not the one"):
        full.understood(vilt.get_config("variant=tiny"), meta, {}, facts | {"vocabulary_path": "vocab.txt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose only checkpoint holds random parameters of a very small ViLT."""
    folder = tmp_path_factory.mktemp("run")
    config = vilt.get_config("variant=tiny,smoke")
    config.data.dir = str(prepared.write(folder / "data", splits={"test": 12}, name="coco"))
    config.model.width, config.model.fusion.mlp_width, config.model.fusion.depth = 32, 64, 1
    config.evaluation.examples, config.evaluation.pictures, config.compilation_cache = 0, 2, ""
    facts = data_facts.collect(config)
    config = systems.get("vilt").resolve(config, facts)
    system = systems.get("vilt").build(config)
    mesh, rules = meshes.make_mesh(config.parallel), config.parallel.rules
    optimizer = optimizers.make(config.optimizer, 2)
    with shard.context(mesh, rules):
        make = initial_state(config, system, optimizer, spec.spec(config, 8))
        state = shard.concrete(make, shard.abstract(make, mesh, rules))
    checkpointer = Checkpointer(folder / "checkpoints", keep=1, asynchronous=False)
    vocabulary = Path(facts["vocabulary_path"])
    assets = {vocabulary.name: vocabulary.read_bytes()}
    checkpointer.save(2, state, {"config": config.to_dict(), "facts": facts}, assets, {})
    checkpointer.close()
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 6.25}\n{"step": 2, "train/loss": 6.125}\n'
    )
    return folder


@pytest.mark.slow
def test_evaluate_writes_scores_and_report(run, tmp_path, capsys):
    argv = [f"--workdir={run}", f"--target={tmp_path}"]
    assert cli.run(evaluate.main, evaluate.define, usage=evaluate.__doc__, argv=argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "report.html"]
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    names = ["mlm/accuracy", "mlm/accuracy_visual", "itm/accuracy"]
    names += [f"{kind}_retrieval/r{cut}" for kind in ("image", "text") for cut in (1, 5, 10)]
    # Photographs have no oracle.
    assert set(scores) == {name + twin for name in names for twin in ("", "_blind")}
    assert all(0 <= value <= 1 for value in scores.values())
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(f"{value:.3f}" in page for value in scores.values()) and "6.125" in page
    assert "Words and their patches" in page and page.count("data:image/") >= 8
    said = capsys.readouterr().out
    assert "itm/accuracy" in said and str(tmp_path / "report.html") in said


@pytest.mark.slow
def test_evaluate_of_a_checkpoint_with_data_elsewhere(run, capsys):
    step = run / "checkpoints" / "2"
    argv = [f"--checkpoint={step}", f"--data={run / 'nowhere'}"]
    assert cli.run(evaluate.main, evaluate.define, usage=evaluate.__doc__, argv=argv) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not step.with_name("2.evaluation").exists()


@pytest.mark.slow
def test_parameters_lie_where_the_preset_wants():
    config = vilt.get_config("variant=tiny,smoke")
    config.parallel.rules, config.model.fusion.depth = "fsdp", 1
    config = systems.get("vilt").resolve(config, {"vocab_size": 40})
    system, mesh, inputs = (
        systems.get("vilt").build(config),
        meshes.make_mesh(config.parallel),
        spec.spec(config, 8),
    )
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in inputs.items()}
    with shard.context(mesh, "fsdp"):
        target = shard.abstract(lambda: system.init(jax.random.key(3), zeros)[0], mesh, "fsdp")
        drawn = shard.concrete(lambda: system.init(jax.random.key(3), zeros)[0], target)
    placed = full.put(config, system, jax.tree.map(np.asarray, drawn), inputs, mesh)
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(drawn), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
