# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of examples as the pipeline gives them, one self-contained HTML file without a script.

The picture is put together again from the batch's patches, the text decoded from its ids; boxes and all that the record
says stand with it. Captions come from strangers: everything is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import pipeline
from vlp_jax.data.source import Source
from vlp_jax.data.text import CONTINUED, SPACE_MARK, Vocabulary
from vlp_jax.files import save
from vlp_jax.types import UserError

MARK = "<!doctype html><!-- contact sheet by vlp_jax.doctor -->"
BATCH = 8
NOT_THERE = (128, 128, 128)  # patches that were not kept
MOST_PICTURES = 2000  # on one sheet, which is made in memory: about 100 kB each
MOST_BOXES = 60  # drawn a picture
LETTER = 32  # of so many a picture is wide, whatever its pixels
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_TEXTS = (("captions", "caption"), ("questions", "question"), ("labels", "label"))
_STYLE = """body{font:14px/1.4 sans-serif;margin:16px;background:#fafafa;color:#111}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:16px}
article{background:#fff;border:1px solid #ccc;border-radius:6px;padding:10px;overflow:hidden}
figure{margin:0 0 8px;position:relative;line-height:0}figure img{width:100%;height:auto;display:block}
figure svg{position:absolute;inset:0;width:100%;height:100%}
h2{font-size:13px;margin:0 0 6px;color:#555;font-weight:normal;overflow-wrap:anywhere}
p,li{margin:2px 0;overflow-wrap:anywhere}ul{margin:4px 0;padding-left:18px;max-height:24em;overflow:auto}
mark{background:#ffd54f;padding:0 2px}del{color:#b00}.given{font-weight:bold}small{color:#666}"""


def write(config: Any, path: str | Path, split: str, records: int = 0) -> int:
    """Writes the sheet, whole or not at all; a file that is there is replaced only if it is such a sheet.

    Args:
        config: reads data (data.dir, one prepared directory) and evaluation, as `pipeline.evaluation_batches`.
        path: of the HTML file.
        split: of the data.
        records: how many, evenly spread; 0 = all.

    Returns:
        The number of pictures on it.

    Raises:
        UserError: data that cannot be used, a split without captions, or a file that is in the way.
    """
    path = Path(path).expanduser()
    _check_place(path)
    source = Source(config.data.dir, split)
    if not source.pairs:
        raise UserError(
            f"The split {split} of {source.directory} has no captions, so that the pipeline gives no examples of it. "
            "Choose another --browse_split."
        )
    vocabulary = Vocabulary.load(source.vocabulary_path)
    rows = _rows(config, source, split, records)
    cells = [_cell(row, source, vocabulary, config.data.patch_size) for row in rows]
    title = html.escape(f"{source.manifest['dataset']} {split}: {len(cells)} of {len(source)} pictures")
    places = (
        f"{source.directory}; shorter side {config.data.image_size}, text length {config.data.text_length}"
    )
    page = (
        f'{MARK}<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\"><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{html.escape(places)}. <mark>Marked</mark>: what the model sees in place of <del>the original</del>. "
        f"<b>Bold</b>: the caption of the example. Grey: patches that are not kept.</p>"
        f"<main>{''.join(cells)}</main></body></html>\n"
    )
    save(path, page.encode("utf-8", "replace"))
    return len(cells)


def _check_place(path: Path) -> None:
    """Looks before the work whether the file can be written."""
    if not path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: there is no folder {path.parent}. Make it or choose another."
        )
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MARK)) == MARK.encode():
                return
    raise UserError(
        f"{path} is there already and is no contact sheet of doctor, so it is not replaced. Choose another --browse=FILE."
    )


def _rows(config: Any, source: Source, split: str, records: int) -> list[dict[str, np.ndarray]]:
    """One row of a batch for each of so many records, in the order of the split."""
    wanted = min(records or len(source), int(np.count_nonzero(source.captions)))
    if wanted > MOST_PICTURES:
        raise UserError(
            f"A contact sheet of {wanted} pictures is more than browsers show; at most {MOST_PICTURES} fit. Give a "
            "smaller --browse_records."
        )
    found: dict[int, dict[str, np.ndarray]] = {}
    for batch in pipeline.evaluation_batches(config, split=split, batch_size=BATCH):
        for number, record in enumerate(batch["image_id"].tolist()):
            if record >= 0 and len(found) < wanted:
                found.setdefault(record, {key: values[number] for key, values in batch.items()})
        if len(found) == wanted:
            break
    return [found[record] for record in sorted(found)]


def restore(row: Mapping[str, np.ndarray], patch: int) -> np.ndarray:
    """Puts the picture of one row of a batch together again.

    Args:
        row: patches, patch_positions, patch_mask and grid_size of an example.
        patch: side of a patch in pixels.

    Returns:
        uint8 [rows x patch, columns x patch, 3]; patches that were not kept are grey.
    """
    rows, columns = (int(side) for side in row["grid_size"])
    grid = np.full((rows, columns, patch, patch, 3), NOT_THERE, np.uint8)
    kept = np.flatnonzero(row["patch_mask"])
    y, x = row["patch_positions"][kept].T
    grid[y, x] = row["patches"][kept].reshape(-1, patch, patch, 3)
    return grid.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


