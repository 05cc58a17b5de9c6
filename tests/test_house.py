# SPDX-License-Identifier: Apache-2.0
"""What a newcomer leans on outside Python: pins, shell scripts, the README's commands, nothing of one machine."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = (".ci", "benchmarks", "configs", "launch", "tests", "vlp_jax")
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
README = ROOT / "README.md"


def text_files() -> list[pathlib.Path]:
    """All that a clone holds, without what runs leave behind."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        files += [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
    return [path for path in sorted(files) if path.suffix not in (".png", ".jpg", ".npz")]


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def version(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{pin} is no exact pin"
    return Version(specifier.version)


RANGES = {"requirements.txt": PROJECT["project"]["dependencies"]} | {
    f"requirements-{group}.txt": ranges for group, ranges in PROJECT["dependency-groups"].items()
}


@pytest.mark.parametrize("name", RANGES)
def test_pins_are_exact_and_satisfy_the_ranges(name):
    pinned = pins(name)
    for pin in pinned.values():
        version(pin)
    for wanted in map(Requirement, RANGES[name]):
        pin = pinned.get(canonicalize_name(wanted.name))
        assert pin is not None, f"{name} lacks {wanted}; make it anew by the command at its head"
        assert version(pin) in wanted.specifier, f"{name} pins {pin}, pyproject.toml wants {wanted}"


@pytest.mark.parametrize("name", [name for name in RANGES if name != "requirements.txt"])
def test_pins_agree_with_the_base(name):
    base = pins("requirements.txt")
    for package, pin in pins(name).items():
        if package in base:
            assert version(pin) == version(base[package]), f"{name}: {pin}, requirements.txt: {base[package]}"


def test_everything_imported_is_asked_for():
    """No import of the package leans on what another library happens to bring along."""
    asked = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    other = {"orbax": "orbax-checkpoint", "pil": "pillow", "absl": "absl-py", "google": "protobuf"}
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    optional = {"torch": ROOT / "vlp_jax" / "convert" / "proof"}  # asked for, and looked for, only there
    missing = set()
    for path in [*(ROOT / "vlp_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for module in pattern.findall(path.read_text(encoding="utf-8")):
            name = canonicalize_name(module)
            if path.is_relative_to(optional.get(module, path / "nowhere")):
                continue
            if (
                module not in sys.stdlib_module_names | {"vlp_jax", "configs"}
                and other.get(name, name) not in asked
            ):
                missing.add(f"{path.relative_to(ROOT)} imports {module}")
    assert not missing, "\n" + "\n".join(sorted(missing))


# Written so that these lines do not match themselves.
FOREIGN = re.compile(
    r"(?<![\w.<])/(?:work|root|farm|home/\w+|Users/\w+)/"
    r"|pypi\.org|python[h]osted|--(?:extra-)?index[-]url|--find[-]links|download\.pytorch"
)


def test_nothing_of_one_machine():
    offences = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_parses_and_is_short(script):
    run = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_explains_itself_from_any_folder(script, tmp_path):
    run = subprocess.run(["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: bash "), run.stderr


def local(tmp_path: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs launch/local.sh in a folder of its own, with no more of the environment than it needs."""
    environment = {
        "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
    } | environment
    command = ["bash", str(ROOT / "launch" / "local.sh"), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)


def test_local_dry_run_shows_the_road(tmp_path):
    run = local(
        tmp_path, "--dry-run", "--data=raw", "--workdir=here", "--config.train.steps=7", PYTHON=sys.executable
    )
    assert run.returncode == 0, run.stderr
    prepare, train, evaluate = run.stdout.splitlines()
    assert f"vlp_jax.prepare scenes --target={tmp_path}/raw" in prepare and "vlp_jax.evaluate" in evaluate
    assert f"--workdir={tmp_path}/here" in train and "--config.train.steps=7" in train
    assert not list(tmp_path.iterdir())


def test_local_names_a_wrong_argument_and_a_missing_python(tmp_path):
    run = local(tmp_path, "--dryrun")
    assert run.returncode == 2 and "unknown argument: --dryrun" in run.stderr
    run = local(tmp_path, PYTHON=str(tmp_path / "python3.9"))
    assert run.returncode == 2 and "No usable Python" in run.stderr and "3.11" in run.stderr


def commands() -> list[str]:
    """The command lines in the README's blocks, continued lines joined, comments cut."""
    blocks = re.findall(r"```\w*\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines]
    return [line for line in found if line.startswith(("bash ", "python ", "pip "))]


def test_readme_commands_exist():
    import configs.common

    assert any("launch/local.sh" in command for command in commands())
    assert any("tests/run.sh" in command for command in commands())
    for command in commands():
        for word in shlex.split(command):
            if re.fullmatch(r"(?:launch|tests|benchmarks|configs)/[\w./-]+", word):
                assert (ROOT / word).exists(), f"{command}: no {word}"
            if match := re.match(r"--config=configs/(\w+)\.py", word):
                assert (ROOT / "configs" / f"{match[1]}.py").exists(), f"{command}: no configs/{match[1]}.py"
            if (match := re.match(r"--config\.([\w.]+)=", word)) and not match[1].startswith(
                ("model", "objectives")
            ):
                node = configs.common.get_config()
                for key in match[1].split("."):
                    assert key in node, f"{command}: configs/common.py has no {match[1]}"
                    node = node[key]
        if match := re.search(r"python -m vlp_jax\.(\w+)", command):
            path = ROOT / "vlp_jax" / match[1]
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                f"{command}: no {match[1]}"
            )


def test_readme_links_exist():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README.md links to {missing}"


def test_source_is_formatted():
    for command in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "configs", "vlp_jax", "tests"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"ruff {' '.join(command)}:\n{run.stdout[-3000:]}{run.stderr}"
