# SPDX-License-Identifier: Apache-2.0
"""A process for each program that benchmarks/input.py compares, so that cores, memory and CPU-seconds are its own.

Started as `python -m benchmarks.input_side JSON`; each line on its standard input asks for one unit of work, each
line on its standard output answers with what it took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SLOTS = (192, 216, 228)  # buckets of ViLT at 384 pixels
# The pipeline works ahead. It rests when this process has used less than so much in so many pauses in a row.
PAUSE, IDLE, TIMES = 0.01, 0.002, 4
QUIET = 60.0  # seconds after which something else must be running in this process


def cpu_seconds() -> float:
    """What this process and its children that have ended have used."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory() -> int:
    """Resident bytes of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def rest() -> float:
    """Waits until no thread of this process works any more; returns since when, by time.perf_counter."""
    end, since, quiet = time.perf_counter() + QUIET, time.perf_counter(), 0
    while quiet < TIMES:
        used = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - used < IDLE:
            quiet += 1
        else:
            quiet, since = 0, time.perf_counter()
        if time.perf_counter() > end:
            raise RuntimeError(f"threads still work {QUIET:.0f} s after the last batch was taken")
    return since


def make_config(directory: str, batch: int, data: Mapping[str, Any], variant: str = "b32"):
    """ViLT's data keys at 384 pixels with a slot for every patch, or scenes as `tiny` has them."""
    from configs import vilt

    config = vilt.get_config(f"variant={variant}")
    config.data.dir, config.train.batch_size = directory, batch
    if variant == "b32":
        config.data.max_patches = 0
    config.data.update(
        {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    )
    return config


def ours(
    directory: str, batch: int, count: int, data: Mapping[str, Any], folder: str = ""
) -> Callable[[], dict]:
    """Our pipeline: a unit is `count` batches, taken from a pipeline at rest until it rests again.

    With `folder` the first unit looks whether the pictures are the peer's, and answers with the mean difference.
    """
    from vlp_jax.data import pipeline

    config = make_config(directory, batch, data)
    stream = pipeline.batches(config)
    apart = difference(config, next(stream), Path(folder)) if folder else None
    next(stream)
    rest()

    def unit() -> dict:
        begun, used = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            next(stream)
        wall = rest() - begun
        return {"wall": wall, "cpu": cpu_seconds() - used, "pictures": count * batch, "apart": apart}

    return unit


def difference(config, batch: Mapping[str, Any], folder: Path) -> float:
    """Mean difference, in levels, of the patches in a batch from those that the peer cuts from the same files.

    Raises:
        RuntimeError: other patches are real, or they are another picture's.
    """
    import numpy as np
    from PIL import Image

    from benchmarks import input_peer
    from vlp_jax.data.source import Source

    source, total = Source(config.data.dir, config.data.split), []
    for row, record in enumerate(source.read(batch["image_id"])):
        picture = Image.open(folder / record["image_name"]).convert("RGB")
        patches, mask = input_peer.patches(input_peer.resized(picture))
        apart = np.abs(patches[mask].astype(int) - batch["patches"][row][mask]).mean()
        if (mask != batch["patch_mask"][row]).any() or apart > 1.0:
            raise RuntimeError(
                f"{record['image_name']}: {apart:.2f} levels apart; the two do not do the same work"
            )
        total.append(apart)
    return float(np.mean(total))


def peer(
    folder: str, workers: int, batch: int, published: bool = False, augment: bool = False
) -> Callable[[], dict]:
    """PyTorch's DataLoader: a unit is all pictures of the folder once, by new worker processes."""
    import torch

    from benchmarks import input_peer

    torch.set_num_threads(1)

    def unit() -> dict:
        begun, used = time.perf_counter(), cpu_seconds()
        pictures = input_peer.epoch(Path(folder), workers, batch, published, augment)
        return {"wall": time.perf_counter() - begun, "cpu": cpu_seconds() - used, "pictures": pictures}

    return unit


def first(directory: str, batch: int, start: int, data: Mapping[str, Any]) -> Callable[[], dict]:
    """Seconds to the first batch of a new pipeline, imports apart."""
    import tensorflow as tf

    from vlp_jax.data import pipeline

    config = make_config(directory, batch, data)
    tf.constant(0) + 1  # what TensorFlow sets up at its first operation counts as import

    streams = []  # kept: one that is let go of while it works ahead says so

    def unit() -> dict:
        begun, used = time.perf_counter(), cpu_seconds()
        streams.append(pipeline.batches(config, start=start))
        next(streams[-1])
        return {"wall": time.perf_counter() - begun, "cpu": cpu_seconds() - used}

    return unit


def slope(directory: str, batch: int, count: int, samples: int = 100) -> Callable[[], dict]:
    """Resident bytes a batch over `count` batches: least squares, the first quarter left out."""
    import numpy as np

    from vlp_jax.data import pipeline

    stream = pipeline.batches(make_config(directory, batch, {}, "tiny"))

    def unit() -> dict:
        taken, resident, every = [], [], max(1, count // samples)
        begun, used = time.perf_counter(), cpu_seconds()
        for number in range(count):
            next(stream)
            if not number % every:
                taken.append(number)
                resident.append(memory())
        late = len(taken) // 4
        rise = np.polyfit(taken[late:], resident[late:], 1)[0]
        wall, cpu = time.perf_counter() - begun, cpu_seconds() - used
        return {"wall": wall, "cpu": cpu, "slope": float(rise), "first": resident[late], "last": resident[-1]}

    return unit


KINDS = {"ours": ours, "peer": peer, "first": first, "slope": slope}


def serve(order: Mapping[str, Any]) -> None:
    """Answers until standard input ends. A fault of the data or the config is an answer, too.

    What TensorFlow reads of the environment is inherited: vlp_jax/cli.py has set it in the process that starts this.
    """
    if order["cpus"]:
        os.sched_setaffinity(0, order["cpus"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    make, unit = KINDS[order["kind"]], None
    for _ in sys.stdin:
        try:
            unit = unit or make(**order["options"])
            answer = unit()
        except Exception as error:
            from vlp_jax.types import UserError  # imports jax, whose threads PyTorch's forks must not meet

            if not isinstance(error, UserError):
                raise
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
