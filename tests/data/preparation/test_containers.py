# SPDX-License-Identifier: Apache-2.0
"""Hostile pictures: every beginning, flipped bytes, bombs; what is let through must not trouble the training graph."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from tests.data import corpus
from tests.data.corpus import chunk, digest, png
from vlp_jax.data import image
from vlp_jax.data.preparation import admission, containers

NOISE = np.random.default_rng(0).integers(0, 256, (19, 27, 3), np.uint8)


def check(picture: admission.Picture) -> None:
    assert digest(image.decode(picture.content).numpy()) == picture.pixels


def survives(content: bytes) -> None:
    """Refused with a reason, or stored as something that the training graph decodes to the pixels told."""
    try:
        picture = admission.admit(content, upright=True)
    except ValueError:
        return
    check(picture)


@pytest.mark.parametrize("name", corpus.good())
def test_every_beginning(name):
    content = corpus.good()[name]
    for length in range(0, len(content), 1 if len(content) < 1500 else 3):
        if name.endswith(".gif"):
            survives(content[:length])
        else:
            with pytest.raises(ValueError):
                admission.admit(content[:length])
            # With an end put on again.
            survives(
                content[:length] + b"\xff\xd9" if name.endswith(".jpg") else content[:length] + bytes(40)
            )


@pytest.mark.parametrize("name", corpus.good())
def test_flipped_bytes(name):
    content = corpus.good()[name]
    draw = np.random.default_rng(5)
    for place in range(0, len(content), 1 + len(content) // 700):
        changed = bytearray(content)
        changed[place] ^= 1 << int(draw.integers(8))
        if name.endswith(".png") and place % 2:  # past the check sums, into the decoder
            changed = summed(changed)
        survives(bytes(changed))


def summed(content: bytearray) -> bytearray:
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        if place + 12 + length > len(content):
            break
        struct.pack_into(
            ">I", content, place + 8 + length, zlib.crc32(content[place + 4 : place + 8 + length])
        )
        place += 12 + length
    return content


HOSTILE = """
import os, resource, sys, time, zlib
sys.path.insert(0, sys.argv[1])
from tests.data import corpus
from tests.data.corpus import assemble, chunk, encode, photograph
from vlp_jax.data.preparation import admission

bomb = zlib.compress(bytes(2**28), 9)  # 256 MB in 260 kB
plain = zlib.compress(bytes(6 * 16))
jpeg = corpus.good()["progressive.jpg"]
cases = {
    "iTXt": lambda: assemble(6, 5, 8, 2, plain, extra=chunk(b"iTXt", b"k\\0\\1\\0\\0\\0" + bomb)),
    "zTXt": lambda: assemble(6, 5, 8, 2, plain, extra=chunk(b"zTXt", b"k\\0\\0" + bomb) * 50),
    "iCCP": lambda: assemble(6, 5, 8, 2, plain, extra=chunk(b"iCCP", b"k\\0\\0" + bomb)),
    "tEXt": lambda: assemble(6, 5, 8, 2, plain, extra=chunk(b"tEXt", b"k\\0" + bytes(20_000_000))),
    "many": lambda: assemble(6, 5, 8, 2, plain, extra=chunk(b"tEXt", b"k\\0v") * 100_000),
    "data": lambda: assemble(6, 5, 8, 2, bomb),
    "size": lambda: assemble(50_000, 50_000, 8, 2, bomb),
    "short": lambda: assemble(8192, 8192, 8, 6, plain),
    "segments": lambda: jpeg[:2] + b"\\xff\\xfe\\0\\2" * 2_000_000 + jpeg[2:],
    "fill": lambda: jpeg[:2] + b"\\xff" * 20_000_000 + jpeg[2:],
    "restarts": lambda: jpeg[:-2] + b"\\xff\\xd0" * 30_000_000,
    "scans": lambda: jpeg[:-2] + jpeg[jpeg.rindex(b"\\xff\\xda"):-2] * 50_000,
    "comments": lambda: b"GIF89a\\1\\0\\1\\0\\0\\0\\0" + b"!\\xfe\\1a\\0" * 5_000_000,
    "blocks": lambda: b"GIF89a\\1\\0\\1\\0\\0\\0\\0!\\xfe" + b"\\1a" * 20_000_000,
    "riff": lambda: b"RIFF" + (8 * 5_000_000 + 4).to_bytes(4, "little") + b"WEBP" + b"JUNK\\0\\0\\0\\0" * 5_000_000,
    "noise": lambda: os.urandom(2_000_000),
    "zeros": lambda: bytes(60_000_000),
    "page": lambda: b"<" * 60_000_000,
}
encode(photograph(), "PPM")
admission.admit(jpeg)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, make in cases.items():
    content = make()
    start = time.process_time()
    try:
        result = admission.admit(content).changed or "taken"
    except ValueError as error:
        result = str(error)
    print(name, round(time.process_time() - start, 2), result, sep="|")
    del content
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep="|")
"""


def test_bombs_cost_neither_time_nor_memory():
    root = str(corpus.Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HOSTILE, root], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    *lines, (_, grown) = (line.split("|") for line in done.stdout.splitlines())
    assert len(lines) == 18
    for name, seconds, result in lines:
        assert float(seconds) < 1.5, (name, seconds, result)
        assert (result == "taken") == (name in ("iTXt", "zTXt", "iCCP", "tEXt", "many", "fill")), (
            name,
            result,
        )
    assert int(grown) < 300, f"{grown} MB"  # the largest file has 60 MB


@pytest.mark.parametrize("name", ["tEXt", "zTXt", "iCCP"])
def test_large_texts_do_not_trouble_the_training_graph(name):
    packed = zlib.compress(bytes(2**26))
    extra = chunk(name.encode(), b"k\0\0" + (bytes(2**24) if name == "tEXt" else packed))
    check(admission.admit(png(NOISE, 8, 2, extra=extra)))


def test_many_parts_do_not_trouble_the_training_graph():
    check(admission.admit(png(NOISE, 8, 2, extra=chunk(b"tEXt", b"k\0v") * 3000)))


def test_the_largest_picture_is_taken_and_one_more_row_is_not():
    side = 8192
    assert side * side == containers.MAX_PIXELS
    rows = zlib.compress(bytes(side * (side // 8 + 1)))
    check(admission.admit(corpus.assemble(side, side, 1, 0, rows)))
    with pytest.raises(ValueError, match="pixels, more than 67108864"):
        admission.admit(
            corpus.assemble(side + 1, side, 1, 0, zlib.compress(bytes((side + 1) * (side // 8 + 1))))
        )
