# SPDX-License-Identifier: Apache-2.0
"""Walks through JPEG, PNG, WebP and GIF files without decoding: type, size, orientation, and the parts that make up
one still picture.

Follows ITU-T T.81 annex B, the PNG specification (third edition), the WebP container specification (RFC 9649) and
GIF89a.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib

LONGEST_SIDE = 65535  # pixels: sizes are kept as uint16 in the index
MAX_PIXELS = 2**26  # 8192 x 8192: above all but a few cameras; 0.27 GB while PIL decodes
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten, each costs a pass over the picture
MAX_PARTS = 2**18  # segments, chunks or blocks of a file: some 0.5 s to walk through
_MARKER = re.compile(rb"\xff(?![\0\xff\xd0-\xd7])")  # what ends the entropy-coded data of a scan
_MARKER_OR_RESTART = re.compile(rb"\xff(?!\0)")  # 3 times as fast
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG's color type -> values a pixel
_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
_TOO_MANY = f"has more than {MAX_PARTS} parts"
_STARTS = (  # what else there may be under a picture's name
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x7fELF", "a program"),
    (b"\x1aE\xdf\xa3", "a video (Matroska)"),
)
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF"),
}


@dataclasses.dataclass(frozen=True)
class Still:
    """One picture of a file.

    Attributes:
        kind: JPEG, PNG, WebP or GIF.
        height, width: pixels, as the header says.
        content: a file of the same kind that holds this picture alone.
        orientation: EXIF's, 1 (upright) to 8.
        changed: "", or why the file cannot be stored as it is.
        replacement: what to store instead, b"" = the picture must be encoded anew.
        colors: entries of the palette.
    """

    kind: str
    height: int
    width: int
    content: bytes
    orientation: int = 1
    changed: str = ""
    replacement: bytes = b""
    colors: int = 256


def still(content: bytes) -> Still:
    """Finds the first picture of a file.

    Raises:
        ValueError: what the file is instead, or where it is broken.
    """
    if not content:
        raise ValueError("is empty")
    for start, name, walk in (
        (b"\xff\xd8\xff", "JPEG", _jpeg),
        (b"\x89PNG\r\n\x1a\n", "PNG", _png),
        (b"GIF8", "GIF", _gif),
        (b"RIFF", "WebP", _webp),
    ):
        if content.startswith(start) and (name != "WebP" or content[8:12] == b"WEBP"):
            try:
                found = walk(content)
            except (struct.error, IndexError) as error:  # a field lies behind the end
                raise ValueError(f"is a truncated {name}") from error
            _check_size(found.height, found.width)
            return found
    raise ValueError(f"is {_other(content)}, not JPEG, PNG, WebP or GIF")


def _check_size(height: int, width: int) -> None:
    if not height or not width:
        raise ValueError("has a side of 0 pixels")
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"has a side of {max(height, width)} pixels, more than {LONGEST_SIDE}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"has {height * width} pixels, more than {MAX_PIXELS}")


def _other(content: bytes) -> str:
    for start, name in _STARTS:
        if content.startswith(start):
            return name
    if content[4:8] == b"ftyp":
        return _BRANDS.get(content[8:12], "a video (MP4)")
    head = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "an SVG"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        return "an HTML page"
    if head.startswith(b"<?xml"):
        return "XML"
    if head.startswith((b"{", b"[")):
        return "JSON"
    if not head.strip(b"\0"):
        return "nothing but zeros" if head else "nothing but blanks"
    if len(head.decode("utf-8", "ignore").encode()) > len(head) - 4 and not re.search(
        rb"[\0-\x08\x0e-\x1a]", head
    ):
        return "text"  # the head's last letter may be cut
    return f"of an unknown type (begins with {content[:8].hex(' ')})"


def _jpeg(content: bytes) -> Still:
    """Leaves out applications' segments and comments before the first scan.

    Adobe's (APP14) and JFIF's (APP0) stay, they say which colors are meant.
    """
    kept, frame, exif, place = [content[:2]], b"", b"", 2
    for _ in range(MAX_PARTS):
        start, marker = _marker(content, place)
        if marker in (0xD8, 0xD9):
            raise ValueError("is a broken JPEG (no picture)")
        place = start + 2 + (marker != 0x01 and struct.unpack_from(">H", content, start + 2)[0])
        segment = content[start + 4 : place]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame:
                raise ValueError("is a broken JPEG (two frame headers)")
            frame = bytes([marker]) + segment
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        if marker == 0xDA:
            break
        if marker in (0xE0, 0xEE) or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            kept.append(content[start:place])
    else:
        raise ValueError(_TOO_MANY)
    if not frame:
        raise ValueError("is a broken JPEG (no frame header)")
    precision, height, width, components = struct.unpack_from(">BHHB", frame, 1)
    _check_size(height, width)
    if precision != 8:
        raise ValueError(f"is a JPEG of {precision} bits a channel, not 8")
    _check_scans(content, start, frame, min(MAX_SCANS, 16 * MAX_PIXELS // (height * width)))
    changed = "four colors to three" if components == 4 else ""
    if frame[0] not in (0xC0, 0xC1, 0xC2):
        changed = changed or "a rare kind of JPEG to a common one"
    clean = b"".join([*kept, memoryview(content)[start:]]) if sum(map(len, kept)) < start else content
    return Still("JPEG", height, width, clean, _orientation(exif), changed)


def _marker(content: bytes, place: int) -> tuple[int, int]:
    """Where the next marker begins, and which one it is."""
    found = _MARKER_OR_RESTART.search(content, place)
    if found and (content[found.end()] == 0xFF or 0xD0 <= content[found.end()] <= 0xD7):
        found = _MARKER.search(content, found.end())
    if found is None:
        raise ValueError("is a truncated JPEG")
    return found.start(), content[found.end()]


def _check_scans(content: bytes, place: int, frame: bytes, limit: int) -> None:
    """What follows from the first scan on must be whole.

    Every coefficient must come to full accuracy: libjpeg's versions differ in how they smooth over the rest. Segments
    behind the last scan are read by tensorflow, not by PIL.
    """
    components = frame[7 : 7 + 3 * frame[6] : 3]
    unknown = {component: [1] * 64 for component in components}  # bits that are missing
    scans, progressive = 0, frame[0] == 0xC2
    for _ in range(MAX_PARTS):
        start, marker = _marker(content, place)
        if marker == 0xD9:
            break
        place = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
        if marker == 0xDA:
            scans += 1
            count = content[start + 4]
            first, last, bits = content[start + 5 + 2 * count : start + 8 + 2 * count]
            if not progressive:
                first, last, bits = 0, 63, 0
            for component in content[start + 5 : start + 5 + 2 * count : 2]:
                if component in unknown and last < 64:
                    unknown[component][first : last + 1] = [bits & 15] * (last + 1 - first)
        elif marker < 0xE0 or 0xEF < marker < 0xFE:  # neither an application's nor a comment
            table = marker in (0xC4, 0xCC, 0xDB, 0xDD)
            if not (table and any(map(any, unknown.values()))):
                raise ValueError(f"is a broken JPEG (segment {marker:X} behind a scan)")
        if scans > limit:
            raise ValueError(f"has more than {limit} scans")
    else:
        raise ValueError(_TOO_MANY)
    if any(map(any, unknown.values())):
        raise ValueError("is a truncated JPEG (scans are missing)")


def _png(content: bytes) -> Still:
    """Keeps header, palette and data, each checked: PIL looks at few of the check sums, libpng stops at each."""
    kept, exif, data, palette, animated = [content[:8]], b"", [], b"", False
    place, last, header, parts = 8, b"", None, 0
    while last != b"IEND":
        parts += 1
        if parts > MAX_PARTS:
            raise ValueError(_TOO_MANY)
        length, name = struct.unpack_from(">I4s", content, place)
        start, end = place + 8, place + 12 + length
        if end > len(content):
            raise ValueError("is a truncated PNG")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            if zlib.crc32(memoryview(content)[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
                raise ValueError(f"is a broken PNG (check sum of {name.decode()})")
            again = {b"IHDR": header, b"PLTE": palette or data, b"IDAT": data if last != name else None}.get(
                name
            )
            if again or (header is None and name != b"IHDR"):
                raise ValueError(f"is a broken PNG ({name.decode()} out of place)")
            kept.append(memoryview(content)[place:end])
        elif not name.isalpha() or name[:1].isupper():
            raise ValueError("is a broken PNG (a chunk of an unknown kind)")
        if name == b"IHDR":
            header = struct.unpack_from(">IIBBBBB", content, start)
        elif name == b"PLTE":
            palette = content[start : end - 4]
        elif name == b"IDAT":
            data.append(memoryview(content)[start : end - 4])
        elif name == b"eXIf":
            exif = content[start : end - 4]
        animated, place, last = animated or name == b"acTL", end, name
    width, height, depth, color, *methods = header
    if color not in _CHANNELS or depth not in (1, 2, 4, 8, 16) or max(methods[:2]) or methods[2] > 1:
        raise ValueError("is a broken PNG (header)")
    if color == 3 and (not palette or len(palette) % 3 or len(palette) > 768):
        raise ValueError("is a broken PNG (palette)")
    _check_size(height, width)
    _check_data(data, height, width, depth * _CHANNELS[color], bool(methods[2]))
    clean, orientation = b"".join(kept), _orientation(exif)
    if depth == 16:
        return Still("PNG", height, width, clean, orientation, "16 bits to 8")
    changed = "first frame of an animation" if animated else ""
    return Still(
        "PNG",
        height,
        width,
        clean,
        orientation,
        changed,
        clean if animated else b"",
        len(palette) // 3 or 256,
    )


def _check_data(data: list, height: int, width: int, bits: int, interlaced: bool) -> None:
    """The data must unpack to what the header says: PIL passes over missing rows and a wrong sum, libpng does not."""
    expected = 0
    for row, column, down, right in _PASSES if interlaced else [(0, 0, 1, 1)]:
        rows, columns = -(-(height - row) // down), -(-(width - column) // right)
        expected += rows * (1 + -(-columns * bits // 8)) if rows > 0 and columns > 0 else 0
    unpack, size = zlib.decompressobj(), 0
    try:
        for chunk in data:
            for start in range(0, len(chunk), 2**14):  # the unconsumed rest is copied each time
                piece = chunk[start : start + 2**14]
                while piece and not unpack.eof and size <= expected:
                    size += len(unpack.decompress(piece, 2**20))
                    piece = unpack.unconsumed_tail
    except zlib.error as error:
        raise ValueError("is a broken PNG (data)") from error
    if size < expected or not unpack.eof and size == expected:
        raise ValueError("is a truncated PNG")
    if size > expected:
        raise ValueError("is a broken PNG (more data than its header says)")


def _webp(content: bytes) -> Still:
    """Keeps the first picture, without its alpha: tensorflow wants as many channels as the file says."""
    end = 8 + struct.unpack_from("<I", content, 4)[0]
    first = content[12:16]
    chunks: dict[bytes, bytes] = {}
    for name, chunk in _chunks(content, 12, end):
        chunks.setdefault(name, chunk)
    orientation, canvas = _orientation(chunks.get(b"EXIF", b"")), ()
    extended = chunks[first] if first == b"VP8X" else b""
    if first == b"VP8X" and len(extended) != 10 or b"VP8 " in chunks and b"VP8L" in chunks:
        raise ValueError("is a broken WebP (header)")
    if extended:
        canvas = tuple(int.from_bytes(extended[at : at + 3], "little") + 1 for at in (4, 7))
        if extended[0] & 2:
            parts = [(name, chunks[name]) for name in (b"VP8X", b"ANIM", b"ANMF") if name in chunks]
            if len(parts) < 3:
                raise ValueError("is a broken WebP (an animation without frames)")
            return Still(
                "WebP", canvas[1], canvas[0], _riff(parts), orientation, "first frame of an animation"
            )
    name = b"VP8 " if b"VP8 " in chunks else b"VP8L"
    if name not in chunks or first not in (name, b"VP8X"):
        raise ValueError("is a broken WebP (no picture)")
    clean = _riff([(name, chunks[name])])
    if name == b"VP8L":  # libwebp's versions differ in the last pixel where the data ends early
        (sides,) = struct.unpack_from("<I", chunks[name], 1)
        size = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        found = Still("WebP", size[1], size[0], clean, orientation, "lossless WebP to PNG")
    else:
        size = tuple(side & 0x3FFF for side in struct.unpack_from("<HH", chunks[name], 6))
        alpha = b"ALPH" in chunks or (extended and extended[0] & 16)
        changed = ("alpha removed", clean) if alpha else ("", b"")
        found = Still("WebP", size[1], size[0], clean, orientation, *changed)
    if canvas and canvas != size:
        raise ValueError("is a broken WebP (picture and canvas differ in size)")
    return found


def _chunks(content: bytes, place: int, end: int):
    if end > len(content):
        raise ValueError("is a truncated WebP")
    for _ in range(MAX_PARTS):
        if place + 8 > end:
            return
        name, length = struct.unpack_from("<4sI", content, place)
        if place + 8 + length > end:
            raise ValueError("is a truncated WebP")
        yield name, content[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    raise ValueError(_TOO_MANY)


def _riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(chunk)) + chunk + b"\0" * (len(chunk) % 2) for name, chunk in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(content: bytes) -> Still:
    """Keeps the first frame and how it is drawn; it is always encoded anew, because tensorflow reads all frames.

    What stands behind the first frame is not looked at.
    """
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = 13 + _table(flags)
    head, control = content[:place], b""
    for _ in range(MAX_PARTS):
        if content[place] != 0x21:
            break
        end = _blocks(content, place + 2)
        if content[place + 1] == 0xF9:
            control = content[place:end]
        place = end
    if content[place] != 0x2C:
        raise ValueError("is a broken GIF (no frame)")
    left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", content, place + 1)
    _check_size(frame_height, frame_width)
    end = _blocks(content, place + 10 + _table(flags) + 1)
    clean = head + control + content[place:end] + b";"
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    return Still("GIF", height, width, clean, changed="first frame of a GIF to PNG")


def _table(flags: int) -> int:
    """Bytes of a GIF's color table."""
    return 6 << (flags & 7) if flags & 0x80 else 0


def _blocks(content: bytes, place: int) -> int:
    """Where a GIF's sub-blocks end."""
    for _ in range(MAX_PARTS):
        if not content[place]:
            return place + 1
        place += content[place] + 1
    raise ValueError(_TOO_MANY)


def _orientation(exif: bytes) -> int:
    """EXIF's tag 0x112 of the first directory, 1 where there is none or no such.

    PIL's reader warns on standard error about broken ones and costs more than the rest of the header.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for row in range(count):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * row)
            if tag == 0x112:
                return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
