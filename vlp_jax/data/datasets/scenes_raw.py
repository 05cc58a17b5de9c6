# SPDX-License-Identifier: Apache-2.0
"""Writes scenes as the public data sets publish theirs: COCO, Karpathy, VQAv2, Visual Genome, NLVR2, SNLI-VE, RefCOCO+.

A row is one picture: key (its id), folder, file, height, width, objects, captions.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlp_jax.data.datasets import scenes_picture, scenes_questions
from vlp_jax.data.datasets import scenes_text as text
from vlp_jax.data.datasets import scenes_world as world

FOLDERS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
INFO = {
    "description": "scenes: a drawn world",
    "version": "1",
    "year": 2026,
    "contributor": "vlp_jax",
    "url": "",
}
LICENCES = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
NLVR2_NAMES = {"train": "train", "validation": "dev", "test": "test1"}
VE_NAMES = {"train": "train", "validation": "dev", "test": "test"}


def write(folder: Path, rows: dict[str, list[dict]], seed: int, level: int) -> None:
    """Writes all annotation files below `folder`, where the pictures already lie."""
    for split, members in rows.items():
        lot = world.lot(seed, level, split, 0, "tasks")
        _coco(folder / "annotations", split, members)
        _vqa(folder / "vqa", split, members, level, lot)
        _nlvr2(folder / "nlvr2", folder, split, members, lot)
        _snli_ve(folder / "snli_ve", folder, split, members, lot)
    _karpathy(folder / "dataset_coco.json", rows)
    _visual_genome(folder / "visual_genome", folder, [row for members in rows.values() for row in members])
    _refcoco(folder / "refcoco_plus", rows)


def _dump(path: Path, items: Iterable[dict], head: dict | None = None, key: str = "") -> None:
    """Writes a json list, or `head` with the list under `key`, one item a line: never all in memory as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if head is None else f'{json.dumps(head)[:-1]}, "{key}": [')
        for number, item in enumerate(items):
            file.write(("\n" if number == 0 else ",\n") + json.dumps(item))
        file.write("\n]" if head is None else "\n]}")


