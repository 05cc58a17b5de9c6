# SPDX-License-Identifier: Apache-2.0
"""What a run has learnt, as `evaluation.json` for programs and as `report.html` for people.

The page is one file: its charts are inline SVG, its pictures inline PNG or JPEG, and it loads nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.evaluation.detection import SURE, Judged, called
from vlp_jax.evaluation.frames import draw_boxes, of_verdicts
from vlp_jax.evaluation.masked_language import Guess
from vlp_jax.evaluation.matching import Alignment, Decision
from vlp_jax.evaluation.pictures import chart, data_uri, heat_map, meter, unpatchify, veil
from vlp_jax.files import save

ROOT = Path(__file__).resolve().parents[2]  # the repository, where this is one
MEANINGS = {
    "mlm/accuracy": ("Masked words", "how often the hidden word piece is the first guess"),
    "mlm/accuracy_visual": ("Masked words, visual", "the same for words that only the picture tells"),
    "itm/accuracy": ("Matching", "is this text of this picture? half of the pairs are not, so chance is 0.5"),
    "image_retrieval/r1": ("Image retrieval R@1", "a text's own picture scores highest in the gallery"),
    "image_retrieval/r5": ("Image retrieval R@5", "... is among the first five"),
    "image_retrieval/r10": ("Image retrieval R@10", "... is among the first ten"),
    "text_retrieval/r1": ("Text retrieval R@1", "a picture's own text scores highest in the gallery"),
    "text_retrieval/r5": ("Text retrieval R@5", "... is among the first five"),
    "text_retrieval/r10": ("Text retrieval R@10", "... is among the first ten"),
    "detection/ap": ("Boxes AP", "COCO's average precision, mean over classes and overlaps 0.50 to 0.95"),
    "detection/ap50": ("Boxes AP50", "a box that overlaps its object by half (IoU 0.50) is right"),
    "detection/ap75": ("Boxes AP75", "... by three quarters"),
    "detection/ap_small": (
        "Boxes AP, small",
        "objects of less than 32 x 32 pixels, by the area of their mask",
    ),
    "detection/ap_medium": ("Boxes AP, medium", "... of 32 x 32 to 96 x 96 pixels"),
    "detection/ap_large": ("Boxes AP, large", "... of more"),
    "detection/ar_1": ("Boxes AR@1", "average recall with one box a class and picture"),
    "detection/ar_10": ("Boxes AR@10", "... with ten"),
    "detection/ar_100": ("Boxes AR@100", "... with a hundred"),
    "detection/ar_small": ("Boxes AR@100, small", "... of small objects"),
    "detection/ar_medium": ("Boxes AR@100, medium", "... of medium ones"),
    "detection/ar_large": ("Boxes AR@100, large", "... of large ones"),
    "detection/padding": (
        "Padding",
        "no score: mean share of the canvas outside of a picture; scores depend on it",
    ),
    "detection/unknown_objects": (
        "Unknown objects",
        "no score: share of objects whose class the model lacks",
    ),
}
TWINS = ("_blind", "_oracle")
CURVES = {"run": "this run", "reference": "reference curve", "blind": "blind", "oracle": "oracle"}
UNCHARTED = ("train/lr", "train/skipped_steps")  # no curves worth a panel
LAST = ("train/grad_norm",)  # after the curves that say more
STYLE = """
:root{--ink:#1c2329;--soft:#5d6872;--line:#e2e6ea;--ground:#fff;--card:#f7f8fa;--run:#2463ae;--reference:#8d99a4;
--blind:#c9761a;--oracle:#2e8555;--wrong:#b3372e}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#9aa6b1;--line:#343c44;--ground:#15191d;--card:#1e2429;
--run:#6ea8ec;--reference:#77838e;--blind:#e29a49;--oracle:#5fb88a;--wrong:#e5786f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 20px 60px;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}h2{font-size:19px;margin:40px 0 6px}
h3{font-size:14px;font-weight:600;margin:0 0 2px;overflow-wrap:anywhere}
p{margin:0 0 14px;max-width:76ch}.soft,p.note{color:var(--soft)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:10px 22px;margin:18px 0 0}
dt{color:var(--soft);font-size:12.5px}dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th{font-size:12.5px;font-weight:500;color:var(--soft);text-align:right;padding:4px 8px}
th:first-child,td:first-child{text-align:left;padding-left:0}
td{border-top:1px solid var(--line);padding:8px;text-align:right;font-variant-numeric:tabular-nums;vertical-align:top}
td small{display:block;color:var(--soft);font-size:12.5px;line-height:1.35}td.score{font-weight:650;font-size:16px}
td.bar{width:26%;min-width:90px;vertical-align:middle}svg.meter{display:block;width:100%;height:16px}
.track{fill:var(--line)}.fill{fill:var(--run)}rect.blind{fill:var(--blind)}rect.oracle{fill:var(--oracle)}
.key{display:inline-block;margin-right:16px;color:var(--soft);font-size:13px;white-space:nowrap}
.key i{display:inline-block;width:18px;height:0;border-top:3px solid;margin-right:6px;vertical-align:middle}
.key i.run{color:var(--run)}.key i.blind{color:var(--blind)}.key i.oracle{color:var(--oracle)}
.key i.reference{color:var(--reference);border-top-style:dashed}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:22px 26px;margin-top:14px}
svg.chart{display:block;width:100%;height:auto}svg.chart text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.run{stroke:var(--run)}.line.pale{stroke-width:1;opacity:.25}.line.blind{stroke:var(--blind)}
.line.reference{stroke:var(--reference);stroke-dasharray:5 4}.line.oracle{stroke:var(--oracle)}
.dots.run{fill:var(--run)}.dots.blind{fill:var(--blind)}.dots.oracle{fill:var(--oracle)}.dots.reference{fill:none}
img{display:block;border-radius:4px;max-width:100%}img.small{image-rendering:pixelated}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px;margin-top:12px}
.card{background:var(--card);border-radius:8px;padding:14px;display:flex;gap:14px;align-items:flex-start}
.card img{width:112px;flex:none}.card div{min-width:0;flex:1}.card p{margin:0 0 6px}
.right{color:var(--oracle);font-weight:600}.wrong{color:var(--wrong);font-weight:600}
i.missed{color:var(--soft);border-top-style:dashed!important}.charts p{margin:4px 0 0;font-size:13px}
.hole{border-bottom:2px solid var(--soft);padding:0 4px;color:var(--soft);margin:0 1px;white-space:nowrap}
.hole.this{border-color:var(--run);color:var(--run);font-weight:650}
.guess{display:grid;grid-template-columns:minmax(58px,auto) 1fr 42px;gap:8px;align-items:center;font-size:13.5px}
.guess b{font-weight:400}.guess.hit b{font-weight:650}.guess span{text-align:right;color:var(--soft)}
.guess i{height:7px;background:var(--line);display:block;border-radius:2px}
.guess i u{display:block;height:7px;background:var(--run);border-radius:2px}
.plan{display:flex;gap:18px;align-items:flex-start;padding:14px 0;border-top:1px solid var(--line)}
.plan figure{margin:0;flex:none;width:132px}.plan img{width:100%}
.plan div{display:flex;flex-wrap:wrap;gap:10px;min-width:0}.plan div figure{width:84px}
.plan figcaption{font-size:13px;text-align:center;color:var(--soft);overflow-wrap:anywhere;line-height:1.3;margin-top:3px}
.plan figcaption.visual{color:var(--ink);font-weight:650}
@media(max-width:560px){body{padding:18px 14px 40px}td.bar,th.bar{display:none}td,th{padding:7px 4px}
td small{font-size:12px}.plan{gap:10px}.plan figure{width:92px}.plan div figure{width:66px}
.card img{width:92px}}
"""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What the report shows of the model's work; any part may be empty."""

    alignments: Sequence[Alignment] = ()
    right: Sequence[Decision] = ()
    wrong: Sequence[Decision] = ()
    guesses: Sequence[Guess] = ()
    detections: Sequence[tuple[np.ndarray, Judged]] = ()  # with the picture, uint8 [height, width, 3]
    categories: Sequence[str] = ()  # names of the classes of `detections`


