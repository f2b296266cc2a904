"""A bar on a terminal, and plain lines in a log file."""

import io

import pytest

from utils.system.progress_bar import _duration, progress_bar


class Stream(io.StringIO):
    """A stderr that is a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock in seconds, [now], that tqdm reads."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_log_file_gets_a_plain_line_every_half_minute(monkeypatch, clock):
    stderr = Stream(terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    for clock[0] in progress_bar(range(1, 91), desc="encoding", unit="slice", total=90):
        pass
    assert stderr.getvalue().splitlines() == [
        "encoding: 30 of 90 slices, 60 s left",
        "encoding: 60 of 90 slices, 30 s left",
        "encoding: 90 of 90 slices, 0 s left",
    ]


def test_time_left_is_of_what_this_run_did(monkeypatch, clock):
    stderr = Stream(terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar(desc="epoch 2", unit="step", total=1000, initial=500) as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        clock[0] = 29.0
        bar.update(50)
        assert not stderr.getvalue()
        clock[0] = 60.0
        bar.update(50)
    with progress_bar(desc="reading", unit="file") as bar:
        clock[0] += 31
        bar.update()
    assert stderr.getvalue().splitlines() == [
        "epoch 2: 600 of 1000 steps, 4 min left, loss=0.5",
        "reading: 1 file",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (240, "4 min"), (7200, "2.0 h")]
)
def test_durations_are_in_the_unit_of_a_person(seconds, text):
    assert _duration(seconds) == text


def test_terminal_gets_a_bar_that_vanishes(monkeypatch):
    stderr = Stream(terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(progress_bar("abc", desc="encoding", unit="slice")) == list("abc")
    shown = stderr.getvalue()
    assert "encoding:   0%" in shown and "\n" not in shown
    assert not shown.rpartition("\r")[2] and not shown.split("\r")[-2].strip()


@pytest.mark.parametrize("terminal", [True, False])
def test_first_process_alone_shows_progress(monkeypatch, clock, terminal):
    stderr = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("utils.system.distributed.rank", lambda: 1)
    for clock[0] in progress_bar([40.0, 80.0], desc="encoding", unit="slice"):
        pass
    assert not stderr.getvalue()
