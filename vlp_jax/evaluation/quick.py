# SPDX-License-Identifier: Apache-2.0
"""The short evaluation while training: masked words and matching on a few validation examples, no twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.evaluation import runner
from vlp_jax.evaluation.masked_language import MaskedLanguage
from vlp_jax.evaluation.matching import Matching
from vlp_jax.parallel.mesh import check_batch_size
from vlp_jax.systems.base import System
from vlp_jax.types import Params


def evaluator(
    config: ConfigDict,
    system: System,
    visual_ids: tuple[int, ...],
    mesh: Mesh,
    batches: Callable[..., Iterator[Mapping[str, np.ndarray]]],
) -> Callable[[Params], dict[str, float]]:
    """Returns params -> scores by name; what it compiles is compiled once.

    Args:
        config: of the run; `config.evaluation` says which split and how many examples.
        system: with `fill` and `match` among its predict functions; a task without its function is left out.
        visual_ids: word pieces that are visual words.
        mesh: the devices.
        batches: (split=, batch_size=, examples=) -> this host's rows of one pass.

    Raises:
        UserError: the evaluation batch does not divide over the mesh, or the split cannot be opened.
    """
    wanted = config.evaluation
    check_batch_size("config.evaluation.batch_size", wanted.batch_size, mesh)
    tasks: list[runner.Task] = []
    if "fill" in system.predict:
        tasks.append(MaskedLanguage(system, visual_ids, blind=False))
    if "match" in system.predict:
        tasks.append(Matching(system, blind=False))

    def examples() -> Iterator[Mapping[str, np.ndarray]]:
        return batches(split=wanted.train_split, batch_size=wanted.batch_size, examples=wanted.train_examples)

    examples()  # a split that is missing is told now, not when the last step is taken and not yet saved
    return lambda params: runner.evaluate(system, params, examples(), tasks, mesh)
