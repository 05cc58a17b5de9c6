# SPDX-License-Identifier: Apache-2.0
"""Means of the step metrics between two log lines, exact across a restart, and the count of skipped steps."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from vlp_jax.types import Array, Stop, Term

AHEAD = 2  # steps that may be in flight: enough to hide dispatch, few enough to bound the memory of queued batches


class Window:
    """Sums of the steps since the last log line.

    `saved` goes into a checkpoint and comes back after a restart, so that the next line is the same to the bit.
    """

    def __init__(self, max_skipped: int, saved: Mapping | None = None):
        saved = saved or {}
        self.sums: dict[str, list[float]] = {k: [*v] for k, v in saved.get("sums", {}).items()}  # sum, count
        self.skipped: int = saved.get("skipped", 0)  # of the whole run
        self.in_a_row: int = saved.get("in_a_row", 0)
        self._max_skipped = max_skipped
        self._pending: list[dict[str, Array | Term]] = []

    def add(self, metrics: dict[str, Array | Term]) -> None:
        """Takes the metrics of a step that may still be running."""
        self._pending.append(metrics)
        if len(self._pending) > AHEAD:
            self._settle(1)

    def saved(self) -> dict:
        """Waits for all steps; what a checkpoint must keep."""
        self._settle(len(self._pending))
        return dict(sums=self.sums, skipped=self.skipped, in_a_row=self.in_a_row)

    def close(self) -> dict[str, float]:
        """Waits for all steps, returns their means by "train/..." and begins anew.

        A number is averaged over steps; a `Term` over what it counts, and left out where it counted nothing.
        """
        self._settle(len(self._pending))
        means = {f"train/{name}": total / count for name, (total, count) in self.sums.items() if count}
        self.sums = {}
        return {**means, "train/skipped_steps": self.skipped}

    def _settle(self, count: int) -> None:
        """Counts the oldest pending steps; a skipped one has no finite loss to add.

        Raises:
            Stop: more skipped steps in a row than the config allows (exit code 1).
        """
        settled, self._pending = self._pending[:count], self._pending[count:]
        for metrics in jax.device_get(settled):
            if metrics.pop("skipped"):
                self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
                if self.in_a_row > self._max_skipped:
                    raise Stop(
                        1,
                        f"{self.in_a_row} steps in a row had a loss or gradient that is not finite "
                        f"(config.train.max_skipped {self._max_skipped}). The last finite checkpoint is kept. "
                        "Lower config.optimizer.lr, set config.optimizer.clip_norm, or look at the data of these steps.",
                    )
                continue
            self.in_a_row = 0
            for name, value in metrics.items():
                total, count = (value.sum, value.count) if isinstance(value, Term) else (value, 1.0)
                sums = self.sums.setdefault(name, [0.0, 0.0])
                sums[:] = sums[0] + float(total), sums[1] + float(count)
