"""Processes that are killed, stopped or out of room: nothing that was finished is lost."""

import contextlib
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

import pytest

import eval as evaluation
import preprocess_ct
import train_adaptive
from tests.helpers import assert_same, call, preprocessing, results
from utils.data.slices import open_dataset
from utils.model.checkpoints import read_checkpoint
from utils.system import files

ROOT = Path(__file__).resolve().parents[2]
KILLS = 24
EPOCHS = 3
PHASES = ("encode", "validate", "step", "write")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, signals and limits of POSIX")


class Forked:
    """Processes of tests/hard/forked.py; how the last one ended, what it said, in what time."""

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
        )

    def run(
        self, script: str, *words: object, at: tuple[str, int] | None = None, then: tuple = ()
    ) -> bool:
        """Run a script, do `then` when a phase begins for the n-th time; returns whether it did."""
        begun, signalled, seen = self.log.stat().st_size, None, Counter()
        self.server.stdin.write(json.dumps([script, *map(str, words)]) + "\n")
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


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[Forked]:
    forked = Forked(tmp_path_factory.mktemp("forked") / "log.txt")
    yield forked
    forked.server.stdin.close()
    forked.server.wait()


@pytest.fixture(scope="module")
def whole(forked, toy_slices, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("whole")
    forked.run("train_adaptive", *training(toy_slices, work, "whole"))
    assert forked.status == 0, forked.said
    return work / "whole"


def training(data: Path, work: Path, name: str) -> list[str]:
    start = ["--data", data, "--device", "cpu", "--epochs", EPOCHS]
    resume = (work / name / "config.json").exists()
    return [*map(str, ["--resume"] if resume else start), "--work-dir", str(work), "--run", name]


def assert_intact(folder: Path) -> None:
    """Every file of a run that was killed is whole: read it."""
    for path in [*folder.glob("*.pth"), *folder.glob("*.json")]:
        files.read_json(path) if path.suffix == ".json" else read_checkpoint(path)


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(forked, whole, fresh_slices, tmp_path):
    chance = random.Random(0)
    kills: Counter[str] = Counter()
    runs = 0
    while sum(kills.values()) < KILLS or kills.keys() != set(PHASES):
        runs += 1
        run = tmp_path / f"killed-{runs}"
        shutil.rmtree(fresh_slices / "embeddings", ignore_errors=True)
        forked.status, attempts = None, 0
        while forked.status != 0:
            attempts += 1
            # The first write is of config.json.
            phase = "encode" if attempts in (2, 3, 4) else chance.choice(PHASES[1:])
            phase = "write" if attempts == 1 else phase
            longest = {1: 0.001}.get(attempts, 0.9 if phase == "encode" else 0.2)
            killed = forked.run(
                "train_adaptive",
                *training(fresh_slices, tmp_path, run.name),
                at=(phase, 1 if attempts == 1 else chance.randint(1, 2)),
                then=(chance.uniform(0, longest), signal.SIGKILL),
            )
            assert forked.status in (0, -signal.SIGKILL), forked.said
            kills[phase] += killed and forked.status != 0
            assert_intact(run)
        assert_same(results(run), results(whole))
        assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    print(f"kills survived: {dict(kills)}")


@pytest.mark.parametrize(
    ("number", "phase", "message"),
    [
        (signal.SIGINT, ("encode", 2), "interrupted"),
        (signal.SIGTERM, ("step", 6), "stopped at epoch 2, step 2, and saved"),
        (signal.SIGINT, ("validate", 2), "stopped at epoch 1, step 4, and saved"),
    ],
)
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(
    forked, whole, toy_slices, fresh_slices, tmp_path, number, phase, message
):
    data = fresh_slices if phase[0] == "encode" else toy_slices
    words = training(data, tmp_path, "run")
    assert forked.run("train_adaptive", *words, at=phase, then=(number,))
    assert forked.status == 128 + number and "Traceback" not in forked.said
    command = f"python train_adaptive.py --work-dir {tmp_path} --run run --resume"
    assert forked.said.endswith(f"{message}; go on with: {command}\n"), forked.said
    assert forked.said.count("a second signal stops at once") == 1
    forked.run("train_adaptive", *training(data, tmp_path, "run"))
    assert_same(results(tmp_path / "run"), results(whole))


def test_second_signal_stops_at_once_and_loses_nothing(forked, whole, toy_slices, tmp_path):
    words = training(toy_slices, tmp_path, "run")
    twice = (signal.SIGINT, 0.01, signal.SIGINT)
    assert forked.run("train_adaptive", *words, at=("step", 3), then=twice)
    assert forked.status == -signal.SIGINT and forked.seconds < 1
    forked.run("train_adaptive", *training(toy_slices, tmp_path, "run"))
    assert_same(results(tmp_path / "run"), results(whole))


def test_signal_after_the_last_look_is_not_forgotten(forked, whole, toy_slices, tmp_path):
    """At the end of the first policy; the second one is not trained then."""
    words = ["--policy", "medsam,adaptive", *training(toy_slices, tmp_path, "run")]
    words[words.index("--epochs") + 1] = "1"
    assert forked.run("train_adaptive", *words, at=("log", 3), then=(signal.SIGINT,))
    assert forked.status == 130 and "go on with: python train_adaptive.py" in forked.said
    assert (tmp_path / "run" / "medsam" / "log.csv").exists()
    assert not (tmp_path / "run" / "adaptive").exists()


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2), (signal.SIGKILL, -9, 2)],
)
def test_stopped_preprocessing_leaves_no_data_set(
    forked, toy_volumes, tmp_path, number, status, workers
):
    words = preprocessing(toy_volumes, tmp_path / "out", "--workers", workers)
    assert forked.run("preprocess_ct", *words, at=("case", 2), then=(number,))
    assert forked.status == status and "Traceback" not in forked.said, forked.said
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert forked.said.endswith("interrupted\n")
        assert {path.name for path in tmp_path.iterdir()} == {"ct"}
    forked.run("preprocess_ct", *words)
    assert forked.status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "out"}
    assert len(open_dataset(tmp_path / "out").split("all")) == 8


