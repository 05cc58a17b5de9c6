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


def coco(folder: Path, pictures: dict[str, int], captions: int = 2) -> Path:
    """Writes captions_NAME.json and NAME/ for each name -> number of pictures; ids fall, so that order matters."""
    (folder / "annotations").mkdir(parents=True)
    start = 0
    for name, count in pictures.items():
        (folder / name).mkdir()
        ids = list(range(start + count, start, -1))
        start += count
        images = [{"id": key, "file_name": f"{key:012d}.jpg", "height": 30, "width": 40} for key in ids]
        rows = [
            {"id": key * 10 + i, "image_id": key, "caption": f"Picture {key}, words {i}. \n"}
            for i in range(captions)
            for key in ids
        ]
        for image in images:
            (folder / name / image["file_name"]).write_bytes(picture(image["id"]))
        content = {"info": {}, "licenses": [], "images": images, "annotations": rows}
        (folder / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
    return folder
