# SPDX-License-Identifier: Apache-2.0
"""Presets: which logical axis lies on which axis of the mesh."""

from __future__ import annotations

from vlp_jax.types import UserError, closest

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes along which a batch is cut, in every preset

# An axis that is not named is not cut. Parameters: embed heads mlp vocab; activations: batch act_*.
PRESETS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "dp": {"batch": BATCH},
    "fsdp": {"batch": BATCH, "embed": "fsdp"},
    "fsdp_tp": {
        "batch": BATCH,
        "embed": "fsdp",
        "heads": "tensor",
        "mlp": "tensor",
        "act_mlp": "tensor",
        "vocab": "tensor",
        "act_vocab": "tensor",
    },
}

MESHES = {
    "dp": (-1, 1, 1),
    "fsdp": (1, -1, 1),
    "fsdp_tp": (1, -1, 2),
}  # used where config.parallel.mesh is ()

_AXES = (
    "batch",
    "token",
    "embed",
    "heads",
    "mlp",
    "vocab",
    "norm",
    "layers",
    "act_embed",
    "act_mlp",
    "act_vocab",
)


def rules(preset: str) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """Returns the preset as pairs (logical axis, mesh axis or None) for every axis of the vocabulary.

    Raises:
        UserError: unknown preset, with the list and the closest.
    """
    if preset not in PRESETS:
        raise UserError(
            f"unknown config.parallel.rules {preset!r}.{closest(preset, PRESETS)} Possible: {', '.join(PRESETS)}."
        )
    return tuple((axis, PRESETS[preset].get(axis)) for axis in _AXES)
