# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/input.py reads: a folder of photographs that all differ, prepared data, ten million pairs of scenes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import ROOT

# A photograph's bytes by its side in pixels, as COCO has them: 640 pixels, about 160 kB.
QUALITY = 96
NOISE = 3.0  # levels, so that no two files are equal; more would make files larger than photographs are
TABLE, VOCABULARY = "captions.csv", "vocab.txt"
WORDS = ("a", "photograph", "number", "of", "many", ".")
# Height and width of `plain` pictures, about as COCO's: 192 to 228 patches at 384.
SIDES = ((480, 640), (427, 640), (640, 480), (375, 500), (640, 427), (333, 500), (612, 612), (480, 640))


def photographs(source: Path, count: int, originals: Sequence[Path]) -> None:
    """Writes `count` JPEGs of photograph size with a caption each, and captions.csv as `prepare folder` reads it.

    They are `originals` in turn, each time with other noise; drawn pictures where there are none.
    """
    from PIL import Image

    (source / "images").mkdir(parents=True)
    loaded = [Image.open(path).convert("RGB") for path in originals[:count]] or [_drawn(i) for i in range(8)]
    with (source / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for number in range(count):
            draw = np.random.default_rng(number)
            pixels = np.asarray(loaded[number % len(loaded)], np.float32)
            pixels = pixels + draw.normal(0.0, NOISE, pixels.shape).astype(np.float32)
            name = f"images/{number:06d}.jpg"
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(source / name, "JPEG", quality=QUALITY)
            table.writerow([name, f"a photograph of many, number {number}.", "train"])
    write_vocabulary(source)


def write_vocabulary(source: Path) -> None:
    """A vocab.txt that knows the words of the captions."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *WORDS, *"0123456789"]
    pieces += [f"##{digit}" for digit in "0123456789"]
    (source / VOCABULARY).write_text("\n".join(pieces) + "\n", encoding="utf-8")


def _drawn(number: int):
    """A landscape or a portrait of soft shades and sharp ellipses, as hard to decode as a photograph."""
    from PIL import Image, ImageDraw

    draw = np.random.default_rng(10_000 + number)
    size = ((640, 480), (640, 427), (480, 640), (500, 375))[number % 4]
    coarse = draw.integers(0, 256, (12, 16, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(60):
        left, top, wide, tall = draw.integers(0, [*size, 120, 120])
        colour = tuple(draw.integers(0, 256, 3).tolist())
        pen.ellipse([left, top, left + wide, top + tall], fill=colour)
    return picture


def plain(source: Path, count: int = 256, captions: int = 5) -> None:
    """Writes `count` JPEGs of COCO's sizes and one color each, with captions, as `prepare folder` reads them."""
    from PIL import Image

    source.mkdir(parents=True)
    with (source / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for number in range(count):
            height, width = SIDES[number % len(SIDES)]
            color = (number, number // 3, 255 - number)
            Image.new("RGB", (width, height), color).save(source / f"{number:06d}.jpg", "JPEG")
            rows = [
                (f"{number:06d}.jpg", f"number {number}, text {text}", "train") for text in range(captions)
            ]
            table.writerows(rows)
    write_vocabulary(source)


def part(whole: Path, target: Path, count: int) -> None:
    """The first `count` pictures of what `photographs` wrote, by links."""
    (target / "images").mkdir(parents=True)
    for path in sorted((whole / "images").iterdir())[:count]:
        os.link(path, target / "images" / path.name)
    lines = (whole / TABLE).read_text(encoding="utf-8").splitlines(keepends=True)
    (target / TABLE).write_text("".join(lines[: count + 1]), encoding="utf-8")
    shutil.copyfile(whole / VOCABULARY, target / VOCABULARY)


def prepare_folder(source: Path, target: Path, workers: int) -> list[str]:
    """The command that prepares what `photographs` wrote."""
    given = [f"--source={source}", f"--vocab={source / VOCABULARY}", f"--workers={workers}"]
    return [sys.executable, "-m", "vlp_jax.prepare", "folder", f"--target={target}", *given]


def prepare_scenes(target: Path, train: int) -> list[str]:
    """The command that draws and prepares scenes of level 1."""
    given = [f"--train={train}", "--validation=8", "--test=8", "--workers=1"]
    return [sys.executable, "-m", "vlp_jax.prepare", "scenes", f"--target={target}", *given]


def run(command: Sequence[str]) -> None:
    """Runs a command of this project.

    Raises:
        RuntimeError: it failed; its message has been shown on standard error.
    """
    if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"{' '.join(map(str, command[1:]))} ended with {code}")


def many_pairs(small: Path, target: Path, pairs: int) -> int:
    """Writes a prepared directory whose manifest lists the one train shard of `small` until there are `pairs`.

    The shard is there once, by link; the index is as large as that of so many records.

    Returns:
        pairs that it states: `pairs`, rounded up to whole shards.
    """
    target.mkdir()
    manifest = json.loads((small / "manifest.json").read_bytes())
    split = manifest["splits"]["train"]
    (shard,) = split["shards"]
    times = -(-pairs // split["pairs"])
    with np.load(small / split["index"]["file"]) as columns:
        index = {name: np.tile(column, times) for name, column in columns.items()}
    path = target / split["index"]["file"]
    np.savez(path, **index)
    content = path.read_bytes()
    entry = {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    split |= {"shards": [shard] * times, "index": split["index"] | entry}
    for count in ("records", "pairs", "listed"):
        if count in split:
            split[count] *= times
    os.link(small / shard["file"], target / shard["file"])
    for name in (manifest["vocabulary"]["file"], "dataset_info.json", "features.json"):
        shutil.copyfile(small / name, target / name)
    manifest["splits"] = {"train": split}
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return split["pairs"]
