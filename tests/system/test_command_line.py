"""What all scripts share: quick help, one line for known errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.system import UserError
from utils.system.command_line import Parser, integer, number, run

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / f"{name}.py" for name in ("preprocess_ct", "train_adaptive", "eval", "perturb")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_has_quick_help_with_every_option_in_a_group_and_one_line_errors(script, tmp_path):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print({'torch', 'pandas', 'scipy', 'matplotlib'} & sys.modules.keys())"
    )
    words = [sys.executable, "-c", code, script, "--help"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.endswith("set()\n")
    usage, ungrouped, *groups = re.split(r"\n\n(?=\S.*:\n)", shown)
    assert re.findall(r"^  (-\S+)", ungrouped, re.M) == ["-h,", "--version"]
    grouped = re.findall(r"^  (--[a-z-]+)", "\n".join(groups), re.M)
    assert {*grouped, "--version"} == set(re.findall(r"--(?!no-)[a-z-]+", usage))
    # And from another folder, an error is one line.
    words = [sys.executable, script, "--no-such-option"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_version_names_the_commit(capsys):
    with pytest.raises(SystemExit) as stop:
        Parser().parse_args(["--version"])
    assert stop.value.code == 0
    assert re.match(r"commit (unknown|[0-9a-f]{40}\S*), torch [\d.]+", capsys.readouterr().out)


def fail_with(error):
    raise error if isinstance(error, BaseException) else UserError(f"{error}: no")


@pytest.fixture
def parser():
    parser = Parser()
    parser.add_argument("--window")
    parser.add_argument("--flag", action="store_true", default=None)
    parser.add_argument("--file", type=fail_with)
    parser.add_argument("--epochs", type=integer(1), default=20, help="of training")
    parser.add_argument("--lr", type=number(1e-12, 1), default=1e-4)
    parser.add_argument("--seed", type=integer(0), default=0, help="of boxes")
    return parser


def test_options_given_by_default_and_beginning_with_a_minus(parser):
    options = parser.parse_args(["--window", "-360,440", "--flag"])
    assert options.window == "-360,440" and options.flag and options.epochs == 20
    assert parser.given(["--epochs", "20"]) == {"epochs": 20} and parser.given([]) == {}
    shown = parser.format_help()
    assert "of training (default 20)" in shown and "of boxes (default 0)" in shown
    assert shown.count("(default") == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--window", "--flag"], "--window: expected one argument (see --help)"),
        (["--epochs", "1.5"], "--epochs: expected a whole number, 1 or more, got 1.5 (see --help)"),
        (["--lr", "nan"], "--lr: expected a number, 1e-12 to 1, got nan (see --help)"),
        (["--file", "a\nb"], "a b: no"),
    ],
)
def test_errors_in_options_are_one_line_without_run(parser, capsys, words, line):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb"), 2, "error: a b"),
        (FileNotFoundError(2, "No such file", "x.nii"), 2, "error: x.nii: No such file"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_known_errors_are_one_line_and_a_status(capsys, error, status, line):
    with pytest.raises(SystemExit) as stop:
        run(fail_with, error)
    assert stop.value.code == status and capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("of a bug")])
def test_a_bug_is_not_disguised_as_bad_input(error):
    with pytest.raises(type(error)):
        run(fail_with, error)


def test_reader_that_leaves_gets_no_traceback():
    code = "from utils.system.command_line import run\n"
    code += "run(lambda: [print('line', i) for i in range(100000)])"
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    done.stdout.readline()
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 1
