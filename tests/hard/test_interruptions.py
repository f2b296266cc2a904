"""Processes that are killed, stopped or out of room: nothing that was finished is lost."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import preprocess_ct
import train_adaptive
from tests.helpers import assert_same, results
from utils.data.slices import Geometry, open_dataset
from utils.data.volumes import write_volume
from utils.model.checkpoints import read_checkpoint, save_checkpoint
from utils.system import files, signals
from utils.system.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KILLS = 24
EPOCHS = 3
PHASES = ("encode", "validate", "step", "write")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, signals and limits of POSIX")


class Forked:
    """Processes of tests/hard/forked.py, one after another.

    Attributes:
        status: how the last one ended; negative for a signal.
        said: what the last one printed.
        seconds: how long it took it to end after the last signal.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.hard.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a process group of its own, to find what it started
        )

    def run(
        self, script: str, *argv: object, at: tuple[str, int] | None = None, then: tuple = ()
    ) -> bool:
        """Run a script until it ends; returns whether `then` was done.

        `then` holds signals to send and seconds to wait when a phase begins for the n-th time;
        `at` is the phase and n.
        """
        begun, signalled, seen = self.log.stat().st_size, None, Counter()
        self.server.stdin.write(json.dumps([script, *map(str, argv)]) + "\n")
        self.server.stdin.flush()
        for line in self.server.stdout:
            kind, what = line.split()
            if kind == "pid":
                pid = int(what)
            elif kind == "exit":
                self.status = int(what)
                break
            else:
                seen[what] += 1
                if (what, seen[what]) == at:
                    for action in then:
                        if isinstance(action, signal.Signals):
                            os.kill(pid, action)
                        else:
                            time.sleep(action)
                    signalled = time.monotonic()
        if signalled:
            self.seconds = time.monotonic() - signalled
        self.said = self.log.read_text()[begun:]
        return signalled is not None

    def alone(self) -> bool:
        """Whether all processes that were started have ended, within a few seconds."""
        for _ in range(50):
            if self.group() == {self.server.pid}:
                return True
            time.sleep(0.1)
        return False

    def group(self) -> set[int]:
        """The processes of the server's group that run; where there is no /proc, the server."""
        found = {self.server.pid}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.server.pid and state != "Z":
                    found.add(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[Forked]:
    """Processes to end."""
    forked = Forked(tmp_path_factory.mktemp("forked") / "log.txt")
    yield forked
    forked.server.stdin.close()
    forked.server.wait()


@pytest.fixture
def fresh(toy_slices, tmp_path) -> Path:
    """The toy slices without embeddings."""
    shutil.copytree(toy_slices, tmp_path / "toy", ignore=shutil.ignore_patterns("embeddings"))
    return tmp_path / "toy"


@pytest.fixture(scope="module")
def data(toy_slices, tmp_path_factory) -> Path:
    """The toy slices, encoded when `whole` has run."""
    folder = tmp_path_factory.mktemp("encoded") / "toy"
    shutil.copytree(toy_slices, folder, ignore=shutil.ignore_patterns("embeddings"))
    return folder


@pytest.fixture(scope="module")
def whole(forked, data, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    work = tmp_path_factory.mktemp("whole")
    forked.run("train_adaptive", *arguments(data, work, "whole"))
    assert forked.status == 0, forked.said
    return work / "whole"


def arguments(data: Path, work: Path, name: str) -> list[str]:
    """Of a new run, or to go on with it."""
    start = ["--data", data, "--device", "cpu", "--epochs", EPOCHS]
    resume = (work / name / "config.json").exists()
    return [*map(str, ["--resume"] if resume else start), "--work-dir", str(work), "--run", name]


def assert_intact(folder: Path, data: Path) -> None:
    """Every file of a run that was killed is whole: read it."""
    for path in [*folder.glob("*.pth"), *folder.glob("*.json")]:
        files.read_json(path) if path.suffix == ".json" else read_checkpoint(path)
    open_dataset(data)


def preprocessing(volumes: Path, out: Path, *more: object) -> list[object]:
    """Arguments of preprocess_ct.py."""
    return ["--input", volumes, "--out", out, *more]


# --- Kill and resume -----------------------------------------------------------------------------
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(forked, whole, fresh, tmp_path, tally):
    chance = random.Random(0)
    kills: Counter[str] = Counter()
    runs = 0
    while sum(kills.values()) < KILLS or kills.keys() != set(PHASES):
        runs += 1
        shutil.rmtree(fresh / "embeddings", ignore_errors=True)
        forked.status, attempts = None, 0
        while forked.status != 0:
            attempts += 1
            # The first write is of config.json.
            phase = "encode" if attempts in (2, 3, 4) else chance.choice(PHASES[1:])
            phase = "write" if attempts == 1 else phase
            longest = {1: 0.001}.get(attempts, 0.9 if phase == "encode" else 0.2)
            then = (chance.uniform(0, longest), signal.SIGKILL)
            killed = forked.run(
                "train_adaptive",
                *arguments(fresh, tmp_path, f"killed-{runs}"),
                at=(phase, 1 if attempts == 1 else chance.randint(1, 2)),
                then=then,
            )
            assert forked.status in (0, -signal.SIGKILL), forked.said
            kills[phase] += killed and forked.status != 0
            assert_intact(tmp_path / f"killed-{runs}", fresh)
        assert_same(results(tmp_path / f"killed-{runs}"), results(whole))
        left = {path.name for path in (tmp_path / f"killed-{runs}").iterdir()}
        assert left == {path.name for path in whole.iterdir()}
    for phase, number in kills.items():
        tally(f"kills survived, in {phase}", number)


# --- Ctrl-C and SIGTERM --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "phase", "where"),
    [
        (signal.SIGINT, ("encode", 2), "stopped in encoding; what is encoded is kept"),
        (signal.SIGINT, ("step", 3), "stopped at epoch 1, step 3, and saved"),
        (signal.SIGTERM, ("step", 6), "stopped at epoch 2, step 2, and saved"),
        (signal.SIGTERM, ("validate", 4), "stopped at epoch 1, step 4, and saved"),
    ],
)
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(
    forked, whole, data, fresh, tmp_path, number, phase, where
):
    data = fresh if phase[0] == "encode" else data
    argv = arguments(data, tmp_path, "run")
    assert forked.run("train_adaptive", *argv, at=phase, then=(number,))
    assert forked.status == 128 + number
    command = f"python train_adaptive.py --work-dir {tmp_path} --run run --resume"
    assert forked.said.endswith(f"{where}; go on with: {command}\n"), forked.said
    assert "Traceback" not in forked.said
    assert forked.said.count("a second signal stops at once") == 1
    forked.run("train_adaptive", *arguments(data, tmp_path, "run"))
    assert_same(results(tmp_path / "run"), results(whole))


def test_second_signal_stops_at_once_and_loses_nothing(forked, whole, data, tmp_path):
    argv = arguments(data, tmp_path, "run")
    twice = (signal.SIGINT, 0.01, signal.SIGINT)
    assert forked.run("train_adaptive", *argv, at=("step", 3), then=twice)
    assert forked.status == -signal.SIGINT and forked.seconds < 1
    forked.run("train_adaptive", *arguments(data, tmp_path, "run"))
    assert_same(results(tmp_path / "run"), results(whole))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_stopped_preprocessing_leaves_no_data_set(
    forked, toy_volumes, tmp_path, number, status, workers
):
    argv = preprocessing(toy_volumes, tmp_path / "out", "--workers", workers)
    assert forked.run("preprocess_ct", *argv, at=("volume", 2), then=(number,))
    assert forked.status == status and "Traceback" not in forked.said, forked.said
    assert not (tmp_path / "out").exists()
    assert forked.alone()
    if number != signal.SIGKILL:
        assert forked.said.endswith("interrupted\n")
        assert {path.name for path in tmp_path.iterdir()} == {"ct"}
    forked.run("preprocess_ct", *argv)
    assert forked.status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "out"}
    assert len(open_dataset(tmp_path / "out").split("all")) == 8


