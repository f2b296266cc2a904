"""What models were trained on, held against what they are evaluated on: patients and windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.data.slices import Slice, SliceDataset
from utils.evaluation.inputs import by_patient
from utils.evaluation.models import Spec
from utils.system.errors import UserError
from utils.training.runs import TrainedRun, seen_patients


def seen_by_models(
    specs: Sequence[Spec], slices: Sequence[Slice], datasets: Sequence[SliceDataset]
) -> dict[str, list[Slice] | None]:
    """The evaluated patients that each model has seen: was trained on, or chosen by.

    Patients are recognised by the source image's SHA-256, whatever the data set is called.

    Returns:
        By model, a slice of every such patient; None where the weights do not record it.
    """
    images = {(d.name, case): digest for d in datasets for case, digest in d.volumes.items()}
    seen: dict[str, list[Slice] | None] = {}
    for name, _, checkpoint in specs:
        recorded = seen_patients(Path(checkpoint)) if checkpoint else None
        if recorded is None:
            seen[name] = None
            continue
        known = [entry for entry in slices if images[entry.dataset, entry.case] in recorded]
        seen[name] = [entries[0] for entries in by_patient(known).values()]
    return seen


def check_seen(seen: Mapping[str, list[Slice] | None], patients: int, allowed: bool) -> str:
    """The note that marks a report in which a model has seen patients; empty if none has.

    Args:
        seen: as `seen_by_models` returns it.
        patients: how many are evaluated.
        allowed: whether the user accepts that models have seen some.

    Raises:
        UserError: a model has seen a patient, and that is not allowed.
    """
    counts = {name: len(entries) for name, entries in seen.items() if entries}
    if not counts:
        return ""
    listed = ", ".join(f"{name} {count} of {patients}" for name, count in counts.items())
    if not allowed:
        first = next(entries[0] for entries in seen.values() if entries)
        raise UserError(
            f"{first.folder}: models were trained on patients to be evaluated or chosen by them "
            f"({listed}; {first.case} is one of them); evaluate on other patients, or use "
            "--allow-seen, which marks the report"
        )
    return (
        f"Models were trained on patients of this evaluation or chosen by them ({listed}): what "
        "follows says nothing about new patients."
    )


def window_notes(datasets: Sequence[SliceDataset], runs: Sequence[TrainedRun]) -> list[str]:
    """One note per data set and window that runs were trained in and the data set is not in.

    Runs of earlier versions do not record their window, and MedSAM's slices have none that is
    known: there is no note on these.
    """
    notes = []
    for dataset in datasets:
        others: dict[str, list[str]] = {}  # runs by their windows
        for run in runs:
            records = [of for of in run.config.get("data", {}).values() if isinstance(of, dict)]
            windows = {tuple(of["window"]) for of in records if of.get("window")}
            if dataset.window and windows and dataset.window not in windows:
                others.setdefault(" and ".join(map(_text, sorted(windows))), []).append(run.name)
        notes += [
            f"The window of the data set {dataset.name} is {_text(dataset.window)}, that of the "
            f"data that {', '.join(names)} trained on is {windows}: the same tissue has other grey "
            "levels."
            for windows, names in others.items()
        ]
    return notes


def _text(window: Sequence[float]) -> str:
    return f"[{window[0]:g}, {window[1]:g}] HU"
