# SPDX-License-Identifier: Apache-2.0
"""The report as a browser reads it: well-formed, whole, self-contained; and what its pictures are made of."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import stat

import numpy as np
import pytest
from PIL import Image

from vlp_jax.evaluation import pictures, report
from vlp_jax.evaluation.detection import Detections, Objects, judge
from vlp_jax.evaluation.masked_language import Guess
from vlp_jax.evaluation.matching import Alignment, Decision

VOID = {"meta", "img", "br", "link", "input", "hr"}
SCORES = {
    "mlm/accuracy": 0.7123,
    "mlm/accuracy_blind": 0.5012,
    "mlm/accuracy_visual": 0.8531,
    "mlm/accuracy_visual_blind": 0.2294,
    "mlm/accuracy_visual_oracle": 0.9917,
    "itm/accuracy": 0.9446,
    "itm/accuracy_blind": 0.5,
    "itm/accuracy_oracle": 0.9785,
    "image_retrieval/r1": 0.3125,
    "image_retrieval/r1_blind": 0.01,
    "image_retrieval/r1_oracle": 1.0,
    "text_retrieval/r10": 0.777,
    "mine/own": 0.123,
    "detection/ap50": 0.4321,
    "detection/ap50_blind": 0.0123,
    "detection/padding": 0.2525,
}


class Reader(html.parser.HTMLParser):
    """Checks that every tag is closed in turn and gathers text, attributes and tag names."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def picture(rows: int = 2, columns: int = 3, size: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A row of a batch in random order of its patches, one slot empty."""
    draw = np.random.default_rng(seed)
    places = draw.permutation(rows * columns)
    mask = np.append(np.ones(len(places), bool), False)
    positions = np.stack(np.divmod(np.append(places, 0), columns), -1).astype(np.int32)
    patches = draw.integers(0, 256, (len(mask), 3 * size**2)).astype(np.uint8)
    return dict(
        patches=patches,
        patch_positions=positions,
        patch_mask=mask,
        grid_size=np.array([rows, columns], np.int32),
    )


def examples() -> report.Examples:
    plan = np.random.default_rng(1).random((3, 7)).astype(np.float32)
    guess = Guess(
        ["a", "<red>", "cube"],
        [False, True, True],
        1,
        "<red>",
        [("<red>", 0.7), ("blue", 0.2)],
        [("x", 0.4)],
        picture(),
    )
    return report.Examples(
        alignments=[Alignment(["a", "<red>", "cube"], [False, True, True], plan, picture())],
        right=[Decision("a red cube & more", True, 0.9321, picture())],
        wrong=[Decision("a blue ball", False, 0.8642, picture(seed=2))],
        guesses=[guess],
        detections=[(np.zeros((30, 40, 3), np.uint8), judged())],
        categories=["cat & dog", ""],
    )


def judged():
    """A picture with a cat that was found, something nameless that was not, and one box too many."""
    boxes = np.array([[1, 1, 10, 10], [20, 20, 5, 5]], float)
    objects = Objects(30, 40, boxes, np.array([0, 1]), np.zeros(2, int), np.ones(2))
    return judge(objects, Detections(np.array([0.9, 0.8]), np.array([0, 0]), boxes[:1].repeat(2, 0)))


def metrics(count: int = 60, shift: float = 0.0) -> list[dict[str, float]]:
    lines = []
    for step in range(10, 10 * count + 1, 10):
        lines.append({"step": step, "train/loss": 5.0 / step + shift, "train/lr": 1e-3, "time/examples": 5.0})
    lines.append({"step": 10 * count, "validation/itm/accuracy": 0.875, "validation/itm/accuracy_blind": 0.5})
    return lines


@pytest.fixture
def page(tmp_path) -> str:
    facts = {"Data": "scenes <1>", "Steps": "600"}
    path = tmp_path / "report.html"
    report.write_report(path, "ViLT & friends", facts, SCORES, metrics(), metrics(shift=1.0), examples())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return path.read_text("utf-8")


def test_page_is_well_formed_and_holds_every_number(page):
    text = " ".join(Reader(page).text)
    for name, value in SCORES.items():
        assert f"{value:.3f}" in text, name
    for wanted in (
        "ViLT & friends",
        "scenes <1>",
        "600",
        "a red cube & more",
        "0.932",
        "0.864",
        "mine/own",
        "0.875",
        "Boxes AP50",
        "1 of 2 found, 1 wrong",
        "in truth: cat & dog, class 1",
    ):
        assert wanted in text, wanted
    assert "train/lr" not in text and "time/examples" not in text


def test_page_loads_nothing(page):
    reader = Reader(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "data", "xlink:href"):
            assert tag == "img" and re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", value)
    assert "://" not in page and "url(" not in page and "@import" not in page


def test_pictures_of_the_page_decode(page):
    sources = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    assert len(sources) == 4 + 2 + 1 + 1  # a picture with three words, two decisions, a guess, boxes
    sizes = {Image.open(io.BytesIO(base64.b64decode(source))).size for source in sources}
    assert sizes == {(12, 8), (480, 360)}


def test_reference_curve_is_drawn_only_where_there_is_one(tmp_path):
    for reference, wanted in ((metrics(shift=1.0), True), ([], False)):
        report.write_report(tmp_path / "r.html", "t", {}, SCORES, metrics(), reference)
        assert ('class="line reference"' in (tmp_path / "r.html").read_text("utf-8")) == wanted


