"""Ctrl-C and SIGTERM: finish the step, save, say how to go on; a second signal stops at once.

Schedulers end jobs with SIGTERM, and users end them with Ctrl-C; neither should cost an epoch.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received = 0  # the signal that arrived within `deferred`, or 0


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def exit_process(status: int) -> NoReturn:
    """End this process, as the last thing it does."""
    if not under_torchrun():
        sys.exit(status)
    # gloo's threads may still hold tensors; releasing them while the interpreter is torn down
    # aborts the process, and torchrun reports finished work as failed.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, by its number; the message says what was saved and how to go on."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signal = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler, with which SIGTERM cleans up as Ctrl-C does."""
    raise Interrupted(number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block, keep the first signal for `pending`; a second one ends the process.

    Raises:
        Interrupted: at the end of the block, if a signal arrived.
    """
    global _received
    handlers = [signal.signal(number, _defer) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        received, _received = _received, 0
    if received:
        raise Interrupted(received)


def _defer(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    if not under_torchrun():  # which forwards signals that its processes got as well
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
    # os.write, as the signal may interrupt a print; the reader may have gone, as `tee` on Ctrl-C.
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")


def pending() -> int:
    """The signal that arrived within `deferred`, or 0."""
    return _received


def raise_if_pending() -> None:
    """Raise Interrupted if a signal arrived within `deferred`."""
    if _received:
        raise Interrupted(_received)


def init_worker() -> None:
    """Set up a worker process: it ignores Ctrl-C, which its parent handles, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