def _dump_lines(path: Path, items: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def _place(picture: Path, target: Path) -> None:
    """The same picture under another data set's name: a hard link where the disk has them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(picture, target)
    except OSError:
        shutil.copyfile(picture, target)


def _coco(folder: Path, split: str, rows: list[dict]) -> None:
    name = FOLDERS[split]
    images = [
        {
            "license": 1,
            "file_name": row["file"],
            "coco_url": "",
            "flickr_url": "",
            "height": row["height"],
            "width": row["width"],
            "date_captured": "2026-01-01 00:00:00",
            "id": row["key"],
        }
        for row in rows
    ]
    head = {"info": INFO, "licenses": LICENCES, "images": images}
    captions = (
        {"id": row["key"] * 10 + number, "image_id": row["key"], "caption": caption}
        for row in rows
        for number, caption in enumerate(row["captions"])
    )
    _dump(folder / f"captions_{name}.json", captions, head, "annotations")
    categories = [
        {"supercategory": "object", "id": 1 + i, "name": shape} for i, shape in enumerate(world.SHAPES)
    ]
    instances = (_instance(row, number) for row in rows for number in range(len(row["objects"])))
    _dump(folder / f"instances_{name}.json", instances, head | {"categories": categories}, "annotations")
    scenes = ({"image_id": row["key"], "objects": row["objects"]} for row in rows)
    _dump(folder / f"scenes_{name}.json", scenes)


def _instance(row: dict, number: int) -> dict:
    item = row["objects"][number]
    outline = scenes_picture.outline(item)
    return {
        "id": row["key"] * 10 + number,
        "image_id": row["key"],
        "category_id": 1 + world.SHAPES.index(item["shape"]),
        "bbox": [float(value) for value in item["box"]],
        "area": scenes_picture.area(outline),
        "iscrowd": 0,
        "segmentation": [outline],
    }


def _karpathy(path: Path, rows: dict[str, list[dict]]) -> None:
    def images() -> Iterator[dict]:
        number = 0
        for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
            for row in rows[split]:
                ids = [number * 5 + i for i in range(len(row["captions"]))]
                sentences = [
                    {
                        "tokens": caption.replace(",", "").replace(":", "").split(),
                        "raw": caption,
                        "imgid": number,
                        "sentid": i,
                    }
                    for i, caption in zip(ids, row["captions"], strict=True)
                ]
                yield {
                    "filepath": row["folder"],
                    "sentids": ids,
                    "filename": row["file"],
                    "imgid": number,
                    "split": short,
                    "sentences": sentences,
                    "cocoid": row["key"],
                }
                number += 1

    _dump(path, images(), {"dataset": "coco"}, "images")


def _vqa(folder: Path, split: str, rows: list[dict], level: int, rng: random.Random) -> None:
    name = FOLDERS[split]
    questions = scenes_questions.balanced([row["objects"] for row in rows], level, rng)
    ids, asked = [], {}
    for question in questions:
        number = asked[question.row] = asked.get(question.row, -1) + 1
        ids.append(rows[question.row]["key"] * 1000 + number)
    head = {
        "info": INFO,
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": LICENCES[0],
        "data_subtype": name,
    }
    _dump(
        folder / f"v2_OpenEnded_mscoco_{name}_questions.json",
        (
            {"image_id": rows[one.row]["key"], "question": one.text.capitalize() + "?", "question_id": number}
            for number, one in zip(ids, questions, strict=True)
        ),
        head,
        "questions",
    )
    _dump(
        folder / f"v2_mscoco_{name}_annotations.json",
        (
            {
                "question_id": number,
                "image_id": rows[one.row]["key"],
                "question_type": one.kind,
                "answer_type": scenes_questions.answer_type(one.answer),
                "multiple_choice_answer": one.answer,
                "answers": scenes_questions.ten_answers(one, level, rng),
            }
            for number, one in zip(ids, questions, strict=True)
        ),
        head,
        "annotations",
    )


def _visual_genome(folder: Path, pictures: Path, rows: list[dict]) -> None:
    def boxes(row: dict, number: int) -> dict:
        x, y, width, height = row["objects"][number]["box"]
        item = {"object_id": row["key"] * 10 + number, "x": x, "y": y, "w": width, "h": height}
        return item | {"names": [row["objects"][number]["shape"]], "synsets": []}

    def attributes(item: dict) -> list[str]:
        return [item["color"], item["material"], item["size"]]

    def regions(row: dict) -> Iterator[dict]:
        for number, item in enumerate(row["objects"]):
            x, y, width, height = item["box"]
            phrase = f"a {item['material']} {item['color']} {item['shape']}"
            region = {"region_id": row["key"] * 10 + number, "image_id": row["key"], "phrase": phrase}
            yield region | {"x": x, "y": y, "width": width, "height": height}

    for row in rows:
        _place(pictures / row["folder"] / row["file"], folder / "VG_100K" / f"{row['key']}.jpg")
    numbers = [range(len(row["objects"])) for row in rows]
    urls = [f"VG_100K/{row['key']}.jpg" for row in rows]
    _dump(
        folder / "image_data.json",
        (
            {
                "image_id": row["key"],
                "url": url,
                "width": row["width"],
                "height": row["height"],
                "coco_id": row["key"],
                "flickr_id": None,
            }
            for row, url in zip(rows, urls, strict=True)
        ),
    )
    _dump(
        folder / "objects.json",
        (
            {
                "image_id": row["key"],
                "image_url": url,
                "objects": [boxes(row, i) | {"merged_object_ids": []} for i in some],
            }
            for row, url, some in zip(rows, urls, numbers, strict=True)
        ),
    )
    _dump(
        folder / "attributes.json",
        (
            {
                "image_id": row["key"],
                "attributes": [boxes(row, i) | {"attributes": attributes(row["objects"][i])} for i in some],
            }
            for row, some in zip(rows, numbers, strict=True)
        ),
    )
    _dump(
        folder / "region_descriptions.json",
        ({"id": row["key"], "regions": list(regions(row))} for row in rows),
    )


def _sentence(rng: random.Random) -> tuple[str, object]:
    """A sentence about two pictures and the test of its truth."""
    color, shape = rng.choice(world.COLORS), rng.choice(world.SHAPES)

    def shows(key: str, value: str, objects: list[dict]) -> bool:
        return any(item[key] == value for item in objects)

    total = rng.choice((2, 3, 4, 5, 6))
    return rng.choice(
        (
            (
                f"Both images show a {shape}.",
                lambda a, b: shows("shape", shape, a) and shows("shape", shape, b),
            ),
            (
                f"Only one image shows a {color} object.",
                lambda a, b: shows("color", color, a) != shows("color", color, b),
            ),
            (
                "There are more objects in the left image than in the right image.",
                lambda a, b: len(a) > len(b),
            ),
            (f"There are {total} objects in the two images together.", lambda a, b: len(a) + len(b) == total),
            (
                f"The left image shows a {color} object and the right image shows a {shape}.",
                lambda a, b: shows("color", color, a) and shows("shape", shape, b),
            ),
        )
    )


def _nlvr2(folder: Path, pictures: Path, split: str, rows: list[dict], rng: random.Random) -> None:
    """Each sentence stands with one pair of pictures of which it is true and one of which it is false."""
    name = NLVR2_NAMES[split]
    lines = []
    for number in range(len(rows) // 8):
        sentence, holds = _sentence(rng)
        pairs = [rng.sample(rows, 2) for _ in range(400)]
        by_label = {
            label: next((p for p in pairs if holds(p[0]["objects"], p[1]["objects"]) == label), None)
            for label in (True, False)
        }
        if None in by_label.values():
            continue
        for pair, (label, (left, right)) in enumerate(sorted(by_label.items())):
            directory = str(number % 100)
            place = folder / "images" / "train" / directory if split == "train" else folder / name
            for side, row in enumerate((left, right)):
                _place(
                    pictures / row["folder"] / row["file"], place / f"{name}-{number}-{pair}-img{side}.png"
                )
            line = {
                "sentence": sentence,
                "left_url": left["file"],
                "right_url": right["file"],
                "label": str(label),
                "identifier": f"{name}-{number}-{pair}-0",
                "writer": "0",
                "validation": {"0": str(label)},
                "extra_validations": {},
                "synset": "object",
                "query": "objects",
            }
            lines.append(line | ({"directory": number % 100} if split == "train" else {}))
    _dump_lines(folder / "data" / f"{name}.json", lines)


def _snli_ve(folder: Path, pictures: Path, split: str, rows: list[dict], rng: random.Random) -> None:
    """Three sentences for every fourth picture: true, false, and one that no picture can show ("heavy")."""

    def lines() -> Iterator[dict]:
        for row in rows[::4]:
            objects = row["objects"]
            _place(pictures / row["folder"] / row["file"], folder / "flickr30k-images" / f"{row['key']}.jpg")
            premise, true = rng.sample(row["captions"], 2)
            present, absent = _heavy(objects, True, rng), _heavy(objects, False, rng)
            other = [caption for one in rng.sample(rows, min(8, len(rows))) for caption in one["captions"]]
            false = next((caption for caption in other if not text.truth(caption, objects)), absent)
            for label, sentence in (
                ("entailment", true),
                ("contradiction", rng.choice((false, absent))),
                ("neutral", present),
            ):
                yield {
                    "Flickr30K_ID": str(row["key"]),
                    "annotator_labels": [label],
                    "captionID": f"{row['key']}.jpg#0",
                    "gold_label": label,
                    "pairID": f"{row['key']}.jpg#0r1{label[0]}",
                    "sentence1": premise,
                    "sentence2": sentence,
                }

    _dump_lines(folder / f"snli_ve_{VE_NAMES[split]}.jsonl", lines())


def _heavy(objects: list[dict], present: bool, rng: random.Random) -> str:
    here = {(item["color"], item["shape"]) for item in objects}
    every = [(color, shape) for color in world.COLORS for shape in world.SHAPES]
    color, shape = rng.choice([one for one in every if (one in here) == present])
    return f"there is a heavy {color} {shape}"


def _refcoco(folder: Path, rows: dict[str, list[dict]]) -> None:
    """One object of every picture with several, in words that fit it alone and tell no place (RefCOCO+)."""
    refs = []
    for split, members in rows.items():
        for row in members:
            number = row["key"] % len(row["objects"])
            if len(row["objects"]) == 1:
                continue
            item = row["objects"][number]
            part = {"train": "train", "validation": "val"}.get(split) or (
                "testA" if item["shape"] in ("cube", "ball") else "testB"
            )
            ref = row["key"] * 10 + number
            sentences = [
                {"tokens": sentence.split(), "raw": sentence, "sent": sentence, "sent_id": ref * 10 + i}
                for i, sentence in enumerate(_expressions(item, row["objects"]))
            ]
            refs.append(
                {
                    "ref_id": ref,
                    "ann_id": ref,
                    "category_id": 1 + world.SHAPES.index(item["shape"]),
                    "image_id": row["key"],
                    "file_name": f"{Path(row['file']).stem}_{number}.jpg",
                    "split": part,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    _dump(folder / "refs(unc).json", refs)
    everything = [row for members in rows.values() for row in members]
    images = [
        {"id": row["key"], "file_name": row["file"], "height": row["height"], "width": row["width"]}
        for row in everything
    ]
    categories = [
        {"supercategory": "object", "id": 1 + i, "name": shape} for i, shape in enumerate(world.SHAPES)
    ]
    instances = (_instance(row, number) for row in everything for number in range(len(row["objects"])))
    _dump(folder / "instances.json", instances, {"images": images, "categories": categories}, "annotations")


def _expressions(item: dict, objects: list[dict]) -> list[str]:
    """At most three expressions, the shortest first."""
    wanted = (
        ("shape",),
        ("color",),
        ("material", "shape"),
        ("color", "shape"),
        ("material", "color", "shape"),
    )
    found = []
    for keys in wanted:
        if sum(all(other[key] == item[key] for key in keys) for other in objects) == 1:
            words = [item[key] for key in keys]
            found.append(" ".join(words if "shape" in keys else [*words, "object"]))
    return found[:3]
