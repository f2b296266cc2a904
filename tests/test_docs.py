"""The docs name what exists: docs/paper.md functions and constants, tests/README.md files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", PAPER)))
ITEMS = (
    *(f"({number})" for number in range(1, 15)),
    *("III.A, windows", "III.A, split"),
    *("III.B, epochs", "III.B, optimiser", "III.B, scheduler", "III.B, AMP"),
    *("Table I", "Table II", "Table III"),
    *(f"Fig. {number}" for number in range(2, 7)),
)


def names_in(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_name_exists(file, name):
    assert name in names_in(ROOT / file)


@pytest.mark.parametrize("item", ITEMS)
def test_item_of_the_paper_has_a_row_that_names_code(item):
    (row,) = [line for line in PAPER.splitlines() if line.startswith(f"| {item} |")]
    assert re.search(r"`[\w/]+\.py:\w+`", row)


def test_files_that_the_readme_of_the_tests_names_are_there():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == ["tests/helpers.py"]
