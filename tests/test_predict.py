# SPDX-License-Identifier: Apache-2.0
"""`predict` as a user runs it, beside what `evaluate` makes of the same pictures, and all that can be given wrongly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from configs import detr, vilt
from tests.data import prepared
from vlp_jax import cli, evaluate, predict, systems
from vlp_jax.data import grid, spec
from vlp_jax.evaluation.detection import SCORES, Detections
from vlp_jax.parallel import shard
from vlp_jax.prediction import boxes as task
from vlp_jax.training import checkpoint

NAMES = ["ball", "cone", "", "cube"]
SIZES = ((64, 64), (48, 72), (40, 64))
QUERIES, PICTURES = 8, 24  # of each size as many as a batch has: none needs a larger canvas than its own


def small_detector():
    """A config of a DETR that compiles in seconds; its pictures need canvases of two sizes."""
    config = detr.get_config("variant=tiny,smoke")
    config.model.width, config.model.object_queries.queries = 32, QUERIES
    config.model.grid_embed.update(depths=(1,), widths=(16,), stem_width=8)
    for stack in (config.model.encoder, config.model.decoder):
        stack.update(depth=1, num_heads=2, mlp_width=32)
    config.data.update(dir="/nowhere", image_size=64, image_limit=96, canvases=((64, 64), (96, 96)))
    config.evaluation.update(batch_size=8, examples=0, pictures=2)
    config.compilation_cache = ""
    return config


def drawn(path, leaf) -> np.ndarray:
    """Kernels that keep the size of what they are given, scales and variances of 1, no means: without compiling."""
    name = path[-1].key
    if leaf.ndim < 2 or name in ("scale", "bias", "mean", "variance", "var"):
        return np.full(leaf.shape, name in ("scale", "variance", "var"), np.float32)
    generator = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return generator.normal(0, np.prod(leaf.shape[-2:-1]) ** -0.5, leaf.shape).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """All calls of a main use one system for one model: the same, but quicker."""
    built, build = {}, systems.build

    def again(config, facts):
        key = config.model.to_json_best_effort(sort_keys=True)
        if key not in built:
            built[key] = build(config, facts)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "build", again)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory, compiled_once) -> Path:
    """Pictures, and a checkpoint of random parameters that says something else of each."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "pictures").mkdir()
    for row in range(PICTURES):
        path = folder / "pictures" / f"{row}.jpg"
        path.write_bytes(prepared.picture(row, *SIZES[row % 3]))
    config = systems.get("detr").resolve(small_detector(), {"classes": len(NAMES)})
    system = systems.build(config, {})
    inputs = {key: np.zeros(one.shape, one.dtype) for key, one in spec.spec(config, 1).items()}
    shapes = shard.shapes(lambda: system.init(jax.random.key(0), inputs)[0])
    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    params["object_queries"]["table"] *= 12
    head = params["heads"]["class"]["dense"]
    head["kernel"] *= 4
    pictures = [grid.load(prepared.picture(row, *SIZES[row]), config.data) for row in range(3)]
    logits = [system.predict["boxes"](params, picture)["class_logits"] for picture in pictures]
    head["bias"] = -np.mean(logits, (0, 1, 2))  # so that no class is said of all
    meta = {"config": config.to_dict(), "step": 7}
    checkpoint.write(folder / "checkpoint", params, meta, {"labels.json": json.dumps(NAMES)})
    return folder


def call(main, capsys, *argv):
    """Exit code, standard output and standard error of a main."""
    code = cli.run(main.main, main.define, usage=main.__doc__, argv=[str(word) for word in argv])
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err
    return code, said.out, said.err


