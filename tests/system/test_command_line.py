"""What all scripts share: quick help, one line for known errors."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.system.command_line import Parser, run, shell_command
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("preprocess_ct", "train_adaptive", "eval", "perturb")
MAINS = (*SCRIPTS[:3], "utils.preview.command")  # perturb.py's command line


@pytest.mark.parametrize("main", MAINS)
def test_help_imports_nothing_slow(main):
    code = (
        f"import sys, {main} as script\n"
        "try: script.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "usage:" in shown and shown.endswith("[]\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_another_folder_and_exit_with_2(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), "--no-such-option"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_values_that_begin_with_a_minus():
    parser = Parser()
    parser.add_argument("--window")
    parser.add_argument("--flag", action="store_true")
    assert parser.parse_args(["--window", "-360,440", "--flag"]).window == "-360,440"
    assert parser.parse_args(["--window=-1,2"]).window == "-1,2"


def refuse(text):
    raise UserError(f"{text}: no")


def test_errors_in_options_are_one_line_without_run(capsys):
    """Scripts parse their options first, outside of `run`."""
    parser = Parser()
    parser.add_argument("--window")
    parser.add_argument("--file", type=refuse)
    for words, line in (
        (["--window", "--file"], "--window: expected one argument (see --help)"),
        (["--file", "a\nb"], "a b: no"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


def test_options_that_were_given():
    parser = Parser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    assert parser.given(["--epochs", "20"]) == {"epochs": 20} and parser.given([]) == {}


def test_run_passes_arguments_on(capsys):
    with pytest.raises(SystemExit) as stop:
        run(print, "a", 1)
    assert stop.value.code == 0 and capsys.readouterr().out == "a 1\n"


@pytest.mark.parametrize("main", MAINS)
def test_help_has_every_option_in_a_group(main, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(main).main(["--help"])
    usage, ungrouped, *groups = re.split(r"\n\n(?=\S.*:\n)", capsys.readouterr().out)
    assert re.findall(r"^  (-\S+)", ungrouped, re.M) == ["-h,"]
    grouped = re.findall(r"^  (--[a-z-]+)", "\n".join(groups), re.M)
    assert set(grouped) == set(re.findall(r"--[a-z-]+", usage)) - {
        f"--no-{name}" for name in ("sweep", "figures")
    }


def test_commands_are_quoted_for_the_shell():
    assert shell_command("python", Path("my runs")) == "python 'my runs'"


def test_exit_status_of_an_interruption(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(interrupted)
    assert stop.value.code == 130


def test_reader_that_leaves_gets_no_traceback():
    code = "from utils.system.command_line import run\n"
    code += "run(lambda: [print('line', i) for i in range(100000)])"
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    done.stdout.readline()
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 1


def test_a_bug_is_not_disguised_as_bad_input():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
