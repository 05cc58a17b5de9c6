# SPDX-License-Identifier: Apache-2.0
"""Pictures that may enter: stored bytes against PIL and tensorflow, and what hostile files do."""

import concurrent.futures
import errno
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data import corpus
from tests.data.corpus import chunk, digest, encode, photograph, png
from vlp_jax.data import image
from vlp_jax.data.preparation import admission

DRAW = np.random.default_rng(0)
NOISE = DRAW.integers(0, 256, (19, 27, 4), np.uint8)
GREY16 = DRAW.integers(0, 2**16, (19, 27, 4)).astype(np.uint16)
PALETTE = DRAW.integers(0, 256, 48, np.uint8).tobytes()


def pil(content: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def check(picture: admission.Picture) -> np.ndarray:
    """What is stored decodes in the training graph as was said, and would be admitted again as it is."""
    pixels = image.decode(picture.content).numpy()
    assert pixels.shape == (picture.height, picture.width, 3)
    assert digest(pixels) == picture.pixels
    again = admission.admit(picture.content, upright=True)
    assert (again.changed, again.pixels, again.content) == ("", picture.pixels, picture.content)
    return pixels


def clear(picture=None) -> Image.Image:
    picture = picture or photograph()
    picture.putalpha(photograph().convert("L"))
    return picture


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


COLORS = photograph()
FLIPPED = COLORS.transpose(Image.Transpose.ROTATE_180)
FRAMES = {"save_all": True, "append_images": [FLIPPED]}
UNTOUCHED = {
    **{f"jpeg 4:{s}": encode(COLORS, "JPEG", subsampling=s, quality=90) for s in range(3)},
    **{f"progressive {s}": encode(COLORS, "JPEG", subsampling=s, progressive=True) for s in range(3)},
    "jpeg grey": encode(COLORS.convert("L"), "JPEG"),
    "jpeg grey progressive": encode(COLORS.convert("L"), "JPEG", progressive=True),
    "jpeg of red, green, blue": encode(COLORS, "JPEG", keep_rgb=True),
    "jpeg with restarts": encode(COLORS, "JPEG", restart_marker_blocks=1),
    "jpeg of 1 pixel": encode(COLORS.crop((0, 0, 1, 1)), "JPEG"),
    "mpo": encode(COLORS, "MPO", **FRAMES),
    "jpeg with a profile and 200 kB of exif": encode(
        COLORS, "JPEG", icc_profile=bytes(200_000), exif=b"Exif\0\0" + bytes(60_000), comment=bytes(60_000)
    ),
    "jpeg with garbage between": encode(COLORS, "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb"),
    "jpeg with garbage behind": encode(COLORS, "JPEG") + bytes(999) + b"\xff\xd8\xff",
    "png with garbage behind": encode(COLORS, "PNG") + b"garbage" * 99,
    "webp with garbage behind": encode(COLORS, "WEBP") + b"garbage" * 99,
    "webp": encode(COLORS, "WEBP"),
    "webp of 1 pixel": encode(COLORS.crop((0, 0, 1, 1)), "WEBP"),
    "webp with exif and profile": encode(COLORS, "WEBP", exif=exif(6), icc_profile=b"ab" * 99),
    "long png": png(np.zeros((1, 65535, 1), np.uint8), 1, 0),
    "png with all transparent": png(NOISE[..., :3], 8, 2, extra=chunk(b"tRNS", bytes(6))),
    "palette with transparency": png(NOISE[..., :1] >> 4, 4, 3, palette=PALETTE, extra=chunk(b"tRNS", b"\0\1")),
    "grey with transparency": png(NOISE[..., :1], 8, 0, extra=chunk(b"tRNS", b"\0\7")),
    "png with gamma": png(NOISE[..., :3], 8, 2, extra=chunk(b"gAMA", struct.pack(">I", 10_000))),
    **{
        f"png color {color} depth {depth}{' interlaced' * interlaced}": png(
            NOISE[..., :values] >> (8 - depth), depth, color, palette=PALETTE * 8 * (color == 3), interlaced=interlaced
        )
        for color, values, depths in ((0, 1, (1, 2, 4, 8)), (2, 3, (8,)), (3, 1, (1, 2, 4)), (4, 2, (8,)), (6, 4, (8,)))
        for depth in depths
        for interlaced in (False, True)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", UNTOUCHED)
def test_bytes_stay_and_decode_as_in_pil(name):
    content = UNTOUCHED[name]
    picture = admission.admit(content)
    assert picture.changed == "" and picture.content is content
    np.testing.assert_array_equal(image.decode(content).numpy(), pil(content))
    assert digest(pil(content)) == picture.pixels and pil(content).shape[:2] == (
        picture.height,
        picture.width,
    )


ANEW = {
    "gif": (encode(COLORS, "GIF"), "GIF"),
    "gif of grey": (encode(COLORS.convert("L"), "GIF", interlace=False), "GIF"),
    "gif with transparency": (encode(COLORS.quantize(5), "GIF", transparency=2), "GIF"),
    "moving gif": (encode(COLORS, "GIF", **FRAMES), "GIF"),
    "gif with garbage behind": (encode(COLORS, "GIF") + b"garbage", "GIF"),
    "moving png": (encode(COLORS, "PNG", **FRAMES), "first frame"),
    "moving png with another picture before": (
        encode(COLORS, "PNG", default_image=True, **FRAMES),
        "first frame",
    ),
    "moving webp": (encode(COLORS, "WEBP", **FRAMES), "first frame"),
    "moving webp with alpha": (encode(clear(), "WEBP", lossless=True, **FRAMES), "first frame"),
    "lossless webp": (encode(COLORS, "WEBP", lossless=True), "lossless WebP"),
    "lossless webp with alpha": (encode(clear(), "WEBP", lossless=True, exact=True), "lossless WebP"),
    "webp with alpha": (encode(clear(), "WEBP"), "alpha"),
    "webp with alpha and exif": (encode(clear(), "WEBP", exif=exif(3)), "alpha"),
    **{
        f"16 bits, color {color}{' interlaced' * interlaced}": (
            png(GREY16[..., :values], 16, color, interlaced=interlaced),
            "16 bits",
        )
        for color, values in ((2, 3), (4, 2), (6, 4))
        for interlaced in (False, True)
    },
}


@pytest.mark.parametrize("name", ANEW)
def test_new_encoding_has_the_pixels_of_pil(name):
    content, changed = ANEW[name]
    picture = admission.admit(content)
    assert changed in picture.changed and picture.content != content
    np.testing.assert_array_equal(check(picture), pil(content))


def test_wrong_sum_of_a_text_does_no_harm():
    """PIL refuses such a file; viewers and tensorflow do not."""
    text = chunk(b"tEXt", b"a\0b")
    picture = admission.admit(png(NOISE[..., :3], 8, 2, extra=text[:-1] + bytes([text[-1] ^ 1])))
    np.testing.assert_array_equal(check(picture), NOISE[..., :3])


def test_16_bits_of_grey_keep_the_upper_8():
    pixels = check(admission.admit(png(GREY16[..., :1], 16, 0)))
    np.testing.assert_array_equal(pixels, np.repeat(GREY16[..., :1] >> 8, 3, -1))


def test_four_colors_become_three():
    """PIL's conversion and tensorflow's round differently; quality 95 comes close to PIL's."""
    for picture in (COLORS.convert("CMYK"), Image.merge("CMYK", [*COLORS.split(), COLORS.convert("L")])):
        content = encode(picture, "JPEG", quality=95)
        admitted = admission.admit(content)
        assert "colors" in admitted.changed
        assert np.abs(check(admitted).astype(int) - pil(content)).mean() < 4  # a small picture full of noise


def test_twins_are_found_whatever_the_format():
    indexed = COLORS.quantize(30)
    plain = indexed.convert("RGB")
    files = [
        encode(indexed, "PNG"),
        encode(plain, "PNG"),
        encode(indexed, "GIF"),
        encode(plain, "WEBP", lossless=True),
    ]
    assert len({admission.admit(content).pixels for content in files}) == 1
    jpeg = encode(COLORS, "JPEG")
    copy = encode(Image.open(io.BytesIO(jpeg)), "PNG")
    assert admission.admit(jpeg).pixels == admission.admit(copy).pixels
    # Shape counts: the same bytes in other rows are another picture.
    flat = [np.zeros(shape, np.uint8) for shape in ((2, 6, 3), (3, 4, 3), (4, 3, 3))]
    assert len({admission.admit(png(values, 8, 2)).pixels for values in flat}) == 3


def test_pixels_as_defined():
    """The numbers stand in prepared sets: they may not depend on version or machine."""
    content = png(np.arange(6, dtype=np.uint8).reshape(1, 2, 3), 8, 2)
    file = hashlib.sha256(b"P6\n2 1\n255\n\0\1\2\3\4\5").digest()
    assert admission.admit(content).pixels == int.from_bytes(file[:8], "little")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GREY"])
def test_turned_upright(kind, orientation):
    grey, kind = kind == "GREY", "JPEG" if kind == "GREY" else kind
    content = encode(COLORS.convert("L" if grey else "RGB"), kind, exif=exif(orientation))
    assert admission.admit(content) == admission.admit(content, upright=False)
    assert admission.admit(content).content is content
    picture = admission.admit(content, upright=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert (picture.height, picture.width) == expected.shape[:2]
    if orientation == 1:
        assert picture.content is content and picture.changed == ""
        return
    assert picture.changed == "turned upright"
    difference = np.abs(check(picture).astype(int) - expected)
    assert difference.mean() < 2 if kind == "JPEG" else not difference.any()
    assert (picture.content[:2] == b"\xff\xd8") == (kind == "JPEG")


def test_broken_exif_is_no_orientation():
    start = b"Exif\0\0"
    for tags in (
        *(exif(6)[: 6 + cut] for cut in range(3, 20)),
        start + b"II*\0\xff\xff\xff\xff",
        start + b"II*\0\x08\0\0\0\xff\xff" + bytes(30),
        exif(9),
        exif(0),
        start + b"XX" + bytes(40),
        start + b"MM\0*\0\0\0\x08\0\1\x01\x12\0\4\0\0\0\1\0\0\0\6",  # 4 bytes instead of 2
    ):
        content = encode(COLORS, "JPEG", exif=tags)
        assert admission.admit(content, upright=True).changed == "", tags
    big = start + b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    assert admission.admit(encode(COLORS, "JPEG", exif=big), upright=True).changed == "turned upright"


def test_real_photographs_stay_as_they_are(realdata):
    files = (
        sorted((realdata / "coco/val2017").glob("*.jpg"))[:8]
        + sorted((realdata / "cc_images").glob("*.jpg"))[:8]
    )
    files += sorted((realdata / "nlvr2").rglob("*.png"))[:4] + sorted((realdata / "coco").rglob("*.png"))[:1]
    assert len(files) > 16
    for file in files:
        content = admission.read(file)
        assert content == file.read_bytes()
        picture = admission.admit(content)
        assert picture.changed == "" and picture.content is content, file
        np.testing.assert_array_equal(check(picture), pil(content))


def test_bad_files_are_each_named(tmp_path, capfd):
    expected = corpus.make(tmp_path / "bad")
    assert len(expected) >= 120
    for name, pattern in expected.items():
        start = time.process_time()
        with pytest.raises(ValueError) as caught, warnings.catch_warnings(action="error"):
            admission.admit(admission.read(tmp_path / "bad" / name), upright=True)
        reason = str(caught.value)
        assert re.search(pattern, reason), (name, reason)
        assert len(reason) < 160 and "\n" not in reason and " at 0x" not in reason, (name, reason)
        assert time.process_time() - start < 1, name
    assert capfd.readouterr() == ("", "")


def test_read(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    assert admission.read(file) == admission.read(tmp_path / "link") == b"abc"
    for path, reason in (
        (tmp_path / "b", "^not found$"),
        (file / "b", "^not found$"),
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300), "name that is too long"),
        (corpus.Path("a\0b"), "name that no file can have"),
        (corpus.Path("a\ud800"), "name that no file can have"),
        (corpus.Path("/dev/zero"), "is a device"),
    ):
        with pytest.raises(ValueError, match=reason):
            admission.read(path)
    if os.geteuid():  # root reads everything
        file.chmod(0)
        with pytest.raises(ValueError, match="no permission"):
            admission.read(file)
        file.chmod(0o600)
    real = os.open

    def grown(path, *rest):
        handle = real(path, *rest)
        with file.open("ab") as more:
            more.write(b"more")
        return handle

    stat = os.fstat
    sizes = iter((3, 3))

    def before_it_grew(handle):
        found = stat(handle)
        return os.stat_result((*found[:6], next(sizes, found.st_size), *found[7:10]))

    monkeypatch.setattr(os, "open", grown)
    monkeypatch.setattr(os, "fstat", before_it_grew)
    with pytest.raises(ValueError, match="changes while it is read"):
        admission.read(file)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EMFILE, OSError), (errno.ENOMEM, OSError), (errno.EIO, ValueError), (errno.EACCES, ValueError)],
)
def test_errors_of_the_machine_are_no_reasons(tmp_path, monkeypatch, number, expected):
    (tmp_path / "a").write_bytes(b"abc")

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(expected):
        admission.read(tmp_path / "a")


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    file, pipe = tmp_path / "a", tmp_path / "pipe"
    file.write_bytes(b"abc")
    os.mkfifo(pipe)
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real(pipe, flags))
    with pytest.raises(ValueError, match="is a named pipe"):
        admission.read(file)


def test_threads_get_what_one_gets():
    contents = [*UNTOUCHED.values(), *(content for content, _ in ANEW.values())]
    alone = [admission.admit(content) for content in contents]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(admission.admit, contents * 3)) == alone * 3


def test_pil_is_left_as_it_was():
    program = """
from PIL import Image, ImageFile
before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK
from tests.data import corpus
from vlp_jax.data.preparation import admission
for content in corpus.good().values():
    admission.admit(content, upright=True)
assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK)
"""
    root = corpus.Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
