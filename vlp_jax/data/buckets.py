# SPDX-License-Identifier: Apache-2.0
"""Batches of pictures alike in size, so that little is padding: a pure function of the step.

Positions are cut into windows of whole batches. A window holds the examples that data/order.py gives its positions,
each once, sorted into buckets by number of patches, or rows and columns; what fills no batch goes to the next bucket
that holds it.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from vlp_jax.data import image, order
from vlp_jax.types import UserError

WINDOW = (
    2**18
)  # positions, about; the larger, the fewer rows are promoted, and the longer the first batch takes
LEAST = 32  # batches: of 16, promoted rows fill 0.6 % of the slots, of 32 they fill 0.3 %
KEPT = 2  # windows in memory, 2 MB each: batches made ahead may stand on both sides of a border
_BATCHES = 0xB7  # separates this use of the seed from those of data/order.py


def check(sizes: Sequence[int], rule: image.Layout) -> tuple[int, ...]:
    """Returns `config.data.buckets` as a tuple, () for off.

    Raises:
        UserError: sizes that are no whole numbers above 0, do not ascend, or whose last is not `rule.slots`.
    """
    sizes = tuple(sizes) if isinstance(sizes, Sequence) and not isinstance(sizes, str) else (sizes,)
    whole = all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes)
    if not whole or any(size <= 0 for size in sizes) or list(sizes) != sorted(set(sizes)):
        near = sorted({max(1, rule.slots * 27 // 32), rule.slots})
        raise UserError(
            f"data.buckets={sizes} are no sizes of buckets. Possible are whole numbers above 0 that ascend, the last "
            f"{rule.slots}, for example {tuple(near)}; () = off. Change data.buckets."
        )
    if sizes and sizes[-1] != rule.slots:
        raise UserError(
            f"data.buckets={sizes} ends with {sizes[-1]}; a picture of this run may keep {rule.slots} patches "
            f"(data.max_patches, or all that data.image_size and data.image_limit give). Let data.buckets end with "
            f"{rule.slots}, or set data.max_patches={sizes[-1]}."
        )
    return tuple(int(size) for size in sizes)


def tokens(height: np.ndarray, width: np.ndarray, rule: image.Layout) -> np.ndarray:
    """Patches that pictures of these sizes (int [n], pixels) keep, int64 [n]."""
    tall, wide = image.resized_size(height, width, rule.shorter, rule.longer, rule.patch)
    return np.minimum((tall // rule.patch) * (wide // rule.patch), rule.slots)


def empty(count: np.ndarray, slots: int | np.ndarray) -> float:
    """Share of patch slots that hold no patch, when pictures with `count` patches get `slots` each."""
    return 1.0 - float(np.sum(count) / np.sum(np.broadcast_to(slots, np.shape(count))))


def fill(extent: np.ndarray, sizes: Sequence, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts pictures into batches of one bucket each: each picture into the first that holds it.

    What fills no batch goes to the next bucket that holds it; there it comes first. What fills none in the last bucket
    is the last batch, with empty rows.

    Args:
        extent: int [n], patches, or [n, 2], rows and columns in pixels.
        sizes: of the buckets, likewise; the last holds every picture.
        batch_size: rows.

    Returns:
        int64 [batches], the bucket of each batch, and [batches, batch_size], numbers of pictures; n where a row is empty.

    Raises:
        ValueError: a picture that the last bucket does not hold.
    """
    count, last = len(extent), len(sizes) - 1
    sides = np.asarray(extent).reshape(count, np.size(sizes[0])).T
    held = np.stack(
        [np.all([side <= most for side, most in zip(sides, np.ravel(one), strict=True)], 0) for one in sizes]
    )
    if not held[last].all():
        raise ValueError(f"a picture with {extent[np.argmin(held[last])]} in buckets of {tuple(sizes)}")
    first = np.argmax(held, 0)
    which, rows = [], []
    waiting: list[list[np.ndarray]] = [[] for _ in sizes]
    for bucket in range(len(sizes)):
        inside = np.concatenate([*waiting[bucket], np.flatnonzero(first == bucket)])
        full = len(inside) // batch_size
        rest = inside[full * batch_size :]
        if bucket < last:
            following = bucket + 1 + np.argmax(held[bucket + 1 :, rest], 0)
            for later in range(bucket + 1, len(sizes)):
                waiting[later].append(rest[following == later])
        elif len(rest):
            full += 1
            inside = np.concatenate([inside, np.full(batch_size - len(rest), count)])
        rows.append(inside[: full * batch_size].reshape(full, batch_size))
        which += [bucket] * full
    return np.array(which, np.int64), np.concatenate(rows).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Window:
    """The batches of one window in the order in which they are trained on.

    Attributes:
        slots: int64 [batches], patch slots of each picture of a batch, or [batches, 2], rows and columns of its canvas.
        positions: int64 [batches, batch size], ascending but for promoted rows, which come first.
        tokens: int64 [batches], patches or pixels that a batch holds.
    """

    slots: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray


