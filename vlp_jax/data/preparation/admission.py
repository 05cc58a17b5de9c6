# SPDX-License-Identifier: Apache-2.0
"""Which picture files may enter a data set: read from disk, typed by content, decoded once, kept or encoded anew.

Sizes are checked in the header before anything is decoded, and the decoder gets the parts of the file that make up
one still picture, without texts, profiles and further frames (the container's walk is in `containers`). What is
stored decodes in the training graph (`image.decode`) to exactly the pixels that PIL gives.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import stat
from pathlib import Path

from vlp_jax.data.preparation import containers

MAX_BYTES = 2**26  # a worker holds a few copies

_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # the machine's state says nothing about a file
_REASONS = {
    errno.ENOENT: "not found",
    errno.ENOTDIR: "not found",
    errno.ELOOP: "is a loop of symbolic links",
    errno.EACCES: "may not be read (no permission)",
    errno.EPERM: "may not be read (no permission)",
    errno.ENAMETOOLONG: "has a name that is too long",
}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is stored.

    Attributes:
        content: the file's bytes, untouched unless `changed` says otherwise.
        height, width: pixels.
        pixels: uint64, the first bytes of the sha256 of the picture as a PPM file, which is its shape and RGB
            values: twins have the same whatever their format.
        changed: "" or what was done, e.g. "turned upright".
    """

    content: bytes
    height: int
    width: int
    pixels: int
    changed: str


def read(path: Path) -> bytes:
    """Reads a regular file of at most MAX_BYTES; never waits for one that is none.

    Raises:
        ValueError: why not.
        OSError: the machine has no more handles or memory.
    """
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeError:
        possible = False
    if not possible:
        raise ValueError("has a name that no file can have")
    try:
        _check_regular(os.stat(path))  # first: opening a device may have effects
        # The file may have become a pipe since: opening one that nobody writes to would wait.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            before = os.fstat(handle)
            _check_regular(before)
            content = bytearray()
            while len(content) <= before.st_size and (piece := file.read(before.st_size + 1 - len(content))):
                content += piece
            after = os.fstat(handle)
    except OSError as error:
        if error.errno in _OURS:
            raise
        raise ValueError(_REASONS.get(error.errno) or f"cannot be read ({error.strerror})") from error
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if not same or len(content) != before.st_size:
        raise ValueError("changes while it is read")
    return bytes(content)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"has {status.st_size} bytes, more than {MAX_BYTES}")


def admit(content: bytes, *, upright: bool = False) -> Picture:
    """Decodes a picture once and says how it is stored.

    JPEG, PNG, WebP and GIF are taken, of animations the first frame. A picture that must be encoded anew becomes
    PNG; a JPEG stays JPEG, of quality 95 without subsampling: it is as large as the photograph was and 1.4 levels
    of 255 away on average, while PNG is 2.8 times as large and takes 2.2 times as long to decode in every epoch
    (32 photographs of COCO, turned).

    Args:
        content: a file, see `read`.
        upright: turn the picture as its EXIF orientation says.

    Raises:
        ValueError: why the bytes are no usable picture.
    """
    still = containers.still(content)
    picture, changed = _decoded(still), still.changed
    if upright and still.orientation != 1:
        picture, changed = _turned(picture, still.orientation), "turned upright"
    if changed == still.changed and still.replacement:
        content = still.replacement
    elif changed:
        content, picture = _encoded(picture, still.kind)
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    digest = _Digest()
    rgb.save(digest, "PPM")
    key = int.from_bytes(digest.sha256.digest()[:8], "little")
    return Picture(content, rgb.height, rgb.width, key, changed)


def _decoded(still: containers.Still):
    """A PIL picture of the modes 1, L, LA, P, RGB, RGBA or CMYK, of 8 bits.

    The plugin is called by itself: `Image.open` would warn about sizes on standard error and try other formats.
    """
    from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    plugins = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
    }
    try:
        picture = plugins[still.kind](io.BytesIO(still.content))
        if picture.size != (still.width, still.height):
            raise ValueError(f"its size is {picture.size}")
        picture.decodermaxblock = len(still.content)  # pieces of 64 kB cost 2 %
        picture.load()
        if picture.mode.startswith("I"):  # PIL would cut the values at 255
            import numpy as np

            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        missing = picture.mode == "P" and picture.getextrema()[1] >= still.colors
    except MemoryError:
        raise
    except Exception as error:  # the plugins raise all kinds of errors on broken bytes
        raise ValueError(f"is a broken {still.kind} ({str(error)[:100] or type(error).__name__})") from error
    if missing:
        raise ValueError(f"is a broken {still.kind} (uses colors that its palette lacks)")
    return picture


class _Digest:
    """A file that keeps nothing: less copying than `tobytes`, which costs a fifth of a decode."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.write = self.sha256.update

    def flush(self) -> None:
        """Called by PIL."""


def _turned(picture, orientation: int):
    from PIL.Image import Transpose

    ways = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    return picture.transpose(ways[orientation - 2])


def _encoded(picture, kind: str):
    """Returns bytes and the picture that they decode to."""
    from PIL import JpegImagePlugin

    plain = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    plain.info.clear()
    file = io.BytesIO()
    if kind != "JPEG":
        plain.save(file, "PNG")
        return file.getvalue(), plain
    plain.save(file, "JPEG", quality=95, subsampling=0)
    again = JpegImagePlugin.JpegImageFile(io.BytesIO(file.getvalue()))
    again.load()
    return file.getvalue(), again
