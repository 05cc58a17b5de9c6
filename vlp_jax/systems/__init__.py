# SPDX-License-Identifier: Apache-2.0
"""One file a system: `resolve(config, facts)` and `build(config) -> System`, found by module name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.systems.base import System
from vlp_jax.types import UserError, closest


def names() -> list[str]:
    """Returns the systems that there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def get(name: str) -> ModuleType:
    """Imports a system's module.

    Raises:
        UserError: no such system; lists them and names the closest.
    """
    if name not in names():
        raise UserError(
            f"unknown system {name!r}.{closest(name, names())} Systems: {', '.join(names())}. Set config.system."
        )
    return importlib.import_module(f"{__name__}.{name}")


def build(config: ConfigDict, facts: Mapping[str, Any]) -> System:
    """Resolves a config with the facts of its data and builds its system."""
    module = get(config.system)
    return module.build(module.resolve(config, facts))
