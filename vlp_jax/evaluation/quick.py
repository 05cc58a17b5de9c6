# SPDX-License-Identifier: Apache-2.0
"""The short evaluation while training: words, matching, boxes on a few validation examples, no twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.evaluation import detection, runner
from vlp_jax.evaluation.masked_language import MaskedLanguage
from vlp_jax.evaluation.matching import Matching
from vlp_jax.parallel.mesh import check_batch_size
from vlp_jax.systems.base import System
from vlp_jax.types import Params


def evaluator(
    config: ConfigDict,
    system: System,
    facts: Mapping[str, Any],
    mesh: Mesh,
    batches: Callable[..., Iterator[Mapping[str, np.ndarray]]],
    opened: Callable[[str], Sequence[tuple[str, detection.Records, float]]],
) -> Callable[[Params], dict[str, float]]:
    """Returns params -> scores by name; what it compiles is compiled once.

    Args:
        config: of the run; `config.evaluation` says which split and how many examples.
        system: with `fill`, `match` or `boxes` among its predict functions; a task without its function is left out.
        facts: of the data, with `visual_ids` and, for boxes, `categories`.
        mesh: the devices.
        batches: (split=, batch_size=, examples=) -> this host's rows of one pass.
        opened: split -> name, records and weight of each source: boxes before any resizing.

    Raises:
        UserError: the evaluation batch does not divide over the mesh, the split cannot be opened or has no boxes.
    """
    wanted = config.evaluation
    check_batch_size("config.evaluation.batch_size", wanted.batch_size, mesh)
    tasks: list[runner.Task] = []
    if "fill" in system.predict:
        tasks.append(MaskedLanguage(system, facts["visual_ids"], blind=False))
    if "match" in system.predict:
        tasks.append(Matching(system, blind=False))
    if "boxes" in system.predict:
        records = [source for _, source, _ in opened(wanted.train_split)]
        truth = detection.recorded(records, facts["categories"])
        tasks.append(detection.Detection(system, truth, blind=False))

    def examples() -> Iterator[Mapping[str, np.ndarray]]:
        return batches(split=wanted.train_split, batch_size=wanted.batch_size, examples=wanted.train_examples)

    examples()  # a split that is missing is told now, not when the last step is taken and not yet saved
    return lambda params: runner.evaluate(system, params, examples(), tasks, mesh)