def test_page_without_curves_and_pictures(tmp_path):
    report.write_report(tmp_path / "r.html", "t", {}, {"itm/accuracy": 0.5})
    reader = Reader((tmp_path / "r.html").read_text("utf-8"))
    assert "img" not in reader.tags and "Learning curves" not in reader.text


def test_non_finite_values_do_not_break_charts(tmp_path):
    lines = [
        {"step": 1, "train/loss": float("nan")},
        {"step": 2, "train/loss": 1.0},
        {"step": 3, "train/loss": 1.0},
    ]
    report.write_report(tmp_path / "r.html", "t", {}, {}, lines)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert not re.search(r'(d|cx|cy|x|y)="[^"]*(nan|inf)', page) and Reader(page)


def test_scores_are_written_as_fractions_by_rename(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text("old")
    report.write_scores(path, SCORES)
    assert json.loads(path.read_text()) == SCORES and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_where_writing_fails(tmp_path):
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(OSError):
        report.write_scores(tmp_path / "evaluation.json", SCORES)
    assert [stat.S_ISDIR(path.stat().st_mode) for path in tmp_path.iterdir()] == [True]


def test_table_has_a_line_a_score(capsys):
    lines = report.table(SCORES).splitlines()
    assert lines[0].split() == ["score", "blind", "oracle"]
    assert ["mlm/accuracy_visual", "0.853", "0.229", "0.992"] in [line.split() for line in lines]
    assert lines[-1].split() == ["mine/own", "0.123", "–", "–"] and len({len(line) for line in lines}) == 1


def test_read_lines_drops_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'null\n\xff\xfe\n{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr'
    )
    assert report.read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.0}]
    assert report.read_lines(tmp_path / "none.jsonl") == []


def test_quantities_that_stay_at_nothing_have_no_panel(tmp_path):
    lines = [{"step": step, "train/loss": 1.0, "train/left_out": 0.0, "validation/x": 0.0} for step in (1, 2)]
    report.write_report(tmp_path / "r.html", "t", {}, {}, lines)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "train/loss" in page and "validation/x" in page and "train/left_out" not in page


def test_facts_of_a_detector_speak_of_pictures():
    from configs import detr

    config = detr.get_config("variant=tiny")
    config.evaluation.batch_size = 16
    sizes = {"splits": {"test": {"pairs": 50, "records": 24}}}
    facts = {"sources": {"scenes": sizes}, "manifest_sha256": "a" * 64}
    found = report.Found({"detection/padding": 0.25}, report.Examples(), 0, 10, 1.0)
    known = report.run_facts(config, {"step": 3}, facts, found, [])
    assert (
        known["Scored on"] == "test split: 24 of 24 pictures; in batches of 16, 25.0% of their pixels padding"
    )
    assert known["Trained"].startswith("3 steps of 32 pictures") and "Retrieval" not in known
    assert "patches" not in known["Input"] and "word pieces" not in known["Input"]


def test_unpatchify_is_the_inverse_of_cutting():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    row = picture()
    for slot, (i, j) in enumerate(row["patch_positions"][:-1]):
        row["patches"][slot] = image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1)
    np.testing.assert_array_equal(pictures.unpatchify(row), image)
    row["patch_mask"][0] = False
    i, j = row["patch_positions"][0]
    assert (pictures.unpatchify(row)[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] == round(pictures.GROUND)).all()


def test_heat_map_normalises_cuts_and_stretches():
    row = picture()
    mass = np.append(np.array([0.0, 0.0, 0.0, 0.0, 1.0, 10.0]), 99.0)  # the last slot is padding
    heat = pictures.heat_map(mass, row)
    standard = (mass[:6] - mass[:6].mean()) / mass[:6].std()
    wanted = (np.clip(standard, 1, 3) - 1) / (np.clip(standard, 1, 3).max() - 1)
    at = row["patch_positions"][:6]
    np.testing.assert_allclose(heat[at[:, 0], at[:, 1]], wanted, atol=1e-6)
    assert heat.max() == 1.0 and heat.shape == (2, 3)
    assert not pictures.heat_map(np.full(7, 0.1), row).any()
    assert not pictures.heat_map(np.full(7, 1 / 7) + np.arange(7) * 1e-9, row).any()


def test_veil_keeps_hot_patches_as_they_are():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    shown = pictures.veil(image, np.array([[1.0, 0, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(shown[:4, :4], image[:4, :4])
    assert np.abs(shown[4:].astype(float) - pictures.GROUND).max() <= 0.16 * pictures.GROUND + 1


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 2.7), (4.123, 4.124), (0, 1e5), (2, 2), (1e-7, 3e-7)])
def test_ticks_are_round_and_span_the_values(low, high):
    found = pictures.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    assert len(set(found)) == len(found)


def test_running_mean_keeps_the_middle_of_a_line_and_of_noise():
    line = [(step, 2.0 * step) for step in range(100)]
    assert np.allclose(pictures.running_mean(line), line)
    noisy = [(step, float(step % 2)) for step in range(100)]
    assert np.std([value for _, value in pictures.running_mean(noisy)[10:-10]]) < 0.1
    assert pictures.running_mean(line[:5]) == line[:5]
