# SPDX-License-Identifier: Apache-2.0
"""What the compiler's messages say, and figures that cannot be true."""

from __future__ import annotations

import pathlib

import pytest

from configs import vilt
from vlp_jax.data import spec
from vlp_jax.planning import chips, compilation, estimate, program, report
from vlp_jax.systems import vilt as system

PROGRAMS = pathlib.Path(__file__).parent / "programs"
GIB = 2**30


@pytest.mark.parametrize(
    "message, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (22.29G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee ...",
            22.29 * GIB,
            15.75 * GIB,
        ),
        ("XLA:TPU compile permanent error. Used 612.50M of 0.50G hbm. Exceeded ...", 612.5 * 2**20, GIB / 2),
        ("RESOURCE_EXHAUSTED: in other words", 0, 0),
    ],
)
def test_what_is_needed_is_read_from_the_message(message, needed, available):
    found = compilation.OutOfMemory(message)
    assert (found.needed, found.available) == pytest.approx((needed, available))


def figures(**changes: object) -> dict:
    return {
        "topology": "v5e:2x2",
        "usable_hbm_bytes_per_device": 15.75 * GIB,
        "state_bytes_per_device": 1.75 * GIB,
        "pairs_per_chip": 32.0,
        "micro_batches": 1,
        "rules": "dp",
        "remat_switch": "fusion.remat",
        "flops_per_step": 4e12,
        "useful_flops_per_step": 3e12,
        "batch_size": 128,
    } | changes


def test_advice_keeps_the_proportion_of_what_grows_with_the_batch():
    found = figures()
    message = "the total memory required for all (29.75G) exceeds available HBM (15.75G)."
    estimate._add_out_of_memory(found, compilation.OutOfMemory(message))
    # 1.75 stay, 28 of 32 pairs: 14 are left for 16 pairs.
    assert found["pairs_per_chip_that_may_fit"] == 16 and found["fits"] is False
    advice = report.advice(found)
    for part in (
        "29.75 GiB",
        "15.75 GiB",
        "--pairs_per_chip=16",
        "accumulation=2",
        "rules=fsdp",
        "fusion.remat=true",
    ):
        assert part in advice


def test_advice_without_figures_or_switches():
    found = figures(remat_switch="", rules="fsdp")
    estimate._add_out_of_memory(found, compilation.OutOfMemory("RESOURCE_EXHAUSTED: in other words"))
    assert "needs more memory" in report.advice(found) and "Try more chips." in report.advice(found)


def run(cycles: int, trips: int | None = 1) -> program.Program:
    operation = program.Operation("a", "fusion", "jit(step)/jvp()/dot", "", cycles, 1)
    return program.Program((operation,), (), (program.Loop("w", "", "", trips, cycles),), 0)


def test_more_than_the_peak_is_our_error_and_not_a_figure():
    where = chips.find("v5e:2x2")
    second = round(where.generation.clock)
    enough = estimate._time(figures(flops_per_step=197e12 * 4), run(second + 1000), where)
    assert enough["mfu_computed"] == pytest.approx(1, abs=1e-3) and enough["step_seconds"] == pytest.approx(
        1, rel=1e-3
    )
    with pytest.raises(RuntimeError, match="over 1"):
        estimate._time(figures(flops_per_step=197e12 * 4), run(second // 2), where)
    # A loop of unknown length is counted once, so that too little time is no surprise; the report says so.
    unknown = estimate._time(figures(flops_per_step=197e12 * 4), run(second // 2, None), where)
    assert unknown["loops_of_unknown_length"] == 1


def test_a_walk_that_loses_cycles_is_our_error():
    lost = program.Program((), (), (), 5)
    with pytest.raises(RuntimeError, match="lost 5"):
        estimate._add_program(figures(), lost, chips.find("v5e:2x2"))


@pytest.mark.parametrize("name, kind", [("gathered", "reduce-scatter"), ("loops", ""), ("search", "")])
def test_the_whole_report_from_a_stored_program(name, kind):
    where = chips.find("v5e:2x4")
    config = vilt.get_config("variant=tiny,smoke")
    config.train.batch_size = 8
    config = system.resolve(config, estimate.facts(config))
    found = estimate.analytic(config, system, spec.spec(config, 8), where)
    found |= {
        "flops_per_step": 1e9,
        "useful_flops_per_step": 9e8,
        "fits": True,
        "trouble": "",
        "compiler": "jax",
    }
    found |= {
        "compile_seconds": 1.0,
        "memory_bytes_per_device": dict.fromkeys(("arguments", "temporaries"), GIB),
    }
    found["memory_bytes_per_device"] |= {"results": 0, "total": 2 * GIB, "free": 13.75 * GIB}
    walked = program.read((PROGRAMS / f"{name}.txt").read_text(encoding="utf-8"))
    estimate._add_program(found, walked, where)
    printed = report.table(found)
    for part in ("2.00 GiB of 15.75 GiB: fits, 13.75 GiB free", "sample.py", "copy-start", kind):
        assert part in printed
    # A loop of unknown length makes the time a lower bound, and says so.
    assert ("at least" in printed.split("estimated step")[1].split("\n")[0]) is (name == "search")
    assert max(map(len, printed.splitlines())) < 160


def test_a_text_that_cannot_be_read_leaves_memory_and_says_what_is_missing():
    config = vilt.get_config("variant=tiny,smoke")
    config.train.batch_size = 8
    config = system.resolve(config, estimate.facts(config))
    found = estimate.analytic(config, system, spec.spec(config, 8), chips.find("v5e:2x4"))
    memory = {"arguments": GIB, "temporaries": GIB, "results": 0}
    unread = compilation.Compiled(1.0, memory, "", "INTERNAL: RET_CHECK failure")

    def compile_step(*_: object) -> compilation.Compiled:
        return unread

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "compile_step", compile_step)
        assert estimate.add_compiled(found, config, system, {}, chips.find("v5e:2x4")) == ""
    printed = report.table(found)
    assert "2.00 GiB of 15.75 GiB" in printed and "RET_CHECK" in printed and "requirements-tpu.txt" in printed
    assert "MFU" not in printed
