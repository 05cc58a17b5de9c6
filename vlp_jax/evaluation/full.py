# SPDX-License-Identifier: Apache-2.0
"""The whole evaluation of a checkpoint: every task that its system can do, with twins, oracles and pictures."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.data.text import Vocabulary
from vlp_jax.evaluation import runner
from vlp_jax.evaluation.detection import Detection, class_names, recorded
from vlp_jax.evaluation.masked_language import MaskedLanguage
from vlp_jax.evaluation.matching import Matching
from vlp_jax.evaluation.oracle import Knowledge
from vlp_jax.evaluation.report import Examples, Found
from vlp_jax.evaluation.retrieval import Retrieval
from vlp_jax.parallel import shard
from vlp_jax.systems.base import System
from vlp_jax.types import Params, UserError

PAIRS_A_ROW = 4  # retrieval scores pairs without embedding anything, so its batches may be larger


@dataclasses.dataclass(frozen=True)
class Places:
    """Where an evaluation reads and writes; `run` has `metrics.jsonl` and may be no run at all."""

    checkpoint: Path
    run: Path
    target: Path


def chosen(workdir: str, checkpoint: str) -> Path:
    """The folder that one of two flags names.

    Raises:
        UserError: neither or both of them, or a folder that does not exist.
    """
    if bool(workdir) == bool(checkpoint):
        given = "both" if workdir else "neither"
        raise UserError(
            f"Which checkpoint is not clear: {given} of --workdir and --checkpoint are given. Give one: "
            "--workdir=RUN for a run's newest checkpoint, or --checkpoint=RUN/checkpoints/STEP."
        )
    path = Path(workdir or checkpoint).expanduser()
    if not path.is_dir():
        flag = "workdir" if workdir else "checkpoint"
        raise UserError(
            f"--{flag}={path} {'is no folder' if path.exists() else 'does not exist'}. Possible: a folder that "
            "train or convert has written. Correct the path, or train first."
        )
    return path


def find(workdir: str, checkpoint: str, target: str) -> Places:
    """Reads the flags of `evaluate`; makes nothing.

    Raises:
        UserError: as `chosen`, or no place for results.
    """
    path = chosen(workdir, checkpoint)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    results = Path(target).expanduser() if target else path
    if checkpoint and not target:
        results = path.resolve().with_name(f"{path.resolve().name}.evaluation")
    there = next(folder for folder in (results, *results.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(
            f"The results cannot be written to {results}: {there} is no folder that may be written to. "
            "Give another one with --target=DIR."
        )
    return Places(path, run, results)


def local_config(config: Mapping[str, Any], data: str, defaults: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a run, perhaps of a pod, for one process with this machine's devices.

    The mesh is the preset's, the evaluation batch is rounded up to divide over it; `data` may be "". A key that is
    younger than the checkpoint takes its value from `defaults`.
    """
    config = ConfigDict(_completed(config, defaults))
    config.data.dir = data or config.data.dir
    parallel = config.parallel
    parallel.coordinator, parallel.processes, parallel.process, parallel.mesh = "", 1, 0, ()
    devices = jax.local_device_count()
    if devices % 2:
        parallel.rules = "dp"  # fsdp_tp needs an even number
    config.evaluation.batch_size = math.ceil(config.evaluation.batch_size / devices) * devices
    return config


