"""The floor plan of docs/layout.md, enforced: a room imports only from the rooms below it, and heavy packages only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flexmask"

# A room and those it may import, lowest first. Siblings (frontend, analysis) never see each other.
BELOW = {
    "errors": set(),
    "options": {"errors"},
    "ir": {"errors", "options"},
    "frontend": {"errors", "options", "ir"},
    "analysis": {"errors", "options", "ir"},
    "lowering": {"errors", "options", "ir", "analysis"},
    "templates": {"errors", "options", "ir", "lowering"},
    "runtime": {"errors", "options", "ir", "frontend", "analysis", "lowering", "templates"},
    "inspect": {"errors", "options", "ir", "frontend", "analysis", "lowering", "templates", "runtime"},
    "mods": {"errors", "options", "ir", "frontend", "analysis", "lowering", "templates", "runtime", "inspect"},
    "api": {"errors", "options", "ir", "frontend", "analysis", "lowering", "templates", "runtime", "inspect", "mods", "reference"},
    "compat": {"errors", "frontend", "runtime", "mods", "api", "masks"},
    "masks": {"errors", "mods"},
    "scores": {"mods"},
    "reference": set(),
    "__init__": {"errors", "api", "mods", "masks", "scores", "reference", "runtime"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(file: Path, top_level_only: bool = False):
    """(level, module) of each import; relative modules as written."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_imports_only_from_below(file):
    room, depth = room_of(file), len(file.relative_to(ROOT).parts)
    for level, module, names in imports_of(file):
        assert not (level == 0 and module.split(".")[0] == "flexmask"), f"{file}: write a relative import"
        if level == depth:  # climbs to the package root
            for other in [module.split(".")[0]] if module else names:
                assert other == room or other in BELOW[room], f"{file}: {room} may not import {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_heavy_packages_are_imported_lazily_and_in_their_rooms(file):
    relative = str(file.relative_to(ROOT))
    for _, module, _ in imports_of(file):
        if module.split(".")[0] == "triton":
            assert relative.startswith("templates/") or relative == "runtime/launch.py", f"{file} imports triton"
    for _, module, _ in imports_of(file, top_level_only=True):
        heavy = {"sympy", "networkx", "jinja2", "rich"} | (set() if relative.startswith("templates/") else {"triton"})
        assert module.split(".")[0] not in heavy, f"{file} imports {module} at the top"


def test_import_flexmask_brings_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import flexmask; new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(new & {'sympy', 'networkx', 'jinja2', 'triton', 'rich', 'matplotlib'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "set()"


def test_functions_and_files_stay_small():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 400, f"{file} has outgrown its room"
        if room_of(file) == "templates":
            continue  # kernels are long functions
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{file}:{node.lineno} {node.name} is too long"