@dataclasses.dataclass(frozen=True)
class Found:
    """What an evaluation brings: scores, pictures for the report, and what it took."""

    scores: Mapping[str, float]
    examples: Examples
    gallery: int  # pictures among which retrieval searched
    parameters: int
    seconds: float


def write(target: Path, run: Path, config: ConfigDict, meta: Mapping, facts: Mapping, found: Found) -> None:
    """Writes both files.

    Args:
        target: the folder for them, made if it is not there.
        run: a workdir, for its `metrics.jsonl`; may be none.
        config: of the evaluation.
        meta: of the checkpoint.
        facts: of the data scored on.
        found: what was found.
    """
    metrics = read_lines(run / "metrics.jsonl")
    reference = read_lines(ROOT / "benchmarks" / "curves" / f"{config.system}-{config.variant}.jsonl")
    target.mkdir(parents=True, exist_ok=True)
    write_scores(target / "evaluation.json", found.scores)
    title = f"{config.system} {config.variant} on {', '.join(facts['sources'])}"
    known = run_facts(config, meta, facts, found, metrics)
    write_report(target / "report.html", title, known, found.scores, metrics, reference, found.examples)


def run_facts(
    config: ConfigDict, meta: Mapping, facts: Mapping, found: Found, metrics: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """What a reader must know to judge the numbers, in words."""
    split, data, train = config.evaluation.split, config.data, config.train
    sizes = [source["splits"][split] for source in facts["sources"].values() if split in source["splits"]]
    pairs, records = (sum(size[name] for size in sizes) for name in ("pairs", "records"))
    whole = "text" not in data.inputs  # pictures, not pairs
    unit, total = ("pictures", records) if whole else ("pairs", pairs)
    scored = f"{min(total, config.evaluation.examples or total):,} of {total:,} {unit}"
    if not whole:
        scored += f", {records:,} pictures"
    padding = found.scores.get("detection/padding")
    if padding is not None:
        scored += f"; in batches of {config.evaluation.batch_size}, {padding:.1%} of their pixels padding"
    objectives = [f"{name} × {factor:g}" for name, factor in config.objectives.items() if factor]
    speeds = [line["time/examples_per_second"] for line in metrics if "time/examples_per_second" in line]
    devices = jax.devices()
    captions = config.evaluation.captions or "all"
    retrieval = {"Retrieval": f"gallery of {found.gallery} pictures, texts of each: {captions}"}
    return {
        "System": f"{config.system}, variant {config.variant}: {found.parameters / 1e6:.2f} million parameters",
        "Trained": f"{meta.get('step', 0):,} steps of {train.batch_size} {unit}, seed {config.seed}"
        + (", averages of the parameters" if meta.get("averages") else ""),
        "Training speed": f"{np.median(speeds):,.0f} {unit} a second" if speeds else "not known",
        "Objectives": ", ".join(objectives),
        "Optimizer": f"AdamW, learning rate {config.optimizer.lr:g}, decay {config.optimizer.weight_decay:g}",
        "Input": _input(data),
        "Scored on": f"{split} split: {scored}",
        **(retrieval if found.gallery else {}),
        "Data digest": facts["manifest_sha256"][:12],
        "Device": f"{len(devices)} × {devices[0].device_kind}, {os.cpu_count()} processor cores",
        "Evaluation took": f"{found.seconds:.0f} s",
        "Code": _commit() or "no commit known",
        "Written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def _input(data: ConfigDict) -> str:
    parts = [f"{data.image_size} pixels"]
    parts += [f"in patches of {data.patch_size}"] if "patches" in data.inputs else ["the shorter side"]
    return " ".join(parts) + (f"; {data.text_length} word pieces" if "text" in data.inputs else "")


def _commit() -> str:
    """The commit of the code, marked where files differ from it; "" outside a repository or without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_scores(path: Path, scores: Mapping[str, float]) -> None:
    """Writes `evaluation.json`: fractions by name, sorted."""
    save(path, json.dumps(dict(sorted(scores.items())), indent=2) + "\n")


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    scores: Mapping[str, float],
    metrics: Sequence[Mapping[str, float]] = (),
    reference: Sequence[Mapping[str, float]] = (),
    examples: Examples | None = None,
) -> None:
    """Writes `report.html`.

    Args:
        path: where to.
        title: what was run, in a line.
        facts: what a reader must know of the run, name -> value, shown in this order.
        scores: as in `evaluation.json`.
        metrics: the lines of the run's `metrics.jsonl`.
        reference: the lines of a committed curve of the same system and variant, laid over.
        examples: what the pictures are made of.
    """
    examples = examples or Examples()
    listed = [f"<div><dt>{escape(name)}</dt><dd>{escape(str(facts[name]))}</dd></div>" for name in facts]
    body = [f"<h1>{escape(title)}</h1>", f'<dl class="facts">{"".join(listed)}</dl>']
    body += [_score_section(scores), _curve_section(metrics, reference)]
    body += [
        _alignment_section(examples.alignments),
        _decision_section(examples),
        _guess_section(examples.guesses),
        _detection_section(examples),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
    save(path, page + "\n".join(part for part in body if part) + "\n</body></html>\n")


def read_lines(path: Path) -> list[dict[str, float]]:
    """Reads a `metrics.jsonl`; none where there is no file, and without what a kill or a crash left unreadable."""
    lines = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def table(scores: Mapping[str, float]) -> str:
    """The scores as text for a terminal: name, score, blind twin, oracle."""
    rows = [("", "score", "blind", "oracle")]
    rows += [(name, *(_number(value) for value in values)) for name, *values in _rows(scores)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows)


def _rows(scores: Mapping[str, float]) -> list[tuple[str, float, float | None, float | None]]:
    """Score, blind twin and oracle of each name, known names first and in the order of `MEANINGS`."""
    names = [name for name in scores if not name.endswith(TWINS)]
    order = list(MEANINGS)
    names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    return [(name, scores[name], *(scores.get(name + twin) for twin in TWINS)) for name in names]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _section(title: str, note: str, parts: Sequence[str], kind: str = "", key: str = "") -> str:
    """A headed part of the page, nothing where there are no parts."""
    body = f'<div class="{kind}">{"".join(parts)}</div>'
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{key}{body}' if parts else ""


def _key(**lines: str) -> str:
    return "".join(
        f'<span class="key"><i class="{name}"></i>{escape(text)}</span>' for name, text in lines.items()
    )


def _score_section(scores: Mapping[str, float]) -> str:
    rows = []
    for name, score, blind, oracle in _rows(scores):
        label, meaning = MEANINGS.get(name, (name, ""))
        rows.append(
            f"<tr><td>{escape(label)}<small>{escape(meaning)}</small></td>"
            f'<td class="bar">{meter(score, blind, oracle)}</td><td class="score">{_number(score)}</td>'
            f"<td>{_number(blind)}</td><td>{_number(oracle)}</td></tr>"
        )
    note = (
        "Fractions from 0 to 1. Blind: the same model with the picture withheld, what it knows without seeing. "
        "Oracle: a guesser that knows the scene; where several answers are true it draws one."
    )
    key = _key(run="score", blind="blind", oracle="oracle")
    head = '<tr><th></th><th class="bar"></th><th>score</th><th>blind</th><th>oracle</th></tr>'
    return _section("Scores", note, [f"<table>{head}", *rows, "</table>"], "scores", key) if rows else ""


def _curve_section(metrics: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]) -> str:
    """A panel for each training quantity and each validation score, the blind twin in its score's panel."""
    panels, kinds = [], {}
    for name in _charted(metrics):
        lines = {"run": _points(metrics, name), "reference": _points(reference, name)}
        if name.startswith("validation/"):
            lines |= {twin[1:]: _points(metrics, name + twin) for twin in TWINS}
        lines = {kind: points for kind, points in lines.items() if points}
        kinds |= {kind: CURVES[kind] for kind in lines}
        last = lines["run"][-1][1]
        label, fraction = (
            f"{name} over steps, {last:.4g} at the end",
            any(part in name for part in ("accuracy", "retrieval", "/detection/")),
        )
        drawn = chart(lines, label, fraction)
        panels.append(f'<div><h3>{escape(name)} <span class="soft">{last:.4g}</span></h3>{drawn}</div>')
    note = "Over training steps; the number is the last value. Long curves are a running mean over the pale points."
    return _section("Learning curves", note, panels, "charts", _key(**kinds))


def _charted(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """What gets a panel: the loss, then what else was trained and ever was above 0, then validation."""
    values = [item for line in metrics for item in line.items() if isinstance(item[1], (int, float))]
    names = dict.fromkeys(name for name, value in values if value or not name.startswith("train/"))
    train = [name for name in names if name.startswith("train/") and name not in UNCHARTED]
    train.sort(key=lambda name: (name != "train/loss", name in LAST, "accuracy" in name))
    return train + [name for name in names if name.startswith("validation/") and not name.endswith(TWINS)]


def _points(lines: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[name])) for line in lines if name in line and "step" in line]


def _prose(text: str) -> str:
    """Words joined by blanks, as one writes them: no blank before punctuation."""
    return re.sub(r" ([,.:;!?])", r"\1", text)


def _image(picture: np.ndarray, alt: str, longest: int = 384) -> str:
    small = ' class="small"' if max(picture.shape[:2]) <= 160 else ""
    return f'<img{small} src="{data_uri(picture, longest)}" alt="{escape(alt)}">'


def _alignment_section(alignments: Sequence[Alignment]) -> str:
    plans = []
    for example in alignments:
        if "patches" not in example.picture:
            continue
        picture, sentence = unpatchify(example.picture), " ".join(example.words)
        figures = []
        for word, visual, mass in zip(example.words, example.visual, example.plan, strict=True):
            if not any(character.isalnum() for character in word):
                continue
            shown = _image(veil(picture, heat_map(mass, example.picture)), f"patches of “{word}”", 192)
            kind = ' class="visual"' if visual else ""
            figures.append(f"<figure>{shown}<figcaption{kind}>{escape(word)}</figcaption></figure>")
        whole = f"<figure>{_image(picture, sentence)}</figure>"
        plans.append(f'<div class="plan">{whole}<div>{"".join(figures)}</div></div>')
    note = (
        "The optimal transport between a caption's words and the picture's patches: patches in full colour carry a "
        "word's mass, the others are faded. Words in bold are visual words."
    )
    return _section("Words and their patches", note, plans)


def _decision_section(examples: Examples) -> str:
    cards = []
    for decision in [*examples.wrong, *examples.right]:
        if "patches" not in decision.picture:
            continue
        verdict = "right" if decision.right else "wrong"
        says = "match" if decision.probability > 0.5 else "no match"
        truth = "its own text" if decision.matched else "the text of another picture"
        cards.append(
            f'<div class="card">{_image(unpatchify(decision.picture), decision.text)}<div><p>{escape(_prose(decision.text))}</p>'
            f'<p><span class="{verdict}">{"✓" if decision.right else "✗"} {verdict}</span>: says {says} '
            f'({decision.probability:.3f})<br><span class="soft">in truth {truth}</span></p></div></div>'
        )
    note = (
        f"The first {len(examples.wrong)} wrong and the first {len(examples.right)} right decisions; in brackets the "
        "probability of a match."
    )
    return _section("Is this its text?", note, cards, "cards")


def _guess_section(guesses: Sequence[Guess]) -> str:
    cards = []
    for guess in guesses:
        if "patches" not in guess.picture:
            continue
        words = [escape(word) for word in guess.words]
        for place in (place for place, hidden in enumerate(guess.masked) if hidden):
            words[place] = '<span class="hole">…</span>'
        words[guess.position] = '<span class="hole this">?</span>'
        bars = "".join(_guess(word, chance, word == guess.answer) for word, chance in guess.guesses)
        blind = f"; blind: {escape(guess.blind[0][0])} {guess.blind[0][1]:.2f}" if guess.blind else ""
        cards.append(
            f'<div class="card">{_image(unpatchify(guess.picture), " ".join(guess.words))}<div><p>{_prose(" ".join(words))}</p>'
            f'{bars}<p class="soft">answer: {escape(guess.answer)}{blind}</p></div></div>'
        )
    note = "A hidden word (?) and the three best guesses with their probabilities; … are other hidden words."
    return _section("Masked words", note, cards, "cards")


def _detection_section(examples: Examples) -> str:
    panels = []
    for picture, judged in examples.detections:
        wrong = int(np.sum(~judged.right))
        words = f"{int(np.sum(judged.found))} of {len(judged.found)} found" + (
            f", {wrong} wrong" if wrong else ""
        )
        there = [called(examples.categories, label) for label in judged.objects.labels]
        alt = f"in truth: {', '.join(there) or 'nothing'}"
        drawn = _image(draw_boxes(picture, of_verdicts(judged, examples.categories)), alt, 640)
        panels.append(f'<div>{drawn}<p>{words} <span class="soft">{escape(alt)}</span></p></div>')
    note = (
        f"The pictures that went worst, then those that went best. Shown are boxes with a score of {SURE:g} and more, or "
        f"the surest one; right is a box that overlaps an object of its name by {SURE:g} and more."
    )
    key = _key(right="right", wrong="wrong", missed="in truth")
    return _section("Objects and their boxes", note, panels, "charts", key)


def _guess(word: str, chance: float, hit: bool) -> str:
    bar = f'<i><u style="width:{100 * chance:.0f}%"></u></i>'
    return (
        f'<div class="guess{" hit" if hit else ""}"><b>{escape(word)}</b>{bar}<span>{chance:.2f}</span></div>'
    )
