"""Results computed ahead of their use, in other threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A, B = TypeVar("A"), TypeVar("B")


def prefetch(
    function: Callable[[A], B], items: Iterable[A], depth: int, threads: int = 1
) -> Iterator[B]:
    """`map` that computes up to `depth` results ahead in other threads; they come in order.

    It hides reading behind the GPU's work. On a CPU, where the threads would compete with the
    network for cores, callers use depth 0, which is plain `map`.
    """
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
