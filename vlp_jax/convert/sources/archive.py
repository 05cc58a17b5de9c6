# SPDX-License-Identifier: Apache-2.0
"""The entries of a zip file, each checked against the file's true size before a byte of it is read.

`zipfile` accepts entries that overlap or are named twice, and makes an object per entry before anyone can count them.
Layout: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 to 4.5.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from vlp_jax.convert.sources import disk

STORED, DEFLATED = 0, 8
DIRECTORY_LIMIT = 25_000_000  # bytes of the list of entries, some 200,000 of them
RATIO = 1032  # deflate cannot pack better than this (258 bytes in 2 bits)
UNKNOWN = 0xFFFFFFFF  # "the true number is 64 bits wide and stands elsewhere"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file inside the zip: where its bytes lie and how many they claim to become."""

    name: str
    method: int
    checksum: int
    packed: int
    size: int
    offset: int


def read_entries(path: Path, file: BinaryIO) -> dict[str, Entry]:
    """The entries by name.

    Raises:
        UserError: not a zip file, truncated, encrypted, of several disks, or with entries that overlap, are named
            twice, leave the folder, or claim impossible sizes.
    """
    start, length, count = _directory(path, file)
    if length > DIRECTORY_LIMIT:
        raise disk.damaged(path, f"its list of entries has {length} bytes, more than is ever needed")
    content = disk.piece(path, file, start, length)
    entries: dict[str, Entry] = {}
    position = 0
    try:
        while position < length:
            entry, position = _entry(path, content, position)
            if entry.name in entries:
                raise disk.damaged(path, f"it has two entries called {disk.short(entry.name)}")
            entries[entry.name] = entry
    except (struct.error, UnicodeDecodeError) as error:
        raise disk.damaged(path, "its list of entries is broken") from error
    if len(entries) != count:
        raise disk.damaged(path, f"it announces {count} entries and lists {len(entries)}")
    return _located(path, file, entries, start)


def _directory(path: Path, file: BinaryIO) -> tuple[int, int, int]:
    """Where the list of entries begins, its length, and the number of entries."""
    size = disk.size_of(file)
    tail = disk.piece(
        path, file, max(0, size - 65557), min(size, 65557)
    )  # a comment has at most 65,535 bytes
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 > len(tail):
        raise disk.damaged(
            path, "it begins like a zip file and has no end of one; the download may have stopped early"
        )
    *disks, count, length, start, _ = struct.unpack("<4H2LH", tail[at + 4 : at + 22])
    end = size - len(tail) + at
    if UNKNOWN in (length, start) or 0xFFFF in (count, *disks):
        locator = disk.piece(path, file, end - 20, 20)
        end = int.from_bytes(locator[8:16], "little")
        record = disk.piece(path, file, end, 56)
        if locator[:4] != b"PK\6\7" or record[:4] != b"PK\6\6":
            raise disk.damaged(path, "the 64-bit end of its list of entries is broken")
        count, length, start = struct.unpack("<3Q", record[32:56])
    elif any(disks[:2]):
        raise disk.damaged(path, "it is one of several parts of a split zip file")
    if start + length > end:
        raise disk.damaged(path, f"its list of entries claims bytes {start} to {start + length} of {end}")
    return start, length, count


def _entry(path: Path, content: bytes, position: int) -> tuple[Entry, int]:
    """The entry of the list at `position` (its `offset` still that of its local header), and the next position."""
    signature, flags, method, checksum, packed, size, *lengths, offset = struct.unpack_from(
        "<4s4x2H4x3L3H8xL", content, position
    )
    if signature != b"PK\1\2":
        raise disk.damaged(path, "its list of entries is broken")
    names, extras, comments = lengths
    after = position + 46 + names
    name = content[position + 46 : after].decode("utf-8" if flags & 0x800 else "cp437")
    wide = _wide(content[after : after + extras])
    size = next(wide) if size == UNKNOWN else size
    packed = next(wide) if packed == UNKNOWN else packed
    offset = next(wide) if offset == UNKNOWN else offset
    if size is None or packed is None or offset is None or after + extras + comments > len(content):
        raise disk.damaged(path, f"the entry {disk.short(name)} is broken")
    if flags & 0x2041:
        raise disk.damaged(path, f"the entry {disk.short(name)} is encrypted")
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.isprintable():
        raise disk.damaged(path, f"an entry is called {disk.short(name)}, which leaves the folder")
    if method == STORED and size != packed or method == DEFLATED and size > RATIO * packed:
        raise disk.damaged(path, f"the entry {disk.short(name)} claims {size} bytes and holds {packed}")
    return Entry(name, method, checksum, packed, size, offset), after + extras + comments


