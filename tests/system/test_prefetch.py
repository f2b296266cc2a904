"""Prefetching is `map`, in other threads."""

import threading
import time

import pytest

from utils.system.prefetch import prefetch


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_is_map(depth):
    threads = set()

    def square(x):
        threads.add(threading.get_ident())
        return x * x

    assert list(prefetch(square, range(7), depth)) == [x * x for x in range(7)]
    assert (threads == {threading.get_ident()}) == (depth == 0)


def test_several_threads_work_at_once_and_results_come_in_order():
    together = threading.Barrier(3, timeout=10)  # breaks unless three items are in work at once
    finished = []

    def late_if_early(x):
        together.wait()
        if x % 3 == 0:  # the first of the three ends last
            while not {x + 1, x + 2} <= set(finished):
                time.sleep(0.001)
        finished.append(x)
        return x

    assert list(prefetch(late_if_early, range(6), depth=4, threads=3)) == list(range(6))
    assert finished != list(range(6))


def test_nothing_is_begun_after_the_end():
    begun = []
    results = prefetch(begun.append, range(100), depth=4, threads=2)
    next(results)
    results.close()
    assert len(begun) <= 5


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (2, 1), (4, 3)])
def test_errors_come_where_the_item_was_due(depth, threads):
    def fail_at_three(x):
        if x == 3:
            raise OSError("three")
        return x

    results = []
    with pytest.raises(OSError, match="three"):
        for x in prefetch(fail_at_three, range(6), depth, threads):
            results.append(x)
    assert results == [0, 1, 2]
