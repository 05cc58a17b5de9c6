# SPDX-License-Identifier: Apache-2.0
"""COCO's published numbers and the original DETR's post-processing; what is padding, empty, crowded or not finite."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vlp_jax.data import categories
from vlp_jax.evaluation import detection
from vlp_jax.evaluation.detection import SCORES, Detection, Detections, Objects, average_precision
from vlp_jax.evaluation.runner import evaluate
from vlp_jax.parallel import mesh as meshes

RAW = [f"detection/{name}" for name in SCORES]


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(ConfigDict({"rules": "dp", "mesh": ()}))


@pytest.fixture(scope="module")
def coco(realdata):
    """Truth and results of a hundred pictures of val2014 by COCO id, and the twelve numbers of its toolbox."""
    folder = realdata / "coco_eval"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    said = {image["id"]: [] for image in truth["images"]}
    there = {image["id"]: [] for image in truth["images"]}
    for row in results:
        said[row["image_id"]].append(row)
    for row in truth["annotations"]:
        there[row["image_id"]].append(row)
    objects, found = {}, {}
    for image in truth["images"]:
        rows = there[image["id"]]
        columns = [[row[name] for row in rows] for name in ("bbox", "category_id", "iscrowd", "area")]
        boxes = np.array(columns[0], np.float64).reshape(-1, 4)
        objects[image["id"]] = Objects(image["height"], image["width"], boxes, *map(np.array, columns[1:]))
        rows = said[image["id"]]
        columns = [np.array([row[name] for row in rows]) for name in ("score", "category_id", "bbox")]
        found[image["id"]] = Detections(columns[0], columns[1].astype(int), columns[2].reshape(-1, 4))
    official = json.loads((realdata / "golden" / "coco_ap_official.json").read_text())["bbox"]["stats"]
    text = (folder / "val2014_fake_eval_res.txt").read_text()
    printed = re.findall(
        r"= (\d\.\d{3})$", text[text.index("type=bbox") : text.index("type=keypoints")], re.M
    )
    return objects, found, official, [float(number) for number in printed]


def test_the_published_numbers(coco, capsys):
    objects, found, official, printed = coco
    keys = sorted(objects)
    assert any(picture.crowd.any() for picture in objects.values())
    scores = average_precision([objects[key] for key in keys], [found[key] for key in keys])
    assert list(scores) == list(SCORES)
    np.testing.assert_allclose(list(scores.values()), official, rtol=1e-12)
    assert [round(value, 3) for value in scores.values()] == printed
    assert capsys.readouterr().out == ""


class Parrot:
    """Says what a table holds for the picture, as the logits and fractions that a model would give."""

    def __init__(self, objects, found, keys, classes):
        """`classes`: the category of each class of the model."""
        self.queries = max(len(found[key].scores) for key in keys)
        index = {category: number for number, category in enumerate(classes)}
        self.logits = np.full((len(keys), self.queries, len(classes) + 1), -30.0, np.float32)
        self.logits[..., -1] = 0.0
        self.boxes = np.zeros((len(keys), self.queries, 4), np.float32)
        for row, key in enumerate(keys):
            size = np.tile([objects[key].width, objects[key].height], 2)
            one = found[key]
            places = np.arange(len(one.scores)), [index[label] for label in one.labels]
            # Against "no object" at 0 the class has this probability.
            self.logits[row][places] = np.log(one.scores) - np.log1p(-one.scores)
            centers = np.concatenate([one.boxes[:, :2] + one.boxes[:, 2:] / 2, one.boxes[:, 2:]], 1)
            self.boxes[row, : len(one.scores)] = centers / size
        self.predict = {"boxes": jax.jit(self.say)}

    def say(self, params, batch):
        rows = batch["image_id"]
        return {"class_logits": params["logits"][rows], "boxes": params["boxes"][rows]}

    @property
    def params(self):
        return {"logits": self.logits, "boxes": self.boxes}


def rows_of(keys, size, order=None):
    """Batches of a pass; the last one is filled up with padding rows that hold rubbish."""
    order = list(range(len(keys)) if order is None else order)
    for start in range(0, len(order), size):
        rows = np.array((order[start : start + size] + [0] * size)[:size], np.int32)
        real = np.arange(size) < len(order) - start
        yield {
            "image_id": np.where(real, rows, -1).astype(np.int32),
            "example_id": np.where(real, rows, -1).astype(np.int32),
            "source_id": np.where(real, 0, -1).astype(np.int32),
        }


def test_the_whole_task_on_any_split_into_batches(coco, mesh):
    """Some detections of a picture are many more than others': the rest of its queries says rubbish with chance 1e-13."""
    objects, found, official, _ = coco
    keys = sorted(objects)
    parrot = Parrot(objects, found, keys, tuple(categories.COCO))

    def truth(source, rows):
        assert source == 0
        return [objects[keys[row]] for row in rows]

    task, passes = Detection(parrot, truth, tuple(categories.COCO), blind=False), []
    shuffled = np.random.default_rng(0).permutation(len(keys)).tolist()
    twice = shuffled + shuffled[:20]
    for size, order in ((8, None), (64, None), (40, shuffled), (16, twice)):
        passes.append(evaluate(parrot, parrot.params, rows_of(keys, size, order), [task], mesh))
    assert all(scores == passes[0] for scores in passes)
    assert list(passes[0]) == RAW
    scores, labels = detection.best_class(parrot.logits)
    plain = [
        Detections(
            np.asarray(scores[row]),
            np.array(tuple(categories.COCO))[labels[row]],
            detection.absolute(parrot.boxes[row], objects[key].height, objects[key].width),
        )
        for row, key in enumerate(keys)
    ]
    assert list(passes[0].values()) == list(average_precision([objects[k] for k in keys], plain).values())
    # Some of the published boxes overlap by a threshold to the bit, and fractions in float32 miss it.
    np.testing.assert_allclose(list(passes[0].values()), official, atol=1e-3)
    assert len(task.objects) == len(task.detections) == 100


