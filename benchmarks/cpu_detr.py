# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.cpu_detr [--parts=r50,tiny] [--sizes=2x320x384,1x480x640] [--repeats=5] [--record]

A training step of DETR on the CPU, float32, against transformers' PyTorch DETR with its own loss: the same weights,
pictures, targets and frozen parts, losses of all decoder layers, clipping, AdamW. Wanted: 1.3 times as fast.
"""

from __future__ import annotations

import os
import re
import sys

from absl import flags as absl_flags

from benchmarks import measure
from benchmarks.measure import Program
from vlp_jax import cli
from vlp_jax.types import UserError, closest

PARTS = ("r50", "tiny")
TINY = "32x64x64"  # what the laptop trains on
BASELINE = "transformers"


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=5)
    common = {"flag_values": flags}
    absl_flags.DEFINE_list("parts", list(PARTS), "of r50, tiny", **common)
    absl_flags.DEFINE_list("sizes", ["2x320x384", "1x480x640"], "of r50: pictures x rows x columns", **common)
    absl_flags.DEFINE_boolean(
        "toy", False, "a tiny model on tiny pictures, to see that all of it runs", **common
    )


def main(flags: absl_flags.FlagValues) -> None:
    """Checks that the work is equal, measures, prints a table a size, and records them all or none."""
    sizes = [parsed(size) for size in flags.sizes or [""]]
    for part in flags.parts or [""]:
        if part not in PARTS:
            raise UserError(
                f"--parts has no '{part}'.{closest(part, PARTS)} Possible: {', '.join(PARTS)}. Give one or both."
            )
    before = measure.start(flags)
    from benchmarks import detr_pair, results

    # Not before that import: the oracles of the tests set one thread. XLA takes as many as there are cores.
    detr_pair.torch.set_num_threads(len(os.sched_getaffinity(0)))
    rate, sections = measure.product_rate(), []
    for part in flags.parts:
        for count, *size in sizes if part == "r50" else [(2, 40, 48) if flags.toy else parsed(TINY)]:
            sections.append(_measured(flags, part, count, tuple(size), before, rate))
    if flags.record:
        results.append(sections)


def parsed(size: str) -> tuple[int, int, int]:
    """Pictures, rows and columns of "2x320x384".

    Raises:
        UserError: anything else.
    """
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{1,4}){2}", size):
        raise UserError(
            f"--sizes holds '{size}'. Possible: pictures x rows x columns, sides from 10. Give, for example, "
            "--sizes=2x320x384."
        )
    return tuple(int(number) for number in size.split("x"))


def _measured(
    flags: absl_flags.FlagValues, part: str, count: int, size: tuple[int, int], before: float, rate: float
) -> object:
    """The section of one size; both sides take a first step, which must be equal."""
    from benchmarks import detr_pair, results

    config = detr_pair.make_config(part, depth=1 if flags.toy else 0)
    batch = detr_pair.make_batch(config, count, size)
    peer = detr_pair.Peer(config, batch)
    ours = detr_pair.Ours(config, batch, peer.params())
    (unrolled, flops), (scanned, _) = ours.train(config.model.unroll), ours.train(1)
    print(detr_pair.check_equal(unrolled(), peer.step()), flush=True)
    programs = [
        Program("ours, unrolled", unrolled),
        Program("ours, scanned", scanned),
        Program(BASELINE, peer.step),
        Program(f"{BASELINE}, channels last", lambda: peer.step(channels_last=True)),
    ]
    timings, load = measure.compare(programs, flags.repeats, before, 0.0 if flags.toy else measure.SETTLE)
    base = next(timing for timing in timings if timing.name == BASELINE)
    what = (
        f"{part}, {count} pictures of {size[0]} x {size[1]}, {flags.repeats} repetitions, auxiliary losses on both "
        f"sides; at {rate / 1e9:.0f} GFLOP a CPU-second, which a large float32 product reaches here, the step's "
        f"{flops / 1e9:.0f} GFLOP alone would be {min(base.cpu) * rate / flops:.2f} times as fast as {BASELINE}"
    )
    packages = ("jax", "torch", "transformers")
    table = measure.table(timings, BASELINE)
    made = results.section("CPU: DETR against transformers, train", what, load, packages, table)
    measure.check_undisturbed(load, flags.loaded)
    return made


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
