# SPDX-License-Identifier: Apache-2.0
"""The stack machine: plain values come back as pickle makes them, and nothing of the file is imported or called."""

from __future__ import annotations

import builtins
import collections
import io
import pickle
import random
import time
import tracemalloc

import numpy as np
import pytest

from tests.convert.sources import hostile_pickles
from vlp_jax.convert.sources import pickles
from vlp_jax.convert.sources.pickles import Damaged, Placeholder, Storage, View, Window, load

SHARED = [1, 2]
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        255,
        256,
        65_536,
        -(1 << 31),
        1 << 40,
        1 << 200,
        -(1 << 3000),
        1.5,
        -0.0,
        1e300,
    ),
    *(
        float("inf"),
        2 + 3j,
        "",
        "a",
        "größer\n\\'\"",
        "\U0001f600" * 300,
        b"",
        b"\x00\xff" * 300,
        bytearray(b"ab"),
    ),
    *([], [1], list(range(1500)), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), set(), {1, 2}, frozenset("ab")),
    *(
        {},
        {"a": {1: [2, (3, None)]}},
        dict.fromkeys(range(1500), "x"),
        {1.5: b"k", b"b": None, None: 1, True: 2},
    ),
    *([SHARED, SHARED], collections.OrderedDict(b=1, a=[2])),
]


def storage(identity):
    """Takes any persistent id for six floats."""
    return Storage("0", np.dtype(np.float32), 0, 24)


@pytest.mark.parametrize("protocol", range(6))
def test_values_come_back(protocol):
    for value in VALUES:
        found = load(pickle.dumps(value, protocol), storage)
        assert found == value, value
        if not isinstance(value, frozenset | bytearray | collections.OrderedDict):
            assert type(found) is type(value)


def test_sharing_and_cycles_are_kept():
    first, second = load(pickle.dumps([SHARED, SHARED], 2), storage)
    assert first is second
    endless = []
    endless.append(endless)
    found = load(pickle.dumps(endless, 2), storage)
    assert found[0] is found


def test_python_2_text():
    """Protocol 2 of Python 2 writes text as bytes, protocol 0 in quotes."""
    assert load(b"U\x03abc.", storage) == "abc"
    assert load(b"T\x03\x00\x00\x00ab\xe9.", storage) == "abé"
    assert load(b"S'a\\nb\\x41'\np0\n.", storage) == "a\nbA"
    assert load(b"I01\n.", storage) is True and load(b"L12L\n.", storage) == 12


def test_other_keys_are_replaced_and_entries_kept():
    found = load(pickle.dumps({(1, 2): 3, frozenset({4}): 5, "a": 6}), storage)
    assert sorted(found.values()) == [3, 5, 6] and found["a"] == 6
    assert [str(key) for key in found if key != "a"] == ["builtins.tuple", "builtins.frozenset"]


def test_tensor_is_described():
    view = load(hostile_pickles.GOOD, storage)["weight"]
    assert isinstance(view, View) and view.contiguous and view.span == 6
    assert (view.shape, view.strides, view.offset, view.dtype) == ((2, 3), (3, 1), 0, np.float32)
    sizes = load(b"ctorch\nSize\n(" + hostile_pickles.numbers((2, 3)) + b"tR.", storage)
    assert sizes == (2, 3) and load(b"ctorch\nbfloat16\n.", storage).name == "bfloat16"


def test_the_window_stands_behind_the_pickle():
    content = b"skip" + pickle.dumps("first", 2) + pickle.dumps("second", 4) + b"rest"
    window = Window(io.BytesIO(content), 4, len(content))
    assert load(window, storage) == "first" and load(window, storage) == "second"
    assert content[window.position :] == b"rest"


PAYLOADS = hostile_pickles.payloads(hostile_pickles.Path("mark"))


@pytest.mark.parametrize(
    "name", ["os.system", "eval", "exec", "a chain of getattr", "INST", "OBJ", "nested calls"]
)
def test_payload_is_live(name, tmp_path):
    """Python's own unpickler runs it, so that the test below can fail."""
    mark = tmp_path / "mark"
    try:
        pickle.loads(hostile_pickles.payloads(mark)[name])
    except (TypeError, AttributeError):
        pass  # after the call
    assert mark.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_is_executed_or_imported(name, tmp_path, monkeypatch):
    mark, imported = tmp_path / "mark", []
    payload = hostile_pickles.payloads(mark)[name]

    def record(module, *arguments, **keywords):
        imported.append(module)
        return original(module, *arguments, **keywords)

    original = builtins.__import__
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", record)
        try:
            found = load(payload, lambda identity: Placeholder("torch", "storage"))
        except Damaged:
            found = None
    assert not mark.exists() and not imported
    assert isinstance(found, Placeholder | dict | list | None)


def test_placeholder_keeps_nothing_and_shows_no_control_characters():
    found = load(pickle.dumps({"a": hostile_pickles.Call(print, "secret" * 9)}), storage)["a"]
    assert (found.module, found.name) == ("builtins", "print") and not hasattr(found, "__dict__")
    assert (
        str(Placeholder("a\x1b[2J", "b" * 1000)).isprintable()
        and len(str(Placeholder("a", "b" * 1000))) < 100
    )


@pytest.mark.parametrize("name", hostile_pickles.harmless())
def test_endless_for_a_careless_reader(name):
    start = time.monotonic()
    found = load(hostile_pickles.harmless()[name], storage)
    assert isinstance(found["weight"], View) and "other" in found
    del found
    assert time.monotonic() - start < 5


def test_operations_are_limited(monkeypatch):
    monkeypatch.setattr(pickles, "OPERATIONS", 10_000)
    for opcodes in (b"]", b"\x8f", b"(", b"}q\x01", b"N2"):
        with pytest.raises(Damaged, match="operations"):
            load(opcodes * (pickles.OPERATIONS + 1), storage)


def test_claims_allocate_nothing():
    """Lengths of 2 GB to 8 EB in a few bytes."""
    tracemalloc.start()
    try:
        for opcodes in (
            b"X\xff\xff\xff\x7f",
            b"\x8b\xff\xff\xff\x7f",
            b"B\xff\xff\xff\xff",
            b"T\xff\xff\xff\x7f",
        ):
            with pytest.raises(Damaged):
                load(opcodes + b"abc", storage)
        for opcode in (b"\x8d", b"\x8e", b"\x96", b"\x95"):
            for length in (1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
                with pytest.raises(Damaged):
                    load(opcode + length.to_bytes(8, "little") + b"NNN.", storage)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_every_prefix_is_refused():
    for content in (hostile_pickles.GOOD, pickle.dumps(VALUES[:20], 4), pickle.dumps(VALUES[:20], 0)):
        for end in range(len(content)):
            with pytest.raises(Damaged):
                load(content[:end], storage)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(seed):
    """Any value or `Damaged`, nothing else."""
    draw = random.Random(seed)
    samples = [
        hostile_pickles.GOOD,
        *PAYLOADS.values(),
        *(pickle.dumps(VALUES[:24], each) for each in range(6)),
    ]
    for _ in range(1500):
        content = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            load(bytes(content), storage)
        except Damaged:
            pass
