# SPDX-License-Identifier: Apache-2.0
"""Regular files only, read by exact pieces, each tensor straight into its own array.

What a file claims (names, shapes, sizes) is checked against its true size here, before anything is allocated.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from vlp_jax.convert.sources import Tensor
from vlp_jax.types import UserError, closest

NAME_LENGTH = 1000  # characters; the longest released names have about 150
RANK = 32  # numpy allows 64, older ones 32; weights have at most 6
PIECE = 1 << 20
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
# All types that a tensor may have, by numpy's name.
DTYPES = {
    name: np.dtype(getattr(jnp, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool_"),
    )
}
DTYPES["bool"] = DTYPES.pop("bool_")


def short(text: object) -> str:
    """A claim of the file for a message: quoted, control characters escaped, at most 80 characters of it."""
    shown = ascii(text if len(text) <= 80 else text[:80]) if isinstance(text, str | bytes) else ascii(text)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that contradicts itself or its format."""
    return UserError(
        f"{path} cannot be read: {what}. The file is damaged or was made to mislead: compare its size and sha256 with "
        "those at its source and download it again."
    )


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading; a pipe, socket or device is refused without a wait.

    Raises:
        UserError: it is missing, a dangling link, not a regular file, empty or not permitted.
    """
    try:
        mode = path.stat().st_mode
        for test, kind in KINDS.items():
            if test(mode):
                raise UserError(
                    f"{path} is {kind}. Weights are read from regular files: name the file itself."
                )
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=1 << 16)
    except FileNotFoundError as error:
        raise UserError(_missing(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be opened: {reason}. Check the path and its permissions.") from error
    status = os.fstat(file.fileno())  # the path may have become something else meanwhile
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return file
    file.close()
    raise UserError(f"{path} is empty (0 bytes). A download may have failed: get the file again.")


def _missing(path: Path) -> str:
    if path.is_symlink():
        return (
            f"{path} is a link to {os.readlink(path)}, which does not exist. Name the file itself, or get it."
        )
    folder = path.parent
    if not folder.is_dir():
        return f"There is no {path}: its folder {folder} does not exist. Check the path."
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "nothing"
    return f"There is no {path}. {folder} holds: {listed}.{closest(path.name, names)} Check the path."


def size_of(file: BinaryIO) -> int:
    """The file's true size in bytes."""
    return os.fstat(file.fileno()).st_size


def fill(path: Path, file: BinaryIO, view: memoryview) -> None:
    """Reads from the file's position until `view` (of bytes) is full.

    Raises:
        UserError: the file ends before, or the disk fails.
    """
    try:
        while view:
            count = file.readinto(view)
            if not count:
                raise damaged(path, f"it ends {len(view)} bytes too early")
            view = view[count:]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the disk.") from error


def piece(path: Path, file: BinaryIO, offset: int, count: int) -> bytes:
    """Returns `count` bytes from `offset`; the claim is checked before they are allocated.

    Raises:
        UserError: the file does not hold them, or the disk fails.
    """
    if offset < 0 or count < 0 or offset + count > size_of(file):
        raise damaged(path, f"bytes {offset} to {offset + count} are needed and it has {size_of(file)}")
    content = bytearray(count)
    file.seek(offset)
    fill(path, file, memoryview(content))
    return bytes(content)


def empty(path: Path, name: str, tensor: Tensor) -> np.ndarray:
    """A new array for a tensor whose size has been checked; its pages are taken only when it is filled.

    Raises:
        UserError: this machine has not got the memory.
    """
    try:
        return np.empty(tensor.shape, tensor.dtype)
    except (MemoryError, ValueError) as error:
        raise UserError(
            f"{path}: {short(name)} needs {tensor.nbytes / 1e9:.1f} GB of memory, more than there is. "
            "Convert on a machine with more memory."
        ) from error


def octets(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array of any type, as a view."""
    return memoryview(array.reshape(-1).view(np.uint8))


def read_array(path: Path, file: BinaryIO, offset: int, name: str, tensor: Tensor) -> np.ndarray:
    """Reads a little-endian C-ordered tensor that lies at `offset` into its own array.

    Raises:
        UserError: the file does not hold it.
    """
    if offset < 0 or offset + tensor.nbytes > size_of(file):
        raise damaged(
            path, f"{short(name)} needs {tensor.nbytes} bytes at {offset}, and it has {size_of(file)}"
        )
    array = empty(path, name, tensor)
    file.seek(offset)
    fill(path, file, octets(array))
    return checked_bool(path, name, array)


def checked_bool(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array; a bool that is neither 0 nor 1 is refused, because numpy's answers on it are undefined."""
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise damaged(path, f"{short(name)} is of type bool and holds a byte above 1")
    return array


def checked_shape(path: Path, name: str, shape: object, dtype: np.dtype) -> Tensor:
    """The tensor for a claimed shape, once every length is a whole number and numpy can hold the product.

    Raises:
        UserError: it is not, or not a sequence.
    """
    lengths = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str | bytes) else None
    if lengths is None or len(lengths) > RANK or not all(type(length) is int for length in lengths):
        raise damaged(path, f"{short(name)} has the shape {short(shape)}")
    # Numpy refuses (0, 2**62) as well: the product without the zeros must fit.
    if (
        min(lengths, default=0) < 0
        or math.prod(length or 1 for length in lengths) * dtype.itemsize >= 1 << 62
    ):
        raise damaged(path, f"{short(name)} has the shape {short(lengths)}")
    return Tensor(lengths, dtype)


def checked_name(path: Path, name: object) -> str:
    """The name, once it is text that can be printed and is not absurdly long.

    Raises:
        UserError: it is not.
    """
    if not isinstance(name, str) or len(name) > NAME_LENGTH or not name.isprintable():
        raise damaged(path, f"a tensor is called {short(name)}")
    return name
