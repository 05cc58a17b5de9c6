# SPDX-License-Identifier: Apache-2.0
"""What is in a prepared directory, and what of it would make a run suffer. The keys of --json: see `examine`.

Problems end `doctor` with 2: a directory, manifest, file, index or record that is missing, damaged or of an older
version; no split or an empty one; captions that are all equal or have no word; a share of unknown pieces above UNKNOWN
or of cut texts above CUT; training pictures in an evaluation split, here or in an --against directory, above
max_overlap. Remarks do not: twins inside a split, captions that repeat, small or long pictures, dead sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import image, order
from vlp_jax.data.inspection import duplicates, intact, statistics
from vlp_jax.data.source import AGAIN, stored
from vlp_jax.data.text import Vocabulary
from vlp_jax.files import digest
from vlp_jax.types import UserError

SAMPLE = 2000  # records of a split whose texts are read without `deep`
PICTURES = 4  # of them whose pictures are decoded
SHOWN = 10  # problems of one kind that are kept; the others are counted
UNKNOWN = 0.1  # a share of [UNK] above this says that the vocabulary does not fit
CUT = 0.1  # a share of cut texts above this loses too much
REPEATED = 0.1  # of texts or pictures inside a split: worth a remark
DEAD = 0.2  # of the source
LONG = 10  # times longer than short: the resizing squeezes what is beyond data.image_limit
TEXT_FIELDS = ("captions", "questions")  # what a model reads


def examine(
    directory: str | Path,
    *,
    rule: image.Layout,
    length: int = 40,
    deep: bool = False,
    against: Sequence[str | Path] = (),
    max_overlap: float = 0.0,
) -> dict[str, Any]:
    """Looks at a prepared directory and, for overlaps, at others.

    Quick on any number of records: sizes, ids and digests come from the index, texts from SAMPLE records spread
    evenly. Memory: the index columns (about 30 bytes a record of all splits) and 8 bytes a text.

    Args:
        directory: written by prepare.
        rule: how a run would cut pictures into patches.
        length: data.text_length of a run.
        deep: reads everything: sha256 of all files, checksum of every record, every picture decoded and compared
            with the index, all texts.
        against: other prepared directories, whose splits other than train must have no picture of this train.
        max_overlap: largest share of an evaluation split that may be in train.

    Returns:
        A json-able object. Always: directory, deep, ok, problems [{kind, message}] (at most SHOWN a kind; kinds are
        directory, file, index, record, picture, vocabulary, texts, empty, overlap), problem_counts {kind: count}.
        If the manifest can be used also: dataset, builder_version, licence, manifest_sha256, bytes, files,
        vocabulary {file, size}, text_length, image_size, dropped {count, reasons}, changed {reason: count}, remarks,
        overlaps (see `duplicates.overlaps`), splits: name -> {records, pairs, listed, alive, captions_a_record,
        lengths, texts (see `statistics.Texts.summary`), pictures {shorter, longer, aspect, tokens, common_sizes},
        duplicates (see `duplicates.within`)}; null where nothing could be read. Shares are fractions.
    """
    look = _Look(Path(directory).expanduser(), deep)
    report: dict[str, Any] = {"directory": str(look.directory), "deep": deep}
    try:
        look.manifest, sha256 = intact.read_manifest(look.directory)
    except UserError as error:
        look.add("directory", str(error))
    else:
        report |= _stated(look.manifest, sha256) | {"text_length": length, "image_size": rule.shorter}
        look.files()
        texts = {name: look.records(name) for name in look.manifest["splits"]}
        report["splits"] = _splits(look, texts, rule, length)
        report["overlaps"] = _overlaps(look, against)
        _judge(look, report, max_overlap)
        report["remarks"] = list(_remarks(report, rule))
    return report | {"ok": not look.problems, "problems": look.problems, "problem_counts": look.counts}


def _stated(manifest: dict[str, Any], sha256: str) -> dict[str, Any]:
    """The part of the report that the manifest alone gives."""
    entries = [*stored(manifest), manifest["dropped"]]
    return {
        "dataset": manifest["dataset"],
        "builder_version": str(manifest.get("builder_version", "?")),
        "licence": manifest["licence"],
        "manifest_sha256": sha256,
        "bytes": sum(entry["bytes"] for entry in entries),
        "files": len(entries) + 1,
        "vocabulary": {key: manifest["vocabulary"][key] for key in ("file", "size")},
        "dropped": {key: manifest["dropped"][key] for key in ("count", "reasons")},
        "changed": manifest["changed"],
    }


class _Look:
    """One examination: what was opened and what was found.

    Attributes:
        problems: [{kind, message}], the first SHOWN of each kind.
        counts: kind -> how many.
        columns: split -> columns of its index, where it can be read.
        vocabulary: None if it cannot be used.
    """

    def __init__(self, directory: Path, deep: bool):
        self.directory, self.deep = directory, deep
        self.manifest: dict[str, Any] = {}
        self.problems: list[dict[str, str]] = []
        self.counts: dict[str, int] = {}
        self.columns: dict[str, dict[str, np.ndarray]] = {}
        self.vocabulary: Vocabulary | None = None
        self._unreadable: set[str] = set()

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= SHOWN:
            self.problems.append({"kind": kind, "message": message})

    def files(self) -> None:
        """All but the records: files, indexes and the vocabulary."""
        entries = [*stored(self.manifest), self.manifest["vocabulary"], self.manifest["dropped"]]
        entries = self._bar(entries, len(entries), "file")
        bad = set()
        for name, message, readable in intact.damaged_files(self.directory, entries, deep=self.deep):
            self.add("file", message)
            bad.add(name)
            if not readable:
                self._unreadable.add(name)
        for name, entry in self.manifest["splits"].items():
            try:
                self.columns[name] = intact.read_index(self.directory, entry)
            except UserError as error:
                if entry["index"]["file"] not in bad:
                    self.add("index", str(error))
        stated = self.manifest["vocabulary"]
        if stated["file"] in bad:
            return
        path = self.directory / stated["file"]
        try:
            if digest(path) != stated["sha256"]:
                raise UserError(f"{path} is not the vocabulary of these data: its sha256 differs. {AGAIN}")
            self.vocabulary = Vocabulary.load(path)
        except UserError as error:
            self.add("vocabulary", str(error))

    def records(self, split: str) -> statistics.Texts | None:
        """Reads records of a split and a few or all of their pictures; counts the texts, None if there are none."""
        entry, columns = self.manifest["splits"][split], self.columns.get(split)
        count = entry["records"] if self.deep else min(SAMPLE, entry["records"])
        rows = None if self.deep else np.sort(order.spread(entry["records"], SAMPLE))
        texts = statistics.Texts(self.vocabulary) if self.vocabulary else None
        pictures = count if self.deep else PICTURES
        read = intact.records(self.directory, entry, rows, skip=self._unreadable)
        with ThreadPoolExecutor() as threads:
            for group in _groups(self._bar(read, count, split)):
                whole = [(row, found) for row, found in group if not isinstance(found, str)]
                for _, found in group:
                    if isinstance(found, str):
                        self.add("record", found)
                if columns and pictures > 0:
                    some, pictures = whole[:pictures], pictures - len(whole)
                    for message in intact.wrong_pictures(self.directory, entry, columns, some, threads):
                        self.add("picture", message)
                if texts:
                    self._count(entry, whole, texts)
        return texts if texts and texts.texts else None

    def _bar(self, items: Iterable, total: int, what: str) -> Iterable:
        """A progress bar on standard error for the long way, where somebody looks at it."""
        from tqdm import tqdm

        return tqdm(items, total=total, desc=what, disable=None if self.deep else True)

    def _count(self, entry: dict[str, Any], found: list[tuple[int, dict]], texts: statistics.Texts) -> None:
        said = [(row, text) for row, one in found for field in TEXT_FIELDS for text in one.get(field, ())]
        texts.records += len(found)
        for number in texts.add([text for _, text in said]):
            where = intact.place(self.directory, entry, said[number][0])
            self.add(
                "texts", f"The {where} has a text without a word. Repair the source and prepare it again."
            )


def _groups(items: Iterable) -> Iterator[list]:
    """Yields lists of at most CHUNK items."""
    items = iter(items)
    while group := list(itertools.islice(items, intact.CHUNK)):
        yield group


def _splits(
    look: _Look, texts: dict[str, statistics.Texts | None], rule: image.Layout, length: int
) -> dict[str, dict[str, Any]]:
    """The part of the report about each split; the histograms of all splits have the same bins."""
    found: dict[str, dict[str, statistics.Distribution]] = {}
    common: dict[str, list] = {}
    for name in look.manifest["splits"]:
        columns = look.columns.get(name)
        found[name] = {"lengths": texts[name].lengths()} if texts[name] else {}
        if columns and len(columns["height"]):
            found[name]["captions"] = statistics.Distribution.of(columns["captions"].astype(np.int64))
            sizes, common[name] = statistics.pictures(columns["height"], columns["width"], rule)
            found[name] |= sizes
    kinds = {kind for distributions in found.values() for kind in distributions}
    edges = {
        kind: statistics.edges([one[kind] for one in found.values() if kind in one]) for kind in sorted(kinds)
    }

    def summary(split: str, kind: str) -> dict[str, Any] | None:
        return found[split][kind].summary(edges[kind]) if kind in found[split] else None

    report = {}
    for name, entry in look.manifest["splits"].items():
        sides = {kind: summary(name, kind) for kind in ("shorter", "longer", "aspect", "tokens")}
        report[name] = {key: entry[key] for key in ("records", "pairs", "listed", "alive")} | {
            "captions_a_record": summary(name, "captions"),
            "lengths": summary(name, "lengths"),
            "texts": texts[name].summary(length) if texts[name] else None,
            "pictures": sides | {"common_sizes": common[name]} if name in common else None,
            "duplicates": duplicates.within(look.columns[name]["pixels"]) if name in look.columns else None,
        }
    return report


def _overlaps(look: _Look, against: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What the training split has in common with evaluation splits, here and elsewhere."""
    train = look.columns.get(duplicates.TRAIN)
    others = {name: columns for name, columns in look.columns.items() if name != duplicates.TRAIN}
    for directory in (Path(one).expanduser() for one in against):
        try:
            for name, entry in intact.read_manifest(directory)[0]["splits"].items():
                if name != duplicates.TRAIN:
                    others[f"{directory}:{name}"] = intact.read_index(directory, entry)
        except UserError as error:
            look.add("overlap", f"--against={directory} cannot be compared with. {error}")
    return duplicates.overlaps(train, others) if train else []


