# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.gpu_vilt [--batches=64,256] [--repeats=5] [--record]

ViLT-B/32's training step (MLM + ITM, AdamW) in bfloat16 on one GPU against transformers' PyTorch ViLT with
torch.compile: the same weights, batch and device, tokens a second and MFU. --toy runs the same code on the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from benchmarks import measure, results
from benchmarks.measure import Program, Timing
from vlp_jax import cli
from vlp_jax.types import UserError

# Dense bfloat16 products with float32 sums, FLOP/s, by NVIDIA's data sheets (half of what they give with sparsity).
# The first name found in the device's name counts. A V100 has no bfloat16 units; its number is of float16.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}
# Two sides in bfloat16 round apart; that the work is equal is proved in float32, by cpu_vilt.
TOLERANCE = 2e-2


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    measure.define(flags, repeats=5)
    common = {"flag_values": flags}
    absl_flags.DEFINE_list("batches", ["64", "256"], "numbers of pairs, one table each", **common)
    absl_flags.DEFINE_integer("steps", 10, "training steps a repetition", 1, **common)
    absl_flags.DEFINE_boolean("compile", True, "torch.compile on the peer's side", **common)
    absl_flags.DEFINE_boolean(
        "toy", False, "a tiny model on any device, to see that all of it runs", **common
    )


def main(flags: absl_flags.FlagValues) -> None:
    """Measures each batch size, prints a table each, and records them all or none."""
    for batch in flags.batches or [""]:
        if not batch.isdigit() or int(batch) < 2:
            raise UserError(f"--batches has '{batch}'. It takes whole numbers from 2 on: --batches=64,256.")
    # PyTorch needs room on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    before = measure.start(flags)
    device = _device(flags.toy)
    sections = []
    for batch in map(int, flags.batches):
        try:
            timings, load, tokens, flops = _measure(flags, batch, device, before)
        except Exception as error:
            if "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
                raise UserError(
                    f"Batch {batch} does not fit: both sides hold their memory at once. Leave {batch} out of --batches."
                ) from error
            raise
        what = f"{'tiny' if flags.toy else 'b32'}, bfloat16, batch {batch}, {tokens // batch // 2} tokens a pair and pass"
        what += f", {flops / 1e12:.2f} TFLOP a step, {flags.steps} steps a repetition, {flags.repeats} repetitions"
        rows = measure.table(timings, timings[-1].name)
        rows = with_rates(
            rows, timings, tokens * flags.steps, flops * flags.steps, peak(results.accelerator())
        )
        packages = ("jax", "torch", "transformers")
        sections.append(results.section("GPU: ViLT against transformers, train", what, load, packages, rows))
        measure.check_undisturbed(load, flags.loaded)
    if flags.record:
        results.append(sections)


def peak(device: str) -> float | None:
    """Published FLOP/s of a device by its name, None where it is not known."""
    return next((flops for name, flops in PEAKS.items() if name in device), None)


def with_rates(
    rows: Sequence[Sequence[str]], timings: Sequence[Timing], tokens: int, flops: int, most: float | None
) -> list[list[str]]:
    """Adds tokens a second and MFU (model FLOPs by the best time over `most`, "unknown" where that is None)."""
    made = [[*rows[0], "tokens/s", "MFU"]]
    for row, timing in zip(rows[1:], timings, strict=True):
        rate = 1 / min(timing.wall)
        made.append([*row, f"{tokens * rate:,.0f}", f"{flops * rate / most:.3f}" if most else "unknown"])
    return made


def _device(toy: bool) -> str:
    """PyTorch's name of the device that both sides use."""
    import jax
    import torch

    if toy:
        return "cpu"
    found = jax.devices()[0].platform
    if found != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"This benchmark needs a GPU that JAX and PyTorch both see: JAX has '{found}', PyTorch "
            f"{'a' if torch.cuda.is_available() else 'no'} CUDA device. Install requirements-gpu.txt and a CUDA build of "
            "PyTorch on a machine with one, or give --toy to try the program on the CPU."
        )
    return "cuda"


def _measure(
    flags: absl_flags.FlagValues, batch: int, device: str, before: float
) -> tuple[list[Timing], measure.Load, int, int]:
    """Timings and load of one batch size, tokens of both passes, and FLOPs of a step as our model counts them."""
    import jax
    import torch

    from benchmarks import vilt_batch, vilt_pair

    config = vilt_batch.make_config("tiny" if flags.toy else "b32", "bfloat16", token_multiple=8)
    task = vilt_batch.make_task(config, batch)
    net = vilt_pair.Peer(config)
    params = net.params()
    peer = vilt_pair.PeerTraining(net.to(device), config)
    ours = vilt_pair.Ours(config, task, params)
    step = ours.train(config.model.unroll)
    print(vilt_pair.check_equal(ours, [step], peer, device, TOLERANCE), flush=True)

    placed, inputs = ours.batch(), vilt_pair.tensors(task, ours.pairs(), device)
    loss = torch.compile(net.loss) if flags.compile else net.loss

    def run_ours() -> None:
        for _ in range(flags.steps):
            step(placed)
        jax.block_until_ready(ours.state)

    def run_peer() -> None:
        for _ in range(flags.steps):
            peer.step(inputs, autocast=True, loss=loss)
        if device == "cuda":
            torch.cuda.synchronize()

    name = "transformers autocast" + (", torch.compile" if flags.compile else "")
    programs = [Program("ours", run_ours), Program(name, run_peer)]
    timings, load = measure.compare(programs, flags.repeats, before)
    return timings, load, 2 * task.tokens(), ours.flops("train")


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
