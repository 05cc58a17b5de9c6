# SPDX-License-Identifier: Apache-2.0
"""How files name what we have: one module a system, found by its name, holding tables and no code of its own.

A system's module has CONFIG (which config a source is read into), TABLES, SIZES (config key -> how arrays fix it),
HEADS (our paths that may be fresh as a whole), CLASSES (of which heads the classes have names), RESIZE (our path -> how
it takes another shape), HUB (what stands beside exported weights).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vlp_jax.convert.ops import LINEAR, SAME, Op, Shape
from vlp_jax.types import UserError, closest

Size = Callable[
    [Mapping[str, Shape]], Any
]  # shapes by our path -> a config value, None where they do not say


LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file and what it becomes.

    Attributes:
        source: its name, `{layer}` standing for the number of a layer. Several: other names of one tensor, of which
            a file may have any; they must be equal. The first is the one that is written.
        target: our path, or as many as `op` gives arrays. With `{layer}` in `source` our array stacks the layers.
        op: what happens on the way.
        first: number in the file of the layer that is the first of our stack; lower ones are no layers of this row.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    op: Op = SAME
    first: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The names, one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """The paths, one or several."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def stack(self) -> str:
        """What tells one stack of a file from another: the names before the number."""
        return self.sources[0].split(LAYER)[0]

    def name(self, layer: int | None) -> str:
        """The name in a file of a layer of our stack; None where nothing is stacked."""
        name = self.sources[0]
        return name if layer is None else name.replace(LAYER, str(self.first + layer))


@dataclasses.dataclass(frozen=True)
class Copy:
    """A parameter that takes what another tensor holds, where the file has no tensor of its own for it.

    `when` is a name in the file that shows that the part is there which this parameter belongs to.
    """

    row: Row
    when: str
    because: str


@dataclasses.dataclass(frozen=True)
class Classes:
    """The outputs of a head that have names.

    Attributes:
        key: config key of their number.
        ends: our paths whose last axis they are; the first that a file has counts.
        more: outputs behind them that are no classes: "no object".
        blank: labels that stand for a number without meaning, kept as ""; () = every number has a meaning.
        unsaid: number of classes -> their names where no file says them; () = not known.
        facts: whether names and number are also facts of a run on such data.
    """

    key: str
    ends: tuple[str, ...]
    more: int = 0
    blank: tuple[str, ...] = ()
    unsaid: Callable[[int], Sequence[str]] = lambda count: ()
    facts: bool = False

    @property
    def name(self) -> str:
        """As it is called among heads: "answer"."""
        return self.key.rsplit(".", 1)[-1]

    def count(self, shapes: Mapping[str, Shape]) -> int:
        """Classes of the head in a file; 0 if it has none."""
        return max(0, next((shapes[path][-1] for path in self.ends if path in shapes), 0) - self.more)


@dataclasses.dataclass(frozen=True)
class Table:
    """One way to name the parameters of a system, or of a part of it.

    Attributes:
        name: for people: "ViLT as released".
        format: what `--format` calls it; "" where nothing is exported in it.
        marks: names, with `{layer}`, all of which only this layout has.
        rows: what is read.
        drop: regular expression on whole names -> why such a tensor is not read.
        fresh: regular expression on our paths -> why such a parameter keeps its initial value.
        copies: what is taken from elsewhere in the file.
        prefix: which names in `rows` begin with it and files of the bare body leave it away; "" = none.
        spellings: (regular expression, replacement) applied to the names of a file first.
        settings: config key -> key of the `config.json` beside the file.
        fixed: key of that `config.json`, nested ones with dots -> the one value that we have, where it is said.
        model_types: what `model_type` in that `config.json` may be, where it is said; () = anything.
        defaults: config key -> what the original has, where no `config.json` says it.
        fits: shapes by the names in `rows` -> whether it is this layout, where names do not tell.
        unfit: shapes by the names in `rows` -> why a file of this layout is another network than ours; "" = it is not.
        complete: whether it holds a whole system, so that the sizes of all parts follow from it.
    """

    name: str
    rows: tuple[Row, ...]
    marks: tuple[str, ...]
    format: str = ""
    drop: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fresh: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: tuple[Copy, ...] = ()
    prefix: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    unfit: Callable[[Mapping[str, Shape]], str] = lambda shapes: ""
    complete: bool = False


def projection(source: str, target: str, op: Op = LINEAR) -> tuple[Row, Row]:
    """The rows of a PyTorch linear layer, or of a convolution by its `op`: weight and bias."""
    return Row(f"{source}.weight", f"{target}/kernel", op), Row(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Row, Row]:
    """The rows of a PyTorch LayerNorm: weight and bias."""
    return Row(f"{source}.weight", f"{target}/scale"), Row(f"{source}.bias", f"{target}/bias")


def axis(number: int, *paths: str) -> Size:
    """The size of an axis of the first of these arrays that there is."""
    return lambda shapes: next((shapes[path][number] for path in paths if path in shapes), None)


def either(*sizes: Size) -> Size:
    """The first of these that says something."""
    return lambda shapes: next((found for size in sizes if (found := size(shapes)) is not None), None)


def present(start: str) -> Size:
    """Whether there is any array whose path starts so: of a head that is there in part, the rest is missing."""
    return lambda shapes: any(path.startswith(start) for path in shapes)


def count(*paths: str) -> Size:
    """The last size of the first of these arrays that there is; 1 if only others start with the last one, else 0."""

    def size(shapes: Mapping[str, Shape]) -> int:
        there = next((shapes[path][-1] for path in paths if path in shapes), 0)
        return there or int(any(path.startswith(paths[-1]) for path in shapes))

    return size


def patch_side(path: str) -> Size:
    """The side p of patches whose projection is [p p 3, out]."""
    return lambda shapes: math.isqrt(shapes[path][0] // 3) if path in shapes else None


def names() -> list[str]:
    """The systems that have tables."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in PARTS)


# What a `config.json` that someone has put beside a file without one of its own may say.
BARE_SETTINGS = {"model.fusion.num_heads": "num_attention_heads", "model.gelu": "hidden_act"}
PARTS = ("vit", "bert", "resnet")  # rows that several systems share


def get(system: str) -> ModuleType:
    """Imports the tables of a system.

    Raises:
        UserError: there are none; lists the systems and names the closest.
    """
    if system not in names():
        raise UserError(
            f"No conversion tables for the system {system!r}.{closest(system, names())} Systems: "
            f"{', '.join(names())}. Give one of them with --system."
        )
    return importlib.import_module(f"{__name__}.{system}")
