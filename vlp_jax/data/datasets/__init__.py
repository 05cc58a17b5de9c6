# SPDX-License-Identifier: Apache-2.0
"""One file a data set, found by module name: its public raw format -> records.

A data set module has NAME, LICENCE, VERSION, VISUAL_WORDS, SOURCE (what to download), OPTIONS (name -> default) and
HELP (name -> meaning), `features, splits, sources, count, texts, examples`, and, where it makes its own raw files,
`check, draw`. `coco` is the model to copy.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pkgutil
from types import ModuleType

from vlp_jax.types import UserError, closest

LONGEST_SIDE = 65535  # pixels: sizes are kept as uint16 in the index


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An example that cannot be used; it goes into the manifest instead of a record."""

    file: str
    reason: str


def names() -> list[str]:
    """The data sets there are; a helper file beside them has no `examples`."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    return sorted(module.NAME for module in modules if hasattr(module, "examples"))


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


def picture_size(content: bytes) -> tuple[int, int]:
    """Decodes a picture once and returns its (height, width).

    Raises:
        ValueError: why the bytes are no usable picture; the type goes by the content, never by the file's name.
    """
    from PIL import Image

    if not content:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            kind, mode, (width, height) = picture.format, picture.mode, picture.size
            picture.load()
    except Exception as error:  # the decoders raise all kinds of errors on broken bytes
        raise ValueError(f"does not decode ({error}); begins with {content[:8]!r}") from error
    if kind not in ("JPEG", "MPO", "PNG"):  # MPO: a JPEG with a second picture behind it
        raise ValueError(f"is {kind}, not JPEG or PNG")
    if mode.startswith("I"):
        raise ValueError("has 16 bits a channel, not 8")
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"has a side of {max(height, width)} pixels, more than {LONGEST_SIDE}")
    return height, width
