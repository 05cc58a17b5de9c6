# SPDX-License-Identifier: Apache-2.0
"""The least and the most that the numbers of a config may be, looked at before a run touches its folder.

What depends on the mesh, the data or two keys at once is checked where it is used.
"""

from __future__ import annotations

import fnmatch
import math
import sys

from ml_collections import ConfigDict

from vlp_jax.training.paths import flatten
from vlp_jax.types import UserError, closest

MOST = sys.float_info.max  # all that is finite
BELOW_ONE = math.nextafter(1.0, 0.0)
DTYPES = ("float32", "bfloat16")  # of activations; float16 would need its losses scaled
# Pattern of the dotted key -> least and most; what ends in .* stands for each key below. The first match counts.
LIMITS = {
    "train.steps": (1, MOST),
    "train.batch_size": (1, MOST),
    "train.accumulation": (1, MOST),
    "train.log_every": (1, MOST),
    "train.*": (0, MOST),
    "data.text_length": (3, MOST),  # [CLS], a piece, [SEP]
    "data.image_size": (1, MOST),
    "data.max_boxes": (1, MOST),
    "data.patch_size": (1, MOST),
    "*.mask_rate": (math.nextafter(0.0, 1.0), BELOW_ONE),
    "data.*": (0, MOST),
    "optimizer.b[12]": (0, BELOW_ONE),
    "optimizer.*": (0, MOST),
    "ema.decay": (0, BELOW_ONE),
    "checkpoint.keep": (1, MOST),
    "checkpoint.*": (0, MOST),
    "evaluation.batch_size": (1, MOST),
    "evaluation.max_patches": (-1, MOST),  # -1: as in training
    "evaluation.*": (0, MOST),
    "model.*.eps": (0, 1),
    "model.heads.classes": (-1, MOST),  # -1: as the data has it
    "model.heads.*": (0, MOST),  # classes; 0 = no such head
    "model.*_embed.*": (-1, MOST),  # -1: as the data has it
    "model.modalities": (2, MOST),
    "model.*dropout": (0, BELOW_ONE),
    "model.*": (1, MOST),
    "objectives.*": (0, MOST),
}


def check(config: ConfigDict) -> None:
    """Checks what a training run reads.

    Raises:
        UserError: as `check_numbers`; or no objective has a coefficient.
    """
    check_numbers(config)
    if not any(config.objectives.values()):
        names = ", ".join(f"config.objectives.{name}" for name in config.objectives)
        raise UserError(
            f"All objectives are 0: nothing would be learned. Set one or more of {names} above 0."
        )


def check_numbers(config: ConfigDict) -> None:
    """Compares every number with its limits, the number type with the possible ones.

    Raises:
        UserError: names the key, what it is and what it may be.
    """
    for key, value in flatten(config.to_dict(), "."):
        limits = next((LIMITS[name] for name in LIMITS if fnmatch.fnmatchcase(key, name)), None)
        if limits is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = limits
        if not least <= value <= most:  # "not a number" neither
            raise UserError(f"config.{key} is {value}. Possible: {_words(least, most)}. Change it.")
    if config.model.dtype not in DTYPES:
        hint = closest(config.model.dtype, DTYPES)
        raise UserError(
            f"config.model.dtype is '{config.model.dtype}'.{hint} Possible: {', '.join(DTYPES)}. Take one of them."
        )


def _words(least: float, most: float) -> str:
    low = "above 0" if 0 < least < 1 else f"{least:g} or more"
    return low if most == MOST else f"{low} and below 1"
