"""No table in the package lists analyses, edits or key selectors by name: they declare themselves."""

import ast
from pathlib import Path

import pytest

from interp.analyses import registry

ROOT = Path(__file__).resolve().parents[1] / "interp"
# the jobs of planted models have names of their own, some of which are those of analyses
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.name != "planted.py"]
MAX_NAMES = 2
"""A declaration may name the analyses whose results it needs."""


def names_in_literals(tree: ast.AST, known: set[str]) -> list[tuple[int, list[str]]]:
    """(line, names) of every tuple, list, set or dict that holds more names of entries than a declaration needs."""
    exports = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
    }
    found = []
    for node in ast.walk(tree):
        # figures and sections have the names of what they show
        if id(node) in exports:
            continue
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        named = [part.value for part in parts if isinstance(part, ast.Constant) and part.value in known]
        if len(named) > MAX_NAMES:
            found.append((getattr(node, "lineno", 0), named))
    return found


def comparisons(tree: ast.AST, known: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every comparison with the name of an entry, which is a branch for one method."""
    return [
        (node.lineno, part.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for part in (node.left, *node.comparators)
        if isinstance(part, ast.Constant) and part.value in known
    ]


def known() -> set[str]:
    """Names of all entries."""
    return {name for kind in registry.KINDS for name in registry.names(kind)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_literal_lists_entries(file):
    assert names_in_literals(ast.parse(file.read_text(encoding="utf-8")), known()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_branch_asks_for_one_entry(file):
    assert comparisons(ast.parse(file.read_text(encoding="utf-8")), known()) == []


def test_a_table_and_a_branch_are_found():
    table = ast.parse('ORDER = ("retrieval", "induction", "sinks")\nCOLOURS = {"retrieval": 1, "sinks": 2, "qada": 3}')
    assert [line for line, _ in names_in_literals(table, known())] == [1, 2]
    assert comparisons(ast.parse('if name == "retrieval": pass'), known()) == [(1, "retrieval")]
