# SPDX-License-Identifier: Apache-2.0
"""The short evaluation while training, of a detector on prepared scenes: same scores on any number of devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from configs import detr
from vlp_jax import systems
from vlp_jax.data import facts as data_facts
from vlp_jax.data import pipeline, source, spec
from vlp_jax.evaluation import quick
from vlp_jax.evaluation.detection import SCORES
from vlp_jax.parallel import mesh as meshes
from vlp_jax.parallel import shard


@pytest.mark.slow
def test_boxes_on_one_device_and_on_eight(scenes_dir):
    config = detr.get_config("variant=tiny,smoke")
    config.data.update(dir=str(scenes_dir), image_limit=64)
    config.evaluation.update(train_examples=12, batch_size=8)
    config.model.width, config.model.decoder.depth, config.model.encoder.depth = 32, 1, 1
    config.model.grid_embed.update(depths=(1,), widths=(16,), stem_width=8)
    facts = data_facts.collect(config)
    config = systems.get("detr").resolve(config, facts)
    system, scores = systems.get("detr").build(config), []
    inputs = {key: np.zeros(one.shape, one.dtype) for key, one in spec.spec(config, 8).items()}
    drawn = shard.selected(lambda: system.init(jax.random.key(0), inputs)[0], dict)
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = meshes.make_mesh(config.parallel, devices)
        examples = functools.partial(pipeline.evaluation_batches, config)
        opened = functools.partial(source.open_sources, config.data.dir)
        evaluate = quick.evaluator(config, system, facts, mesh, examples, opened)
        with shard.context(mesh, "dp"):
            params = jax.device_put(drawn, shard.replicated(mesh))
            scores.append(evaluate(params))
            assert evaluate(params) == scores[-1]  # nothing is left of the pass before
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    # Scenes have small objects only, and nobody asks for blind twins while training.
    names = {name for name in SCORES if not name.endswith(("medium", "large"))} | {"padding"}
    assert scores[0].keys() == {f"detection/{name}" for name in names}
    assert scores[0]["detection/padding"] == 0.0 and scores[0]["detection/ar_100"] < 1.0