def _judge(look: _Look, report: dict[str, Any], max_overlap: float) -> None:
    """Adds the problems that the figures show."""
    splits = look.manifest["splits"]
    if not splits:
        look.add("empty", f"{look.directory} has no split. {AGAIN}")
    for name, split in report["splits"].items():
        if not split["records"]:
            look.add("empty", f"The split {name} is empty. Prepare the data again with other splits.")
        texts = split["texts"]
        if not texts:
            continue
        if texts["unknown"] > UNKNOWN:
            look.add(
                "vocabulary",
                f"{texts['unknown']:.1%} of the pieces of split {name} are unknown to {look.vocabulary.path.name}: the "
                "vocabulary does not fit these texts. Prepare the data with another.",
            )
        if texts["cut"] > CUT:
            look.add(
                "texts",
                f"{texts['cut']:.1%} of the texts of split {name} are longer than {report['text_length']} pieces and "
                f"would be cut; 99 % have at most {split['lengths']['p99']}. Give a larger data.text_length.",
            )
        if texts["most_frequent"]["times"] == texts["texts"] > 1:
            shown = ascii(texts["most_frequent"]["text"][:60])
            look.add(
                "texts", f"All {texts['texts']} texts read of split {name} are {shown}. Repair the source."
            )
    for one in report["overlaps"]:
        if one["share"] > max_overlap:
            look.add("overlap", _leak(look, one))


