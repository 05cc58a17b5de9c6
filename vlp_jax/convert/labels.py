# SPDX-License-Identifier: Apache-2.0
"""What the classes of a head are called: from a file that the user gives, or from the `config.json` of the source."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.types import UserError

LARGEST = 64 << 20  # bytes


def load(path: Path, blank: Sequence[str] = ()) -> list[str]:
    """Reads labels: a JSON list, a JSON object {number: label} (vqa_dict.json, vqa2-id2label.json), or a line each.

    Labels among `blank` stand for a number without meaning; they may be there several times and become "".

    Raises:
        UserError: the file cannot be read, or its numbers are not 0, 1, 2, ..., or a label is there twice or empty.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        text = path.read_text("utf-8-sig")
        content: Any = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
        found = _ordered(content) if isinstance(content, Mapping) else content
        return _checked(found, blank)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"The labels {path} cannot be used: {error}. Possible: a JSON list of texts, a JSON object from numbers to "
            "texts, or a text file with a label a line. Give such a file with --labels."
        ) from error


def of_config(content: Mapping[str, Any], file: Path, blank: Sequence[str] = ()) -> list[str]:
    """The labels that a `config.json` states as id2label; [] if it has none but LABEL_0, LABEL_1, ...

    `blank` as of `load`.

    Raises:
        UserError: its id2label is no such list.
    """
    if not content.get("id2label"):
        return []
    try:
        found = _ordered(content["id2label"])
        if all(isinstance(label, str) and re.fullmatch(r"LABEL_\d+", label) for label in found):
            return []
        return _texts(found, blank)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: id2label is wrong: {error}. Mend or remove it.") from error


def distinct(found: Sequence[str]) -> bool:
    """Whether no label is there twice; "" may be."""
    named = [label for label in found if label]
    return len(set(named)) == len(named)


def _ordered(content: Mapping[str, Any]) -> list[Any]:
    # Both ways round are published: {"0": "net"} and {"net": 0}.
    if content and all(isinstance(value, int) and not isinstance(value, bool) for value in content.values()):
        content = {str(number): label for label, number in content.items()}
    numbers = {int(key): value for key, value in content.items()}
    if sorted(numbers) != list(range(len(content))):
        raise ValueError(f"its {len(content)} numbers are not 0 to {len(content) - 1}")
    return [numbers[number] for number in range(len(content))]


def _texts(found: Any, blank: Sequence[str]) -> list[str]:
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ValueError("it holds no label")
    for number, label in enumerate(found):
        if not isinstance(label, str) or (not label.strip() and label not in blank):
            raise ValueError(f"label {number} is {label!r}, no text")
    return ["" if label in blank else label for label in found]


def _checked(found: Any, blank: Sequence[str]) -> list[str]:
    texts = _texts(found, blank)
    if not distinct(texts):
        label, times = collections.Counter(filter(None, texts)).most_common(1)[0]
        raise ValueError(f"{label!r} is there {times} times")
    return texts
