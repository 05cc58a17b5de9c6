# SPDX-License-Identifier: Apache-2.0
"""One file a task of `predict`, named as the function of the system that it calls; found by module name.

A task has `check(images, threshold, picture, overwrite)`, called before anything is loaded, and `run(config, system,
params, assets, wanted)`, which takes what `check` has returned and gives one result an input.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from vlp_jax.systems.base import System
from vlp_jax.types import UserError, closest


def names() -> list[str]:
    """Returns the tasks that there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "pictures")


def get(name: str) -> ModuleType:
    """Imports a task's module.

    Raises:
        UserError: no such task; lists them and names the closest.
    """
    if name not in names():
        raise UserError(
            f"--task={name} is unknown.{closest(name, names())} Possible: {', '.join(names())}. Give one of these."
        )
    return importlib.import_module(f"{__name__}.{name}")


def require(task: str, system: System, name: str) -> None:
    """Checks that a system can do a task.

    Args:
        task: one of `names()`.
        system: of the checkpoint.
        name: its name, for the message.

    Raises:
        UserError: it cannot; says what it can.
    """
    if task not in system.predict:
        raise UserError(
            f"--task={task} is not for this checkpoint: its system {name} has no function {task}, but "
            f"{', '.join(sorted(system.predict))}. Give a checkpoint of a system that has it."
        )
