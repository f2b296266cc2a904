"""Starting a run, or going on with it: what may have changed, and how that is recorded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from utils.data.slices import DATASET_FILE
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.files import read_json, sha256, write_json
from utils.training.options import CONFIG, parse_policies
from utils.training.runs import (
    PERTURB,
    data_hashes,
    finished_epochs,
    git_commit,
    start_run,
    versions,
)

# Options that change neither boxes nor losses, as long as device type and number format stay the
# same, which `check_unchanged` checks: they are among the facts that a run records.
MAY_CHANGE = ("data", "epochs", "boxes_per_call", "cache", "cache_dir", "device", "amp")


def resumed_options(folder: Path, stored: Namespace, given: dict) -> Namespace:
    """The options with which a run goes on.

    Args:
        folder: of the run.
        stored: its options so far.
        given: those named on the command line now.

    Raises:
        UserError: an option that would change boxes or losses, fewer epochs than are finished, or
            data that is not there or not the run's.
    """
    for key, value in given.items():
        if key not in MAY_CHANGE and getattr(stored, key) != value:
            raise UserError(
                f"{folder}: was started with --{key.replace('_', '-')} {getattr(stored, key)}, not "
                f"{value}; resume it without that option, or start a new run"
            )
    options = Namespace(**{**vars(stored), **given})
    policies = parse_policies(options.policy)
    folders = [folder] if len(policies) == 1 else [folder / policy for policy in policies]
    finished = max(map(finished_epochs, folders))
    if options.epochs < finished:
        raise UserError(f"{folder}: --epochs {options.epochs}: has finished {finished} already")
    recorded = data_hashes(read_json(folder / CONFIG))
    if not recorded or not stored.data:
        raise UserError(f"{folder / CONFIG}: damaged, it names no data; start a new run")
    if "data" in given:
        options.data = _in_recorded_order(options.data, recorded)
    for path in options.data:
        if not Path(path).is_dir():
            raise UserError(f"{folder}: its data {path} is gone; give its new place with --data")
    return options


def _in_recorded_order(paths: Sequence[str], recorded: dict[str, str]) -> list[str]:
    """The folders that hold a run's data sets, whatever they are called now.

    Args:
        paths: the folders.
        recorded: the SHA-256 of each dataset.json by the name of the data set.
    """
    left = {path: sha256(Path(path) / DATASET_FILE) for path in paths}
    ordered = []
    for name, digest in recorded.items():
        folder = next((path for path in left if left[path] == digest), None)
        if folder is None:
            raise UserError(
                f"--data: no folder holds the data {name!r} that the run was started on (SHA-256 "
                f"of its {DATASET_FILE}: {digest[:16]}); give its new place, or start a new run"
            )
        del left[folder]
        ordered.append(folder)
    if left:
        raise UserError(f"--data: {next(iter(left))} is not among the run's data; leave it out")
    return ordered


def start_or_resume(folder: Path, options: Namespace, resume: bool, **facts: object) -> None:
    """Write the config.json of a new run, or check and record what changed when one is resumed.

    Args:
        folder: of the run, which this process holds; see `runs.claim`.
        options: of the run, as they are now.
        resume: whether it was started before.
        facts: what a run depends on beside its options.

    Raises:
        UserError: the folder holds a run already, something changed, or it cannot be written.
    """
    if resume:
        check_unchanged(folder, **facts)
        distributed.rank_zero_first(lambda: record_resume(folder, vars(options)))
    else:
        distributed.rank_zero_first(lambda: start_run(folder, vars(options), **facts))


def check_unchanged(folder: Path, **facts: object) -> None:
    """Check that what a run depends on is what it was when the run was started.

    Raises:
        UserError: something changed.
    """
    config = read_json(folder / CONFIG)
    for name, value in facts.items():
        before = config.get(name)
        if before == value:
            continue
        if before is None:
            raise UserError(f"{folder / CONFIG}: of another version (no {name}); start a new run")
        if name == "perturb_sha256":
            raise UserError(
                f"{folder}: perturb.py changed since the run was started: compare it with "
                f"{folder / PERTURB}, and undo that or start a new run"
            )
        change = f"{name.replace('_', ' ')} changed since the run was started"
        if name == "constants":
            change = ", ".join(changed_constants(before, value))
        elif name in ("device", "amp"):
            change = f"{name} is {value}, was {before}"
        raise UserError(f"{folder}: {change}; start a new run")


def changed_constants(before: dict, now: dict) -> list[str]:
    """For each constant that changed, a clause with its new and its old value."""
    return [
        f"{name} is {now.get(name, 'not used')}, was {before.get(name, 'not used')}"
        for name in now | before
        if now.get(name) != before.get(name)
    ]


def record_resume(folder: Path, options: dict) -> None:
    """Write into config.json what has changed since the run was started or last resumed.

    The options become those of now. "resumed" lists for each time the changed options, [old, new],
    and the new versions and commit, if they are others.
    """
    config = read_json(folder / CONFIG)
    resumed = config.setdefault("resumed", [])
    old = config["options"]
    changes = {key: [old[key], value] for key, value in options.items() if old[key] != value}
    entry: dict[str, object] = {"changes": changes} if changes else {}
    for name, value in (("versions", versions()), ("git_commit", git_commit())):
        before = [each[name] for each in (config, *resumed) if name in each]
        if value != before[-1]:
            entry[name] = value
    if entry:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        resumed.append({"time": now, **entry})
        write_json(folder / CONFIG, config | {"options": options})
