# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.cpu_vilt [--batch=4] [--repeats=5] [--record]

ViLT-B/32 on the CPU against transformers' PyTorch ViLT with the same weights on the same batch: training step
(MLM + ITM, AdamW) and forward (matching), both from pictures on. Wanted in float32: 1.5 and 1.8 times as fast.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags as absl_flags

from benchmarks import measure
from benchmarks.measure import Program
from vlp_jax import cli
from vlp_jax.types import UserError, closest

PARTS = ("train", "forward")
BASELINE = "transformers float32"


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=5)
    common = {"flag_values": flags}
    absl_flags.DEFINE_integer("batch", 4, "pairs", 2, **common)
    absl_flags.DEFINE_list("parts", list(PARTS), "of train, forward", **common)
    absl_flags.DEFINE_boolean("compile", False, "torch.compile besides; takes a minute to compile", **common)
    absl_flags.DEFINE_boolean("toy", False, "a tiny model, to see that all of it runs", **common)


def main(flags: absl_flags.FlagValues) -> None:
    """Checks that the work is equal, measures, prints a table a part, and records them all or none."""
    for part in flags.parts or [""]:
        if part not in PARTS:
            raise UserError(
                f"--parts has no '{part}'.{closest(part, PARTS)} Possible: {', '.join(PARTS)}. Give one or both."
            )
    before = measure.start(flags)
    import torch

    from benchmarks import results, vilt_batch, vilt_pair

    threads = len(os.sched_getaffinity(0))  # XLA takes as many
    torch.set_num_threads(threads)
    variant = "tiny" if flags.toy else "b32"
    config = vilt_batch.make_config(variant, "float32")
    task = vilt_batch.make_task(config, flags.batch)
    peer = vilt_pair.PeerTraining(vilt_pair.Peer(config), config)
    ours = vilt_pair.Ours(config, task, peer.net.params())
    depth = config.model.fusion.depth
    kinds = {"ours float32, scanned": (1, "float32"), "ours float32, unrolled": (depth, "float32")}
    steps = {name: ours.train(*kind) for name, kind in kinds.items()}
    print(vilt_pair.check_equal(ours, list(steps.values()), peer, "cpu", vilt_pair.TOLERANCE), flush=True)
    kinds[half := "ours bfloat16, unrolled"] = depth, "bfloat16"

    inputs, rate, sections = vilt_pair.tensors(task, ours.pairs()), measure.product_rate(), []
    for part in flags.parts:
        if part == "train":
            programs = _ours(ours, steps | {half: ours.train(*kinds[half])})
            programs += _peer_training(peer, inputs, flags.compile)
        else:
            programs = _ours(ours, {name: ours.forward(*kind) for name, kind in kinds.items()})
            programs += _peer_forward(peer.net, inputs, flags.compile)
        timings, load = measure.compare(programs, flags.repeats, before, 0.0 if flags.toy else measure.SETTLE)
        base = next(timing for timing in timings if timing.name == BASELINE)
        bound = min(base.cpu) * rate / ours.flops(part)
        what = (
            f"{variant}, batch {flags.batch}, {task.tokens() // flags.batch} tokens a pair, {threads} threads, "
            f"{flags.repeats} repetitions; at {rate / 1e9:.0f} GFLOP a CPU-second, which a large float32 product reaches "
            f"here, the model's products alone would be {bound:.2f} times as fast as {BASELINE}"
        )
        heading, packages = f"CPU: ViLT against transformers, {part}", ("jax", "torch", "transformers")
        sections.append(results.section(heading, what, load, packages, measure.table(timings, BASELINE)))
        measure.check_undisturbed(load, flags.loaded)
    if flags.record:
        results.append(sections)


def _ours(ours: Any, runs: Mapping[str, Callable]) -> list[Program]:
    """Programs that cut the pictures, place the batch and run to the end."""
    import jax

    return [
        Program(name, lambda run=run: jax.block_until_ready((run(ours.batch()), ours.state)))
        for name, run in runs.items()
    ]


def _peer_training(peer: Any, inputs: Any, compiled: bool) -> list[Program]:
    """The peer's training step in float32, in its best type, and compiled."""
    import torch

    programs = [
        Program(BASELINE, lambda: float(peer.step(inputs))),
        Program("transformers bfloat16 autocast", lambda: float(peer.step(inputs, autocast=True))),
    ]
    if compiled:
        loss = torch.compile(peer.net.loss)
        programs.append(Program(f"{BASELINE}, torch.compile", lambda: float(peer.step(inputs, loss=loss))))
    return programs


def _peer_forward(net: Any, inputs: Any, compiled: bool) -> list[Program]:
    """The peer's matching logits in float32, in bfloat16 both ways, and compiled."""
    import torch

    half = copy.deepcopy(net).bfloat16()

    @torch.no_grad()
    def run(net: Any, autocast: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net(inputs["pairs"], inputs["image"])

    programs = [
        Program(BASELINE, lambda: run(net)),
        Program("transformers bfloat16 autocast", lambda: run(net, autocast=True)),
        Program("transformers bfloat16 weights", lambda: run(half)),
    ]
    if compiled:
        fast = torch.compile(net)
        programs.append(Program(f"{BASELINE}, torch.compile", lambda: run(fast)))
    return programs


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
