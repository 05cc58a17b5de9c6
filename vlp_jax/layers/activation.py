# SPDX-License-Identifier: Apache-2.0
"""Activations, exact to the compute type."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlp_jax.types import Array


def gelu(x: Array) -> Array:
    """The erf form of GELU, evaluated in float32 and cast once: no bfloat16 product in between."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