def test_golden_post_processing(specs):
    with np.load(specs / "goldens_detr.npz") as golden:
        scores, labels = detection.best_class(golden["pred_logits"][-1])
        np.testing.assert_allclose(scores, golden["pp_scores"], rtol=1e-6)
        np.testing.assert_array_equal(labels, golden["pp_labels"])
        for row, size in enumerate([(480, 640), (100, 50), (333, 500)]):
            boxes = detection.absolute(golden["pred_boxes"][-1][row], *size)
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], -1)
            np.testing.assert_allclose(corners, golden["pp_boxes"][row], rtol=1e-6, atol=1e-3)


def picture(boxes=(), labels=(), crowd=None, area=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    crowd = np.zeros(len(boxes), int) if crowd is None else np.array(crowd)
    area = boxes[:, 2] * boxes[:, 3] if area is None else np.array(area)
    return Objects(100, 200, boxes, np.array(labels, int), crowd, area)


def said(boxes=(), labels=(), scores=()):
    return Detections(np.array(scores), np.array(labels, int), np.array(boxes, np.float64).reshape(-1, 4))


BOX, FAR = (10, 10, 50, 50), (120, 10, 50, 50)


def test_right_and_wrong():
    assert average_precision([picture([BOX], [3])], [said([BOX], [3], [0.01])])["ap"] == pytest.approx(1)
    assert average_precision([picture([BOX], [3])], [said([BOX], [4], [0.9])])["ap"] == 0
    # The first object, number 0 of all, is found as well as any other.
    both = average_precision([picture([BOX, FAR], [0, 0])], [said([BOX, FAR], [0, 0], [0.9, 0.8])])
    assert both["ap"] == pytest.approx(both["ar_10"]) == 1 and both["ar_1"] == 0.5
    # A wrong one with the higher score halves precision; with the lower score it costs nothing.
    for scores, expected in (((0.9, 0.8), 0.5), ((0.8, 0.9), 1.0)):
        found = average_precision([picture([BOX], [1])], [said([FAR, BOX], [1, 1], scores)])
        assert found["ap"] == pytest.approx(expected)


def test_sizes_that_are_not_there_are_left_out():
    scores = average_precision([picture([BOX], [3])], [said([BOX], [3], [0.5])])
    assert set(SCORES) - set(scores) == {"ap_small", "ap_large", "ar_small", "ar_large"}
    scores = average_precision([picture([BOX], [3], area=[1000.0])], [said([BOX], [3], [0.5])])
    assert "ap_small" in scores and "ap_medium" not in scores  # the mask's area decides, not the box's


def test_no_detections_and_no_objects(capsys):
    nothing, empty = said(), picture()
    scores = average_precision([picture([BOX], [3])], [nothing])
    assert scores["ap"] == scores["ar_100"] == 0
    assert average_precision([empty], [said([BOX], [3], [0.5])]) == {}
    assert average_precision([empty], [nothing]) == average_precision([], []) == {}
    crowded = picture([BOX], [3], crowd=[1])
    assert average_precision([crowded], [said([BOX], [3], [0.5])]) == {}
    assert capsys.readouterr().out == ""


def test_detections_in_a_picture_without_objects_count_against():
    full, empty = picture([BOX], [3]), picture()
    found = said([BOX], [3], [0.5])
    assert average_precision([full, empty], [found, said()])["ap"] == pytest.approx(1)
    assert average_precision([full, empty], [found, said([BOX], [3], [0.9])])["ap"] == pytest.approx(0.5)
    # A class that no picture has is not measured.
    assert average_precision([full, empty], [found, said([BOX], [9], [0.9])])["ap"] == pytest.approx(1)


def test_a_crowd_takes_any_number_of_detections():
    crowded = picture([BOX, (100, 0, 100, 100)], [3, 3], crowd=[0, 1])
    inside = [(100 + 10 * i, 10, 30, 30) for i in range(5)]
    assert average_precision([crowded], [said([*inside, BOX], [3] * 6, [0.9] * 5 + [0.5])])[
        "ap"
    ] == pytest.approx(1)
    plain = picture([BOX, (100, 0, 100, 100)], [3, 3])
    assert average_precision([plain], [said([*inside, BOX], [3] * 6, [0.9] * 5 + [0.5])])["ap"] < 0.2


def test_boxes_without_area_and_numbers_that_are_none():
    point = (30, 30, 0, 0)
    scores = average_precision([picture([BOX, point], [3, 3])], [said([BOX, point], [3, 3], [0.5, 0.9])])
    assert 0 < scores["ap"] < 1 and scores["ar_100"] == 0.5  # a point is never found
    good, bad = said([BOX], [3], [0.5]), [(np.nan, 0, 1, 1), BOX, (0, 0, np.inf, 1)]
    expected = average_precision([picture([BOX], [3])], [good])
    broken = said([BOX, *bad], [3] * 4, [0.5, 0.9, np.nan, 0.9])
    assert average_precision([picture([BOX], [3])], [broken]) == expected
    unsure = said([BOX], [3], [np.nan])
    assert average_precision([picture([BOX], [3])], [unsure])["ar_100"] == 0


def test_objects_of_unknown_categories_are_counted(mesh):
    record = {"height": 100, "width": 200, "boxes": [BOX, FAR, BOX], "box_names": ["cat", "unicorn", "dog"]}
    objects = Objects.of(record, {"cat": 1, "dog": 0})
    assert objects.labels.tolist() == [1, -1, 0] and objects.area.tolist() == [2500.0] * 3
    assert not objects.crowd.any()
    whole = Objects.of(record | {"box_crowd": [0, 0, 1], "box_area": [1, 2, 3.5]}, {})
    assert whole.crowd.tolist() == [0, 0, 1] and whole.area.tolist() == [1, 2, 3.5]
    assert Objects.of({"height": 1, "width": 2, "boxes": [], "box_names": []}, {}).boxes.shape == (0, 4)

    found = {0: said([BOX, BOX], [1, 0], [0.5, 0.5])}
    parrot = Parrot({0: objects}, found, [0], (0, 1))
    task = Detection(parrot, lambda source, rows: [objects for _ in rows], blind=False)
    scores = evaluate(parrot, parrot.params, rows_of([0], 8), [task], mesh)
    assert scores["detection/unknown_objects"] == pytest.approx(1 / 3)
    assert scores["detection/ap"] == pytest.approx(1) and "detection/ap_small" not in scores


def test_a_pass_without_objects_has_no_score(mesh):
    parrot = Parrot({0: picture()}, {0: said([BOX], [1], [0.5])}, [0], (0, 1))
    task = Detection(parrot, lambda source, rows: [picture() for _ in rows])
    assert evaluate(parrot, parrot.params, rows_of([0], 8), [task], mesh) == {}


def test_pictures_of_several_sources_are_told_apart(mesh):
    worlds = [picture([BOX], [1]), picture([FAR], [1])]
    parrot = Parrot({0: worlds[0]}, {0: said([BOX], [1], [0.5])}, [0], (0, 1))
    task = Detection(parrot, lambda source, rows: [worlds[source] for _ in rows])
    batch = dict(next(rows_of([0], 8)), source_id=np.array([0, 1] + [-1] * 6, np.int32))
    batch["example_id"] = np.array([0, 0] + [-1] * 6, np.int32)
    scores = evaluate(parrot, parrot.params, [batch], [task], mesh)
    assert len(task.objects) == 2 and scores["detection/ar_100"] == pytest.approx(0.5)


class Seeing:
    """Finds the objects of two classes in any picture, and says of a withheld one that the first lies at `BOX`."""

    def __init__(self, parrot):
        self.parrot, self.predict = parrot, {"boxes": self.say}

    def say(self, params, batch):
        said, seen = self.parrot.say(params, batch), jnp.any(batch["image_mask"], (1, 2))[:, None, None]
        guess = jnp.array([[[30.0, 0.0, 0.0]]])
        box = jnp.array([[[35 / 200, 35 / 100, 50 / 200, 50 / 100]]])
        return {
            "class_logits": jnp.where(seen, said["class_logits"], guess),
            "boxes": jnp.where(seen, said["boxes"], box),
        }


def test_the_blind_twin_and_padding(mesh):
    objects = {0: picture([BOX], [0]), 1: picture([FAR], [0]), 2: picture([FAR], [1])}
    found = {key: said(one.boxes, one.labels, [0.5]) for key, one in objects.items()}
    parrot = Parrot(objects, found, [0, 1, 2], (0, 1))
    task = Detection(Seeing(parrot), lambda source, rows: [objects[row] for row in rows])
    # The last row is padding, and what it holds counts nowhere.
    mask = np.zeros((8, 4, 10), bool)
    mask[0], mask[1, :2], mask[2, :3] = True, True, True
    batch = dict(next(rows_of([0, 1, 2], 8)), image=np.ones((8, 4, 10, 3), np.uint8), image_mask=mask)
    scores = evaluate(Seeing(parrot), parrot.params, [batch], [task], mesh)
    assert scores["detection/padding"] == pytest.approx((0 + 0.5 + 0.25) / 3)
    assert scores["detection/ap50"] == scores["detection/ap"] == pytest.approx(1)
    # One guess in every picture: right in the first, wrong in the second, in the third of a class that is not there.
    same = [said([BOX], [0], [1.0])] * 3
    expected = average_precision(list(objects.values()), same)
    assert {name: scores[f"detection/{name}_blind"] for name in expected} == pytest.approx(expected)
    assert expected["ap50"] == pytest.approx(0.252, abs=1e-3)  # half of the one class
    assert {name.removesuffix("_blind") for name in scores if name.endswith("_blind")} == {
        f"detection/{name}" for name in expected
    }


def test_truth_from_records():
    rows = [
        dict(height=4, width=6, boxes=[[0, 0, 2, 2]], box_names=["cat"], box_crowd=[1], box_area=[3.0]),
        dict(height=5, width=6, boxes=[], box_names=[], box_crowd=[], box_area=[]),
    ]

    class Opened:
        manifest = {"fields": ["boxes", "box_names", "box_crowd"]}
        asked = []

        def read(self, wanted, names=()):
            self.asked.append(tuple(names))
            return [{name: rows[row][name] for name in names} for row in wanted]

    truth = detection.recorded([Opened()], ["", "dog", "cat"])
    first, second = truth(0, [0, 1])
    assert first.labels.tolist() == [2] and first.crowd.tolist() == [1] and first.area.tolist() == [4.0]
    assert (second.height, second.width) == (5, 6) and second.boxes.shape == (0, 4)
    assert Opened.asked == [("height", "width", "boxes", "box_names", "box_crowd")]


def test_what_a_reader_is_told_of_a_picture():
    there = picture([BOX, FAR, (0, 60, 30, 30), (100, 60, 100, 40)], [0, 1, -1, 1], crowd=[0, 0, 0, 1])
    near = (12, 12, 50, 50)
    boxes = [near, BOX, FAR, (110, 62, 20, 20), (0, 0, 5, 5), (np.nan, 0, 1, 1)]
    labels, scores = [0, 0, 0, 1, 1, 1], [0.9, 0.95, 0.8, 0.7, 0.4, 0.99]
    judged = detection.judge(there, said(boxes, labels, scores))
    # The surest takes the object, the second is one too many, the third has the wrong name, the fourth is in a crowd.
    np.testing.assert_allclose(judged.said.scores, [0.95, 0.9, 0.8])
    assert judged.right.tolist() == [True, False, False] and judged.found.tolist() == [True, False]
    assert judged.quality == pytest.approx(2 * 1 / (2 + 3))
    unsure = detection.judge(there, said([FAR, BOX], [1, 0], [0.2, 0.1]))
    assert unsure.said.scores.tolist() == [0.2] and unsure.right.tolist() == [True]
    assert not len(detection.judge(picture(), said([FAR], [1], [0.2])).right)
    nothing = detection.judge(there, said())
    assert nothing.quality == 0 and nothing.found.tolist() == [False, False]


def test_examples_are_the_worst_and_the_best(mesh):
    objects = {
        0: picture([BOX], [0]),
        1: picture([BOX, FAR], [0, 1]),
        2: picture(),
        3: picture([BOX, FAR], [0, 1]),
    }
    found = {
        0: said([BOX], [0], [0.9]), 1: said([BOX], [0], [0.9]), 2: said([BOX], [1], [0.1]),
        3: said([BOX, FAR], [0, 1], [0.9, 0.9]),
    }  # fmt: skip
    task = Detection(
        Parrot(objects, found, [0, 1, 2, 3], (0, 1)), lambda source, rows: [objects[r] for r in rows]
    )
    task.objects = {(0, key): one for key, one in objects.items()}
    task.detections = {(0, key): one for key, one in found.items()}
    assert [key for key, _ in task.examples(1)] == [(0, 1), (0, 3)]  # two right before one
    assert [key for key, _ in task.examples(9)] == [(0, 1), (0, 3), (0, 0)]
    assert task.examples(0) == []


def test_names_of_classes(tmp_path):
    assert [detection.called(["", "cat"], label) for label in (0, 1, 2, -1)] == [
        "class 0",
        "cat",
        "class 2",
        "class -1",
    ]
    (tmp_path / "labels.json").write_text('["", "Katze ü"]', "utf-8")
    assert detection.class_names({"labels.json": tmp_path / "labels.json"}) == ["", "Katze ü"]
    assert detection.class_names({}) == []
