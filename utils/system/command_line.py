"""Command-line parsers, and known errors as one line and exit status 2."""

import argparse
import contextlib
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from utils.system import UserError, signals


class _Help(argparse.HelpFormatter):
    """Appends the default to the help of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is True:
            return f"{text} (default on)"
        left_out = default is None or default is False or default in (argparse.SUPPRESS, [])
        return text if left_out or "(default" in text else f"{text} (default %(default)s)"


class _Version(argparse.Action):
    def __call__(self, parser, *_) -> NoReturn:
        python, commit = platform.python_version(), git_commit() or "unknown"
        print(f"commit {commit}, torch {version('torch')}, Python {python}")
        parser.exit()


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if it was edited; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        words = [*command, "--exclude=*", "--dirty=+changes"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults; its errors are one line, with exit status 2."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
        self._negative_number_matcher = re.compile(r"-[.\d]")  # so that --window -360,440 has one

    def parse_args(self, args=None, namespace=None):
        with _one_line_errors():  # an option's type may raise UserError
            return super().parse_args(args, namespace)

    def given(self, argv: list[str] | None) -> dict[str, object]:
        """The options named on the command line, by destination; defaults are left out."""
        # argparse sets no default for a name that the namespace has already.
        blank = argparse.Namespace(**{action.dest: None for action in self._actions})
        return {k: v for k, v in vars(self.parse_args(argv, blank)).items() if v is not None}

    def error(self, message: str) -> NoReturn:
        fail(f"{message.removeprefix('argument ')} (see --help)")


def integer(minimum: int) -> Callable[[str], int]:
    """An option type: a whole number from `minimum`."""
    return partial(_parse_number, int, minimum, math.inf)


def number(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """An option type: a number within bounds, which NaN never is."""
    return partial(_parse_number, float, minimum, maximum)


def _parse_number(kind: type, minimum: float, maximum: float, text: str) -> float:
    with contextlib.suppress(ValueError):
        if minimum <= (value := kind(text)) <= maximum:
            return value
    noun = "a whole number" if kind is int else "a number"
    bounds = "or more" if maximum == math.inf else f"to {maximum:g}"
    raise argparse.ArgumentTypeError(f"expected {noun}, {minimum:g} {bounds}, got {text}")


def shell_command(*words: str | os.PathLike) -> str:
    """A command to copy into a shell."""
    return shlex.join(map(os.fspath, words))


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Exit with status 2 and one line on a UserError, an unreadable file or too little memory."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except MemoryError:
        fail("out of memory; close other programs, or use a machine with more")


def run(main: Callable[..., None], *args: object) -> NoReturn:
    """Run `main(*args)` of a script and exit with 0.

    The exit status is 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM.
    """
    sys.stdout.reconfigure(line_buffering=True)  # logs keep up
    signal.signal(signal.SIGTERM, signals.interrupt)
    try:
        with _one_line_errors():
            main(*args)
    except BrokenPipeError:  # the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):
            print(str(stop) or "interrupted", file=sys.stderr, flush=True)
        signals.exit_process(128 + getattr(stop, "signal", signal.SIGINT))
    signals.exit_process(0)


def fail(message: str) -> NoReturn:
    """Print a one-line error and exit with 2."""
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    signals.exit_process(2)
