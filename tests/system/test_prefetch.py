"""Prefetching is `map`, in other threads."""

import threading

import pytest

from utils.system.prefetch import prefetch


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (1, 1), (3, 2)])
def test_prefetch_is_map_up_to_an_error(depth, threads):
    workers = set()

    def square(x):
        workers.add(threading.get_ident())
        return x * x if x < 7 else 1 / 0

    results = prefetch(square, range(9), depth, threads)
    assert [next(results) for _ in range(7)] == [x * x for x in range(7)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert (workers == {threading.get_ident()}) == (depth == 0)


def test_several_threads_work_at_once_and_results_come_in_order():
    together = threading.Barrier(3, timeout=10)  # breaks unless three items are in work at once
    later = {x: threading.Event() for x in range(6)}

    def late_if_early(x):
        together.wait()
        if x % 3 == 0:  # the first of the three ends last
            assert later[x + 2].wait(10)
        later[x].set()
        return x

    assert list(prefetch(late_if_early, range(6), depth=4, threads=3)) == list(range(6))


def test_nothing_is_begun_after_the_end():
    begun = []
    results = prefetch(begun.append, range(100), depth=4, threads=2)
    next(results)
    results.close()
    assert len(begun) <= 5