def _leak(look: _Look, one: dict[str, Any]) -> str:
    first = one["examples"][0]
    train = intact.place(look.directory, look.manifest["splits"][duplicates.TRAIN], first["train_row"])
    directory, _, name = one["evaluation"].rpartition(":")
    what = "" if one["by"] == "pixels" else f" {first['value']}"
    return (
        f"{one['pictures']} pictures of {one['evaluation']} ({one['share']:.2%}) are in train too: "
        f"{duplicates.KEYS[one['by']]}{what}, first row {first['row']} of {name} and {train}. Scores on {name} would be "
        "too good. Leave them out of one of the two, or allow a share with --max_overlap."
    )


def _remarks(report: dict[str, Any], rule: image.Layout) -> Iterator[str]:
    """What is odd and does no harm to a run."""
    for name, split in report["splits"].items():
        if split["alive"] < 1 - DEAD:
            yield f"{name}: only {split['alive']:.1%} of the {split['listed']:,} listed examples could be used"
        if split["records"] and not split["pairs"]:
            yield f"{name} has no captions: it cannot train what needs pairs"
        if split["duplicates"] and split["duplicates"]["share"] > REPEATED:
            yield f"{name}: {split['duplicates']['share']:.1%} of the pictures are there more than once"
        texts, pictures = split["texts"], split["pictures"]
        if texts and texts["duplicates"] > REPEATED:
            often = texts["most_frequent"]
            shown = f"{often['text'][:24]!r} {often['times']:,} times"
            yield f"{name}: {texts['duplicates']:.1%} of the texts read are repeated, {shown}"
        if pictures and pictures["shorter"]["minimum"] < rule.patch:
            smallest = pictures["shorter"]["minimum"]
            yield f"{name} has pictures of {smallest} pixels, less than a patch of {rule.patch}"
        if pictures and pictures["aspect"]["maximum"] > LONG:
            yield f"{name} has pictures {pictures['aspect']['maximum']:.1f} times as long as short"
