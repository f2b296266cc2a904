"""Long loops: progress bars, and prefetching in other threads."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

A, B = TypeVar("A"), TypeVar("B")
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

    A line is "encoding: 120 of 640 slices, 04:10 left"; `unit` is singular. Ranks other than 0
    print nothing. Without `items`, call `update`.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    shown = {"desc": desc, "unit": unit, "total": total, "initial": initial, "leave": False}
    return kind(items, **shown, disable=int(os.environ.get("RANK", 0)) > 0)


def prefetch(
    function: Callable[[A], B], items: Iterable[A], depth: int, threads: int = 1
) -> Iterator[B]:
    """`map` that computes up to `depth` results ahead in other threads; depth 0 is plain `map`."""
    if not depth:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
