# SPDX-License-Identifier: Apache-2.0
"""Trees of nested dicts by path ("a/b/kernel"), and the regular expressions that choose among the paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = "/", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b/kernel", leaf), sorted by name at each level; what is no mapping is a leaf, partition boxes too."""
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from flatten(tree[name], separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, tree[name]


def nest(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The tree of ("a/b/kernel", leaf): the inverse of `flatten`, less empty dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def matches(patterns: Iterable[str], path: str) -> bool:
    """Whether one of the regular expressions is found anywhere in a path."""
    return any(re.search(pattern, path) for pattern in patterns)
