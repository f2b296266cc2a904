"""Progress of long work: a bar on a terminal, and lines every now and then in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

from utils.system.wording import plural

LINE_SECONDS = 30  # between two lines where there is no terminal


def progress_bar(
    items: Iterable | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
) -> tqdm:
    """A tqdm bar on a terminal, which vanishes at the end; elsewhere a line every LINE_SECONDS.

    A line is "encoding: 120 of 640 slices, 4 min left". Ranks other than 0 print nothing.

    Args:
        items: what to iterate over; without them, call `update`.
        desc: what is being done, such as "encoding".
        unit: what is counted, in the singular.
        total: how many there are, if `items` has no length.
        initial: how many were done before, by an earlier run.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(
        items,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        leave=False,
        disable=int(os.environ.get("RANK", 0)) > 0,
    )


class _Lines(tqdm):
    """tqdm that prints plain lines, the first one after LINE_SECONDS."""

    monitor_interval = 0  # no thread that watches the interval: every step looks at the clock

    def __init__(self, *args, **kwargs) -> None:
        interval = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        super().__init__(*args, **kwargs, **interval)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line; `msg` is "" where a bar would be erased."""
        if msg != "":
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def __str__(self) -> str:
        done, elapsed = self.n - self.initial, self.format_dict["elapsed"]
        text = f"{self.desc}: {self.n} of " if self.total else f"{self.desc}: "
        text += plural(self.total or self.n, self.unit)
        if self.total and done:
            text += f", {_duration(elapsed / done * (self.total - self.n))} left"
        return f"{text}, {self.postfix}" if self.postfix else text


def _duration(seconds: float) -> str:
    """A time in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
