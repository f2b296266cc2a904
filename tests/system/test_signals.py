"""Signals: deferred to the end of a step, and workers that end with their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.system import signals

ROOT = Path(__file__).resolve().parents[2]


def test_first_signal_waits_for_the_step():
    with pytest.raises(signals.Interrupted) as stop, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM
        with pytest.raises(signals.Interrupted):
            signals.raise_if_pending()
    assert stop.value.signal == signal.SIGTERM and signals.pending() == 0
    with signals.deferred():
        signals.raise_if_pending()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(number):
    code = "import time\nfrom utils.system import signals\n"
    code += "with signals.deferred():\n    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(number)
    process.stderr.readline()  # an empty line, and the sentence that says what to expect
    assert process.stderr.readline().endswith(b"a second signal stops at once\n")
    process.send_signal(number)
    assert process.wait(10) == -number
    process.communicate()


def wait_for_ever(pipe) -> None:
    signals.init_worker()
    time.sleep(60)


def spawn_and_wait(pipe) -> None:
    multiprocessing.Process(target=wait_for_ever, args=(pipe,)).start()
    pipe.send("started")
    time.sleep(60)


def test_worker_ends_with_its_parent():
    receive, send = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.Process(target=spawn_and_wait, args=(send,))
    parent.start()
    send.close()
    receive.recv()
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    assert receive.poll(10)  # the last process that held the other end is gone
    with pytest.raises(EOFError):
        receive.recv()