def test_two_processes_do_not_write_one_run_data_set_or_report(
    fails, whole, toy_slices, toy_volumes, tmp_path
):
    words = training(toy_slices, whole.parent, whole.name)
    with files.locked(whole / ".lock", "never"):
        assert "another process is training this run" in fails(train_adaptive, *words)
    call(train_adaptive, *words)
    report = ("--data", toy_slices, "--models", "lite_medsam", "--device", "cpu")
    for script, words in ((preprocess_ct, ("--input", toy_volumes)), (evaluation, report)):
        with files.locked(tmp_path / ".out.lock", "never"):
            message = fails(script, *words, "--out", tmp_path / "out")
        assert "another process is writing it" in message


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


def test_training_out_of_room_keeps_what_it_has(fails, forked, whole, fresh_slices, tmp_path):
    words = (fresh_slices, tmp_path, "run")
    for room, message in (
        (10**6, "cannot write: File too large; name another folder with --cache-dir"),
        # Enough for all but a checkpoint with AdamW's two moments.
        ((whole / "decoder_best.pth").stat().st_size + 10**5, "checkpoint_last.pth: cannot write"),
    ):
        with at_most(room):
            assert message in fails(train_adaptive, *training(*words))
        assert_intact(tmp_path / "run")
        assert not [*tmp_path.rglob("*.tmp")]
    forked.run("train_adaptive", *training(*words))
    assert_same(results(tmp_path / "run"), results(whole))


@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing_out_of_room_leaves_nothing(fails, toy_volumes, tmp_path, workers):
    words = preprocessing(toy_volumes, tmp_path / "out", "--workers", workers)
    with at_most(500_000):
        assert "out: cannot write: File too large" in fails(preprocess_ct, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]