class Buckets:
    """The plan of a run: which positions form the batch of a step, and how much room its pictures have.

    Every host computes the whole plan, O(window) once a window, and takes its slice of each batch.

    Attributes:
        sizes: of the buckets: patch slots, ascending, from `check`; or rows and columns, from `grid.canvases`.
        batch_size: global.
        batches: of a window.
    """

    def __init__(
        self,
        sizes: Sequence,
        batch_size: int,
        examples: int,
        seed: int,
        count: Callable[[np.ndarray], np.ndarray],
    ):
        """Makes a plan; computes nothing yet.

        Args:
            sizes: of the buckets; the last holds every picture.
            batch_size: global.
            examples: of the data, all sources together: a window is no longer than it must be, so that a short run
                over few examples sees each of them as often as the others.
            seed: of the run.
            count: positions int64 [n] -> patches that the rows there keep, int64 [n], or rows and columns of their
                pictures, [n, 2]. Called from any thread.
        """
        self.sizes = tuple(sizes)
        self.batch_size = batch_size
        self.batches = max(LEAST, min(WINDOW, examples) // batch_size)
        self._seed, self._count = seed, count
        self._windows: collections.OrderedDict[int, Window] = collections.OrderedDict()
        self._lock = threading.Lock()

    def batch(self, step: int) -> tuple[int | tuple[int, int], np.ndarray]:
        """Returns the size of the step's bucket and the global positions of its rows, int64 [batch size]."""
        number, place = divmod(int(step), self.batches)
        window = self.window(number)
        size = window.slots[place].tolist()
        return tuple(size) if isinstance(size, list) else size, window.positions[place]

    def padding(self, step: int) -> float:
        """Share of the patch slots, or of the pixels, of a step that are empty."""
        number, place = divmod(int(step), self.batches)
        window = self.window(number)
        return 1.0 - float(window.tokens[place] / (window.slots[place].prod() * self.batch_size))

    def window(self, number: int) -> Window:
        """Returns window `number`: steps [number, number + 1) x `batches`."""
        with self._lock:
            if number not in self._windows:
                self._windows[number] = self._make(number)
                if len(self._windows) > KEPT:
                    self._windows.popitem(last=False)
            self._windows.move_to_end(number)
            return self._windows[number]

    def _make(self, number: int) -> Window:
        length = self.batches * self.batch_size
        first = number * length
        extent = np.asarray(self._count(first + np.arange(length)))
        bucket, rows = fill(extent, self.sizes, self.batch_size)
        key = order.mix(self._seed, _BATCHES, number)
        turn = order.permute(np.arange(self.batches), self.batches, key)
        places = rows[turn]
        positions = first + places
        positions.flags.writeable = False
        amount = extent.reshape(length, -1).prod(1)
        return Window(np.array(self.sizes)[bucket[turn]], positions, amount[places].sum(1))
