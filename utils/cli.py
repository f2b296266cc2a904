"""Command lines: known errors become one line and exit status 2."""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from utils import interrupts, ranks


class UserError(Exception):
    """Something that the user can mend. The message names the file, what is wrong, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--window -360,440` and reports errors in one line."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # argparse takes "-360,440" for an option; written as "--window=-360,440" it does not.
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            follows_option = joined and re.fullmatch(r"--[a-z][a-z-]*", joined[-1])
            if follows_option and re.match(r"-[\d.]", arg):
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def command_line(*words: str | os.PathLike) -> str:
    """A command to type, quoted for this system's own shell."""
    texts = list(map(os.fspath, words))
    if sys.platform == "win32":  # where single quotes quote nothing
        import subprocess

        return subprocess.list2cmdline(texts)
    return shlex.join(texts)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C, 143
    for SIGTERM."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # logs show where it is
    sys.stderr.reconfigure(errors="backslashreplace")
    interrupts.end_on_sigterm()
    try:
        main()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader left, as `head` does: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
    except MemoryError:
        fail("out of memory; close other programs, or use a machine with more")
    except KeyboardInterrupt as stop:
        with contextlib.suppress(OSError):
            print(str(stop) or "interrupted", file=sys.stderr, flush=True)
        ranks.leave(128 + getattr(stop, "signal", signal.SIGINT))
    ranks.leave(0)


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong, and exit with 2."""
    line = " ".join(message.splitlines())  # a name in it may hold anything, to move the cursor too
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print("error: " + "".join(shown), file=sys.stderr)
    ranks.leave(2)
