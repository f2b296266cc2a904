"""The docs name what exists: functions, files, sections and options; and they stay short."""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", PAPER)))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "preprocess_ct.py": ROOT / "utils" / "data" / "options.py",
    "train_adaptive.py": ROOT / "utils" / "training" / "options.py",
    "eval.py": ROOT / "utils" / "evaluation" / "options.py",
    "perturb.py": ROOT / "utils" / "preview" / "options.py",
}
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


def anchors(page: Path) -> set[str]:
    """The sections of a page as GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)  # code
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not section or section in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_exist(page):
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        if not re.match(r"    .*python [\w.]+\.py ", line):
            continue
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word in PARSERS), None)
        if script is None or "--validate-on" in words:  # of an earlier version, as its page says
            continue
        known = set(re.findall(r'"(--[a-z-]+)"', PARSERS[script].read_text(encoding="utf-8")))
        given = {word for word in words[words.index(script) :] if word.startswith("--")}
        assert {re.sub("^--no-", "--", word) for word in given} <= known | {"--help"}, line
        if script == "preprocess_ct.py" and "--images" in given:
            assert "--window" in given, line


def test_pages_are_short():
    sizes = {page.name: len(page.read_bytes()) for page in PAGES}
    assert sizes.pop("README.md") <= 9 * 1024
    assert sizes["results.md"] <= 12 * 1024
    assert not {name: size for name, size in sizes.items() if size > 16 * 1024}
