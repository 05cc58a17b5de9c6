# SPDX-License-Identifier: Apache-2.0
"""The config of a converted model: sizes from the arrays, the rest from `config.json`, or the original's default.

Every value comes with its origin, which is printed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.convert.engine import Reading
from vlp_jax.convert.ops import HEADS_IN
from vlp_jax.types import UserError, closest

ACTIVATIONS = {"gelu": "exact", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
DEFAULT = "default of"
OWN = "vlp_jax"  # key of what only we read
TRANSFORM = "image transform"  # shown among the settings, but no config key
COLORS = ("image_mean", "image_std")
LARGEST = 10 << 20  # bytes of a config.json


@dataclasses.dataclass(frozen=True)
class Setting:
    """One config value and why it is so."""

    key: str
    value: Any
    origin: str


def configure(
    readings: Sequence[Reading], tables: ModuleType, config: ConfigDict, given: bool, vocab_size: int = 0
) -> tuple[ConfigDict, list[Setting]]:
    """Returns the config that the files ask for, unresolved, and what was set.

    Args:
        readings: of each file.
        tables: the system's module in vlp_jax/convert/tables.
        config: the one that the user gave, or the system's own.
        given: whether the user gave it; its sizes then hold, and those at -1 that follow from its data.
        vocab_size: of the vocabulary that the user gave; 0 = none.

    Raises:
        UserError: a `config.json` that says what we do not have, or two files that contradict each other.
    """
    config = ConfigDict(config.to_dict())
    found: dict[str, Setting] = {}
    for reading in readings:
        sizes = {**tables.SIZES, **(tables.WHOLE if reading.table.complete else {})}
        for key, size in sizes.items():
            value = size(reading.shapes)
            if value is None or (given and (key in tables.FROM_DATA or get(config, key) != -1)):
                continue
            _note(found, Setting(key, value, f"shapes in {reading.source.path}"))
        _check_stated(reading, {**tables.SIZES, **tables.WHOLE}, tables.STATED)
        for setting in beside(reading, tables.OWNED) + ([] if given else _defaults(reading)):
            _note(found, setting)
    for setting in found.values():
        put(config, setting.key, setting.value)
    if not given:
        whole = any(reading.table.complete for reading in readings)
        for key, value in ((key, follow(config, whole)) for key, follow in tables.IMPLIED.items()):
            if value is not None and value != get(config, key):
                found[key] = Setting(key, value, "follows from the others")
                put(config, key, value)
        for setting in (setting for reading in readings for setting in transform(reading, tables)):
            found[setting.key] = setting
            if setting.key != TRANSFORM:
                put(config, setting.key, setting.value)
    for key in tables.HEAD_WIDTHS.keys() - found.keys():
        found[key] = _heads(key, tables.HEAD_WIDTHS[key], readings, config, given)
        put(config, key, found[key].value)
    for key, (value, origin) in tables.UNKNOWN.items():
        if get(config, key) == -1:
            by_user = vocab_size if key.endswith("vocab_size") else 0
            found[key] = Setting(key, by_user or value, "--vocab" if by_user else origin)
            put(config, key, found[key].value)
    return config, [found[key] for key in sorted(found)]


def json_beside(path: Path, name: str = "config.json") -> tuple[Path, dict[str, Any]]:
    """Returns the `config.json` in the folder of a file (or in that folder), and its content; {} if there is none.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        return file, {}
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: {error}. It stands beside the weights and would be read: mend or remove it."
        ) from error
    return file, content


def beside(reading: Reading, owned: Sequence[str] = ()) -> list[Setting]:
    """What the `config.json` beside a file says of what shapes do not fix; `owned` keys under OWN too.

    Raises:
        UserError: it is damaged, or says what we do not have.
    """
    file, content = json_beside(reading.source.path)
    kind, possible = content.get("model_type"), reading.table.model_types
    if kind and possible and kind not in possible:
        raise UserError(
            f"{file} says model_type {kind!r}, but by its names {reading.source.path} is read as: {reading.table.name} "
            f"({' or '.join(possible)}). Other models have some of its names too. Give the weights of a {possible[0]}."
        )
    _check_fixed(reading, file, content)
    own = {setting.key: setting for setting in _own(file, content, owned)}
    result = []
    for key, name in reading.table.settings.items():
        if content.get(name) is not None:
            value = (
                _activation(file, content[name])
                if key.endswith("gelu")
                else _number(file, key, name, content[name])
            )
            result.append(Setting(key, value, f"{name} in {file.name}"))
    return [setting for setting in result if setting.key not in own] + list(own.values())


def _check_fixed(reading: Reading, file: Path, content: Mapping[str, Any]) -> None:
    """Compares what a `config.json` says of the network with what we have.

    Raises:
        UserError: it is another network.
    """
    for name, value in reading.table.fixed.items():
        said = _said(content, name)
        if said is not None and said != value:
            raise UserError(
                f"{file}: {name} is {said!r}. Ours has {value!r}: {reading.source.path} belongs to a network that "
                "cannot be converted, though its names and shapes are the same. Give weights of one that has."
            )