def _wide(extra: bytes):
    """Yields the 64-bit numbers of an extra field, then None for ever."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            yield from (int.from_bytes(field[at : at + 8], "little") for at in range(0, len(field) - 7, 8))
            break
        position += 4 + length
    yield from itertools.repeat(None)


def _located(path: Path, file: BinaryIO, entries: dict[str, Entry], start: int) -> dict[str, Entry]:
    """The entries with the offsets of their bytes, which neither overlap nor reach into the list of entries."""
    located: dict[str, Entry] = {}
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < position:
            raise disk.damaged(path, f"the entry {disk.short(entry.name)} overlaps the one before it")
        header = disk.piece(path, file, entry.offset, 30)
        flags, method = struct.unpack_from("<2H", header, 6)
        names, extras = struct.unpack_from("<2H", header, 26)
        begin = entry.offset + 30 + names + extras
        position = begin + entry.packed
        name = disk.piece(path, file, entry.offset + 30, names)
        if header[:4] != b"PK\3\4" or method != entry.method or flags & 0x2041 or position > start:
            raise disk.damaged(path, f"the entry {disk.short(entry.name)} is broken")
        if name.decode("utf-8" if flags & 0x800 else "cp437", "replace") != entry.name:
            raise disk.damaged(
                path, f"the entry {disk.short(entry.name)} is called {disk.short(name)} at its place"
            )
        located[entry.name] = dataclasses.replace(entry, offset=begin)
    return located


class EntryStream:
    """The bytes of one entry from its start, at most as many as it claims; stored ones go straight to the target."""

    def __init__(self, path: Path, file: BinaryIO, entry: Entry) -> None:
        if entry.method not in (STORED, DEFLATED):
            raise disk.damaged(
                path, f"the entry {disk.short(entry.name)} is packed by method {entry.method}, not deflate"
            )
        self._path, self._file, self._entry = path, file, entry
        self._position, self._left = entry.offset, entry.size
        self._checksum = 0
        self._inflater = zlib.decompressobj(-15) if entry.method == DEFLATED else None

    def fill(self, view: memoryview) -> None:
        """Fills `view` with the next bytes.

        Raises:
            UserError: the entry has fewer, or is damaged.
        """
        if len(view) > self._left:
            raise disk.damaged(
                self._path,
                f"the entry {disk.short(self._entry.name)} has {len(view) - self._left} bytes too few",
            )
        self._left -= len(view)
        if self._inflater is None:
            self._file.seek(self._position)
            disk.fill(self._path, self._file, view)
            self._position += len(view)
        else:
            self._inflate(view)
        self._checksum = zlib.crc32(view, self._checksum)

    def _inflate(self, view: memoryview) -> None:
        end = self._entry.offset + self._entry.packed
        while view:
            packed = self._inflater.unconsumed_tail
            if not packed:
                packed = disk.piece(
                    self._path, self._file, self._position, min(disk.PIECE, end - self._position)
                )
                self._position += len(packed)
            try:
                content = self._inflater.decompress(packed, min(len(view), disk.PIECE))
            except zlib.error as error:
                raise disk.damaged(
                    self._path, f"the entry {disk.short(self._entry.name)} does not unpack"
                ) from error
            if not content and (not packed or self._inflater.eof):
                raise disk.damaged(
                    self._path, f"the entry {disk.short(self._entry.name)} unpacks to less than it claims"
                )
            view[: len(content)] = content
            view = view[len(content) :]

    def read(self, count: int) -> bytes:
        """Returns the next bytes; `count` is small and known."""
        content = bytearray(count)
        self.fill(memoryview(content))
        return bytes(content)

    @property
    def left(self) -> int:
        """How many bytes the entry claims to have still."""
        return self._left

    def finish(self) -> None:
        """Checks that all has been read and that the checksum holds.

        Raises:
            UserError: it does not.
        """
        if self._left or self._checksum != self._entry.checksum:
            raise disk.damaged(
                self._path, f"the checksum of the entry {disk.short(self._entry.name)} does not hold"
            )
