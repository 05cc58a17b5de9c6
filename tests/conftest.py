# SPDX-License-Identifier: Apache-2.0
"""One process as a pod of eight CPU devices, shapes checked when called, and the fixtures all tests share."""

from __future__ import annotations

import fcntl
import os
import pathlib
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax; TF_* before tensorflow
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jaxtyping
import pytest

# By config and not by XLA_FLAGS: programs that a test starts then see one device, as a user's do.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the first import of these packages; annotations are checked in tests only.
jaxtyping.install_import_hook(["vlp_jax.layers", "vlp_jax.models", "vlp_jax.objectives"], "beartype.beartype")

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
REALDATA = REPOSITORY.parent / "shared" / "realdata"

# What a skip's reason contains -> the one line for the whole group, and the variable under which it must not skip.
GROUPS = {
    r"needs \.\./shared": ("needs ../shared, which lies beside the project's own checkouts only", "CI"),
    r"could not import '(torch|transformers|safetensors|libtpu)\b": (
        "needs torch, transformers or libtpu: bash tests/run.sh --oracle",
        "VLP_JAX_ORACLE",
    ),
}


@pytest.fixture(scope="session")
def realdata() -> pathlib.Path:
    """The folder of real photographs and golden outputs beside the checkout."""
    if not REALDATA.is_dir():
        pytest.skip("needs ../shared/realdata")
    return REALDATA


@pytest.fixture(scope="session")
def specs() -> pathlib.Path:
    """The folder of golden values of DETR beside the checkout."""
    folder = REALDATA.parent / "specs" / "e2evlp_detr"
    if not folder.is_dir():
        pytest.skip("needs ../shared/specs")
    return folder


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> pathlib.Path:
    """Prepared scenes of level 1: 64 pictures to train on, 24 each to validate and test. Do not write there."""
    from vlp_jax.data import datasets
    from vlp_jax.data.preparation import writer

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # one for all workers of a session
    with (base / "scenes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = {"train": 64, "validation": 24, "test": 24}
        writer.write(datasets.get("scenes"), "", base / "scenes", options=options, workers=1)
    return base / "scenes"


def _grouped(report):
    """Gives all skips of a group one place and reason, so that they are one line, or makes them failures."""
    if report.skipped and isinstance(report.longrepr, tuple):
        for pattern, (reason, must_run) in GROUPS.items():
            if re.search(pattern, report.longrepr[2]):
                failed = os.environ.get(must_run, "").lower() in ("true", "1")
                report.outcome = "failed" if failed else "skipped"
                report.longrepr = f"{reason}; {must_run} is set" if failed else (__file__, 1, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _grouped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _grouped((yield))