def asked(capsys, work, *images, threshold=0.0, more=()):
    """The lines for some pictures."""
    argv = [f"--checkpoint={work / 'checkpoint'}", "--task=boxes", f"--threshold={threshold}", *more]
    code, out, err = call(predict, capsys, *argv, *(f"--image={image}" for image in images))
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def by_hand(pictures, lines):
    """COCO's toolbox on truth {row: [(name, box, crowd)]} and printed lines, without anything of ours."""
    index = {name: number for number, name in enumerate(NAMES) if name}
    truth, found = COCO(), []
    rows = [(row, *one) for row, there in pictures.items() for one in there]
    truth.dataset = {
        "images": [{"id": row} for row in pictures],
        "categories": [{"id": number} for number in index.values()],
        "annotations": [
            {
                "id": number, "image_id": row, "category_id": index[name], "bbox": box, "iscrowd": crowd,
                "area": box[2] * box[3],
            }
            for number, (row, name, box, crowd) in enumerate(rows, 1)
        ],
    }  # fmt: skip
    for row, line in zip(pictures, lines, strict=True):
        for one in line["boxes"]:
            if one["label"] in index:
                said = {"image_id": row, "category_id": index[one["label"]], "score": one["score"]}
                found.append(said | {"bbox": one["box"]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return dict(zip(SCORES, evaluation.stats, strict=True))


def test_evaluation_is_the_toolbox_on_what_predict_prints(work, tmp_path, capsys):
    images = [work / "pictures" / f"{row}.jpg" for row in range(PICTURES)]
    lines = asked(capsys, work, *images)
    for image, line in zip(images, lines, strict=True):
        assert list(line) == ["image", "width", "height", "boxes"] and line["image"] == str(image)
        assert (line["width"], line["height"]) == Image.open(image).size
        scores = [one["score"] for one in line["boxes"]]
        assert len(scores) == QUERIES and scores == sorted(scores, reverse=True)
        assert {one["label"] for one in line["boxes"]} <= {"ball", "cone", "class 2", "cube"}
    # The truth is what the model says, moved a little, so that no score is 0 or 1.
    draw, there = np.random.default_rng(0), {}
    for row, line in enumerate(lines):
        named = [one for one in line["boxes"] if one["label"] in NAMES][:: 1 + row % 2]
        moved = [(np.array(one["box"]) * draw.uniform(0.8, 1.25, 4)).tolist() for one in named]
        there[row] = [
            (one["label"], box, int(draw.random() < 0.1)) for one, box in zip(named, moved, strict=True)
        ]
    assert len({name for row in there.values() for name, _, _ in row}) > 1

    def more(split, row):
        boxes = np.float32([box for _, box, _ in there[row]]).ravel().tolist()
        names, crowd = [name for name, _, _ in there[row]], [crowd for _, _, crowd in there[row]]
        # An object that the model has no class for takes no part.
        return {
            "boxes": boxes + [1.0, 1.0, 9.0, 9.0],
            "box_names": [*names, "tree"],
            "box_crowd": [*crowd, 0],
        }

    data = prepared.write(tmp_path / "data", splits={"test": PICTURES}, sizes=SIZES, more=more, name="coco")
    argv = [f"--checkpoint={work / 'checkpoint'}", f"--data={data}", f"--target={tmp_path / 'found'}"]
    code, out, err = call(evaluate, capsys, *argv)
    assert code == 0, err
    scores = json.loads((tmp_path / "found/evaluation.json").read_text())
    expected = {name: value for name, value in by_hand(there, lines).items() if value >= 0}
    assert 0.1 < expected["ap"] < expected["ap50"] < 0.99
    measured = {name: scores.pop(f"detection/{name}") for name in expected}
    assert measured == pytest.approx(expected, abs=2e-4)
    objects = PICTURES + sum(map(len, there.values()))
    assert scores.pop("detection/unknown_objects") == pytest.approx(PICTURES / objects)
    canvas = [64 * 64, 96 * 96, 96 * 96]
    inside = [64 * 64, 64 * 96, 60 * 96]  # 40 x 64 would become 64 x 102
    padding = np.mean([1 - part / whole for part, whole in zip(inside, canvas, strict=True)])
    assert scores.pop("detection/padding") == pytest.approx(padding)
    assert scores.keys() == {f"detection/{name}_blind" for name in expected}
    assert scores["detection/ap50_blind"] < measured["ap50"]
    page = (tmp_path / "found/report.html").read_text("utf-8")
    assert page.count("data:image/") == 4 and "Objects and their boxes" in page and "in batches of 8" in page
    assert "detection/ap50" in out


def test_threshold_and_the_files_of_pictures(work, tmp_path, capsys):
    images = [work / "pictures" / f"{row}.jpg" for row in (1, 2)]
    everything = asked(capsys, work, *images)
    middle = sum(one["score"] for one in everything[0]["boxes"][3:5]) / 2
    some = asked(capsys, work, *images, threshold=middle, more=[f"--picture={tmp_path / 'new' / 'shown'}"])
    for line, all_of_it in zip(some, everything, strict=True):
        assert line["boxes"] == [one for one in all_of_it["boxes"] if one["score"] >= middle]
    assert sorted(path.name for path in (tmp_path / "new/shown").iterdir()) == ["1.png", "2.png"]
    with Image.open(tmp_path / "new/shown/1.png") as shown, Image.open(images[0]) as before:
        factor = shown.width // before.width
        assert shown.size == (before.width * factor, before.height * factor) and factor > 1
        plain = np.asarray(before.convert("RGB")).repeat(factor, 0).repeat(factor, 1)
        changed = (np.asarray(shown) != plain).any(-1)
        assert 0 < changed.mean() < 0.9
    (line,) = asked(capsys, work, images[0], threshold=1, more=[f"--picture={tmp_path / 'nothing.webp'}"])
    assert line["boxes"] == [] and Image.open(tmp_path / "nothing.webp").format == "WEBP"
    first = tmp_path / "one.jpg"
    asked(capsys, work, images[0], more=[f"--picture={first}"])
    before = first.read_bytes()
    argv = [
        f"--checkpoint={work / 'checkpoint'}",
        "--task=boxes",
        f"--image={images[1]}",
        f"--picture={first}",
    ]
    code, out, err = call(predict, capsys, *argv)
    assert code == 2 and out == "" and "--overwrite" in err and first.read_bytes() == before
    code, out, err = call(predict, capsys, *argv, "--overwrite")
    assert code == 0 and first.read_bytes() != before


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


@pytest.mark.slow
def test_pictures_of_all_kinds(work, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    grey = Image.fromarray(pixels)
    palette = Image.fromarray(pixels // 4 * 3, "L").convert("RGB").quantize(64)
    alpha = Image.merge("RGBA", [grey] * 3 + [Image.new("L", grey.size, 9)])
    cmyk = Image.merge("CMYK", [grey.point(lambda v: v // 2)] * 4)
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph = Image.open(io.BytesIO(prepared.picture(3, 64, 96)))
    groups = [
        [saved(tmp_path / "grey.png", grey), saved(tmp_path / "grey_rgb.png", grey.convert("RGB"))],
        [saved(tmp_path / "pal.png", palette), saved(tmp_path / "pal_rgb.png", palette.convert("RGB"))],
        [saved(tmp_path / "pal.gif", palette)],
        [saved(tmp_path / "alpha.png", alpha), tmp_path / "grey.png"],
        [saved(tmp_path / "lossless.webp", grey.convert("RGB"), lossless=True), tmp_path / "grey.png"],
        [saved(tmp_path / "cmyk.jpg", cmyk)],
        [
            saved(tmp_path / "turned.jpg", photograph, exif=turned),
            saved(tmp_path / "not_turned.jpg", photograph),
        ],
        [saved(tmp_path / "point.png", Image.new("RGB", (1, 1), (9, 99, 199)))],
        [saved(tmp_path / "line.png", Image.new("RGB", (20000, 10)))],
        [saved(tmp_path / "pole.png", Image.new("RGB", (10, 20000)))],
    ]
    paths = [path for group in groups for path in group]
    lines = iter(asked(capsys, work, *paths))
    for group in groups:
        said = [next(lines)["boxes"] for _ in group]
        assert all(one == said[0] for one in said), group
        assert len(said[0]) == QUERIES and np.isfinite([box["score"] for box in said[0]]).all()
    few = [tmp_path / f"{name}.png" for name in ("point", "line", "pole")]
    asked(capsys, work, *few, more=[f"--picture={tmp_path / 'shown'}/"])
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == [
        "line.png",
        "point.png",
        "pole.png",
    ]


def broken_files(folder: Path) -> None:
    folder.joinpath("empty.jpg").touch()
    folder.joinpath("text.png").write_text("no picture")
    folder.joinpath("cut.jpg").write_bytes(prepared.picture(0)[:-200])
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(bytes(1000))
    huge += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    folder.joinpath("huge.png").write_bytes(huge + b"\0\0\0\0IEND\xaeB`\x82")
    folder.joinpath("folder").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    shutil.copy(folder / "a.jpg", folder / "notes.txt")


@pytest.mark.parametrize(
    "given, words",
    [
        ("--image=a.jpg --task=", ["--task"]),
        ("--image=a.jpg --task=boxs", ["boxs", "Did you mean 'boxes'", "Possible: boxes"]),
        ("--task=boxes", ["--image"]),
        ("--task=boxes --image=", ["--image"]),
        ("--task=boxes --image=a.jpg --threshold=nan", ["--threshold=nan", "from 0", "to 1"]),
        ("--task=boxes --image=a.jpg --threshold=70", ["--threshold=70", "to 1"]),
        ("--task=boxes --image=a.jpg --threshold=-0.1", ["--threshold=-0.1"]),
        ("--task=boxes --image=a.jpg --threshold=much", ["--threshold", "much"]),
        ("--task=boxes --image=none.jpg", ["none.jpg does not exist"]),
        ("--task=boxes --image=folder", ["folder is no file"]),
        ("--task=boxes --image=pipe.jpg", ["pipe.jpg is no file"]),
        ("--task=boxes --image=a.jpg --image=none.jpg", ["none.jpg does not exist"]),
        ("--task=boxes --image=a.jpg --image=b.jpg --picture=out.png", ["one file", "2 pictures", "folder"]),
        ("--task=boxes --image=a.jpg --image=a.jpg --picture=out", ["a.jpg", "a.png", "several commands"]),
        ("--task=boxes --image=a.jpg --image=deep/a.jpg --picture=out", ["deep/a.jpg", "a.png"]),
        ("--task=boxes --image=a.jpg --picture=out.tif", [".tif", ".png"]),
        ("--task=boxes --image=a.jpg --picture=a.jpg --overwrite", ["a.jpg", "never replaced"]),
        ("--task=boxes --image=a.jpg --picture=b.jpg", ["b.jpg", "exists", "--overwrite"]),
        ("--task=boxes --image=a.jpg --picture=b.jpg/c.png", ["b.jpg", "no folder"]),
        ("--task=boxes --image=a.jpg --workdir=CKPT", ["both"]),
    ],
)
def test_what_is_given_wrongly_is_said_before_anything_is_loaded(
    work, tmp_path, capsys, monkeypatch, given, words
):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(work / "pictures/1.jpg", tmp_path / name)
    (tmp_path / "deep").mkdir()
    shutil.copy(work / "pictures/1.jpg", tmp_path / "deep/a.jpg")
    broken_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "open_for_inference", lambda *_: pytest.fail("loaded"))
    before = sorted(tmp_path.rglob("*"))
    argv = given.replace("CKPT", str(work / "checkpoint")).split()
    code, out, err = call(predict, capsys, f"--checkpoint={work / 'checkpoint'}", *argv)
    assert code == 2 and out == "" and all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_no_pictures(work, tmp_path, capsys):
    shutil.copy(work / "pictures/1.jpg", tmp_path / "a.jpg")
    broken_files(tmp_path)
    for name, words in (
        ("empty.jpg", "empty"), ("text.png", "text.png"), ("cut.jpg", "cut.jpg"), ("huge.png", "3600000000 pixels"),
    ):  # fmt: skip
        argv = [f"--checkpoint={work / 'checkpoint'}", "--task=boxes", f"--image={tmp_path / name}"]
        code, out, err = call(predict, capsys, *argv)
        assert code == 2 and out == "" and words in err and "Possible" in err, (name, err)
    argv[-1:] = [f"--image={tmp_path / 'a.jpg'}", "--picture=/proc/new/a.png"]
    code, out, err = call(predict, capsys, *argv)
    assert code == 2 and out == "" and "/proc/new/a.png cannot be written" in err
    # Told by content: the name does not matter.
    assert asked(capsys, work, tmp_path / "notes.txt")[0]["width"] == 72


def test_checkpoints_that_cannot_do_it(work, tmp_path, capsys):
    config = vilt.get_config("variant=tiny,smoke")
    config.compilation_cache = ""
    config = systems.get("vilt").resolve(config, {"vocab_size": 40})
    params = {"text_embed": {"table": np.zeros(3, np.float32)}}
    checkpoint.write(tmp_path / "vilt", params, {"config": config.to_dict()}, {})
    image = f"--image={work / 'pictures/1.jpg'}"
    code, out, err = call(predict, capsys, f"--checkpoint={tmp_path / 'vilt'}", "--task=boxes", image)
    assert code == 2 and out == "" and "vilt has no function boxes" in err and "encode_text" in err
    for flags in (f"--checkpoint={tmp_path / 'none'}", f"--workdir={tmp_path}", "--averages"):
        argv = [flags] + ([f"--checkpoint={work / 'checkpoint'}"] if flags == "--averages" else [])
        code, out, err = call(predict, capsys, *argv, "--task=boxes", image)
        assert code == 2 and out == ""


def test_numbers_that_are_none_are_no_boxes():
    said = Detections(np.array([0.2, np.nan, 0.9, 0.9, 0.9]), np.arange(5), np.ones((5, 4)))
    said.boxes[3, 1] = np.inf
    assert task._sure(said, 0.0).labels.tolist() == [2, 4, 0]
    assert task._sure(said, 0.9).labels.tolist() == [2, 4]


@pytest.mark.slow
def test_in_a_process_only_results_are_on_standard_output(work, tmp_path):
    command = [sys.executable, "-m", "vlp_jax.predict", f"--checkpoint={work / 'checkpoint'}", "--task=boxes"]
    command += [f"--image={work / 'pictures/1.jpg'}", "--threshold=0", f"--picture={tmp_path / 'a.png'}"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert len(json.loads(line)["boxes"]) == QUERIES and (tmp_path / "a.png").exists()
    assert "Traceback" not in done.stderr
