"""Prefetching is `map`, in another thread."""

import threading

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


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_come_where_the_item_was_due(depth):
    def fail_at_three(x):
        if x == 3:
            raise OSError("three")
        return x

    results = []
    with pytest.raises(OSError, match="three"):
        for x in prefetch(fail_at_three, range(6), depth):
            results.append(x)
    assert results == [0, 1, 2]
