# SPDX-License-Identifier: Apache-2.0
"""Every row of cases.py: outputs, layers, gradients and first losses against another implementation.

And every row of its faults: the same comparisons must fail when one constant is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import pytest

from tests.parity import bounds, harness
from tests.parity.cases import BY_NAME, CASES, FAULTS, Case, Fault, made
from tests.parity.harness import Row

pytest.importorskip("torch")
pytest.importorskip("transformers")
oracles = importlib.import_module("tests.parity.oracle")

LOSSES, FAULTY_LOSSES = 50, 8


def oracle_of(name: str, fault: Fault | None = None):
    """The other side, its weights drawn anew; they are the same with a fault and without."""
    case = BY_NAME[name]
    oracle = case.oracle_module().build(made(name).config, case.quiet)
    if fault and fault.alter:
        getattr(case.oracle_module(), fault.alter)(oracle)
    if fault and fault.recipe:
        oracle = dataclasses.replace(oracle, recipe=dataclasses.replace(oracle.recipe, **fault.recipe))
    return oracle


@functools.cache
def params_of(name: str):
    oracle = oracle_of(name)
    return harness.parameters(made(name), oracle.rows, oracle.fresh, oracles.tensors(oracle.net))


@functools.cache
def function_of(name: str):
    return made(name).terms if BY_NAME[name].compares == "terms" else made(name).outputs


@functools.cache
def batch_of(name: str, kind: str, seed: int = 0):
    return made(name).batch(kind, seed)


@functools.cache
def outputs_of(name: str, kind: str):
    return harness.outputs(function_of(name), params_of(name), batch_of(name, kind))


@functools.cache
def layers_of(name: str, paths: tuple[str, ...]):
    batch = batch_of(name, BY_NAME[name].kinds[0])
    return harness.layers(BY_NAME[name].ours(), params_of(name), batch, paths)


@functools.cache
def gradients_of(name: str):
    """Our gradients and outputs, and what the outputs were multiplied with."""
    batch, function = batch_of(name, BY_NAME[name].kinds[0]), function_of(name)
    weights = harness.projections(function, params_of(name), batch, made(name).masks(batch))
    return *harness.gradients(function, params_of(name), batch, weights), weights


@functools.cache
def training_of(name: str):
    return harness.train(made(name), params_of(name), batches_of(name))


@functools.cache
def batches_of(name: str):
    return [made(name).batch("pretraining", seed) for seed in range(LOSSES)]


def compare_outputs(name: str, ours, theirs, batch) -> float:
    masks = made(name).masks(batch)
    real = {key: masks.get(key, ...) for key in ours}
    assert theirs.keys() == ours.keys()
    return bounds.forward((key, ours[key][real[key]], theirs[key][real[key]]) for key in ours)


def check_outputs(name: str, oracle) -> float:
    ratios = []
    for kind in BY_NAME[name].kinds:
        batch = batch_of(name, kind)
        ratios.append(compare_outputs(name, outputs_of(name, kind), oracles.outputs(oracle, batch), batch))
    return max(ratios)


def check_layers(name: str, oracle) -> float:
    batch = batch_of(name, BY_NAME[name].kinds[0])
    masks, pairs = made(name).masks(batch), []
    ours, theirs = layers_of(name, tuple(path for _, path, _ in oracle.layers)), oracles.layers(oracle, batch)
    for _, path, stream in oracle.layers:
        mask = masks[stream]
        # Several outputs may share a forward or repeat it: the first calls are the layers.
        assert ours[path] and len(ours[path]) % len(theirs[path]) == 0, f"{path}: {len(ours[path])} calls"
        for own, (module, other) in zip(ours[path], theirs[path], strict=False):
            pairs.append((module, own[:, : mask.shape[1]][mask], other[mask]))
    return bounds.forward(pairs, floor=0.0, what="layers")


def check_gradients(name: str, oracle) -> float:
    batch = batch_of(name, BY_NAME[name].kinds[0])
    ours, values, weights = gradients_of(name)
    theirs = oracles.gradients(oracle, batch, weights)
    ratio = bounds.gradients(harness.by_source(oracle.rows, ours, theirs))
    # A rule of our own for a gradient may compute another forward.
    return max(ratio, compare_outputs(name, values, oracles.outputs(oracle, batch), batch))


def check_training(name: str, oracle, steps: int = LOSSES) -> float:
    history, trained = training_of(name)
    start = oracles.tensors(oracle.net)
    theirs = oracles.train(oracle, oracle.recipe, batches_of(name)[:steps])
    ratio = bounds.losses(history[:steps], theirs)
    if steps < LOSSES:
        return ratio
    rows = [row for row in oracle.rows if row.ours not in oracle.idle]
    first = {key: value for key, _, value in harness.by_source(rows, trained, start)}
    final = harness.by_source(rows, trained, oracles.tensors(oracle.net))
    return max(ratio, bounds.movements(final, first))


CHECKS = {
    "outputs": check_outputs,
    "layers": check_layers,
    "gradients": check_gradients,
    "training": check_training,
    "first steps": functools.partial(check_training, steps=FAULTY_LOSSES),
}


def row(case: Case, *values: object, name: str):
    return pytest.param(*values, id=f"{case.name}-{name}", marks=[pytest.mark.slow] * case.slow)


@pytest.mark.parametrize(
    "name, kind", [row(case, case.name, kind, name=kind) for case in CASES for kind in case.checks]
)
def test_parity(name, kind):
    ratio = CHECKS[kind](name, oracle_of(name))
    print(f"{kind}: at most {ratio:.2g} of what is allowed")


@pytest.mark.parametrize(
    "fault",
    [
        row(BY_NAME[f.case], f, name=f"{f.check}-{f.alter or next(iter(f.recipe))}".replace(" ", "-"))
        for f in FAULTS
    ],
)
def test_a_wrong_constant_is_seen(fault):
    with pytest.raises(bounds.Mismatch) as caught:
        CHECKS[fault.check](fault.case, oracle_of(fault.case, fault))
    print(caught.value)
    assert fault.first in str(caught.value).splitlines()[1]


def test_a_table_that_does_not_fit_is_reported_whole():
    name = CASES[0].name
    oracle = oracle_of(name)
    rows = [
        *oracle.rows[3:],
        oracle.rows[-1],
        Row("nowhere", "heads/pooler/nothing"),
        Row("vilt.pooler.dense.bias", "a"),
    ]
    with pytest.raises(AssertionError) as caught:
        harness.parameters(made(name), rows, {}, oracles.tensors(oracle.net))
    lines = str(caught.value).splitlines()[1:]
    words = "vilt.embeddings.text_embeddings.word_embeddings.weight: 0 of its 1280 numbers are read"
    assert (
        words in lines and "text_embed/word: in no row" in lines and "a: we have no such parameter" in lines
    )
    assert "heads/mlm/decoder/bias: doubled" in lines and "heads/itm/dense/kernel: in no row" in lines
    assert "heads/pooler/nothing: no tensor is called nowhere" in lines and lines == sorted(lines)
    linear = [dataclasses.replace(row, op=harness.same) for row in oracle.rows]
    with pytest.raises(AssertionError, match=r"mlp/hidden/kernel: shape \(2, 64, 32\), not \(2, 32, 64\)"):
        harness.parameters(made(name), linear, oracle.fresh, oracles.tensors(oracle.net))
