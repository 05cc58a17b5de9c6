# SPDX-License-Identifier: Apache-2.0
"""Picture files: small good ones of every kind, and a folder of bad ones, each with the reason it must be refused for.

PNG files are put together by hand, because PIL writes neither interlaced nor broken ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

TRUNCATED, BROKEN, OTHER, LARGE = (
    r"truncated",
    r"broken|truncated",
    r"not JPEG, PNG, WebP or GIF",
    r"more than",
)
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def photograph(width: int = 45, height: int = 31) -> Image.Image:
    """Smooth colors with some noise, so that codecs have something to lose."""
    draw = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + k) + np.cos(columns / (4 + k)) for k in range(3)]
    pixels = np.stack(waves, -1) * 55 + 128 + draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: np.ndarray, depth: int, color: int, *, palette=b"", extra=b"", interlaced=False) -> bytes:
    """A PNG without filters.

    Args:
        values: unsigned [height, width, channels], as many bits as `depth` says.
        color: PNG's color type.
        extra: chunks between header and data.
    """
    height, width, _ = values.shape
    data = b""
    for row, column, down, right in PASSES if interlaced else [(0, 0, 1, 1)]:
        part = values[row::down, column::right]
        if not part.size:
            continue
        for line in part.reshape(len(part), -1):
            bits = (line[:, None] >> np.arange(depth)[::-1] & 1).astype(np.uint8)
            data += b"\0" + np.packbits(bits).tobytes()
    return assemble(height, width, depth, color, zlib.compress(data), palette, extra, interlaced)


def assemble(height, width, depth, color, data: bytes, palette=b"", extra=b"", interlaced=False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    parts = chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"") + extra
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def digest(pixels: np.ndarray) -> int:
    """What `admission` must say of these pixels: the start of the sha256 of their PPM file."""
    height, width, _ = pixels.shape
    file = b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
    return int.from_bytes(hashlib.sha256(file).digest()[:8], "little")


def good() -> dict[str, bytes]:
    """A small file of each kind that is taken."""
    picture = photograph()
    clear = picture.copy()
    clear.putalpha(picture.convert("L"))
    return {
        "baseline.jpg": encode(picture, "JPEG"),
        "progressive.jpg": encode(picture, "JPEG", progressive=True),
        "restarts.jpg": encode(picture, "JPEG", restart_marker_blocks=2),
        "grey.jpg": encode(picture.convert("L"), "JPEG"),
        "colors.png": encode(picture, "PNG"),
        "palette.png": encode(picture.quantize(9), "PNG"),
        "lossy.webp": encode(picture, "WEBP"),
        "lossless.webp": encode(picture, "WEBP", lossless=True),
        "alpha.webp": encode(clear, "WEBP"),
        "palette.gif": encode(picture, "GIF"),
    }


def bad_contents() -> Iterator[tuple[str, bytes, str]]:
    """Yields name, bytes, and a pattern that the reason must match."""
    for name, content in good().items():
        stem, ending = name.split(".")
        for part in (0.06, 0.2, 0.4, 0.6, 0.8, 0.95):
            # A GIF that has lost no more than its end mark has its first frame.
            yield f"{stem} cut at {part}.{ending}", content[: int(part * len(content))], BROKEN
    yield from _bad_png()
    yield from _bad_jpeg()
    yield from _bad_others()
    yield from _other_types()
    draw = random.Random(3)
    for number in range(8):
        noise = draw.randbytes(200 + 400 * number)
        yield f"noise {number}.jpg", noise, OTHER
        start = (b"\xff\xd8\xff\xe0\0\x10", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8 ")[
            number % 4
        ]
        yield f"noise behind a start {number}", start + noise, f"{BROKEN}|{LARGE}|0 pixels|bits a channel"


def _bad_png() -> Iterator[tuple[str, bytes, str]]:
    content, indexed = good()["colors.png"], good()["palette.png"]
    draw = random.Random(1)
    data = content.index(b"IDAT")
    for place in (17, 19, 21, 24, 28, 30, *(draw.randrange(data + 4, len(content) - 16) for _ in range(6))):
        yield (
            f"flipped at {place}.png",
            content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :],
            BROKEN,
        )
    values = np.zeros((6, 5, 3), np.uint8)
    packed = zlib.compress(bytes(6 * 16))
    yield "taller than its data.png", assemble(7, 5, 8, 2, packed), TRUNCATED
    yield "wider than its data.png", assemble(6, 6, 8, 2, packed), TRUNCATED
    yield "more data.png", assemble(5, 5, 8, 2, packed), BROKEN
    yield "wrong sum.png", assemble(6, 5, 8, 2, packed[:-1] + b"!"), BROKEN
    yield "no sum.png", assemble(6, 5, 8, 2, packed[:-4]), BROKEN
    yield "no zlib.png", assemble(6, 5, 8, 2, b"not packed at all"), BROKEN
    yield "filter 9.png", assemble(6, 5, 8, 2, zlib.compress(bytes([9] + [0] * 15) * 6)), BROKEN
    yield "no height.png", assemble(0, 5, 8, 2, packed), "0 pixels"
    yield "no width.png", assemble(6, 0, 8, 2, packed), "0 pixels"
    yield "too long.png", assemble(1, 65536, 8, 2, packed), LARGE
    yield "bomb.png", assemble(50_000, 50_000, 8, 2, zlib.compress(bytes(2**20))), LARGE
    yield "lying.png", assemble(2**31, 2**31 + 5, 8, 2, packed), LARGE
    yield "color type 5.png", assemble(6, 5, 8, 5, packed), BROKEN
    yield "depth 3.png", assemble(6, 5, 3, 0, packed), BROKEN
    yield "16 bits palette.png", png(values[..., :1], 16, 3, palette=bytes(6)), BROKEN
    yield "interlace 2.png", assemble(6, 5, 8, 2, packed, interlaced=2), BROKEN
    yield "no palette.png", png(values[..., :1], 8, 3), BROKEN
    yield "odd palette.png", png(values[..., :1], 8, 3, palette=bytes(7)), BROKEN
    yield "outside the palette.png", png(values[..., :1] + 2, 8, 3, palette=bytes(6)), "palette lacks"
    whole = png(values, 8, 2)
    yield "two headers.png", whole[:33] + whole[8:], BROKEN
    yield "header last.png", whole[:8] + whole[33:] + whole[8:33], BROKEN
    yield "no data.png", whole[:33] + chunk(b"IEND", b""), BROKEN
    yield "no end.png", whole[:-12], TRUNCATED
    yield "unknown part.png", png(values, 8, 2, extra=chunk(b"ABCD", b"")), BROKEN
    yield "no letters.png", png(values, 8, 2, extra=chunk(b"\0\1\2\3", b"")), BROKEN
    half = len(packed) // 2
    between = chunk(b"IDAT", packed[:half]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", packed[half:])
    yield "divided data.png", whole[:33] + between + chunk(b"IEND", b""), BROKEN
    place = indexed.index(b"PLTE") - 4
    yield "palette gone.png", indexed[:place] + indexed[indexed.index(b"IDAT") - 4 :], BROKEN


def _bad_jpeg() -> Iterator[tuple[str, bytes, str]]:
    content, progressive = good()["baseline.jpg"], good()["progressive.jpg"]
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")

    def changed(place: int, new: bytes) -> bytes:
        return content[:place] + new + content[place + len(new) :]

    yield "no end.jpg", content[:-2], TRUNCATED
    yield "start and end.jpg", b"\xff\xd8\xff\xd9", BROKEN
    yield "two starts.jpg", content[:2] + content, BROKEN
    yield "no frame.jpg", content[:frame] + content[frame + 19 :], BROKEN
    yield "two frames.jpg", content[: frame + 19] + content[frame:], BROKEN
    yield "no scan.jpg", content[:scan] + b"\xff\xd9", BROKEN
    yield "no height.jpg", changed(frame + 5, b"\0\0"), "0 pixels"
    yield "no width.jpg", changed(frame + 7, b"\0\0"), "0 pixels"
    yield "huge.jpg", changed(frame + 5, b"\xff\xff\xff\xff"), LARGE
    yield "12 bits.jpg", changed(frame + 4, b"\x0c"), "12 bits a channel"
    yield "lossless.jpg", changed(frame + 1, b"\xc3"), BROKEN
    yield "hierarchical.jpg", changed(frame + 1, b"\xc5"), BROKEN
    yield "2 colors.jpg", changed(frame + 9, b"\2"), BROKEN
    yield "reserved segment.jpg", content[:2] + b"\xff\xf6\0\4ab" + content[2:], BROKEN
    yield "segment behind the scan.jpg", content[:-2] + b"\xff\xc4\0\4ab\xff\xd9", BROKEN
    yield "stray length.jpg", content[: scan + 60] + b"\xff\xef\xff\xff" + content[scan + 64 :], TRUNCATED
    yield "no tables.jpg", content[:20] + content[frame : frame + 19] + content[scan:], BROKEN
    last = progressive.rindex(b"\xff\xda")
    yield "scans missing.jpg", progressive[:last] + b"\xff\xd9", "scans are missing"
    yield "endless.jpg", progressive[:-2] + 500 * progressive[last:-2] + b"\xff\xd9", "scans"
    yield "long segment.jpg", content[:2] + b"\xff\xe1\xff\xffExif\0\0" + content[2:], TRUNCATED


def _bad_others() -> Iterator[tuple[str, bytes, str]]:
    gif, webp, alpha = (good()[name] for name in ("palette.gif", "lossy.webp", "alpha.webp"))
    screen = struct.pack("<HH", 65535, 65535)
    yield "giant screen.gif", gif[:6] + screen + gif[10:], LARGE
    place = gif.index(b",", 13 + 768)
    yield "giant frame.gif", gif[: place + 5] + screen + gif[place + 9 :], LARGE
    yield "frame of nothing.gif", gif[: place + 5] + bytes(4) + gif[place + 9 :], "0 pixels"
    yield "no frame.gif", gif[:place] + b";", BROKEN
    yield "no blocks.gif", gif[: place + 11], TRUNCATED
    yield "code of 15 bits.gif", gif[: place + 10] + b"\x0f" + gif[place + 11 :], BROKEN
    yield "moving.webp", webp[:12] + b"VP8X\x0a\0\0\0\2\0\0\0\x09\0\0\x09\0\0", BROKEN
    body = b"WEBPVP8X\x0a\0\0\0\2\0\0\0\x09\0\0\x09\0\0"
    yield "no frames.webp", b"RIFF" + struct.pack("<I", len(body)) + body, BROKEN
    canvas = alpha.index(b"VP8X") + 12
    yield "other canvas.webp", alpha[:canvas] + b"\1" + alpha[canvas + 1 :], BROKEN
    moving = alpha[: canvas - 4] + b"\2\0\0\0" + b"\xff" * 6 + alpha[canvas + 6 :]
    yield "giant canvas.webp", moving.replace(b"ALPH", b"ANIM").replace(b"VP8 ", b"ANMF"), LARGE
    yield "junk first.webp", _riff(b"JUNK\2\0\0\0ab" + webp[12:]), BROKEN
    yield "empty header.webp", _riff(b"VP8X\0\0\0\0" + webp[12:]), BROKEN
    yield "two pictures.webp", _riff(alpha[12:] + b"VP8L\1\0\0\0/\0"), BROKEN
    yield "length lies.webp", webp[:4] + b"\xff\xff\0\0" + webp[8:], TRUNCATED
    yield "no picture.webp", _riff(b"EXIF\2\0\0\0ab"), BROKEN
    yield "empty frame.webp", _riff(b"VP8 \0\0\0\0"), BROKEN


def _riff(body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _other_types() -> Iterator[tuple[str, bytes, str]]:
    picture = photograph()
    for kind, what in (("BMP", "a BMP"), ("TIFF", "a TIFF"), ("ICO", "an icon"), ("PDF", "a PDF")):
        yield f"{kind.lower()} inside.jpg", encode(picture, kind), what
    for kind in ("PPM", "TGA", "DDS", "PCX"):
        yield f"{kind.lower()} inside.png", encode(picture, kind), OTHER
    for name, content, what in (
        ("heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC"),
        ("avif.jpg", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "an AVIF"),
        ("video.jpg", b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video"),
        ("matroska.webp", b"\x1aE\xdf\xa3\x01\0\0\0", "a video"),
        ("big endian.jpg", b"MM\0*\0\0\0\x08\0\0", "a TIFF"),
        ("jpeg2000.jpg", b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        ("jpegxl.jpg", b"\xff\x0a\xfa\x1f\x01", "a JPEG XL"),
        ("photoshop.jpg", b"8BPS\0\1", "a Photoshop file"),
        ("archive.jpg", b"PK\3\4\x14\0", "a zip archive"),
        ("packed.jpg", b"\x1f\x8b\x08\0", "a gzip archive"),
        ("program.jpg", b"\x7fELF\2\1\1", "a program"),
        ("sound.webp", b"RIFF\x24\0\0\0WAVEfmt ", OTHER),
        ("page.jpg", b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "an HTML page"),
        ("page with a mark.jpg", b"\xef\xbb\xbf\r\n<HTML><title>404</title>", "an HTML page"),
        ("xhtml.jpg", b'<?xml version="1.0"?><html xmlns="a">', "an HTML page"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG"),
        ("declared drawing.png", b'<?xml version="1.0"?>\n<svg/>', "an SVG"),
        ("denied.jpg", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML"),
        ("answer.jpg", b'{"error": "rate limit"}', "is JSON"),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is text"),
        ("zeros.jpg", bytes(4096), "nothing but zeros"),
        ("blanks.jpg", b" \r\n\t \n", "nothing but blanks"),
        ("empty.jpg", b"", "is empty"),
        ("one byte.jpg", b"\xff", OTHER),
        ("two bytes.jpg", b"\xff\xd8", OTHER),
        ("text mode.png", b"\x89PNG\n\x1a\n" + bytes(30), OTHER),
        ("with spaces, and commas.jpg", b"", "is empty"),
        ("two\nlines.jpg", b"", "is empty"),
        ('quoted "name".jpg', b"", "is empty"),
        ("снимок 写真 صورة 🐕.jpg", b"", "is empty"),
        ("-rf.jpg", b"", "is empty"),
        ("no ending", b"", "is empty"),
    ):
        yield name, content, what


def make(folder: Path) -> dict[str, str]:
    """Writes the bad files into a new folder, and things that are no files.

    Returns:
        name -> a pattern that the reason must match; names are unique and lie directly in the folder.
    """
    folder.mkdir(parents=True)
    expected = {}
    for name, content, pattern in bad_contents():
        assert name not in expected, name
        (folder / name).write_bytes(content)
        expected[name] = pattern
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "first of two.jpg").symlink_to("second of two.jpg")
    (folder / "second of two.jpg").symlink_to("first of two.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    with (folder / "too many bytes.jpg").open("wb") as file:
        file.truncate(2**26 + 1)  # no room is taken
    expected |= {
        "folder.jpg": "is a folder",
        "pipe.jpg": "is a named pipe",
        "loop.jpg": "loop of symbolic links",
        "first of two.jpg": "loop of symbolic links",
        "second of two.jpg": "loop of symbolic links",
        "dangling.jpg": "not found",
        "too many bytes.jpg": LARGE,
    }
    place = os.open(folder, os.O_RDONLY)
    try:  # by descriptor: a socket's whole path may have 107 bytes only
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{place}/socket.jpg")
        expected["socket.jpg"] = "is a socket"
    except OSError:
        pass  # not on every system
    finally:
        os.close(place)
    return expected