def _said(content: Mapping[str, Any], name: str) -> Any:
    """The value of a key, nested ones with dots; None if it is not there."""
    node: Any = content
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def transform(reading: Reading, tables: ModuleType) -> list[Setting]:
    """How pictures are made ready: their sides, and how colors are scaled, by what stands beside the weights.

    Colors are scaled in one way by a system. Another one is said, not followed.

    Raises:
        UserError: `preprocessor_config.json` is damaged.
    """
    if tables.SEEN not in reading.shapes:
        return []
    whose, scale, values = tables.COLORS
    file, content = json_beside(reading.source.path, "preprocessor_config.json")
    size = content.get("size")
    size = (
        size
        if isinstance(size, Mapping)
        else {"shortest_edge": size, "longest_edge": content.get("max_size")}
    )
    shorter, longer = (
        side if type(side) is int and side > 0 else 0
        for side in (size.get("shortest_edge"), size.get("longest_edge"))
    )
    found = [Setting(TRANSFORM, scale, f"{DEFAULT} {whose}")]
    if shorter:
        sides = tables.sides(shorter, longer)
        found += [Setting(key, value, f"size in {file.name}") for key, value in sides.items()]
    timm, pretrained = json_beside(reading.source.path)
    pretrained = pretrained.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, Mapping) else {}
    for origin, keys, said in ((file, COLORS, content), (timm, ("mean", "std"), pretrained)):
        theirs = [said.get(key) for key in keys]
        if None not in theirs and theirs != values:
            told = f"{origin.name} has mean {theirs[0]} and deviation {theirs[1]}, which is not followed"
            found.append(Setting(TRANSFORM, scale, f"{whose}'s; {told}"))
    return found


def _check_stated(reading: Reading, sizes: Mapping[str, Any], stated: Mapping[str, str]) -> None:
    """Compares the sizes that `config.json` states with those of the arrays.

    Raises:
        UserError: they differ: it belongs to other weights, or the grid of positions is no square.
    """
    file, content = json_beside(reading.source.path)
    for name, key in stated.items():
        found, said = sizes[key](reading.shapes), _said(content, name)
        said = tuple(said) if isinstance(said, list) else said
        if found is not None and isinstance(said, int | tuple) and said != found:
            raise UserError(
                f"{file} says {name} {said}, but {reading.source.path} has {found}. They do not belong together: "
                "put the right config.json beside the weights, or remove it."
            )
    side = content.get("image_size")
    grid, patch = (
        sizes[key](reading.shapes) if key in sizes else None
        for key in ("model.patch_embed.grid", "model.patch_embed.patch_size")
    )
    if isinstance(side, list) and grid and patch and side != [grid * patch] * 2:
        raise UserError(
            f"{file} says image_size {side}: a grid of positions that is no square of {grid} x {grid} patches cannot be "
            "converted. Give weights of square pictures."
        )


def _own(file: Path, content: Mapping[str, Any], owned: Sequence[str]) -> list[Setting]:
    """What an export of ours has added to a `config.json` that has no place for it, or one for three epsilons."""
    own = content.get(OWN)
    if not isinstance(own, Mapping):
        return []
    given = [key for key in owned if key in own]
    return [Setting(key, _number(file, key, key, own[key]), f"{OWN} in {file.name}") for key in given]


def _defaults(reading: Reading) -> list[Setting]:
    origin = f"{DEFAULT} {reading.table.name}"
    return [Setting(key, value, origin) for key, value in reading.table.defaults.items()]


def _activation(file: Path, value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act is {value!r}.{closest(str(value), ACTIVATIONS)} Possible here: "
            f"{', '.join(ACTIVATIONS)}. A model with another activation cannot be converted."
        )
    return ACTIVATIONS[value]


def _number(file: Path, key: str, name: str, value: Any) -> Any:
    """A number that a config key can take; 3.0 counts as 3 where whole ones are wanted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.endswith("eps"):
        good, wanted = number and 0 <= value < 1, "a number from 0 to below 1"
    else:
        least = int(key.endswith("num_heads"))
        good, wanted = (
            number and least <= value < 2**31 and value == int(value),
            f"a whole number from {least} on",
        )
        value = int(value) if good else value
    if not good:
        raise UserError(f"{file}: {name} is {value!r}. It must be {wanted}. Mend that file.")
    return value


def _note(found: dict[str, Setting], setting: Setting) -> None:
    """Adds a setting; of two origins what a file says wins over a default, and two files must agree."""
    before = found.get(setting.key)
    if before is None or before.origin.startswith(DEFAULT):
        found[setting.key] = setting
    elif not setting.origin.startswith(DEFAULT) and before.value != setting.value:
        raise UserError(
            f"The sources contradict each other: {setting.key} is {before.value} ({before.origin}) and "
            f"{setting.value} ({setting.origin}). Give sources that fit, or a config with --config."
        )


def _heads(
    key: str, head_width: int, readings: Sequence[Reading], config: ConfigDict, given: bool
) -> Setting:
    width = config.model.width
    for reading in readings:
        for piece in reading.pieces:
            if piece.row.op is HEADS_IN:
                count = reading.source.tensors[piece.names[0]].shape[1]
                return Setting(key, count, f"shapes in {reading.source.path}")
    if given:
        return Setting(key, get(config, key), "--config")
    if width % head_width:
        raise UserError(
            f"The number of attention heads is not known: no config.json beside the source says it, and a width of "
            f"{width} is no multiple of {head_width}, which all released models have a head. Put a config.json with "
            f'{{"num_attention_heads": N}} beside the source, or give --config=... --config.{key}=N.'
        )
    return Setting(key, width // head_width, f"{head_width} units a head, as all released sizes have")


def get(config: ConfigDict, key: str) -> Any:
    """The value of a config key with dots."""
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the value of a config key with dots."""
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        node = node[parent]
    node[name] = value
