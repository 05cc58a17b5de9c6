# SPDX-License-Identifier: Apache-2.0
"""What modules return on the way, by their path: for comparing with another implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlp_jax.types import Array


def outputs(run: Callable[[], Any], paths: Sequence[str]) -> tuple[Any, dict[str, list[Array]]]:
    """Runs `run()` and returns its result and what the modules at `paths` returned, call by call.

    A path is "fusion/stack/layers"; the layers of a scanned stack come one by one. Whatever `run` calls must not be
    compiled yet: a program that is compiled already calls no module any more.
    """
    found: dict[str, list[Array]] = {path: [] for path in paths}

    def keep(function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result = function(*args, **kwargs)
        path = "/".join(context.module.path)
        # A layer of a scan returns (carry, None) besides: the same array under the same path a second time.
        if path in found and context.method_name == "__call__" and isinstance(result, jax.Array):
            jax.debug.callback(lambda x: found[path].append(np.asarray(x)), result, ordered=True)
        return result

    with nn.intercept_methods(keep):
        result = jax.block_until_ready(run())
    jax.effects_barrier()
    return result, found