def _completed(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    whole = {**defaults, **given}
    below = {key: value for key, value in whole.items() if isinstance(value, Mapping)}
    return whole | {key: _completed(value, defaults.get(key, {})) for key, value in below.items()}


def check_vocabulary(trained: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Compares the vocabulary of the data with that of the checkpoint.

    Raises:
        UserError: they differ: token ids would mean other words.
    """
    known, here = trained.get("vocabulary_sha256"), facts["vocabulary_sha256"]
    if known and known != here:
        raise UserError(
            f"The vocabulary {facts['vocabulary_path']} (sha256 {here[:12]}...) is not the one of the checkpoint "
            f"({known[:12]}...). Give --data=DIR with data prepared with the checkpoint's vocabulary, which lies in "
            "its folder assets."
        )


def understood(
    config: ConfigDict, meta: Mapping[str, Any], assets: Mapping[str, Path], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts of the data as a checkpoint understands them: classes are its own, so objects are told by name.

    Args:
        config: of the evaluation.
        meta, assets: of the checkpoint.
        facts: of the data scored on.

    Raises:
        UserError: texts in another vocabulary than the checkpoint's, or boxes none of whose names is one of its classes.
    """
    if "text" in config.data.inputs:
        check_vocabulary(meta.get("facts", {}), facts)
    names = class_names(assets) if "boxes" in config.data.inputs else []
    if names and not set(names) & set(facts["categories"]) - {""}:
        raise UserError(
            f"No box of {config.data.dir} has a class that the checkpoint knows. It knows "
            f"{', '.join(filter(None, names[:8]))}, ...; the data has {', '.join(filter(None, facts['categories'][:8]))}, "
            "... Give --data=DIR with data of the same classes."
        )
    return {**facts, "categories": names, "classes": len(names)} if names else dict(facts)


def put(config: ConfigDict, system: System, params: Params, spec: Mapping[str, Any], mesh: Mesh) -> Params:
    """Places parameters that were read as numpy arrays on the mesh, as the preset says."""

    def make() -> Params:
        return system.init(jax.random.key(0), {k: np.zeros(v.shape, v.dtype) for k, v in spec.items()})[0]

    return jax.device_put(params, shard.shardings(shard.abstract(make, mesh, config.parallel.rules)))


def score(
    config: ConfigDict,
    system: System,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    knowledge: Knowledge,
    facts: Mapping[str, Any],
    mesh: Mesh,
    examples: int | None = None,
) -> Found:
    """Runs every task whose functions are among the system's.

    Args:
        config: with `evaluation.gallery` and `evaluation.pictures`.
        system, params: what to score; the parameters lie on `mesh`.
        batches: one pass, as for `runner.evaluate`.
        knowledge: of the split that the batches come from.
        facts: of the data, with `vocabulary_path` and `visual_ids`, or for boxes `categories`.
        mesh: the devices.
        examples: how many the pass holds, for the time left.
    """
    wanted, start = config.evaluation, time.monotonic()
    tasks = _tasks(config, system, knowledge, facts, mesh)
    with shard.context(mesh, config.parallel.rules):
        scores = runner.evaluate(system, params, batches, list(tasks.values()), mesh, examples)
    words, pairs, gallery, boxes = (tasks.get(name) for name in ("words", "pairs", "gallery", "boxes"))
    judged = boxes.examples(wanted.pictures) if boxes else ()
    shown = Examples(
        alignments=pairs.alignments if pairs else (),
        right=pairs.right if pairs else (),
        wrong=pairs.wrong if pairs else (),
        guesses=words.examples if words else (),
        detections=[(knowledge.picture(*place), one) for place, one in judged],
        categories=facts.get("categories", ()),
    )
    pictures = len(gallery.gallery.pictures) if gallery else 0
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Found(scores, shown, pictures, parameters, time.monotonic() - start)


def _tasks(
    config: ConfigDict, system: System, knowledge: Knowledge, facts: Mapping[str, Any], mesh: Mesh
) -> dict[str, runner.Task]:
    wanted, can = config.evaluation, set(system.predict)
    tasks: dict[str, runner.Task] = {}
    if can & {"fill", "match"}:
        vocabulary = Vocabulary.load(facts["vocabulary_path"])
        shared = dict(vocabulary=vocabulary, knowledge=knowledge, pictures=wanted.pictures)
    if "fill" in can:
        tasks["words"] = MaskedLanguage(system, facts["visual_ids"], **shared)
    if "match" in can:
        tasks["pairs"] = Matching(system, visual_ids=facts["visual_ids"], **shared)
    if {"encode_text", "encode_image", "fuse", "match"} <= can:
        size = PAIRS_A_ROW * wanted.batch_size
        search = dict(gallery=wanted.gallery, captions=wanted.captions, batch_size=size)
        tasks["gallery"] = Retrieval(system, mesh, knowledge, **search)
    if "boxes" in can:
        tasks["boxes"] = Detection(system, recorded(knowledge.sources, facts["categories"]))
    return tasks
