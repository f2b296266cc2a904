"""Results computed ahead of their use, in another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A, B = TypeVar("A"), TypeVar("B")


def prefetch(function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """`map` that computes up to `depth` results ahead in another thread.

    It hides reading behind the GPU's work. On a CPU, where the thread would compete with the
    network for cores, callers use depth 0, which is plain `map`.
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
