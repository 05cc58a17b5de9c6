# SPDX-License-Identifier: Apache-2.0
"""Makes small raw folders as COCO publishes them, with pictures of plain colors."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, 60)).save(file, kind)
    return file.getvalue()


def write(path: Path, content: object) -> Path:
    """Writes json, or a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pictures(folder: Path, *names: str) -> Path:
    """Writes a picture under each name, of a color by its place."""
    for number, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def coco(folder: Path, pictures: dict[str, int], captions: int = 2) -> Path:
    """Writes captions_NAME.json and NAME/ for each name -> number of pictures; ids fall, so that order matters."""
    start = 0
    for name, count in pictures.items():
        (folder / name).mkdir(parents=True)
        ids = list(range(start + count, start, -1))
        start += count
        images = [coco_image(key) for key in ids]
        rows = [
            {"id": key * 10 + i, "image_id": key, "caption": f"Picture {key}, words {i}. \n"}
            for i in range(captions)
            for key in ids
        ]
        for image in images:
            (folder / name / image["file_name"]).write_bytes(picture(image["id"]))
        content = {"info": {}, "licenses": [], "images": images, "annotations": rows}
        write(folder / "annotations" / f"captions_{name}.json", content)
    return folder


def coco_image(key: int, **other) -> dict:
    return {"id": key, "file_name": f"{key:012d}.jpg", "height": 30, "width": 40, **other}


def coco_instances(folder: Path, name: str, images: list[dict], rows: list[dict]) -> Path:
    """Writes instances_NAME.json with the categories 1 person and 18 dog; rows get ids and defaults."""
    defaults = {"category_id": 1, "iscrowd": 0, "area": 6.5, "segmentation": []}
    rows = [{"id": number, **defaults, **row} for number, row in enumerate(rows, 900)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    content = {"images": images, "annotations": rows, "categories": categories}
    return write(folder / "annotations" / f"instances_{name}.json", content)


def karpathy(key: int, part: str, **other) -> dict:
    """A picture of dataset_coco.json."""
    return {
        "filepath": "val2014",
        "filename": f"COCO_val2014_{key:012d}.jpg",
        "imgid": key - 1,
        "cocoid": key,
        "split": part,
        "sentences": [{"raw": f"Karpathy {key}. ", "sentid": key, "tokens": []}],
        **other,
    }
