# SPDX-License-Identifier: Apache-2.0
"""Small prepared directories for tests, written byte by byte and not by the package's own writer."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from array_record.python import array_record_module
from PIL import Image

from vlp_jax.data import text

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "yellow": (230, 220, 40)}

COLUMNS = {
    "captions": np.uint32, "height": np.uint16, "width": np.uint16, "pixels": np.uint64, "coco_id": np.int64,
    "flickr_id": np.int64,
}  # fmt: skip


def picture(row: int, height: int = 64, width: int = 64) -> bytes:
    """A JPEG of one colour with a little noise, by row."""
    generator = np.random.default_rng(row)
    pixels = np.array(list(COLOURS.values())[row % 4]) + generator.integers(-20, 20, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def captions(row: int) -> list[str]:
    """One to three captions, all different over the rows."""
    colour = list(COLOURS)[row % 4]
    words = (f"a {colour} square number {row}.", f"the {row}th is {colour}", f"{colour}, plainly {row}")
    return list(words[: 1 + row % 3])


def encode(**features) -> bytes:
    """A serialised tf.train.Example as TFDS writes one; a list without values has no kind."""

    def feature(value):
        values = value if isinstance(value, list) else [value]
        if not values:
            return tf.train.Feature()
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        if isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        values = [one.encode() if isinstance(one, str) else one for one in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    example = {name: feature(value) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=example)).SerializeToString()


def pixels(content: bytes) -> int:
    """The digest of a picture in the index: of a PPM file of it, as a uint64; 0 for bytes that are none."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            decoded = np.asarray(opened.convert("RGB"))
    except OSError:
        return 0
    height, width, _ = decoded.shape
    key = hashlib.sha256(f"P6\n{width} {height}\n255\n".encode() + decoded.tobytes()).digest()
    return int.from_bytes(key[:8], "little")


def entry(path: Path) -> dict:
    content = path.read_bytes()
    return {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(
    directory: Path,
    *,
    splits: dict[str, int],
    shards: int = 2,
    sizes=((64, 64),),
    vocabulary: Path | None = None,
    name: str = "tiny",
    pictures=picture,
    texts=captions,
    more=lambda split, row: {},
) -> Path:
    """Writes a prepared directory with that many records a split, sizes taken in turns.

    Args:
        more: fields of a record besides picture, name and captions; boxes as a flat list of floats.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {"dataset": name, "builder_version": "1", "licence": "none", "created_with": {}, "splits": {}}
    fields, names = {"captions"}, []
    for split, records in splits.items():
        files, index = [], {column: [] for column in COLUMNS}
        bounds = np.linspace(0, records, shards + 1).astype(int)
        for shard in range(shards):
            path = directory / f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for row in range(bounds[shard], bounds[shard + 1]):
                height, width = sizes[row % len(sizes)]
                image, lines, extra = pictures(row, height, width), texts(row), more(split, row)
                fields |= extra.keys() - {"coco_id", "flickr_id"}
                names += extra.get("box_names", [])
                key = pixels(image)
                record = dict(
                    image=image, image_name=f"{row}.jpg", image_key=row + 10**10, captions=lines, height=height,
                    width=width, pixels=key - (key >> 63 << 64), coco_id=0, flickr_id=0,
                ) | extra  # fmt: skip
                writer.write(encode(**record))
                for column, values in index.items():
                    values.append(record[column] if column in record else 0)
                index["captions"][-1], index["pixels"][-1] = len(lines), key
            writer.close()
            files.append(entry(path) | {"records": int(bounds[shard + 1] - bounds[shard])})
        path = directory / f"{split}.index.npz"
        np.savez(path, **{column: np.array(values, COLUMNS[column]) for column, values in index.items()})
        manifest["splits"][split] = {
            "records": records, "pairs": sum(index["captions"]), "listed": records, "alive": 1.0,
            "shards": files, "index": entry(path),
        }  # fmt: skip
    if vocabulary is None:
        vocabulary = directory / "vocabulary.model"
        text.train((line for row in range(max(splits.values())) for line in texts(row)), vocabulary, 200)
    else:
        (directory / vocabulary.name).write_bytes(vocabulary.read_bytes())
        vocabulary = directory / vocabulary.name
    manifest["vocabulary"] = entry(vocabulary) | {"size": text.Vocabulary.load(vocabulary).size}
    (directory / "dropped.jsonl").write_bytes(b"")
    dropped = entry(directory / "dropped.jsonl") | {"count": 0, "reasons": {}}
    manifest |= {"visual_words": [*COLOURS], "sources": [], "dropped": dropped, "changed": {}, "options": {}}
    manifest["fields"] = sorted(fields)
    manifest["box_names"] = {name: names.count(name) for name in sorted(set(names))}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return directory
