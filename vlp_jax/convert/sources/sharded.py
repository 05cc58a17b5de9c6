# SPDX-License-Identifier: Apache-2.0
"""Weights split over several files, with an index `{"weight_map": {tensor: file}}` beside them, as transformers saves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from vlp_jax.convert.sources import Source, Tensor, disk
from vlp_jax.convert.sources.safetensors_file import HEADER_LIMIT, parse_json
from vlp_jax.types import UserError

SHARDS = (
    500  # held open at once; a process may have 1,024 files open, and the largest released models have 200
)


class ShardedFiles:
    """A reader of an index and its shards, of any container; see `Source`.

    Args:
        path: the `*.index.json`; its shards lie in the same folder.
        open_shard: opens one of them.

    Raises:
        UserError: index or shard is damaged, a shard is missing or outside the folder, or both sides disagree.
    """

    def __init__(self, path: Path, open_shard: Callable[[Path], Source]) -> None:
        self.path = path
        self.skipped: dict[str, str] = {}
        shard_of = _weight_map(path)
        self.files = _existing(path, sorted(set(shard_of.values())))
        with contextlib.ExitStack() as stack:
            shards = {file.name: stack.enter_context(open_shard(file)) for file in self.files}
            self.container = next(iter(shards.values())).container
            self.tensors = self._merge(shard_of, shards)
            self._shards = {name: shards[shard_of[name]] for name in self.tensors}
            self._stack = stack.pop_all()

    def _merge(self, shard_of: Mapping[str, str], shards: Mapping[str, Source]) -> dict[str, Tensor]:
        """All tensors, each from the shard that the index gives it; a second copy elsewhere is refused."""
        for file, shard in shards.items():
            self.skipped |= {f"{name} ({file})": reason for name, reason in shard.skipped.items()}
            for name in shard.tensors:
                owner = shard_of.get(name)
                if owner is None:
                    self.skipped[f"{name} ({file})"] = "not in the index"
                elif owner != file:
                    raise disk.damaged(
                        self.path, f"{disk.short(name)} belongs to {disk.short(owner)} and lies in {file} too"
                    )
        missing = sorted(name for name, file in shard_of.items() if name not in shards[file].tensors)
        if missing:
            listed = ", ".join(f"{disk.short(name)} in {shard_of[name]}" for name in missing[:5])
            raise disk.damaged(
                self.path, f"{len(missing)} tensors of the index are not in their shards: {listed}"
            )
        return {name: shards[shard_of[name]].tensors[name] for name in sorted(shard_of)}

    def read(self, name: str) -> np.ndarray:
        """One tensor, from its shard."""
        return self._shards[name].read(name)

    def close(self) -> None:
        """Closes all shards."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of its shard; a shard's name is a plain file name, never a path."""
    with disk.open_regular(index) as file:
        size = disk.size_of(file)
        if size > HEADER_LIMIT:
            raise disk.damaged(index, f"an index of {size} bytes is longer than any")
        content = parse_json(index, disk.piece(index, file, 0, size), "the index")
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(
            f'{index} is no index of shards: it has no "weight_map". Name the weight file itself '
            "(*.safetensors, *.bin, *.npz, ...) or the index that came with the shards."
        )
    for name, shard in found.items():
        disk.checked_name(index, name)
        plain = (
            isinstance(shard, str) and shard.isprintable() and shard == Path(shard).name and "\\" not in shard
        )
        if not plain or shard in ("", ".", ".."):
            raise disk.damaged(
                index, f"{disk.short(name)} is said to be in {disk.short(shard)}, no file name of its folder"
            )
    return found


def _existing(index: Path, shards: list[str]) -> tuple[Path, ...]:
    if len(shards) > SHARDS:
        raise disk.damaged(index, f"{len(shards)} shards are more than the {SHARDS} that can be read at once")
    files = tuple(index.with_name(shard) for shard in shards)
    missing = [file.name for file in files if not os.path.exists(file)]
    if missing:
        raise UserError(
            f"{index} names {len(files)} shards and {len(missing)} of them are not beside it: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download all files of the model."
        )
    return files
