"""Ctrl-C and SIGTERM: at once where nothing is lost, else when what was begun is done and saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from utils.system import distributed

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked = 0  # the signal that came within `deferred`


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came. The message says what was saved, and how to go on.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signal = number


def handle_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: cleaning up, and without a traceback."""
    if _on_main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def init_worker() -> None:
    """In a worker process: Ctrl-C, which a terminal sends to all processes, is the parent's to
    answer, and a parent that is killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block the first signal is kept for `check`, and a second ends the process.

    Also for what must not be left at any point, such as a pool of processes.

    Raises:
        Interrupted: at the block's end, if a signal came after the last `check`.
    """
    global _asked
    if not _on_main_thread():
        yield
        return
    before = [signal.signal(number, _remember) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
        came, _asked = _asked, 0
    if came:  # after the last look
        raise Interrupted(came)


def pending() -> int:
    """The signal that came within `deferred`, or 0."""
    return _asked


def raise_if_pending() -> None:
    """Stop here if a signal came.

    Raises:
        Interrupted: one did.
    """
    if _asked:
        raise Interrupted(_asked)


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    # torchrun hands on the signal that a scheduler sends to it and to its processes alike: there a
    # second one is no second wish, and torchrun itself ends who takes longer than half a minute.
    if not distributed.under_torchrun():
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
    # Not by print: the signal may have come in the middle of one. Nobody may be there to read it:
    # the same Ctrl-C ends `tee`.
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping when this step is done; a second time stops at once\n")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
