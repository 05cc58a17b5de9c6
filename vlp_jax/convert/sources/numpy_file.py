# SPDX-License-Identifier: Apache-2.0
"""Numpy's `.npz`: a zip of `.npy` arrays, stored or deflated. Pickled objects are skipped, never read.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

import numpy as np

from vlp_jax.convert.sources import Tensor, archive, disk
from vlp_jax.convert.sources.disk import DTYPES

HEADER_LIMIT = 10_000  # bytes, as numpy has it
# The header is Python text in the one form that numpy writes; nothing of it is evaluated. "L" is Python 2's.
HEADER = re.compile(
    r"\{\s*'descr':\s*(?P<type>'[^']*'|\[.*\]|\(.*\)),\s*'fortran_order':\s*(?P<fortran>True|False),"
    r"\s*'shape':\s*\((?P<shape>[0-9L,\s]*)\),?\s*\}\s*",
    re.DOTALL,
)
# By numpy's codes. V2 is how numpy writes bfloat16 (the released AugReg files have it so); V1 could be any float8.
TYPES = {dtype.str[1:]: dtype for dtype in DTYPES.values() if dtype.kind != "V"}
TYPES["V2"] = DTYPES["bfloat16"]
NO_WEIGHTS = {
    "O": "pickled objects, never read",
    "U": "text",
    "S": "text",
    "M": "dates",
    "m": "times",
    "[": "a record of several types",
    "(": "a record of several types",
    "V": "bytes of an unknown type",
}


class NumpyFile:
    """A reader of one `.npz` file; see `Source`.

    Raises:
        UserError: the zip or an array's header is damaged or misleading.
    """

    container = "npz"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self.tensors: dict[str, Tensor] = {}
        self.skipped: dict[str, str] = {}
        self._fortran: set[str] = set()
        self._file = disk.open_regular(path)
        try:
            self._entries = archive.read_entries(path, self._file)
            for entry in sorted(self._entries):
                self._describe(entry)
            self.tensors = dict(sorted(self.tensors.items()))  # "a.b.npy" sorts before "a.npy"
        except BaseException:
            self.close()
            raise

    def _describe(self, entry: str) -> None:
        """Notes what the array of an entry is, or why it is skipped."""
        if not entry.endswith(".npy"):
            self.skipped[entry] = "not an array"
            return
        name = disk.checked_name(self.path, entry.removesuffix(".npy"))
        stream = archive.EntryStream(self.path, self._file, self._entries[entry])
        found = self._header(name, stream)
        kind = found["type"].strip("'").lstrip("<>|=")[:1] or "V"
        dtype = TYPES.get(found["type"].strip("'").lstrip("<>|="))
        if dtype is None:
            reason = NO_WEIGHTS.get(kind)
            if reason is None:
                raise disk.damaged(self.path, f"{disk.short(name)} is of type {disk.short(found['type'])}")
            self.skipped[name] = reason
            return
        lengths = found["shape"].replace("L", " ").split(",")
        numbers = [length.strip() for length in lengths if length.strip()]
        if not all(number.isdecimal() and len(number) < 20 for number in numbers):
            raise disk.damaged(self.path, f"{disk.short(name)} has the shape ({disk.short(found['shape'])})")
        tensor = disk.checked_shape(self.path, name, [int(number) for number in numbers], dtype)
        if tensor.nbytes != stream.left:
            raise disk.damaged(
                self.path,
                f"{disk.short(name)} has shape {tensor.shape} and type {dtype}, which is {tensor.nbytes} bytes, and "
                f"its entry claims {stream.left}",
            )
        self.tensors[name] = tensor
        if found["fortran"] == "True" and len(tensor.shape) > 1:
            self._fortran.add(name)

    def _header(self, name: str, stream: archive.EntryStream) -> re.Match[str]:
        """The header of an array; the stream is then at the array's first byte."""
        start = stream.read(8)
        width = {1: 2, 2: 4, 3: 4}.get(start[6])
        if start[:6] != b"\x93NUMPY" or width is None:
            raise disk.damaged(self.path, f"{disk.short(name)} is no numpy array of a known version")
        length = int.from_bytes(stream.read(width), "little")
        if length > HEADER_LIMIT:
            raise disk.damaged(self.path, f"the header of {disk.short(name)} claims {length} bytes")
        header = stream.read(length)
        found = HEADER.fullmatch(header.decode("utf-8", "replace"))
        if found is None:
            raise disk.damaged(self.path, f"the header of {disk.short(name)} is {disk.short(header)}")
        return found

    def read(self, name: str) -> np.ndarray:
        """One tensor: stored bytes go straight into its array, deflated ones piece by piece."""
        tensor = self.tensors[name]
        stream = archive.EntryStream(self.path, self._file, self._entries[f"{name}.npy"])
        found = self._header(name, stream)
        layout = Tensor(tensor.shape[::-1], tensor.dtype) if name in self._fortran else tensor
        array = disk.empty(self.path, name, layout)
        stream.fill(disk.octets(array))
        stream.finish()
        if found["type"][1:2] == ">":
            array.byteswap(inplace=True)
        disk.checked_bool(self.path, name, array)
        return np.ascontiguousarray(array.T) if name in self._fortran else array

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