def _cell(row: Mapping[str, np.ndarray], source: Source, vocabulary: Vocabulary, patch: int) -> str:
    number = int(row["image_id"])
    record = source.read([number])[0]
    picture = restore(row, patch)
    given = int(row["example_id"] - source.pair(np.array([number]), np.array([0]))[0])
    height, width = int(source.heights[number]), int(source.widths[number])
    ids = [f"{key} {record[key]}" for key in ("image_key", "coco_id", "flickr_id") if record.get(key)]
    name = record.get("image_name", "")
    facts = [
        f"row {number}",
        name,
        *ids,
        f"{height} x {width}",
        f"{picture.shape[0]} x {picture.shape[1]} given",
    ]
    return (
        f"<article><h2>{' · '.join(f'<bdi>{html.escape(str(fact))}</bdi>' for fact in facts)}</h2>"
        f"{_figure(picture, record, height, width, name)}"
        f'<p dir="auto">{pieces(row, vocabulary)}</p>'
        f"<p><small>decoded: <bdi>{html.escape(vocabulary.decode(row['text_ids']))}</bdi></small></p>"
        f"<ul>{''.join(_lines(record, given))}</ul></article>"
    )


def _figure(picture: np.ndarray, record: Mapping[str, Any], height: int, width: int, name: str) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    tall, wide = picture.shape[:2]
    drawn = "".join(_drawn(record, tall / height, wide / width, wide))
    return (
        f'<figure><img alt="{html.escape(name)}" width="{wide}" height="{tall}" src="data:image/jpeg;base64,{data}">'
        f'<svg viewBox="0 0 {wide} {tall}" font-size="{wide / LETTER:.1f}" font-family="sans-serif">{drawn}</svg></figure>'
    )


def _drawn(record: Mapping[str, Any], down: float, right: float, wide: int) -> Iterator[str]:
    """Boxes with names; those of phrases dashed, with the number of the caption."""
    boxes, names = _boxes(record, "boxes"), record.get("box_names", [])
    crowds = record.get("box_crowd", [])
    marks = [
        (box, names[place] if place < len(names) else str(place), place < len(crowds) and crowds[place])
        for place, box in enumerate(boxes)
    ]
    marks += [(box, f"#{place}", True) for place, box in enumerate(_boxes(record, "caption_boxes"))]
    size = wide / LETTER
    for number, ((x, y, width, height), label, dashed) in enumerate(marks[:MOST_BOXES]):
        x, y, width, height = x * right, y * down, width * right, height * down
        colour = COLOURS[number % len(COLOURS)]
        line = f'stroke="{colour}" stroke-width="{size / 8:.2f}"'
        line += f' stroke-dasharray="{size / 2:.1f}"' * bool(dashed)
        yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none" {line}/>'
        words = html.escape(label if len(label) <= 24 else f"{label[:23]}…")
        yield (
            f'<text x="{x + size / 5:.1f}" y="{y + size:.1f}" fill="{colour}" stroke="#fff" stroke-width="{size / 4:.2f}" '
            f'paint-order="stroke">{words}</text>'
        )


def _boxes(record: Mapping[str, Any], name: str) -> list[list[float]]:
    boxes = np.asarray(record.get(name, ()), np.float64).reshape(-1, 4)
    return np.nan_to_num(boxes, posinf=0, neginf=0).tolist()


def pieces(row: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> str:
    """The text of one row of a batch as HTML: its pieces joined to words, the masked ones marked.

    Args:
        row: text_ids, text_mask, mlm_positions, mlm_inputs and mlm_labels of an example.
    """
    masked = {
        int(place): int(seen)
        for place, seen, label in zip(row["mlm_positions"], row["mlm_inputs"], row["mlm_labels"], strict=True)
        if label >= 0
    }
    shown = []
    for place in np.flatnonzero(row["text_mask"]).tolist():
        piece = int(row["text_ids"][place])
        if piece in (vocabulary.cls, vocabulary.sep):
            continue
        text = html.escape(vocabulary.word(piece))
        if place in masked:
            text = f"<mark>{html.escape(vocabulary.word(masked[place]))}</mark><del>{text}</del>"
        written = vocabulary.pieces[piece]
        apart = written.startswith(SPACE_MARK) or (
            vocabulary.path.suffix == ".txt" and not written.startswith(CONTINUED)
        )
        shown.append((" " if apart else "") + text)
    return "".join(shown)


def _lines(record: Mapping[str, Any], given: int) -> Iterator[str]:
    """All that a record says, a list item each."""
    answers = record.get("answers", [])
    for field, what in _TEXTS:
        for place, text in enumerate(record.get(field, ())):
            words = f'<bdi dir="auto">{html.escape(text)}</bdi>'
            if field == "questions" and place < len(answers):
                words += f" → <bdi>{html.escape(answers[place])}</bdi>"
            kind = ' class="given"' if field == "captions" and place == given else ""
            yield f"<li{kind}><small>{what} #{place}</small> {words}</li>"
    attributes = record.get("box_attributes", [])
    names = record.get("box_names", [])
    count = len(_boxes(record, "boxes"))
    if count:
        some = [
            f"{name} ({attributes[i]})" if i < len(attributes) and attributes[i] else name
            for i, name in enumerate(names)
        ]
        yield f"<li><small>boxes: {count}</small> <bdi>{html.escape(', '.join(some[:MOST_BOXES]))}</bdi></li>"
    if "image_1" in record:
        size = f"{record.get('height_1')} x {record.get('width_1')}"
        yield f"<li><small>second picture</small> {html.escape(size)}</li>"
    if record.get("scene"):
        yield f"<li><small>scene</small> <bdi>{html.escape(str(record['scene'])[:400])}</bdi></li>"
