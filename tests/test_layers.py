"""What import-linter does not see: perturb.py, imports within functions, and private names."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("preprocess_ct.py", "train_adaptive.py", "eval.py")
# Not on every machine; the server needs Werkzeug.
OPTIONAL = {"tensorboard", "torch.utils.tensorboard", "resource", "utils.prediction.server"}
PUBLIC = {"_replace", "_fields", "_asdict", "_exit"}  # documented names of namedtuple and os
OURS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("utils/**/*.py"))
OURS += [*SCRIPTS, "perturb.py"]
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py"))


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that these statements import, dotted; of "from a import b", a."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module)
    return modules


def main_blocks(tree: ast.Module) -> list[ast.If]:
    tests = [(node, ast.unparse(node.test)) for node in tree.body if isinstance(node, ast.If)]
    return [node for node, test in tests if test == "__name__ == '__main__'"]


def test_perturb_imports_numpy_and_the_standard_library_alone():
    tree = parse("perturb.py")
    tops = {module.split(".")[0] for module in imports_of(tree.body)}
    assert tops - set(sys.stdlib_module_names) == {"numpy"}
    (script,) = main_blocks(tree)
    assert imports_of(ast.walk(tree)) - imports_of(tree.body) == imports_of(script.body)


@pytest.mark.parametrize("file", SCRIPTS)
def test_scripts_parse_their_options_before_what_is_slow_is_imported(file):
    tree = parse(file)
    parsing, running = main_blocks(tree)
    assert [ast.unparse(node) for node in parsing.body] == ["options = parse_options()"]
    assert ast.unparse(running.body[-1]) == "run(main, options)"
    before = imports_of(tree.body[: tree.body.index(parsing)]) - {"__future__"}
    assert len(before) == 1 and before.pop().endswith(".options"), before


@pytest.mark.parametrize("file", OURS)
def test_functions_import_only_what_is_optional(file):
    functions = [node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef)]
    assert imports_of(inner for node in functions for inner in ast.walk(node)) <= OPTIONAL


@pytest.mark.parametrize("file", OURS + TESTS)
def test_nobody_uses_private_names_of_others(file):
    """But for PyTorch's: its FakeTensorMode and its operations on lists have no public names."""
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("torch."):
            names |= {alias.name for alias in node.names} | set(node.module.split("."))
        elif isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) in ("self", "cls", "super()", "torch")
            names |= set() if own else {node.attr}
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    assert private <= PUBLIC
