"""Command lines: known errors become one line and exit status 2."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn


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


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0, 2 for a UserError (one line on stderr), 130 for Ctrl-C."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # logs show where it is
    sys.stderr.reconfigure(errors="backslashreplace")
    from utils import ranks

    try:
        main()
        ranks.finish()
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader left, as `head` does: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
