# SPDX-License-Identifier: Apache-2.0
"""Small ViLTs for tests of conversion: random parameters, and files of them in the original's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tests.examples import vilt_config
from vlp_jax.convert import importing, writing
from vlp_jax.convert.sources import Tensor, safetensors_file
from vlp_jax.convert.tables import vilt

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35)))
ODD = dict(model__width=48, model__fusion__num_heads=3, model__fusion__depth=3, model__fusion__mlp_width=52)


def config_of(**changes: object) -> ConfigDict:
    """A resolved config of sizes that no released model has; heads as mlm and itm unless changed."""
    return vilt_config(**{**ODD, "data__image_size": 24, "data__patch_size": 8, **changes})


def parameters(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters by path, far from their initial values."""
    draw = np.random.default_rng(seed)
    return {
        path: draw.normal(float(path.endswith("scale")), 0.2, shape).astype(np.float32)
        for path, shape in sorted(importing.shapes(config).items())
    }


def tensors(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters in the names of the original ViLT."""
    shapes = {path: array.shape for path, array in params.items()}
    rows = writing.written_names(vilt.ORIGINAL, shapes)
    return {name: writing.written(row, layer, params) for name, row, layer in rows}


def original(
    path: Path, config: ConfigDict, seed: int = 0, **changes: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Writes a file in the original's names and the number of heads beside it; returns our parameters.

    `changes` replace tensors by name, or remove them where None.
    """
    params = parameters(config, seed)
    content = {**tensors(params), **changes}
    safetensors_file.write(path, {name: array for name, array in content.items() if array is not None})
    heads = config.model.fusion.num_heads
    (path.parent / "config.json").write_text(f'{{"num_attention_heads": {heads}, "hidden_act": "gelu"}}')
    return params


def vocabulary(path: Path) -> Path:
    """Writes a vocabulary of forty pieces."""
    path.write_text("\n".join(PIECES) + "\n")
    return path


class Memory:
    """A source in memory; with `sealed`, one of which nothing may be read."""

    container, files, skipped = "memory", (), {}

    def __init__(self, tensors: Mapping[str, np.ndarray], name: str = "memory", sealed: bool = False) -> None:
        self.path, self._arrays, self._sealed = Path("nowhere") / name, dict(tensors), sealed
        self.tensors = {name: Tensor(x.shape, x.dtype) for name, x in sorted(self._arrays.items())}

    def read(self, name: str) -> np.ndarray:
        assert not self._sealed, f"{name} was read before everything was checked"
        return self._arrays[name].copy()

    def close(self) -> None:
        self._arrays = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
