# SPDX-License-Identifier: Apache-2.0
"""One file a data set, found by module name: its public raw format -> records.

A data set module has NAME, VERSION, LICENCE, SOURCE (what to download), VISUAL_WORDS, OPTIONS (name -> default), HELP
(name -> meaning), FIELDS (optional ones of data/record.py), UPRIGHT (turn pictures as their EXIF says) and
    check(source, **options)            raises UserError for what can be seen quickly
    sources(source, **options)          the annotation files
    listing(source, each, **options)    (split, entry or Dropped), always in the same order; `each` maps over processes
and, if need be, texts (for a vocabulary) and draw (makes the raw files). `flickr30k` is the model to copy. An entry is
what json holds: image (path from source), image_name, image_key, coco_id, flickr_id and fields of data/record.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType

from vlp_jax.types import UserError, closest


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An example that cannot be used; it goes into dropped.jsonl instead of a record.

    Attributes:
        file: as the source names it.
        reason: why not.
        missing: the file of a web set was never downloaded. It counts for the share of the source that is alive,
            not for --max_bad.
    """

    file: str
    reason: str
    missing: bool = False


def names() -> list[str]:
    """The data sets there are; a helper file beside them has no `listing`."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    return sorted(module.NAME for module in modules if hasattr(module, "listing"))


def get(name: str) -> ModuleType:
    """Returns the module of a data set.

    Raises:
        UserError: there is none of this name.
    """
    possible = names()
    if name not in possible:
        raise UserError(
            f"There is no data set '{name}'.{closest(name, possible)} Possible: {', '.join(possible)}. "
            "Choose one of these."
        )
    return importlib.import_module(f"{__name__}.{name}")
