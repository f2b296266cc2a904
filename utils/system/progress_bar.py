"""Progress of long work: a bar on a terminal, and a line every now and then in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines where there is no terminal


class _Lines(tqdm):
    """tqdm that prints plain lines, the first one after LINE_SECONDS."""

    monitor_interval = 0  # no thread that watches the interval: every step looks at the clock

    def __init__(self, *args, **kwargs) -> None:
        line = "{desc}: {n} of {total} {unit}s, {remaining} left{postfix}"
        interval = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        super().__init__(*args, **kwargs, **interval, bar_format=line, smoothing=0)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg != "":  # which erases a bar
            print(self, file=self.fp, flush=True)


def progress_bar(
    items: Iterable | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
) -> tqdm:
    """A tqdm bar that vanishes at the end; without a terminal, a line every LINE_SECONDS.

    A line is "encoding: 120 of 640 slices, 04:10 left". Ranks other than 0 print nothing.

    Args:
        items: what to iterate over; without them, call `update`.
        desc: what is being done, such as "encoding".
        unit: what is counted, in the singular.
        total: how many there are, if `items` has no length.
        initial: how many an earlier run has done.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    shown = {"desc": desc, "unit": unit, "total": total, "initial": initial, "leave": False}
    return kind(items, **shown, disable=int(os.environ.get("RANK", 0)) > 0)
