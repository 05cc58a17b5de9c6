# SPDX-License-Identifier: Apache-2.0
"""What is in a prepared directory, and what of it would make a run suffer, by file and record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlp_jax import files
from vlp_jax.data import image, order
from vlp_jax.data.source import AGAIN, Source, read_manifest, stored
from vlp_jax.data.text import Vocabulary
from vlp_jax.types import UserError

SAMPLE = 2000  # records of a split that a look without `deep` reads
SHOWN = 10  # problems of one split that are listed; the others are counted
CHUNK = 256  # records read at once
UNKNOWN = 0.1  # a share of [UNK] above this says that the vocabulary does not fit


def examine(
    directory: str | Path, *, deep: bool = False, length: int = 40, say: Callable[[str], None] = print
) -> list[str]:
    """Reports counts, text lengths and picture sizes of each split.

    Args:
        directory: written by prepare.
        deep: looks at every record: digests of all files, all pictures decoded. Otherwise at a sample.
        length: data.text_length that a run will use, for the share of texts that are cut.
        say: takes each line of the report.

    Returns:
        What would make a run suffer, a sentence each; empty when all is well.

    Raises:
        UserError: the directory or its manifest cannot be used at all.
    """
    directory = Path(directory).expanduser()
    manifest, digest = read_manifest(directory)
    say(f"{directory}: {manifest['dataset']}, manifest {digest[:12]}")
    say(f"licence     {manifest.get('licence', 'not stated')}")
    problems = _digests(directory, manifest) if deep else []
    try:
        vocabulary = Vocabulary.load(directory / manifest["vocabulary"]["file"])
    except UserError as error:
        return [*problems, str(error)]
    say(f"vocabulary  {vocabulary.size} pieces in {vocabulary.path.name}")
    for split, entry in manifest["splits"].items():
        if not entry["records"]:
            say(f"{split}: empty")
            continue
        try:
            problems += _split(Source(directory, split), vocabulary, deep, length, say)
        except UserError as error:
            say(f"{split}: cannot be opened")
            problems.append(str(error))
    return problems


def _digests(directory: Path, manifest: dict) -> list[str]:
    problems = []
    for entry in [*stored(manifest), manifest["vocabulary"]]:
        path = directory / entry["file"]
        if not path.is_file():
            problems.append(f"{path} is missing. {AGAIN}")
            continue
        if files.digest(path) != entry["sha256"]:
            problems.append(
                f"{path} is not what was written: its sha256 differs from the manifest's. {AGAIN}"
            )
    return problems


def _split(
    source: Source, vocabulary: Vocabulary, deep: bool, length: int, say: Callable[[str], None]
) -> list[str]:
    rows = np.sort(order.spread(len(source), 0 if deep else SAMPLE))
    problems, lengths, unknown = [], [], 0
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(rows), CHUNK):
            for row, record in _records(source, rows[start : start + CHUNK], problems, threads, deep):
                tokens = vocabulary.tokenize(record["captions"])
                lengths += [len(ids) + 2 for ids in tokens]
                unknown += sum(ids.count(vocabulary.unk) for ids in tokens)
                problems += [
                    f"The {source.where(row)} has a caption without text." for ids in tokens if not ids
                ]
    say(
        f"{source.split}: {len(source)} pictures, {source.pairs} pairs, "
        f"{_between(source.captions)} captions a picture"
    )
    if lengths:
        counts = np.array(lengths)
        share = unknown / max(1, (counts - 2).sum())
        say(
            f"  texts     {_between(counts)} pieces, mean {counts.mean():.1f}; "
            f"{(counts > length).mean():.2%} are cut at {length}; {share:.2%} of the pieces are unknown"
        )
        if share > UNKNOWN:
            problems.append(
                f"{share:.1%} of the pieces of split {source.split} are unknown to {vocabulary.path.name}: the "
                "vocabulary does not fit these texts. Prepare the data with another."
            )
    say(f"  pictures  {_sizes(source)}")
    say(f"  looked at {len(rows)} of {len(source)} records: {len(problems) or 'no'} problems")
    rest = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"... and {rest} more in split {source.split}."] if rest > 0 else [])


def _records(
    source: Source, rows: np.ndarray, problems: list[str], threads: ThreadPoolExecutor, deep: bool
) -> Iterator[tuple[int, dict]]:
    """Yields the records that can be read, and adds those that cannot to the problems."""

    def read(row: int) -> dict | str:
        try:
            return source.read([row])[0]
        except UserError as error:
            return str(error)

    def look(pair: tuple[int, dict]) -> str:
        row, record = pair
        try:
            found = image.decoded(record["image"], f"The picture in {source.where(row)}").shape[:2]
        except UserError as error:
            return str(error)
        stated = (source.heights[row], source.widths[row])
        if found == stated:
            return ""
        return f"The picture in {source.where(row)} has {found[0]} x {found[1]} pixels, stated are {stated[0]} x {stated[1]}."

    found = [(int(row), read(int(row))) for row in rows]
    problems += [record for _, record in found if isinstance(record, str)]
    whole = [(row, record) for row, record in found if not isinstance(record, str)]
    problems += filter(None, threads.map(look, whole if deep else whole[:4]))
    yield from whole


def _sizes(source: Source) -> str:
    sizes = Counter(zip(source.heights.tolist(), source.widths.tolist(), strict=True))
    common = ", ".join(f"{h} x {w} ({count / len(source):.0%})" for (h, w), count in sizes.most_common(3))
    return (
        f"{_between(source.heights)} pixels high, {_between(source.widths)} wide; "
        f"height x width most often {common}"
    )


def _between(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}" if values.min() < values.max() else f"{values.min()}"
