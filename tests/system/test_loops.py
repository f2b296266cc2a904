"""Progress on a terminal and in a log file; prefetching is `map`, in other threads."""

import io
import threading

import pytest

from utils.system.loops import prefetch, progress_bar


def replace_stderr(monkeypatch, terminal: bool) -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    return stream


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds, [now], that tqdm reads."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_log_file_gets_a_plain_line_every_half_minute(monkeypatch, clock):
    stderr = replace_stderr(monkeypatch, terminal=False)
    for clock[0] in progress_bar(range(1, 91), desc="encoding", unit="slice"):
        pass
    # The time left is that of what this run did.
    with progress_bar(desc="epoch 2", unit="step", total=1000, initial=500) as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        for seconds in (29, 31):
            clock[0] += seconds
            bar.update(50)
    assert stderr.getvalue().splitlines() == [
        "encoding: 30 of 90 slices, 01:00 left",
        "encoding: 60 of 90 slices, 00:30 left",
        "encoding: 90 of 90 slices, 00:00 left",
        "epoch 2: 600 of 1000 steps, 04:00 left, loss=0.5",
    ]


def test_terminal_gets_a_bar_that_vanishes(monkeypatch):
    stderr = replace_stderr(monkeypatch, terminal=True)
    assert list(progress_bar("abc", desc="encoding", unit="slice")) == list("abc")
    shown = stderr.getvalue()
    assert "encoding:   0%" in shown and "\n" not in shown
    assert not shown.rpartition("\r")[2] and not shown.split("\r")[-2].strip()
    monkeypatch.setenv("RANK", "1")  # which shows none
    assert list(progress_bar("abc", desc="encoding", unit="slice")) == list("abc")
    assert stderr.getvalue() == shown


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
