# SPDX-License-Identifier: Apache-2.0
"""The peers of benchmarks/input.py: PyTorch's DataLoader with PIL, as ViLT's code does it, and a plain TFDS build.

    python -m benchmarks.input_peer FOLDER TARGET [--check]     builds FOLDER/captions.csv by TFDS in this process

RandAugment and resizing follow ViLT (commit 762fd39): transforms/randaug.py, transforms/utils.py.
"""

from __future__ import annotations

import csv
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

SHORTER, LONGER, PATCH, SLOTS = 384, 639, 32, 228
# Magnitude 9 of 30 between the bounds of each of ViLT's 14 operations.
ROTATION, SHEAR, SHIFT, BITS, THRESHOLD, ADDED, FACTOR = 9.0, 0.09, 30.0, 1, 76.8, 33, 0.64


def resized(picture: Image.Image) -> Image.Image:
    """ViLT's MinMaxResize(384, 639): sides rounded half up, then floored to multiples of 32; PIL's bicubic."""
    wide, tall = picture.size
    scale = SHORTER / min(wide, tall)
    tall, wide = (SHORTER, scale * wide) if tall < wide else (scale * tall, SHORTER)
    if max(tall, wide) > LONGER:
        scale = LONGER / max(tall, wide)
        tall, wide = tall * scale, wide * scale
    tall, wide = (int(side + 0.5) // PATCH * PATCH for side in (tall, wide))
    return picture.resize((wide, tall), resample=Image.Resampling.BICUBIC)


def patches(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Cuts into uint8 [228, 3072] in raster order, zeros behind, and says which are real."""
    pixels = np.asarray(picture)
    rows, columns = (side // PATCH for side in pixels.shape[:2])
    cells = pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
    made = np.zeros((SLOTS, 3 * PATCH**2), np.uint8)
    made[: rows * columns] = cells.reshape(rows * columns, -1)
    return made, np.arange(SLOTS) < rows * columns


def augmented(picture: Image.Image) -> Image.Image:
    """RandAugment(2, 9): two of the fourteen operations, the same one twice allowed."""
    for operation in random.choices(_operations(), k=2):
        picture = operation(picture)
    return picture


def _operations() -> Sequence[Callable[[Image.Image], Image.Image]]:
    def sign(value: float) -> float:
        return -value if random.random() > 0.5 else value

    def moved(*matrix: float) -> Callable[[Image.Image], Image.Image]:
        return lambda picture: picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    def solarize_add(picture: Image.Image) -> Image.Image:
        added = np.clip(np.array(picture).astype(int) + ADDED, 0, 255).astype(np.uint8)
        return ImageOps.solarize(Image.fromarray(added), 128)

    def enhanced(kind: Callable) -> Callable[[Image.Image], Image.Image]:
        return lambda picture: kind(picture).enhance(FACTOR)

    return (
        ImageOps.autocontrast,
        ImageOps.equalize,
        lambda picture: picture.rotate(sign(ROTATION)),
        lambda picture: ImageOps.posterize(picture, BITS),
        lambda picture: ImageOps.solarize(picture, THRESHOLD),
        solarize_add,
        enhanced(ImageEnhance.Color),
        enhanced(ImageEnhance.Contrast),
        enhanced(ImageEnhance.Brightness),
        enhanced(ImageEnhance.Sharpness),
        moved(1, sign(SHEAR), 0, 0, 1, 0),
        moved(1, 0, 0, sign(SHEAR), 1, 0),
        moved(1, 0, sign(SHIFT), 0, 1, 0),
        moved(1, 0, 0, 0, 1, sign(SHIFT)),
    )


class Pictures:
    """A PyTorch data set over the JPEG files of a folder.

    Attributes:
        published: float32 [3, height, width] in [-1, 1], as ViLT's transform gives it, else patches and mask.
        augment: RandAugment on the picture as decoded.
    """

    def __init__(self, folder: Path, published: bool, augment: bool):
        self.files = sorted((folder / "images").iterdir())
        self.published, self.augment = published, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int):
        import torch

        picture = Image.open(self.files[number]).convert("RGB")
        picture = resized(augmented(picture) if self.augment else picture)
        if not self.published:
            return tuple(torch.from_numpy(array) for array in patches(picture))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)


def padded(pictures):
    """float32 [batch, 3, height, width] of the largest height and width in the batch, zeros around."""
    import torch

    sides = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    batch = torch.zeros(len(pictures), 3, *sides)
    for row, picture in zip(batch, pictures, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return batch


def epoch(folder: Path, workers: int, batch: int, published: bool, augment: bool) -> int:
    """Loads every picture once through a DataLoader with that many processes; returns how many came out."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(folder, published, augment),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # nothing with threads is loaded here
        collate_fn=padded if published else None,
    )
    return sum(len(made if published else made[0]) for made in loader)


def build(folder: Path, target: Path, check: bool) -> None:
    """Writes the pictures of captions.csv as ArrayRecord by a GeneratorBasedBuilder, in this one process.

    Args:
        folder: holds captions.csv with columns image and caption, and the pictures.
        target: the TFDS data directory.
        check: decode each picture and keep a digest of its pixels, as our prepare does; else only its header is read.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    class Photographs(tfds.core.GeneratorBasedBuilder):
        name = "photographs"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(folder)  # where TFDS looks for a description: a program is no package

        def _info(self):
            whole = tfds.features.Scalar(np.int64)
            fields = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image_name": tfds.features.Text(),
            }
            fields |= {"captions": tfds.features.Sequence(tfds.features.Text())}
            fields |= dict.fromkeys(("height", "width", "pixels"), whole)
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict]]:
            with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    yield row["image"], example(folder / row["image"], row["image"], row["caption"], check)

    tfds.disable_progress_bar()
    builder = Photographs(data_dir=target, file_format="array_record")
    builder.download_and_prepare()


def example(path: Path, name: str, caption: str, check: bool) -> dict:
    """The fields of one record; the file's bytes are kept as they are."""
    with Image.open(path) as picture:
        wide, tall = picture.size
        pixels = picture.convert("RGB").tobytes() if check else b""
    digest = int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little", signed=True)
    fields = {"image": str(path), "image_name": name, "captions": [caption]}
    return fields | {"height": tall, "width": wide, "pixels": digest}


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), "--check" in sys.argv[3:])
