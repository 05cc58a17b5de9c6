# SPDX-License-Identifier: Apache-2.0
"""What the command does, in order: look at everything, say the plan, read, write, prove, and only then show the target."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlp_jax.convert import exporting, importing, report, sources, target
from vlp_jax.convert.proof import comparison
from vlp_jax.types import Stop, UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that both directions have."""

    sources: Sequence[str]
    target: str
    overwrite: bool = False
    dry_run: bool = False
    report: str = ""
    proof: bool = True


def run(flags: Mapping[str, Any], config: ConfigDict, given: bool) -> None:
    """Imports, or with `format` exports.

    Args:
        flags: values of the command's flags by name.
        config: what a source is read into.
        given: whether the user has given it.

    Raises:
        UserError, Stop: see `bring` and `give`.
    """
    options = Options(
        flags["source"],
        flags["target"],
        flags["overwrite"],
        flags["dry-run"],
        flags["report"],
        flags["proof"],
    )
    if flags["format"]:
        if given:
            raise UserError("--config is not read with --format: a checkpoint has its own. Leave it away.")
        drop, vocab = tuple(flags["drop"]), flags["vocab"]
        give(
            options,
            exporting.Wishes(flags["system"], flags["format"], flags["as"], drop, vocab, flags["labels"]),
        )
    else:
        if unread := [f"--{name}" for name in ("as", "drop") if flags[name]]:
            raise UserError(
                f"{' and '.join(unread)} concern an export. Give --format=hf or --format=original too."
            )
        names = ("vocab", "labels", "position_resize")
        bring(options, importing.Wishes(flags["system"], config, given, *(flags[name] for name in names)))


def bring(options: Options, wishes: importing.Wishes) -> None:
    """Makes a checkpoint of ours from files; prints plan and proof.

    Raises:
        UserError: whatever the user can mend; nothing is left then.
        Stop: 1, our parameters do not compute what the file computes; nothing is left then.
    """
    kept = report.check(options.report, options.overwrite, options.sources)
    path = None if options.dry_run else target.check(options.target, options.overwrite, options.sources)
    with contextlib.ExitStack() as stack:
        opened = importing.open_all(stack, options.sources)
        sha256 = importing.digests(stack, opened) if path else {}
        conversion = importing.plan(opened, wishes)
        print(report.text(report.plan_tables(conversion)), flush=True)
        if path is None:
            if kept:
                report.write(kept, _title(wishes.system), report.plan_tables(conversion), None)
            return
        params = importing.fill(conversion)
        with target.folder(path, options.overwrite) as inside:
            importing.write(conversion, params, sha256, inside)
            proof = _proved(options, conversion, params)
            if kept:
                report.write(kept, _title(wishes.system), report.plan_tables(conversion), proof)
            if proof and not proof.good:
                raise Stop(1, _differs(proof, options))
    print(f"checkpoint: {path}")


def give(options: Options, wishes: exporting.Wishes) -> None:
    """Makes files under other names from a checkpoint of ours; prints plan and proof.

    Raises:
        UserError: whatever the user can mend; nothing is left then.
        Stop: 1, what was written is not what the checkpoint holds or computes; nothing is left then.
    """
    kept = report.check(options.report, options.overwrite, options.sources)
    path = None if options.dry_run else target.check(options.target, options.overwrite, options.sources)
    if len(options.sources) != 1:
        raise UserError(
            f"--format takes one --source, a checkpoint of ours; given are {len(options.sources)}."
        )
    export = exporting.plan(options.sources[0], wishes)
    print(report.text(report.export_tables(export)), flush=True)
    if path is None:
        if kept:
            report.write(kept, _title(wishes.system), report.export_tables(export), None)
        return
    with target.folder(path, options.overwrite) as inside:
        written = exporting.write(export, inside)
        with sources.open_source(written) as source:
            again = importing.plan(
                [source], importing.Wishes(wishes.system, export.config, config_given=True)
            )
            _check_bits(export, importing.fill(again))
            proof = _proved(options, again, dict(export.params))
            rounded = _rounded(export)
            for line in rounded:
                print(line, flush=True)
        if kept:
            tables = [*report.export_tables(export), ("differences", [(line,) for line in rounded])]
            report.write(kept, _title(wishes.system), tables, proof)
        if proof and not proof.good:
            raise Stop(1, _differs(proof, options))
    print(f"{export.class_name or export.table.name}: {path}")


def _title(system: str) -> str:
    return f"Conversion of {system}"


def _rounded(export: exporting.Export) -> list[str]:
    """How far transformers' outputs are from ours where its one epsilon changes them, on the batch of the proof."""
    theirs = exporting.one_epsilon(export)
    if theirs is None:
        return []
    distances = comparison.apart(export.config, theirs, export.params)
    listed = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
    return [
        f"with one epsilon, {theirs.model.fusion.eps:g}, transformers' outputs differ from ours by: {listed}"
    ]


def _check_bits(export: exporting.Export, read: dict[str, np.ndarray]) -> None:
    """Compares what was written, read again, with the checkpoint.

    Raises:
        Stop: 1, an array differs in a bit.
    """
    changed = [name for name, array in export.params.items() if not _same_bits(array, read[name])]
    if changed:
        raise Stop(
            1,
            f"Written and read again, {len(changed)} arrays differ, the first is {changed[0]}. This is ours.",
        )
    print(f"written and read again: {len(read)} arrays, bit for bit the same", flush=True)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one.view(np.uint32), other.view(np.uint32))


def _proved(options: Options, conversion: importing.Import, params: dict) -> comparison.Proof | None:
    why = comparison.hindrance() if options.proof else "--proof=false"
    if why:
        print(f"proof was not run: {why}", flush=True)
        return None
    proof = comparison.prove(conversion, params)
    print(report.text(report.proof_tables(proof)), flush=True)
    return proof


def _differs(proof: comparison.Proof, options: Options) -> str:
    first = next((line for line in proof.lines if not line.good), None)
    what = (
        f"from {first.part} of {first.source} on, by {first.distance:.2e}"
        if first
        else "nothing could be compared"
    )
    return (
        f"Our parameters do not compute what the source computes: {what}. {Path(options.target)} was not made. This is a "
        "fault of ours: please report it with the plan above. --proof=false converts without the proof."
    )
