"""Several processes under torchrun give what one process gives."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import preprocess, results

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *command: object) -> str:
    run = launched(processes, *command)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def launcher(processes: int) -> list[str]:
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone")
    return [sys.executable, *((*launch, "--") if processes > 1 else ())]


def launched(processes: int, *command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher(processes), *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_are_one_with_the_same_batch(toy_volumes, tmp_path):
    """Three of four slices in the first step, one in the second: a process has none there."""
    for processes in (1, 2):  # each encodes for itself
        data = tmp_path / str(processes) / "toy"
        preprocess(toy_volumes, data, "--split", "0.5,0.25,0.25")
        work = tmp_path / str(processes) / "work"
        options = ("--batch", 3, "--epochs", 2, "--device", "cpu", "--boxes-per-call", 2)
        said = torchrun(
            *(processes, "train_adaptive.py", "--data", data, "--work-dir", work),
            *("--run", "r", *options),
        )
        assert said.count("epoch 2/2") == said.count("next: python") == 1
        said = torchrun(
            *(processes, "eval.py", "--runs", work / "r", "--out", work / "report"),
            *("--shift", "15%", "--no-sweep", "--no-figures", "--device", "cpu"),
        )
        assert said.count("wrote ") == 1
    one, two = (tmp_path / str(n) / "work" for n in (1, 2))
    assert losses_of(one / "r") == pytest.approx(losses_of(two / "r"), rel=1e-4)
    # AdamW hides the size of gradients from the losses; its moments do not.
    moments = [
        torch.load(work / "r" / "checkpoint_last.pth", weights_only=True)["optimizer"]["state"]
        for work in (one, two)
    ]
    for key, state in moments[0].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], moments[1][key][name]
            assert (found - expected).norm() <= 0.05 * expected.norm(), (key, name)
    rows = []
    for work in (one, two):
        with open(work / "report" / "instances.csv") as file:
            rows.append(list(csv.DictReader(file)))
    names = ("model", "case", "slice", "label", "box", "pixels")
    assert [[r[n] for n in names] for r in rows[0]] == [[r[n] for n in names] for r in rows[1]]
    scores = [np.array([float(row["dsc"]) for row in part]) for part in rows]
    assert np.abs(scores[0] - scores[1]).max() < 0.02 and len(scores[0]) > 10


def test_one_process_goes_on_where_two_were_interrupted(toy_slices, tmp_path):
    def command(out: Path) -> list[str]:
        options = ("--models", "lite_medsam", "--split", "all", "--shift", "15%", "--no-sweep")
        where = ("--out", str(out), "--no-figures", "--device", "cpu")
        return ["eval.py", "--data", str(toy_slices), *options, *where]

    launch = [*launcher(2), *command(tmp_path / "out")]
    two = subprocess.Popen(launch, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while two.poll() is None and not list(tmp_path.glob("out/.scores/*/*.json")):
        time.sleep(0.05)
    two.send_signal(signal.SIGINT)
    said = two.communicate(timeout=300)[1]
    assert "go on with: torchrun --nproc-per-node 2 -- eval.py --data" in said, said
    finished = len(list(tmp_path.glob("out/.scores/*/*.json")))
    assert 0 < finished < 4 and not (tmp_path / "out" / "instances.csv").exists()
    said = torchrun(1, *command(tmp_path / "out"))
    assert f"going on: {finished} of 4 patients were scored before" in said
    torchrun(1, *command(tmp_path / "whole"))
    again, whole = (tmp_path / name / "instances.csv" for name in ("out", "whole"))
    assert again.read_bytes() == whole.read_bytes()


def test_process_of_several_ends_without_tearing_down_the_interpreter(tmp_path):
    """gloo's threads may hold tensors to the end, and abort where the interpreter goes first."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import atexit, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.system import command_line as cli, distributed\n"
        "def main():\n"
        "    distributed.init()\n"
        "    atexit.register(lambda: print('torn down'))\n"
        "    print('done', end='')\n"
        "    distributed.barrier()\n"
        "cli.run(main)\n"
    )
    assert torchrun(2, script).count("done") == 2
    assert "torn down" not in torchrun(2, script) and "torn down" in torchrun(1, script)


def test_what_the_first_of_several_processes_refuses_is_told_once(toy_slices, tmp_path):
    """The others leave without a word, not with the traceback of a connection that broke."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    script = "train_adaptive.py"
    options = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--batch", 2)
    for policy in ("adaptive", "medsam,adaptive"):
        run = launched(2, script, *options, "--policy", policy, "--device", "cpu")
        own = re.split("torch[./]distributed[./]elastic", run.stderr)[0]  # then torchrun's report
        assert run.returncode and own.count("error: ") == own.count("already exists") == 1, own
        assert "gloo" not in run.stderr and "Traceback" not in own, run.stderr
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["notes.txt"]


def losses_of(folder: Path) -> list[float]:
    log = results(folder)["log"]
    return [float(row[name]) for row in log[1:] for name in ("train_loss", "val_loss")]
