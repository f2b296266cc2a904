"""Command-line parsers, and known errors as one line and exit status 2."""

import argparse
import contextlib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from utils.system import distributed, signals
from utils.system.errors import UserError


class _Help(argparse.HelpFormatter):
    """Appends the default to the help of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, []):
            return text
        return text if "(default" in text else f"{text} (default %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults; its errors are one line, with exit status 2.

    It accepts `--window -360,440`, which argparse takes for two options.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_args(self, args=None, namespace=None):
        with one_line_errors():  # an option's type may raise UserError
            return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            follows_option = joined and re.fullmatch(r"--[a-z][a-z-]*", joined[-1])
            if follows_option and re.match(r"-[\d.]", arg):
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        return super().parse_known_args(joined, namespace)

    def given(self, argv: list[str] | None) -> dict[str, object]:
        """The options named on the command line, by destination; defaults are left out."""
        # argparse sets no default for a name that the namespace has already.
        blank = argparse.Namespace(**{action.dest: None for action in self._actions})
        return {k: v for k, v in vars(self.parse_args(argv, blank)).items() if v is not None}

    def error(self, message: str) -> NoReturn:
        fail(f"{message.removeprefix('argument ')} (see --help)")


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An option type: a whole number within bounds."""
    return _within(int, least, most)


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An option type: a number within bounds, which NaN never is."""
    return _within(float, least, most)


def _within(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    bounds = f"{least:g} or more" if most in (math.inf, 2**63 - 1) else f"{least:g} to {most:g}"
    noun = "a whole number" if kind is int else "a number"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {noun}, {bounds}, got {text}")
        return value

    return convert


def shell_command(*words: str | os.PathLike) -> str:
    """A command to copy into a shell."""
    return shlex.join(map(os.fspath, words))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block, or a function that this decorates, errors of the user exit with 2.

    These are UserErrors, files that cannot be opened, and too little memory.
    """
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
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # logs keep up
    signals.handle_sigterm()
    try:
        with one_line_errors():
            main(*args)
    except BrokenPipeError:  # the reader left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):
            print(str(stop) or "interrupted", file=sys.stderr, flush=True)
        distributed.exit_process(128 + getattr(stop, "signal", signal.SIGINT))
    distributed.exit_process(0)


def fail(message: str) -> NoReturn:
    """Print a one-line error and exit with 2."""
    line = " ".join(message.splitlines())
    # File names in it may contain control characters.
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print("error: " + "".join(shown), file=sys.stderr)
    distributed.exit_process(2)
