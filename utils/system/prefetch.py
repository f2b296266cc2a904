"""Work done ahead of its use, in another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A, B = TypeVar("A"), TypeVar("B")


def prefetch(function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """`map` that works up to `depth` results ahead in another thread, while the caller computes.

    With 0 it is `map`: on a CPU, where decoder and thread would compete for the cores.
    """
    if not depth:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[B]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
