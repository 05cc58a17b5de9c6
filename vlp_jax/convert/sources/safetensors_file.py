# SPDX-License-Identifier: Apache-2.0
"""Safetensors: eight bytes of length, a JSON header, then the tensors without a gap. Read and written here.

Format: https://huggingface.co/docs/safetensors (the rules of "Format" and what the reference library refuses).
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from vlp_jax.convert.sources import Tensor, disk
from vlp_jax.convert.sources.disk import DTYPES
from vlp_jax.files import written

# The format allows 100 MB. This is room for 200,000 tensors, and JSON takes twenty times its size in memory.
HEADER_LIMIT = 25_000_000
TYPES = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E4M3FNUZ": DTYPES["float8_e4m3fnuz"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "F8_E5M2FNUZ": DTYPES["float8_e5m2fnuz"],
    "F8_E8M0": DTYPES["float8_e8m0fnu"],
    "C64": DTYPES["complex64"],
    **{f"I{bits}": DTYPES[f"int{bits}"] for bits in (8, 16, 32, 64)},
    **{f"U{bits}": DTYPES[f"uint{bits}"] for bits in (8, 16, 32, 64)},
    "BOOL": DTYPES["bool"],
}
CODES = {dtype: code for code, dtype in TYPES.items()}
TRANSFORMERS = types.MappingProxyType({"format": "pt"})  # transformers 4 refuses a file without it


class SafetensorsFile:
    """A reader of one `.safetensors` file; see `Source`.

    Raises:
        UserError: the header is damaged, too long, or does not describe exactly the bytes that follow it.
    """

    container = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self._file = disk.open_regular(path)
        try:
            self._offsets, self.tensors, self.skipped = self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> tuple[dict[str, int], dict[str, Tensor], dict[str, str]]:
        """Where each tensor begins, what it is, and what else the header has."""
        length = int.from_bytes(disk.piece(self.path, self._file, 0, 8), "little")
        if length > HEADER_LIMIT:
            raise disk.damaged(
                self.path, f"its header claims {length} bytes, more than {HEADER_LIMIT} are never needed"
            )
        header = parse_json(self.path, disk.piece(self.path, self._file, 8, length), "its header")
        if not isinstance(header, dict):
            raise disk.damaged(self.path, "its header is not a JSON object")
        header.pop("__metadata__", None)  # notes of who wrote it
        skipped: dict[str, str] = {}
        spans, tensors = {}, {}
        for name in sorted(header):
            tensors[name], spans[name] = _entry(self.path, name, header[name])
        _without_gaps(self.path, spans, disk.size_of(self._file) - 8 - length)
        return {name: 8 + length + begin for name, (begin, _) in spans.items()}, tensors, skipped

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from the disk straight into its own array."""
        return disk.read_array(self.path, self._file, self._offsets[name], name, self.tensors[name])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def parse_json(path: Path, content: bytes, what: str) -> Any:
    """Parses JSON from a file that is not trusted: no key twice in an object, no endless nesting.

    Raises:
        UserError: it is not JSON, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise disk.damaged(path, f"{what} has the key {disk.short(twice)} twice")
        return found

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of 5,000 digits
        raise disk.damaged(path, f"{what} is not JSON ({disk.short(str(error))})") from error


def _entry(path: Path, name: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    """The tensor that an entry of the header claims, and its bytes [begin, end) after the header."""
    disk.checked_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise disk.damaged(path, f"its header describes {disk.short(name)} by {disk.short(entry)}")
    dtype = TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise disk.damaged(
            path, f"{disk.short(name)} is of type {disk.short(entry['dtype'])}; known are {', '.join(TYPES)}"
        )
    tensor = disk.checked_shape(path, name, entry["shape"], dtype)
    span = entry["data_offsets"]
    whole = isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)
    if not whole or not 0 <= span[0] <= span[1]:
        raise disk.damaged(path, f"{disk.short(name)} lies at {disk.short(span)}")
    if span[1] - span[0] != tensor.nbytes:
        raise disk.damaged(
            path,
            f"{disk.short(name)} has shape {tensor.shape} and type {dtype}, which is {tensor.nbytes} bytes, and "
            f"{span[1] - span[0]} are set aside for it",
        )
    return tensor, (span[0], span[1])


def _without_gaps(path: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Checks that the tensors fill the bytes after the header: no hole, no overlap, nothing missing or left."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "has a hole before it"
            raise disk.damaged(path, f"{disk.short(name)} {kind} (it begins at {begin}, not at {position})")
        position = end
    if position != size:
        raise disk.damaged(path, f"its tensors take {position} bytes and {size} follow the header")


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = TRANSFORMERS) -> None:
    """Writes a `.safetensors` file tensor by tensor, by rename: there is a whole file or none.

    Wide types come first, so that each tensor is aligned, then names. `tensors` may make its arrays when asked:
    each is asked for twice, once for its shape and once for its bytes, and only one is held at a time.

    Args:
        path: the file; its folder must exist.
        tensors: name -> array of any of `TYPES`, any layout and byte order.
        metadata: notes in the header, text only.

    Raises:
        ValueError: the type of a tensor has no place in the format, or the name is "__metadata__".
        OSError: the disk is full, or the folder cannot be written.
    """
    known = {name: _storable(name, tensors[name]) for name in tensors}
    names = sorted(known, key=lambda name: (-known[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        end = position + known[name].nbytes
        code, shape = CODES[known[name].dtype], list(known[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        _write_arrays(file, names, tensors, known)


def _storable(name: str, array: np.ndarray) -> Tensor:
    dtype = array.dtype.newbyteorder("=")
    if dtype not in CODES or name == "__metadata__":
        raise ValueError(f"{name} of type {array.dtype} has no place in a safetensors file")
    return Tensor(array.shape, dtype)


def _write_arrays(
    file: BinaryIO, names: Iterable[str], tensors: Mapping[str, np.ndarray], known: Mapping[str, Tensor]
) -> None:
    for name in names:
        array = tensors[name]
        if _storable(name, array) != known[name]:
            raise ValueError(f"{name} was {known[name]} and became {array.shape} {array.dtype}")
        # In the host's order, which is the format's (little-endian) on every machine that JAX supports.
        file.write(disk.octets(np.ascontiguousarray(array, known[name].dtype)))
