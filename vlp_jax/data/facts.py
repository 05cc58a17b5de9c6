# SPDX-License-Identifier: Apache-2.0
"""What a run takes from its data before the first record is read: sizes, vocabulary, where it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data import categories
from vlp_jax.data.source import MANIFEST, parse_spec, read_manifest
from vlp_jax.data.text import Vocabulary
from vlp_jax.files import LABELS, digest
from vlp_jax.types import UserError


def collect(config: Any) -> dict[str, Any]:
    """Returns what a run takes from its data; reads manifests and the vocabulary, no record.

    Returns:
        vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id; visual_words and visual_ids (pieces that are one);
        manifest_sha256 (of a mixture: over all); vocabulary_path, vocabulary_sha256; sources: name -> {directory,
        dataset, licence, weight, manifest_sha256, splits: name -> {records, pairs, alive}}. With boxes in
        config.data.inputs also categories, the name of each class, and classes, how many there are.

    Raises:
        UserError: a directory, manifest or vocabulary that cannot be used.
    """
    sources, words, first, manifests = {}, set(), None, []
    for name, directory, weight in parse_spec(config.data.dir):
        manifest, digest = read_manifest(directory)
        manifests.append((directory, manifest))
        first = first or (directory, manifest)
        splits = {
            split: {key: entry[key] for key in ("records", "pairs", "alive")}
            for split, entry in manifest["splits"].items()
        }
        sources[name or manifest["dataset"]] = {
            "directory": str(directory),
            "dataset": manifest["dataset"],
            "licence": manifest.get("licence", "not stated"),
            "weight": weight,
            "manifest_sha256": digest,
            "splits": splits,
        }
        words.update(manifest.get("visual_words", ()))
    directory, manifest = first
    vocabulary = load_vocabulary(directory / manifest["vocabulary"]["file"], manifest["vocabulary"]["sha256"])
    digests = [source["manifest_sha256"] for source in sources.values()]
    together = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    facts = {
        "vocab_size": vocabulary.size,
        "pad_id": vocabulary.pad,
        "unk_id": vocabulary.unk,
        "cls_id": vocabulary.cls,
        "sep_id": vocabulary.sep,
        "mask_id": vocabulary.mask,
        "visual_words": sorted(words),
        "visual_ids": [
            i for i in np.flatnonzero(vocabulary.word_start).tolist() if vocabulary.word(i) in words
        ],
        "manifest_sha256": digests[0] if len(digests) == 1 else together,
        "vocabulary_path": str(vocabulary.path),
        "vocabulary_sha256": manifest["vocabulary"]["sha256"],
        "sources": sources,
    }
    if "boxes" in config.data.inputs:
        classes = list(categories.of_data(config.data.categories, manifests))
        facts |= {"categories": classes, "classes": len(classes)}
    return facts


def line(facts: dict[str, Any], split: str) -> str:
    """What a run is trained on, in one line: sources, their size, how much of each was alive, digest, licence."""
    parts = []
    for name, source in facts["sources"].items():
        counts = source["splits"].get(split, {"pairs": 0, "records": 0, "alive": 0.0})
        parts.append(
            f"{name}: {counts['records']:,} pictures, {counts['pairs']:,} pairs of {split}, "
            f"{counts['alive']:.2%} of the source alive"
        )
    licences = " / ".join(dict.fromkeys(source["licence"] for source in facts["sources"].values()))
    return f"data {'; '.join(parts)}; manifest {facts['manifest_sha256'][:12]}; licence: {licences}"


def assets(facts: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content of what a checkpoint keeps of the data: vocabulary, manifest of each source, names of classes."""
    paths = {
        f"{name}.{MANIFEST}": Path(one["directory"]) / MANIFEST for name, one in facts["sources"].items()
    }
    vocabulary = Path(facts["vocabulary_path"])
    kept = {name: path.read_bytes() for name, path in {**paths, vocabulary.name: vocabulary}.items()}
    if "categories" in facts:
        kept[LABELS] = json.dumps(facts["categories"], ensure_ascii=False).encode()
    return kept


def load_vocabulary(path: Path, sha256: str) -> Vocabulary:
    """Loads a vocabulary after a look at its digest.

    Raises:
        UserError: it is unreadable, or not the file that the manifest states.
    """
    vocabulary = Vocabulary.load(path)
    if digest(path) != sha256:
        raise UserError(
            f"The vocabulary {path} is not the one that the manifest beside it states: its sha256 differs. Token "
            "ids would change their meaning. Put the right file back or prepare the data again."
        )
    return vocabulary
