# SPDX-License-Identifier: Apache-2.0
"""Readers of weight files, one module a container, and `open_source`, which picks one by the file's content.

No reader executes anything from a file, writes, or allocates by a size that the file merely claims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What is known of a tensor before its bytes are read; bfloat16 and the like are types of `ml_dtypes`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that its array takes, in Python's unbounded integers."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class Source(Protocol):
    """One set of weights as it lies on disk; names are the file's own, unwrapped from "state_dict" or "model"."""

    path: Path  # as given; of a folder the file that was taken
    container: str  # "safetensors", "torch zip", "torch legacy", "npz", "msgpack", "TensorFlow checkpoint"
    files: tuple[Path, ...]  # all files that hold tensors
    tensors: Mapping[str, Tensor]  # sorted by name, known without reading a tensor's bytes
    skipped: Mapping[str, str]  # what else was in the file -> why it is not read

    def read(self, name: str) -> np.ndarray:
        """Returns a fresh C-contiguous array in the file's type.

        Raises:
            UserError: the file is truncated or damaged.
            KeyError: `name` is not in `tensors`.
        """
        ...

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_source(path: Path) -> Source:
    """Opens a weight file, a folder of them, or the prefix of a TensorFlow checkpoint, by content, not by suffix.

    Raises:
        UserError: there is no such file, it cannot be read, is no weight file, or is damaged or hostile.
    """
    from vlp_jax.convert.sources import recognition  # the readers import the words above

    return recognition.open_by_content(path)