def test_signal_after_the_last_look_is_not_forgotten(forked, whole, data, tmp_path):
    """At the end of the first policy; the second one is not trained then."""
    argv = ["--policy", "medsam,adaptive", *arguments(data, tmp_path, "run")]
    argv[argv.index("--epochs") + 1] = "1"
    assert forked.run("train_adaptive", *argv, at=("end", 1), then=(signal.SIGINT,))
    assert forked.status == 130 and "go on with: python train_adaptive.py" in forked.said
    assert (tmp_path / "run" / "medsam" / "log.csv").exists()
    assert not (tmp_path / "run" / "adaptive").exists()


def test_killed_before_its_first_file_a_run_can_be_started_again(forked, whole, data, tmp_path):
    argv = arguments(data, tmp_path, "run")
    (tmp_path / "run").mkdir()
    for left in (".config.json.tmp", ".lock"):
        (tmp_path / "run" / left).write_text("{")
    forked.run("train_adaptive", *argv)
    assert_same(results(tmp_path / "run"), results(whole))


def test_signal_is_answered_when_nobody_reads_the_output(monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    with pytest.raises(signals.Interrupted), signals.deferred():
        monkeypatch.setattr(os, "write", closed)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()
        assert signals.pending() == signal.SIGTERM
    assert signals.pending() == 0


# --- One process a run ---------------------------------------------------------------------------
def test_two_processes_do_not_train_one_run_or_write_one_data_set(
    fails, whole, data, toy_volumes, tmp_path
):
    argv = arguments(data, whole.parent, whole.name)
    with files.locked(whole / ".lock", "never"):
        assert "another process is training this run" in fails(train_adaptive.main, *argv)
    train_adaptive.main(argv)
    argv = preprocessing(toy_volumes, tmp_path / "out")
    with files.locked(tmp_path / ".out.lock", "never"):
        assert "another process is writing it" in fails(preprocess_ct, *argv)
    with files.locked(tmp_path / "report" / ".lock", "never"):
        argv = ["--data", data, "--models", "lite_medsam", "--out", tmp_path / "report"]
        assert "another eval.py is writing here" in fails(evaluation.main, *argv, "--device", "cpu")


# --- Full disks ----------------------------------------------------------------------------------
@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let no file of this process become larger than `size` bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_finds_no_room_keeps_the_old_file_and_tells_the_bytes(tmp_path):
    path = tmp_path / "file.bin"
    with files.atomic_write(path) as file:
        file.write(b"old")
    with at_most(4096), pytest.raises(UserError) as error, files.atomic_write(path) as file:
        file.write(bytes(10_000))
    assert f"{path}: cannot write: File too large; 5,904 bytes did not fit" in str(error.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_full_disk_as_the_system_reports_it(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a.pth: cannot write: No space left on device"):
        save_checkpoint(tmp_path / "a.pth", {"bytes": 0})
    assert not list(tmp_path.iterdir())


def test_training_out_of_room_keeps_what_it_has(fails, whole, data, tmp_path):
    # Enough for all but a checkpoint with AdamW's two moments.
    with at_most((whole / "decoder_best.pth").stat().st_size + 100_000):
        message = fails(train_adaptive.main, *arguments(data, tmp_path, "run"))
    assert "checkpoint_last.pth: cannot write: File too large; " in message
    assert (
        "bytes did not fit: free some space and run it again, a training run with --resume"
        in message
    )
    assert_intact(tmp_path / "run", data)
    assert not (tmp_path / "run" / ".checkpoint_last.pth.tmp").exists()


def test_last_checkpoint_survives_one_that_cannot_be_written(
    fails, whole, data, tmp_path, forked, monkeypatch
):
    """Written while it grows by a step, and then no room for another."""
    monkeypatch.setattr(train_adaptive, "SAVE_SECONDS", -1)
    saved = 0

    def full_later(path, content):
        nonlocal saved
        saved += 1
        with at_most(10**6) if saved > 2 else contextlib.nullcontext():
            save_checkpoint(path, content)

    monkeypatch.setattr("utils.training.progress.save_checkpoint", full_later)
    message = fails(train_adaptive.main, *arguments(data, tmp_path, "run"))
    assert "checkpoint_last.pth: cannot write: File too large; " in message
    assert read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["progress"]["step"] == 2
    forked.run("train_adaptive", *arguments(data, tmp_path, "run"))
    assert "going on at epoch 1, step 2" in forked.said and forked.status == 0


def test_cache_out_of_room_keeps_what_it_has(fails, forked, fresh, tmp_path, monkeypatch):
    """The disk is full at the third of six slices."""
    size = 2 * 256 * 64 * 64 + 128
    written = []

    def write(path, content):
        if len(written) == 2:
            with at_most(size - 1):
                return write_bytes(path, content)
        written.append(path)
        return write_bytes(path, content)

    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", write)
    message = fails(train_adaptive.main, *arguments(fresh, tmp_path, "run"))
    assert f"cannot write: File too large; {4 * size:,} bytes did not fit" in message
    forked.run("train_adaptive", *arguments(fresh, tmp_path, "run"))
    assert "encoding 4 slices" in forked.said and forked.status == 0, forked.said


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_out_of_room_leaves_nothing(fails, toy_volumes, tmp_path, workers):
    argv = preprocessing(toy_volumes, tmp_path / "out", "--workers", workers)
    with at_most(500_000):
        message = fails(preprocess_ct, *argv)
    assert ".npy: cannot write: File too large; 548,704 bytes did not fit" in message
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def test_prediction_out_of_room_is_not_left_half_written(tmp_path):
    labels = np.random.default_rng(0).integers(0, 255, (20, 64, 64)).astype(np.uint8)
    geometry = Geometry(labels.shape, (5.0, 1.0, 1.0), (0.0,) * 3, tuple(np.eye(3).ravel()), "RAS")
    with at_most(50_000), pytest.raises(UserError, match="a.nii.gz: cannot write"):
        write_volume(tmp_path / "a.nii.gz", labels, geometry)
    assert not list(tmp_path.iterdir())
