# SPDX-License-Identifier: Apache-2.0
"""The core of the benchmarks: turns, minima, medians and ratios, a busy machine refused, rows written whole or not."""

import os
import pathlib
import re
import subprocess
import time

import pytest

from benchmarks import measure, results
from vlp_jax import cli
from vlp_jax.types import UserError

BEFORE = "# Results\n\nOld words.\n\n## First\n\n| a |\n\n## Second\n\nlast\n"


def programs(calls):
    """Two programs of known lengths: one computes, one mostly waits."""

    def busy():
        calls.append("busy")
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    def waiting():
        calls.append("waiting")
        time.sleep(0.05)

    return [measure.Program("busy", busy), measure.Program("waiting", waiting)]


def test_programs_run_by_turns_and_clocks_are_told_apart():
    calls = []
    timings, load = measure.compare(programs(calls), 3, 0.25, settle=0.0)
    assert calls == ["busy"] * 2 + ["waiting"] * 2 + ["busy", "waiting"] + ["waiting", "busy"] + [
        "busy",
        "waiting",
    ]
    busy, waiting = timings
    assert (busy.name, waiting.name, len(busy.wall), len(waiting.cpu)) == ("busy", "waiting", 3, 3)
    assert min(busy.cpu) >= 0.02 and min(waiting.wall) >= 0.05 and min(waiting.cpu) < 0.02
    assert load.before == 0.25 and load.highest >= 0.25


def test_table_has_minima_medians_and_ratios_against_the_baseline():
    ours = measure.Timing("ours", (2.0, 1.0, 4.0), (3.0, 6.0, 6.0))
    peer = measure.Timing("peer", (3.0, 3.0, 9.0), (6.0, 6.0, 9.0))
    head, first, second = measure.table([ours, peer], "peer")
    assert head[:4] == ["program", "min s", "median s", "min CPU s"]
    assert first == ["ours", "1.000", "2.000", "3.000", "3.00", "1.50", "2.00"]
    assert second == ["peer", "3.000", "3.000", "6.000", "1.00", "1.00", "1.00"]
    lines = results.aligned([head, first, second]).splitlines()
    assert len({len(line) for line in lines}) == 1


def start(*argv):
    """Runs the checks at the start of a benchmark as its main would; returns the exit code."""

    def main(flags):
        measure.start(flags, peers=("numpy",))

    return cli.run(main, lambda flags: measure.define(flags, repeats=2), usage="", argv=list(argv))


def test_a_busy_machine_is_refused_unless_told(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.51, 0.0, 0.0))
    assert start() == 2
    message = capsys.readouterr().err
    assert "0.51" in message and "0.5 or less" in message and "--loaded" in message
    assert start("--loaded") == 0
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert start() == 0


def test_work_of_others_meanwhile_is_refused_unless_told():
    quiet, noisy = measure.Load(0.1, 2.0, 0.4), measure.Load(0.1, 2.0, 0.6)
    assert "no ratio to quote" in str(noisy) and "no ratio" not in str(quiet)
    measure.check_undisturbed(quiet, False)
    measure.check_undisturbed(noisy, True)
    measure.check_undisturbed(measure.Load(0.1, 2.0, None), False)
    with pytest.raises(UserError, match="0.60 cores.*Nothing was recorded.*--loaded"):
        measure.check_undisturbed(noisy, False)


@pytest.mark.skipif(not pathlib.Path("/proc/stat").exists(), reason="counts the work of others in /proc/stat")
def test_work_of_another_process_is_counted_and_our_own_is_not():
    command = "import time; e = time.process_time() + 1.0\nwhile time.process_time() < e: pass"
    start = measure.others_clock()
    began = time.process_time()
    subprocess.run(["python3", "-c", command], check=True)
    while time.process_time() < began + 0.3:
        pass
    end = measure.others_clock()
    assert end[1] - start[1] >= 0.9
    assert measure._others_cores((0.0, 10.0), (2.0, 13.0)) == 1.5


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    def main(flags):
        measure.start(flags, peers=("numpy", "no_such_package"))

    assert cli.run(main, lambda flags: measure.define(flags, repeats=2), usage="", argv=[]) == 2
    message = capsys.readouterr().err
    assert "no_such_package" in message and "numpy" not in message and "requirements-oracle.txt" in message


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of a results file, which the program takes for its own."""
    path = tmp_path / "RESULTS.md"
    path.write_text(BEFORE, encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", path)
    return path


def section(heading):
    return results.Section(
        heading, "where and how", [["program", "min s"], ["ours", "1.000"], ["peer", "2.000"]]
    )


def test_rows_go_to_the_end_of_their_section(copy):
    results.append([section("First"), section("Third")])
    text = copy.read_text(encoding="utf-8")
    first, second, third = re.split(r"^## \w+\n", text, flags=re.MULTILINE)[1:]
    assert text.startswith(
        "# Results\n\nOld words.\n\n## First\n\n| a |\n\nwhere and how\n\n| date (UTC) | commit |"
    )
    assert second == "\nlast\n\n"
    for part in (first, third):
        rows = [line for line in part.splitlines() if re.match(r"\| 20\d\d-\d\d-\d\d \d\d:\d\d \| ", line)]
        assert [row.split(" | ")[2:] for row in rows] == [["ours", "1.000 |"], ["peer", "2.000 |"]]
    results.append([section("First")])
    assert copy.read_text(encoding="utf-8").count("| ours | 1.000 |") == 3
    assert list(copy.parent.iterdir()) == [copy]


def test_a_kill_while_writing_leaves_the_old_file(copy, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        results.append([section("First")])
    assert copy.read_text(encoding="utf-8") == BEFORE and list(copy.parent.iterdir()) == [copy]


def test_nowhere_to_record_is_found_before_measuring(copy, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    copy.unlink()
    assert start("--record") == 2
    assert "--record" in capsys.readouterr().err


def test_commit_says_when_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "benchmarks").mkdir()
    for name in ("code.py", "benchmarks/RESULTS.md"):
        (tmp_path / name).write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    clean = results.commit()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("2")
    assert results.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert results.commit() == f"{clean} dirty"


def test_machine_tells_what_changes_speed(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    text = results.machine()
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in text and "cores" in text and "GiB" in text
    assert re.fullmatch(r"jax [\d.]+, numpy [\d.]+", results.versions("jax", "numpy"))
