# SPDX-License-Identifier: Apache-2.0
"""Log lines are exact means, also across a restart; skipped steps are counted and end the run."""

import pytest

from vlp_jax.training.window import Window
from vlp_jax.types import Stop, Term


def metrics(loss, skipped=0.0):
    return {"loss": loss, "skipped": skipped}


def test_means_leave_skipped_steps_out():
    window = Window(max_skipped=3)
    for loss, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        window.add(metrics(loss, skipped))
    assert window.close() == {"train/loss": 2.0, "train/skipped_steps": 1}
    assert window.close() == {"train/skipped_steps": 1}


def test_a_term_is_averaged_over_what_it_counts():
    window = Window(0)
    for total, count in ((3.0, 1.0), (0.0, 0.0), (5.0, 3.0)):
        window.add({"rare": Term(total, count), "never": Term(0.0, 0.0), "skipped": 0.0})
    again = Window(0, window.saved())
    assert again.close() == {"train/rare": 2.0, "train/skipped_steps": 0}


def test_a_restart_in_the_middle_changes_no_bit():
    values = [0.1, 0.7, 1e-9, 3.3, 0.2]
    whole = Window(0)
    for value in values:
        whole.add(metrics(value))
    first = Window(0)
    for value in values[:3]:
        first.add(metrics(value))
    second = Window(0, first.saved())
    for value in values[3:]:
        second.add(metrics(value))
    assert second.close() == whole.close()


def test_too_many_in_a_row_end_the_run_but_not_as_many_apart():
    window = Window(max_skipped=2)
    for _ in range(5):
        window.add(metrics(0.0, 1.0))
        window.add(metrics(0.0, 1.0))
        window.add(metrics(1.0))
    assert window.close()["train/skipped_steps"] == 10
    with pytest.raises(Stop, match="3 steps in a row") as stop:
        for _ in range(9):
            window.add(metrics(0.0, 1.0))
    assert stop.value.code == 1
