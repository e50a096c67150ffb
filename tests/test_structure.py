"""The layout holds: no circle of imports between files or rooms, and no file, folder or package that grew too large.

Imports inside functions and under ``TYPE_CHECKING`` count: they hide a circle, they do not open it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = {
    "csm_fast": ROOT / "csm_fast",
    "csm_kernels": ROOT / "kernels" / "csm_kernels",
    "benchmarks": ROOT / "benchmarks",
}
LINES, FILES, ENTRIES = 400, 15, 15


def modules() -> dict[str, Path]:
    """Files by dotted name; a package is its ``__init__``."""
    found = {}
    for package, top in PACKAGES.items():
        for path in top.rglob("*.py"):
            parts = [package, *path.relative_to(top).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name or "") of every import in a file, wherever it stands. Imports are absolute in this project."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import of {node.module}"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def file_arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """File -> files it imports from. A package's ``__init__`` may name its parts: they do not import it back."""
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        arrows[name] = set()
        for module, member in imported(ast.parse(path.read_text(encoding="utf-8"))):
            target = f"{module}.{member}" if f"{module}.{member}" in files else module
            if target in files and target != name and not target.startswith(name + "."):
                arrows[name].add(target)
    return arrows


def name_arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """``module:name`` -> the names of other modules that this definition uses, by way of its file's imports."""
    arrows: dict[str, set[str]] = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        local: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if node.module in files and f"{node.module}.{alias.name}" not in files:
                        local[alias.asname or alias.name] = f"{node.module}:{alias.name}"
        definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        own = {n.name: f"{module}:{n.name}" for n in definitions}
        for definition in definitions:
            used = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name)} - {definition.name}
            arrows[own[definition.name]] = {local[n] for n in used if n in local} | {own[n] for n in used if n in own}
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in list(arrows):
        if node not in index:
            visit(node)
    return found


def test_no_circle_of_files():
    assert not circles(file_arrows(modules()))


def test_no_circle_of_rooms():
    rooms: dict[str, set[str]] = {}
    for name, targets in file_arrows(modules()).items():
        room = ".".join(name.split(".")[:2])
        rooms.setdefault(room, set()).update(".".join(t.split(".")[:2]) for t in targets)
    del rooms["csm_fast"], rooms["csm_kernels"]  # the faces of the packages
    assert not circles({room: targets - {room} for room, targets in rooms.items()})


@pytest.mark.slow
def test_no_circle_of_names_between_files():
    """Functions of one file may call each other; across files nothing may lead back."""
    across = [group for group in circles(name_arrows(modules())) if len({n.split(":")[0] for n in group}) > 1]
    assert not across


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_kernels_for_gpus_and_cpus_do_not_import_each_other():
    for name, targets in file_arrows(modules()).items():
        for one, other in (("csm_kernels.gpu", "csm_kernels.cpu"), ("csm_kernels.cpu", "csm_kernels.gpu")):
            assert not (name.startswith(one) and any(t.startswith(other) for t in targets)), name


def test_only_ops_imports_the_kernels():
    """The planner reads their constants, which import nothing."""
    for name, targets in file_arrows(modules()).items():
        kernels = {t for t in targets if t.startswith("csm_kernels")} - {"csm_kernels.constants"}
        assert not kernels or not name.startswith("csm_fast.") or name == "csm_fast.ops", name


@pytest.mark.parametrize("package", PACKAGES)
def test_sizes(package):
    top = PACKAGES[package]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in top.rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > LINES}
    for folder in [top, *(p for p in top.rglob("*") if p.is_dir() and p.name not in ("__pycache__", "results"))]:
        files = [p.name for p in folder.iterdir() if p.is_file() and p.name != "py.typed"]
        assert len(files) <= FILES, folder


def test_entries_of_the_package():
    entries = {p.name for p in PACKAGES["csm_fast"].iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= ENTRIES, sorted(entries)
