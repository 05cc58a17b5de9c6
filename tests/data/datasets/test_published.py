# SPDX-License-Identifier: Apache-2.0
"""Published annotation files with a node changed to something else: read, dropped or refused, never a traceback."""

from __future__ import annotations

import copy
import json
import random

import pytest

from tests.data import raw
from tests.data.datasets import test_visual_genome
from vlp_jax.data.datasets import Dropped, coco, flickr30k, gcc, published, sbu, visual_genome
from vlp_jax.types import UserError

STRANGE = (None, True, -1, 0, 1.5, 2**80, "", "x", "7", "\ud800", [], [1], {}, {"id": 1}, [[]], "a" * 20_000)


def _coco(folder):
    raw.coco(folder, {"train2017": 2, "val2017": 2})
    rows = [{"image_id": 1, "bbox": [1, 2, 3, 4]}]
    return coco, [
        folder / "annotations" / "captions_train2017.json",
        raw.coco_instances(folder, "train2017", [raw.coco_image(1)], rows),
    ]


def _karpathy(folder):
    raw.coco(folder, {"val2014": 4})
    rows = [raw.karpathy(key, split) for key, split in enumerate(("train", "val", "test"), 1)]
    return coco, [raw.write(folder / "dataset_coco.json", {"images": rows})]


def _flickr30k(folder):
    raw.pictures(folder / "flickr30k-images", "1.jpg")
    rows = [{"filename": "1.jpg", "split": "val", "sentences": [{"raw": "a"}, {"raw": "b"}]}]
    return flickr30k, [raw.write(folder / "dataset_flickr30k.json", {"images": rows})]


def _visual_genome(folder):
    raw.pictures(folder, "VG_100K/1.jpg", "VG_100K_2/2.jpg")
    layouts = {"image_data.json": [test_visual_genome.IMAGES], **test_visual_genome.FILES}
    return visual_genome, [raw.write(folder / name, layout[0]) for name, layout in layouts.items()]


def _sbu(folder):
    raw.pictures(folder / "images", "0.jpg", "1.jpg")
    content = {"image_urls": ["http://a/1.jpg", "http://a/2.jpg"], "captions": ["a", "b"], "user_ids": []}
    return sbu, [raw.write(folder / "sbu-captions-all.json", content)]


def _gcc(folder):
    raw.pictures(folder / "train", "0.jpg", "1.jpg")
    return gcc, [raw.write(folder / "train_annot.json", [["a/0.jpg", "a"], ["a/1.jpg", ["b", "c"]]])]


def nodes(content, path=()):
    """The paths of all nodes."""
    yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content if isinstance(content, list) else ())
    )
    for key, value in items:
        yield from nodes(value, (*path, key))


def changed(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is Ellipsis:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.mark.parametrize("make", [_coco, _karpathy, _flickr30k, _visual_genome, _sbu, _gcc])
def test_any_node_may_be_anything(tmp_path, make):
    module, paths = make(tmp_path)
    assert list(module.listing(tmp_path, map)), "the files as they should be"
    rng, refused = random.Random(0), 0
    for path in paths:
        good = json.loads(path.read_text())
        for node in nodes(good):
            for value in (*rng.sample(STRANGE, 6), *([...] if node else [])):
                path.write_text(json.dumps(changed(good, node, value)))
                try:
                    module.check(tmp_path)
                    for split, one in module.listing(tmp_path, map):
                        assert split in published.SPLITS and isinstance(one, dict | Dropped)
                        json.dumps(one) if isinstance(one, dict) else one.reason.encode()
                except UserError as error:
                    refused += 1
                    assert len(str(error)) < 1500 and str(error).count(". ") >= 1
        text = json.dumps(good)
        for _ in range(20):
            path.write_text(text[: rng.randrange(len(text))])
            with pytest.raises(UserError, match=path.name):
                module.check(tmp_path)
                list(module.listing(tmp_path, map))
        raw.write(path, good)
    assert refused > 10


def test_flickr_ids_of_addresses():
    addresses = {
        "http://farm6.staticflickr.com/5021/5560942229_40538af5b5_z.jpg": 5560942229,
        "http://static.flickr.com/2723/4385058960_b0f291553e.jpg": 4385058960,
        "https://live.staticflickr.com/65535/123_0a.jpg": 123,
        "https://c2.staticflickr.com/2/1433/946782888_84c5811a41_o.jpg": 946782888,
        "http://notflickr.org/2723/4385058960_b0f291553e.jpg": 0,
        "http://farm6.staticflickr.com/5021/logo.png": 0,
        "": 0,
        None: 0,
    }
    assert {url: published.flickr_id(url) for url in addresses} == addresses


def test_real_addresses(realdata):
    """Open Images photographs of the Conceptual Captions task: the landing page has the same number."""
    import csv

    with (realdata / "cc_images" / "credits.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "staticflickr" in row["OriginalURL"]]
    assert len(rows) > 10
    for row in rows:
        assert published.flickr_id(row["OriginalURL"]) == int(
            row["OriginalLandingURL"].rstrip("/").rpartition("/")[2]
        )
