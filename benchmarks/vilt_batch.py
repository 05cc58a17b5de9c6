# SPDX-License-Identifier: Apache-2.0
"""The work of the ViLT benchmarks as numpy arrays: texts, masked pieces, and pictures whose patches both sides cut."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from configs import vilt
from vlp_jax import systems
from vlp_jax.data import corrupt, image

# Height and width before resizing, as many of COCO's: 192, 192, 180 and 144 patches at 384 pixels.
SIZES = ((480, 640), (480, 640), (480, 600), (480, 480))
VOCABULARY = {"b32": 30522, "tiny": 600}


def make_config(variant: str, dtype: str, token_multiple: int = 1) -> ConfigDict:
    """ViLT `b32` or a toy, without anything drawn: MLM + ITM, no dropout, a constant rate, torch's AdamW.

    `token_multiple`: a CPU gains nothing from padded tokens; products of a GPU want a multiple of 8.
    """
    config = vilt.get_config(f"variant={variant}")
    config.model.dtype, config.model.dropout = dtype, 0.0
    config.objectives.wpa = 0.0
    config.optimizer.warmup, config.optimizer.decay, config.optimizer.lr = 0.0, "constant", 1e-4
    config.optimizer.eps_placement = "corrected"
    config.model.token_multiple = token_multiple
    if variant == "tiny":
        config.model.width, config.model.fusion.num_heads, config.model.fusion.mlp_width = 32, 2, 64
        config.model.fusion.depth = config.model.unroll = 2
    data = config.data
    rule = image.layout(data)
    tall, wide = image.resized_size(*np.array(SIZES).T, rule.shorter, rule.longer, rule.patch)
    data.max_patches = int((tall * wide).max()) // rule.patch**2
    return systems.get("vilt").resolve(config, {"vocab_size": VOCABULARY[variant]})


@dataclasses.dataclass(frozen=True)
class Task:
    """One batch: pictures uint8 [height, width, 3], sides multiples of the patch, and the rest of it."""

    pictures: tuple[np.ndarray, ...]
    rest: dict[str, np.ndarray]
    patch: int

    def batch(self) -> dict[str, np.ndarray]:
        """What our step takes (vlp_jax/data/spec.py), patches cut in raster order, empty slots zero."""
        patches = np.zeros((*self.rest["patch_mask"].shape, 3 * self.patch**2), np.uint8)
        for slots, picture in zip(patches, self.pictures, strict=True):
            rows, columns = (side // self.patch for side in picture.shape[:2])
            cells = picture.reshape(rows, self.patch, columns, self.patch, 3).swapaxes(1, 2)
            slots[: rows * columns] = cells.reshape(rows * columns, -1)
        return {**self.rest, "patches": patches}

    def tokens(self) -> int:
        """Tokens of one pass, padding and class tokens included: what both sides compute."""
        return self.rest["text_ids"].size + self.rest["patch_mask"].size + len(self.pictures)

    def masked_text(self) -> tuple[np.ndarray, np.ndarray]:
        """Texts with their masked pieces, and labels [batch, text] with -100 elsewhere."""
        ids, labels = self.rest["text_ids"].copy(), np.full(self.rest["text_ids"].shape, -100)
        for row, slot in zip(*np.nonzero(self.rest["mlm_labels"] >= 0), strict=True):
            place = row, self.rest["mlm_positions"][row, slot]
            ids[place], labels[place] = self.rest["mlm_inputs"][row, slot], self.rest["mlm_labels"][row, slot]
        return ids, labels

    def padded_pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures in [-1, 1] as [batch, 3, height, width], zero where a picture is smaller, and their mask."""
        height, width = (max(picture.shape[axis] for picture in self.pictures) for axis in (0, 1))
        pixels = np.zeros((len(self.pictures), 3, height, width), np.float32)
        mask = np.zeros((len(self.pictures), height, width), np.int64)
        for row, picture in enumerate(self.pictures):
            tall, wide = picture.shape[:2]
            pixels[row, :, :tall, :wide] = picture.transpose(2, 0, 1) / 127.5 - 1
            mask[row, :tall, :wide] = 1
        return pixels, mask


def make_task(config: ConfigDict, rows: int) -> Task:
    """Noise for pixels, texts of 8 to 20 pieces padded to the config's length, one to six of them masked."""
    draw = np.random.default_rng(0)
    length, vocabulary = config.data.text_length, config.model.text_embed.vocab_size
    sizes = np.array(SIZES)[np.arange(rows) % len(SIZES)]
    planned = image.plan(*sizes.T, np.zeros(rows, np.uint32), image.layout(config.data))
    pictures = tuple(draw.integers(0, 256, (*size, 3), np.uint8) for size in planned["size"])
    mask = np.arange(length) < draw.integers(8, 21, rows)[:, None]
    slots = corrupt.slots(config.data.mask_rate, length)
    used = np.arange(slots) < draw.integers(1, min(slots, 6) + 1, rows)[:, None]

    def pieces(*shape: int) -> np.ndarray:
        return draw.integers(5, vocabulary, shape, np.int32)

    zero, number = np.int32(0), np.arange(rows, dtype=np.int32)
    rest = {
        "text_ids": np.where(mask, pieces(rows, length), zero),
        "text_mask": mask,
        **{key: planned[key] for key in ("patch_positions", "patch_mask", "grid_size")},
        "mlm_positions": np.where(used, np.arange(1, slots + 1, dtype=np.int32), zero),
        "mlm_inputs": np.where(used, np.int32(4), zero),
        "mlm_labels": np.where(used, pieces(rows, slots), np.int32(-1)),
        "example_id": number,
        "image_id": number,
        "source_id": np.zeros(rows, np.int32),
    }
    return Task(pictures, rest, config.data.patch_size)
