"""Types of train_adaptive.py's options, and the options that a run has stored."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from perturb import MIXED_SCALE, POLICIES, READINGS, Perturbation
from utils.system.command_line import Parser
from utils.system.downloads import DOWNLOAD
from utils.system.errors import UserError
from utils.system.files import read_json

CONFIG = "config.json"  # in the folder of a run


def parse_policies(text: str, source: str = "--policy") -> list[str]:
    """The policies in a comma-separated list.

    Raises:
        UserError: an unknown policy, or one named twice; the message begins with `source`.
    """
    policies = text.split(",")
    for policy in policies:
        if policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise UserError(f"{source}: unknown policy {policy!r}; choose from {known}")
    if len(set(policies)) < len(policies):
        raise UserError(f"{source}: {text} names a policy twice")
    return policies


def policy_names(text: str) -> str:
    """An option type: one policy or several, comma-separated, checked and returned as they are."""
    parse_policies(text)
    return text


def factor_defaults(name: str) -> str:
    """The default of delta_expand or epsilon_shrink under each reading, for the help."""
    values = [f"{getattr(Perturbation(reading=r), name):g} under {r}" for r in READINGS]
    return f"(default {', '.join(values)}; mixed: {MIXED_SCALE:g} times that)"


def absolute_path(path: str) -> str:
    """An option type: an absolute path, so that a run resumes from anywhere."""
    return str(Path(path).resolve())


def checkpoint_path(text: str) -> str:
    """An option type: "download", or an absolute path."""
    return text if text == DOWNLOAD else absolute_path(text)


def is_average(folder: Path) -> bool:
    """Whether a folder holds the mean of runs that --average makes."""
    return (folder / CONFIG).is_file() and "average" in read_json(folder / CONFIG)


def options_of(folder: Path) -> dict:
    """The options in a run's config.json, unchecked but for the policy.

    Raises:
        UserError: the file is not that of a run.
    """
    if is_average(folder):
        raise UserError(f"{folder}: is a mean of runs, which has no boxes and no epochs of its own")
    options = read_json(folder / CONFIG).get("options")
    if not isinstance(options, dict) or not isinstance(options.get("policy"), str):
        raise UserError(f"{folder / CONFIG}: not the configuration of a run")
    parse_policies(options["policy"], f"{folder / CONFIG}")  # they are names of folders
    return options


def read_options(folder: Path, parser: Parser, names: Iterable[str]) -> Namespace:
    """The options of a run, read from its config.json as from a command line.

    Args:
        folder: of the run.
        parser: checks their types and bounds.
        names: of the options that config.json must have.

    Raises:
        UserError: there is no run to resume, or its options are not those of this version or out
            of bounds.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: nothing to resume (no {CONFIG}); start it without --resume")
    stored = options_of(folder)
    if stored.keys() != set(names):
        raise UserError(f"{folder / CONFIG}: not the options of this version; start a new run")
    words = []
    for name, value in stored.items():
        if value is not None and value is not False:  # 0 is a value, though 0 == False
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    try:
        options = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return Namespace(**{name: options[name] for name in stored})
