# SPDX-License-Identifier: Apache-2.0
"""The words that all packages share: arrays, batches, terms of a loss, and the user's errors.

Axis vocabulary of the jaxtyping annotations: batch, text (word pieces), patch, image (class token and patches), token,
query, key, head, width, class, mask (slots of masked pieces).
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Key = jax.Array  # a typed PRNG key, `jax.random.key(seed)`
Batch = Mapping[str, Any]  # key -> array, see vlp_jax/data/spec.py
Params = Mapping[str, Any]  # nested plain dicts of arrays
Extra = Mapping[str, Any]  # what is neither parameter nor optimizer state (queues, "ema"); {} for most


# Why a box of a record is no target; the columns of the batch's `boxes_left_out`. "crowd": a group as COCO marks it.
# "empty": nothing of it lies in the picture. "unknown": its name is none of the classes. "cropped": it lay outside of a
# random crop. "too_many": there were more than slots.
BOXES_LEFT_OUT = ("crowd", "empty", "unknown", "cropped", "too_many")

# What the user can mend: no room, no permission, a bad disk, a path that is something else.
ENVIRONMENT = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
        *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    }
)


class UserError(Exception):
    """The user's input or environment is at fault: mains print the message alone and exit with 2.

    The message has three parts: what was wrong, what was given beside what is possible, what to do.
    """


class Stop(Exception):
    """Work ends before its end, in good order: mains print the message and exit with `code`.

    75 preempted and saved, start me again; 77 hung; 130 Ctrl-C after saving (DESIGN.md, exit codes).
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException) -> int:
    """What a main exits with when this exception ends it: 2 the user's input or environment, 1 ours."""
    if isinstance(error, Stop):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    theirs = isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in ENVIRONMENT)
    return 2 if theirs else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One part of a loss or one metric as `sum / count`, both float32 over the global batch."""

    sum: Array
    count: Array

    def mean(self) -> Array:
        """The value, 0 where nothing was counted."""
        return self.sum / jax.numpy.maximum(self.count, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOut:
    """What `System.loss` returns: terms by the names in `config.objectives`, metrics, the new extra."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, Term]
    extra: Extra


def closest(name: str, possible: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for a misspelt name, or an empty string."""
    match = difflib.get_close_matches(name, list(possible), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
