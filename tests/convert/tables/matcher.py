# SPDX-License-Identifier: Apache-2.0
"""A table applied to a file in memory, written apart from the engine: what is filled, dropped, and left over."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np

from tests.examples import random_batch, vilt_config
from vlp_jax import systems
from vlp_jax.convert.tables import Row, Table
from vlp_jax.training.paths import flatten

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID, VOCABULARY = 48, 3, 3, 80, 8, 3, 40


@dataclasses.dataclass
class Reading:
    """What came of the names of a file."""

    arrays: dict[str, np.ndarray]  # by our path
    dropped: dict[str, str]
    unexpected: list[str]
    doubled: list[str]


@functools.cache
def ours() -> dict[str, tuple[int, ...]]:
    """Shapes of a ViLT's parameters by path: three layers, three heads, masked patches and all other heads."""
    config = vilt_config(
        model__width=WIDTH,
        model__fusion__depth=DEPTH,
        model__fusion__num_heads=HEADS,
        model__fusion__mlp_width=HIDDEN,
        data__patch_size=PATCH,
        data__image_size=GRID * PATCH,
        objectives__mpp=1.0,
    )
    batch = random_batch(config, 2)
    init = systems.get("vilt").build(config).init
    tree = jax.eval_shape(lambda: init(jax.random.key(0), batch)[0])
    return {path: leaf.shape for path, leaf in flatten(nn.unbox(tree))}


def read(table: Table, tensors: Mapping[str, np.ndarray]) -> Reading:
    """Runs every tensor through the one row or drop that has its name."""
    reading, stacks = Reading({}, {}, [], []), {}
    for name, x in tensors.items():
        name = _normal(table, name)
        found, dropped = list(_rows(table, name)), _dropped(table, name)
        if len(found) + (dropped is not None) > 1:
            reading.doubled.append(name)
        elif found:
            row, layer = found[0]
            for path, part in zip(row.targets, row.op.forward(x), strict=True):
                if layer is None:
                    same = path not in reading.arrays or np.array_equal(reading.arrays[path], part)
                    reading.doubled += [] if same else [path]
                    reading.arrays[path] = part
                else:
                    stacks.setdefault(path, {})[layer] = part
        elif dropped is not None:
            reading.dropped[name] = dropped
        else:
            reading.unexpected.append(name)
    for path, layers in stacks.items():
        assert sorted(layers) == list(range(len(layers))), path
        reading.arrays[path] = np.stack([layers[layer] for layer in range(len(layers))])
    names = {_normal(table, name): x for name, x in tensors.items()}
    for copy in table.copies:
        if copy.row.target not in reading.arrays and copy.when in names:
            for name, x in names.items():
                if name in copy.row.sources:
                    (reading.arrays[copy.row.target],) = copy.row.op.forward(x)
    return reading


def recognised(tables: Sequence[Table], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the tables whose marks are all in a file; of several, those that know most of its names."""
    found = []
    for table in tables:
        normal = {_normal(table, name): np.shape(x) for name, x in tensors.items()}
        marked = all(any(_template(mark).fullmatch(name) for name in normal) for mark in table.marks)
        if marked and table.fits(normal):
            found.append((-sum(_known(table, name) for name in normal), table.name))
    best = min((count for count, _ in found), default=0)
    return [name for count, name in found if count == best]


def checked(table: Table, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file, after checking that nothing is left over and every path is filled once or may be fresh."""
    reading = read(table, tensors)
    assert reading.unexpected == [] and reading.doubled == []
    assert all(reading.dropped.values()) and all(table.fresh.values())
    wanted = ours()
    assert reading.arrays.keys() <= wanted.keys()
    fresh = {path for path in wanted if any(re.fullmatch(pattern, path) for pattern in table.fresh)}
    assert fresh & reading.arrays.keys() == set()
    assert fresh | reading.arrays.keys() == wanted.keys()
    for path, x in reading.arrays.items():
        assert x.shape == wanted[path], path
    return reading.arrays


def _normal(table: Table, name: str) -> str:
    for pattern, replacement in table.spellings:
        name = re.sub(pattern, replacement, name)
    bare = table.prefix and not _known(table, name) and _known(table, table.prefix + name)
    return table.prefix + name if bare else name


def _known(table: Table, name: str) -> bool:
    return any(_rows(table, name)) or _dropped(table, name) is not None


def _rows(table: Table, name: str) -> Iterable[tuple[Row, int | None]]:
    for row in table.rows:
        for source in row.sources:
            if match := _template(source).fullmatch(name):
                yield row, int(match[1]) if match.groups() else None


def _dropped(table: Table, name: str) -> str | None:
    return next((why for pattern, why in table.drop.items() if re.fullmatch(pattern, name)), None)


def _template(source: str) -> re.Pattern:
    return re.compile(re.escape(source).replace(r"\{layer\}", r"(\d+)"))
