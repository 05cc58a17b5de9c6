# SPDX-License-Identifier: Apache-2.0
"""The picture of the house, read from the source: who imports whom, how long things are, what is documented.

Every message names file and line, so that a failure is a list of places to go to.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlp_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
NOT_MAINS = {"__init__", "types", "files", "cli"}

# Package -> what it may import of vlp_jax. "systems.base" is one module, "layers" all below it. Mains: all.
MAY_IMPORT = {
    "types": (),
    "files": ("types",),
    "cli": ("types",),
    "layers": ("layers", "types"),
    "models": ("models", "layers", "types"),
    "objectives": ("objectives", "types"),
    "systems": ("systems.base", "models", "objectives", "layers", "types"),
    "systems.base": ("types",),
    "parallel": ("parallel", "systems.base", "types"),
    "data": ("data", "files", "types"),
    "training": ("training", "systems.base", "parallel", "files", "types"),
    "evaluation": ("evaluation", "systems.base", "parallel", "files", "types", "data.text", "data.image"),
    "prediction": (
        *("prediction", "systems.base", "files", "types"),
        *(
            "evaluation.detection",
            "evaluation.frames",
            "data.grid",
            "data.image",
            "data.preparation.admission",
        ),
    ),
    "planning": ("planning", "training", "systems.base", "parallel", "files", "types"),
    "convert": (
        *("convert", "systems", "parallel", "files", "types", "layers.trace"),
        *("training.checkpoint", "training.paths", "training.limits", "data.spec", "data.text"),
        "data.categories",
    ),
}

# Library -> the only places that import it; () is nowhere.
ONLY_IN = {
    "flax.nnx": (),
    "flax": ("layers", "models", "systems", "parallel.shard"),
    "orbax": ("training.checkpoint",),
    "torch": ("convert.proof",),
    "pycocotools": ("evaluation.detection",),
    "transformers": (),
    "pickle": (),
    "tensorflow_datasets": ("data",),
    "array_record": ("data",),
}
NEVER_IN = {
    "data": ("jax", "flax", "optax", "orbax"),
    "objectives": ("flax",),
    "layers": ("tensorflow", "absl"),
    "models": ("tensorflow", "absl"),
    "systems": ("tensorflow", "absl"),
}
FUNCTION_LINES, FILE_LINES, MAIN_LINES = 60, 450, 60
OTHER_FILE_LINES = {"training.loop": 200, "systems": 250}


def name_of(path: pathlib.Path) -> str:
    """The dotted name below vlp_jax: "data.text", "train", "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the places or lies below one."""
    return any(name == place or name.startswith(place + ".") for place in places)


def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of all imports, those inside functions too; `from a import b` gives a.b."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(filter(None, [start, node.module]))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_main(name: str) -> bool:
    if name.endswith(".__main__"):
        return True
    return bool(name) and "." not in name and name not in NOT_MAINS and not (PACKAGE / name).is_dir()


def rule_for(name: str) -> tuple[str, ...]:
    longest = max((key for key in MAY_IMPORT if within(name, (key,))), key=len, default=None)
    assert longest is not None, (
        f"vlp_jax/{name}: DESIGN.md's tree has no such place; known: {sorted(MAY_IMPORT)}"
    )
    return MAY_IMPORT[longest]


def place(path: pathlib.Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def report(offences: Iterable[str]) -> None:
    offences = list(offences)
    assert not offences, "\n" + "\n".join(offences)


def test_imports_point_down():
    offences = []
    for path in FILES:
        name = name_of(path)
        if is_main(name) or not name:
            continue
        for line, imported in imports(path):
            # A package's own __init__ finds its modules by name and may import them.
            allowed = rule_for(name) + ((name,) if path.stem == "__init__" else ())
            top, _, below = imported.partition(".")
            if top == "vlp_jax" and not any(within(below, (each,)) for each in allowed):
                offences.append(
                    f"{place(path, line)}: {name} imports {imported}; it may import {', '.join(allowed)}"
                )
    report(offences)


def test_nothing_imports_a_main_or_the_command_line():
    mains = tuple(name for name in map(name_of, FILES) if is_main(name)) + ("cli",)
    report(
        f"{place(path, line)}: {imported} is for mains"
        for path in FILES
        if not is_main(name_of(path))
        for line, imported in imports(path)
        if within(imported.removeprefix("vlp_jax."), mains) and imported.startswith("vlp_jax.")
    )


def test_libraries_stay_where_they_belong():
    offences = []
    for path in FILES:
        name = name_of(path)
        for line, imported in imports(path):
            for library, places in ONLY_IN.items():
                if within(imported, (library,)) and not within(name, places):
                    offences.append(
                        f"{place(path, line)}: {imported}; allowed in {', '.join(places) or 'no file'}"
                    )
            for package, libraries in NEVER_IN.items():
                if within(name, (package,)) and within(imported, libraries):
                    offences.append(f"{place(path, line)}: {package} must not import {imported}")
    report(offences)


def test_nothing_unpickles():
    loads = {"torch.load", "pickle.load", "pickle.loads", "joblib.load"}
    offences = []
    elsewhere = [path for name in ("benchmarks", "configs") for path in sorted((ROOT / name).glob("*.py"))]
    for path in FILES + elsewhere:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                pickled = any(
                    key.arg == "allow_pickle" and ast.unparse(key.value) != "False" for key in node.keywords
                )
                if ast.unparse(node.func) in loads or pickled:
                    offences.append(
                        f"{place(path, node.lineno)}: {ast.unparse(node.func)} can run foreign code"
                    )
    report(offences)


def test_configs_import_only_configs():
    allowed = {"ml_collections", "difflib", "math", "configs", "__future__"}
    report(
        f"{place(path, line)}: a config imports {imported}; allowed: {sorted(allowed)}"
        for path in sorted((ROOT / "configs").glob("*.py"))
        for line, imported in imports(path)
        if imported.split(".")[0] not in allowed
    )


def test_no_drawers():
    names = {"utils", "util", "common", "helpers", "misc", "core", "registry"}
    report(
        f"{place(path)}: a drawer; name what it holds"
        for path in FILES
        if set(name_of(path).split(".")) & names
    )


def test_files_read_in_one_sitting():
    offences = []
    for path in FILES:
        name, lines = name_of(path), len(path.read_text(encoding="utf-8").splitlines())
        other = next((most for where, most in OTHER_FILE_LINES.items() if within(name, (where,))), FILE_LINES)
        most = MAIN_LINES if is_main(name) else other
        if lines > most:
            offences.append(f"{place(path, lines)}: {lines} lines, at most {most}")
    report(offences)


def test_functions_fit_on_a_screen():
    report(
        f"{place(path, node.lineno)}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    )


def test_modules_open_with_a_licence_and_a_few_lines():
    offences = []
    for path in FILES + sorted((ROOT / "configs").glob("*.py")) + sorted((ROOT / "tests").rglob("*.py")):
        if not path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"):
            offences.append(f"{place(path)}: the first line is not the licence")
        text = ast.get_docstring(tree_of(path))
        if not text:
            offences.append(f"{place(path)}: no module docstring")
    report(offences)


def test_public_names_are_documented():
    report(
        f"{place(path, node.lineno)}: public {node.name} has no docstring"
        for path in FILES
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    )


def test_nothing_is_left_half_done():
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    report(
        f"{place(path, number)}: {line.strip()[:80]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    )
