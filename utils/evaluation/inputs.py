"""What is evaluated: slices, their unit and tolerances, and the roles of the models."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.data.flare22 import FLARE22_TOLERANCES_MM
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset
from utils.system import distributed
from utils.system.errors import UserError

if TYPE_CHECKING:
    from utils.training.runs import TrainedRun

BASELINE, PROPOSED = "medsam", "adaptive"  # the usual models of these roles


def data_of(runs: Sequence[TrainedRun]) -> list[str]:
    """The folders that the runs were trained on.

    Raises:
        UserError: there is no run, they were trained on different folders, or one is not there.
    """
    folders = {tuple(run.options["data"]) for run in runs}
    if len(folders) != 1:
        raise UserError("--data: give the folder(s) of preprocess_ct.py to evaluate on")
    for folder in (data := folders.pop()):
        if not Path(folder).is_dir():
            raise UserError(
                f"{folder}: the data that the runs were trained on are not here any more; give "
                "their new place with --data"
            )
    return list(data)


def select_slices(dataset: SliceDataset, split: str, most: int | None) -> list[Slice]:
    """The slices of a split: all, or at most so many evenly spaced ones of each patient.

    Raises:
        UserError: there is none.
    """
    slices = dataset.split(split)
    if not slices:
        raise UserError(f"{dataset.folder}: the {split} split is empty; choose another --split")
    if most is None:
        return slices
    return [
        entries[(2 * n + 1) * len(entries) // (2 * count)]
        for entries in by_patient(slices).values()
        for count in [min(most, len(entries))]
        for n in range(count)
    ]


def by_patient(slices: Sequence[Slice]) -> dict[tuple[str, str], list[Slice]]:
    """The slices of each patient, by (data set, patient), in order of appearance."""
    patients: dict[tuple[str, str], list[Slice]] = {}
    for entry in slices:
        patients.setdefault((entry.dataset, entry.patient), []).append(entry)
    return patients


def shard_patients(slices: Sequence[Slice]) -> list[Slice]:
    """The slices of this process's patients; all of them without torchrun."""
    patients = by_patient(slices)
    # Dealt out by size, so that the processes have about equally much to do.
    own = set(distributed.shard(sorted(patients, key=lambda p: len(patients[p]), reverse=True)))
    return [entry for entry in slices if (entry.dataset, entry.patient) in own]


def unit_of(slices: Sequence[Slice]) -> str:
    """The unit of distances: "mm", or "px" for slices whose spacing is not known.

    Raises:
        UserError: only some of the slices have a spacing.
    """
    by_spacing = {entry.spacing_mm is not None: entry for entry in slices}
    if len(by_spacing) > 1:
        raise UserError(
            f"{by_spacing[False].folder}: has no spacing, {by_spacing[True].folder} has: NSD "
            "would be in pixels for one and in mm for the other; evaluate them one at a time"
        )
    return "mm" if True in by_spacing else "px"


def check_unit(args: Namespace, unit: str) -> None:
    """Check that no option needs millimetres where there are none.

    Raises:
        UserError: FLARE22's tolerances, --volume or --save-predictions for slices without spacing.
    """
    needs_mm = {
        "--tolerance flare22": args.tolerance == "flare22",
        "--volume": args.volume,
        "--save-predictions": args.save_predictions,
    }
    for option, given in needs_mm.items():
        if given and unit == "px":
            raise UserError(
                f"{option}: the data are MedSAM's slices, whose spacing and place in the patient "
                "are not known; leave it out, or preprocess the volumes"
            )


def tolerances_of(tolerance: float | str, slices: Sequence[Slice]) -> dict[str, float]:
    """The tolerance of each label name, in the unit of the slices; "flare22" is that challenge's.

    Raises:
        UserError: FLARE22 has no tolerance for a label.
    """
    names = {label_name(entry.label_names, label) for entry in slices for label in entry.labels}
    if tolerance != "flare22":
        return dict.fromkeys(names, tolerance)
    unknown = sorted(names - FLARE22_TOLERANCES_MM.keys())
    if unknown:
        raise UserError(f"--tolerance flare22: none for {unknown[0]!r}; give a number of mm")
    return {name: FLARE22_TOLERANCES_MM[name] for name in names}


def tolerance_text(tolerance: float | str, unit: str) -> str:
    """The tolerance as the tables give it."""
    if tolerance == "flare22":
        return "FLARE22's tolerances"
    if unit == "px":  # not to be compared with one in mm, so every table says it
        return f"{tolerance:g} pixels of the slices, whose spacing is not known"
    return f"{tolerance:g} mm"


def roles_of(
    models: Sequence[str],
    baseline: str | None,
    proposed: str | None,
    trained: Collection[str] = (),
    trainings: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """The baseline and the proposed model, whatever the order of the models.

    Proposed is the model of that name, else the usual one, else the last that is fine-tuned.
    Baseline is the model of that name, else the usual one, else the first that is not fine-tuned.
    Where none is, they are the last and the first. One model alone has both roles.

    Args:
        models: their names.
        baseline, proposed: as named by the user, or None.
        trained: those that are fine-tuned.
        trainings: the training of a model that is one of its seeds.

    Raises:
        UserError: a name that no model has, or the same for both roles.
    """
    trainings = trainings or {}
    usual = {trainings.get(name, name): name for name in reversed(models)}  # of the first seed
    for name in filter(None, (baseline, proposed)):
        if name not in models:
            raise UserError(f"no model {name!r} to compare; there are {', '.join(models)}")
    others = [name for name in models if name != baseline] or list(models)
    tuned = [name for name in others if name in trained]
    proposed = proposed or (
        usual[PROPOSED] if usual.get(PROPOSED) in others else (tuned or others)[-1]
    )
    others = [name for name in models if name != proposed] or list(models)
    plain = [name for name in others if name not in trained]
    baseline = baseline or (
        usual[BASELINE] if usual.get(BASELINE) in others else (plain or others)[0]
    )
    if baseline == proposed and len(models) > 1:
        raise UserError(f"--baseline and --proposed are both {baseline!r}; name two models")
    return baseline, proposed


# --- Names in instances.csv ----------------------------------------------------------------------
def case_name(entry: Slice, several: bool) -> str:
    """The case in instances.csv; with several data sets the name says which one it is from."""
    return f"{entry.dataset}/{entry.case}" if several else entry.case


def patient_name(entry: Slice, several: bool) -> str:
    """The patient in instances.csv; with several data sets the name says which one it is from."""
    return f"{entry.dataset}/{entry.patient}" if several else entry.patient


def label_text(entry: Slice, label: int, several: bool) -> str:
    """The label in instances.csv; with several data sets the name says which one it is from."""
    name = label_name(entry.label_names, label)
    return f"{name} ({entry.dataset})" if several else name


def instances_of(
    slices: Sequence[Slice], several: bool
) -> dict[tuple[str, int, str], tuple[Slice, int]]:
    """Slice and label id of every instance, by its case, slice and label in instances.csv."""
    return {
        (case_name(entry, several), entry.index, label_text(entry, label, several)): (entry, label)
        for entry in slices
        for label in entry.labels
    }
