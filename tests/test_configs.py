# SPDX-License-Identifier: Apache-2.0
"""Every config file: all its variants, what a misspelt one says, and a comment beside every key."""

from __future__ import annotations

import ast
import importlib
import io
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest
from ml_collections import ConfigDict

from configs import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
SYSTEMS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")
)
FREE = ("model", "objectives")  # groups that belong to the system file


def module(name: str):
    return importlib.import_module(f"configs.{name}")


VARIANTS = [(name, variant) for name in SYSTEMS for variant in module(name).VARIANTS]


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value."""
    found = {}
    for key, value in config.items():
        below = leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
        found.update(below)
    return found


def shared(config: ConfigDict) -> dict[str, object]:
    return {key: value for key, value in leaves(config).items() if key.split(".")[0] not in FREE}


@pytest.mark.parametrize("name, variant", VARIANTS)
@pytest.mark.parametrize("smoke", ["", ",smoke"])
def test_variant_has_the_keys_and_types_of_common(name, variant, smoke):
    config = module(name).get_config(f"variant={variant}{smoke}")
    assert (config.system, config.variant) == (name, variant)
    given, defaults = shared(config), shared(common.get_config())
    assert given.keys() == defaults.keys(), "a key that common.py does not list, or one that went missing"
    for key, value in given.items():
        assert type(value) is type(defaults[key]), f"{key}: {value!r} beside the default {defaults[key]!r}"
    assert None not in leaves(config).values(), "None cannot be set from the command line"


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_variant_is_consistent(name, variant):
    config = module(name).get_config(f"variant={variant}")
    assert config.data.image_size % config.data.patch_size == 0
    assert config.train.batch_size % config.train.accumulation == 0
    assert config.objectives and all(weight >= 0 for weight in config.objectives.values())
    for key, value in leaves(config.model).items():
        if key.endswith("num_heads"):
            assert config.model.width % value == 0
    patterns = [*config.optimizer.no_decay, *config.optimizer.frozen, *config.ema.parameters]
    for pattern in [*patterns, *(pattern for pattern, _ in config.optimizer.lr_multipliers)]:
        re.compile(pattern)


@pytest.mark.parametrize("name", SYSTEMS)
def test_smoke_is_small_and_keeps_the_structure(name):
    full, smoke = module(name).get_config(), module(name).get_config("smoke")
    assert smoke.train.steps <= 4 and smoke.train.batch_size <= 8
    assert leaves(smoke).keys() == leaves(full).keys()
    assert smoke.model.width == full.model.width


@pytest.mark.parametrize("name", SYSTEMS)
def test_misspelt_variant_lists_all_and_names_the_closest(name):
    known = sorted(module(name).VARIANTS)
    misspelt = known[0] + "x"
    with pytest.raises(ValueError) as error:
        module(name).get_config(f"variant={misspelt}")
    assert f"'{misspelt}'" in str(error.value) and f"Did you mean '{known[0]}'?" in str(error.value)
    assert all(variant in str(error.value) for variant in known)


@pytest.mark.parametrize("argument, closest", [("varaint=tiny", "variant"), ("smok", "smoke")])
@pytest.mark.parametrize("name", SYSTEMS)
def test_misspelt_option_lists_all_and_names_the_closest(name, argument, closest):
    with pytest.raises(ValueError) as error:
        module(name).get_config(argument)
    assert f"Did you mean '{closest}'?" in str(error.value)
    assert "smoke" in str(error.value) and "variant" in str(error.value)


def test_configs_are_independent_values():
    first, second = module("vilt").get_config(), module("vilt").get_config()
    first.data.text_length = -7
    assert second.data.text_length != -7


def test_configs_need_neither_jax_nor_the_package():
    code = "import sys; " + "; ".join(f"import configs.{name}" for name in SYSTEMS)
    code += "; print([name for name in ('jax', 'tensorflow', 'vlp_jax') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_key_has_a_comment():
    """In common.py, on the lines of the key."""
    text = (ROOT / "configs" / "common.py").read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    (function,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "get_config"]
    bare = [
        f"configs/common.py:{node.lineno}: {ast.unparse(node)}"
        for node in function.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value) != "ConfigDict()"
        and not commented & set(range(node.lineno, node.end_lineno + 1))
    ]
    assert not bare, "\n" + "\n".join(bare)


def test_every_key_is_read():
    """A key that no code reads is a promise without effect."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "vlp_jax").rglob("*.py"))
    unread = [
        key for key in leaves(common.get_config()) if not re.search(rf"\b{key.split('.')[-1]}\b", source)
    ]
    assert not unread, f"in configs/common.py, read nowhere in vlp_jax/: {', '.join(unread)}"
