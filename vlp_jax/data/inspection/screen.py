# SPDX-License-Identifier: Apache-2.0
"""The doctor's report on one screen: a column a split, histograms as a row of blocks."""

from __future__ import annotations

import unicodedata
from typing import Any

WIDTH = 100  # characters of a line
LABEL = 22
SPLITS = 4  # columns that fit
LISTED = 3  # of drops, changes, overlaps and remarks each
_BLOCKS = " ▁▂▃▄▅▆▇█"


def render(report: dict[str, Any]) -> str:
    """Draws what `doctor.examine` returned, without its problems."""
    if "splits" not in report:
        return ""
    lines = [_cut(line) for line in [*_head(report), *_table(report), *_tail(report)]]
    return "\n".join(lines)


def _head(report: dict[str, Any]) -> list[str]:
    vocabulary, manifest = report["vocabulary"], report["manifest_sha256"][:12]
    return [
        f"{report['directory']}: {report['dataset']}, version {report['builder_version']}, manifest {manifest}",
        f"{report['files']} files, {_bytes(report['bytes'])}; {vocabulary['size']:,} pieces in {vocabulary['file']}",
        f"licence: {report['licence']}",
        "",
    ]


def _table(report: dict[str, Any]) -> list[str]:
    names = list(report["splits"])
    shown = names[:SPLITS]
    width = (WIDTH - LABEL) // max(1, len(shown))
    splits = [report["splits"][name] for name in shown]

    def row(label: str, cells: list[str]) -> str:
        cells = [_cut(cell, width - 1).ljust(width) for cell in cells]
        return f"{_cut(label, LABEL - 1):{LABEL}}{''.join(cells)}".rstrip()

    def pick(part: str, draw) -> list[str]:
        return [draw(one[part]) if one[part] else "-" for one in splits]

    lines = [row("", shown)]
    lines.append(row("records", [f"{one['records']:,} ({_share(one['alive'])} alive)" for one in splits]))
    lines.append(row("captions (pairs)", [f"{one['pairs']:,}" for one in splits]))
    lines += _histogram(row, "captions a record", [one["captions_a_record"] for one in splits])
    lines.append(
        row("texts looked at", pick("texts", lambda t: f"{t['texts']:,} of {t['records']:,} records"))
    )
    lines += _histogram(row, "word pieces", [one["lengths"] for one in splits])
    lines.append(row(f"cut at {report['text_length']}", pick("texts", lambda t: _share(t["cut"]))))
    lines.append(row("unknown pieces", pick("texts", lambda t: _share(t["unknown"]))))
    lines.append(row("texts twice", pick("texts", lambda t: _share(t["duplicates"]))))
    labels = {
        "shorter": "shorter side",
        "longer": "longer side",
        "aspect": "longer : shorter",
        "tokens": f"patches at {report['image_size']}",
    }
    for key, label in labels.items():
        lines += _histogram(row, label, [(one["pictures"] or {}).get(key) for one in splits])
    lines.append(row("most common size", pick("pictures", _common)))
    twice = [one["duplicates"] for one in splits]
    lines.append(
        row("pictures twice", [f"{t['records']:,} ({_share(t['share'])})" if t else "-" for t in twice])
    )
    if len(names) > SPLITS:
        lines.append(f"and {len(names) - SPLITS} more splits, which --json shows")
    return lines


def _histogram(row, label: str, found: list[dict | None]) -> list[str]:
    """Two lines: blocks, and the numbers below them; one where all are equal."""
    known = [one for one in found if one]
    if not known:
        return [row(label, ["-"] * len(found))]
    low, high = known[0]["edges"][0], known[0]["edges"][-1]
    whole = isinstance(known[0]["minimum"], int)
    if all(one["minimum"] == one["maximum"] for one in known):
        return [row(label, [_numbers(one, whole) if one else "-" for one in found])]
    bounds = f"  {low} to {high - 1}" if whole else f"  {low:.2f} to {high:.2f}"
    return [
        row(label, [_blocks(one["counts"]) if one else "-" for one in found]),
        row(bounds, [_numbers(one, whole) if one else "" for one in found]),
    ]


def _blocks(counts: list[int]) -> str:
    most = max(counts)
    return "".join(_BLOCKS[0 if not count else max(1, round(8 * count / most))] for count in counts) + "|"


def _numbers(one: dict[str, Any], whole: bool) -> str:
    if one["minimum"] == one["maximum"]:
        return f"all {one['minimum']:{'' if whole else '.2f'}}"
    form = "," if whole else ".2f"
    return f"{one['minimum']:{form}}/{one['median']:{form}}/{one['p99']:{form}}/{one['maximum']:{form}}"


def _common(pictures: dict[str, Any]) -> str:
    height, width, share = pictures["common_sizes"][0]
    return f"{height} x {width} ({_share(share)})"


def _tail(report: dict[str, Any]) -> list[str]:
    lines = ["numbers under a histogram: least / median / 99 % / most"]
    dropped = report["dropped"]
    lines.append(f"dropped  {dropped['count']:,}{_reasons(dropped['reasons'])}")
    lines.append(f"changed  {sum(report['changed'].values()):,}{_reasons(report['changed'])}")
    words = [
        word for one in report["splits"].values() if one["texts"] for word in one["texts"]["unknown_words"]
    ]
    if words:
        listed = ", ".join(f"{word} ({count})" for word, count in words[:8])
        lines.append(f"unknown  {listed}")
    for one in report["overlaps"][: 2 * LISTED]:
        lines.append(
            f"overlap  {one['pictures']:,} of {one['evaluation']} ({_share(one['share'])}) are in train by "
            f"{one['by']}"
        )
    rest = len(report["overlaps"]) - 2 * LISTED
    lines += [f"overlap  and {rest} more, which --json shows"] if rest > 0 else []
    lines += [f"note     {remark}" for remark in report["remarks"][:LISTED]]
    count = sum(report["problem_counts"].values())
    fine = "no problem found" + ("" if report["deep"] else "; --deep reads every byte")
    return [*lines, f"{count:,} problems" if count else fine]


def _reasons(reasons: dict[str, int]) -> str:
    often = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in often[:LISTED])
    rest = f" and {len(often) - LISTED} more reasons" if len(often) > LISTED else ""
    return f": {listed}{rest}" if often else ""


def _share(share: float) -> str:
    """Never 0 % or 100 % for what is not quite so."""
    percent = 100 * share
    for digits in (0, 1, 2):
        text = f"{percent:.{digits}f}"
        if float(text) == percent or (digits == 2 and 0 < float(text) < 100):
            return f"{text} %"
    return "< 0.01 %" if percent < 50 else "> 99.99 %"


def _bytes(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _cut(text: str, width: int = WIDTH) -> str:
    """Cuts to so many columns; what a terminal could take for a command becomes a question mark."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    taken, shown = 0, ""
    for letter in text:
        taken += 2 if unicodedata.east_asian_width(letter) in "WF" else not unicodedata.combining(letter)
        if taken > width:
            return shown[:-1] + "…"
        shown += letter
    return shown
