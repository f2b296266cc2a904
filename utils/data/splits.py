"""Which patients of a data set are for training, validation and testing, and if they suffice."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from perturb import IMAGE_SIZE
from utils.data.labels import WINDOWS, is_name, label_name
from utils.data.slices import SPLITS
from utils.data.tables import read_table
from utils.system import UserError, plural

COLUMNS = ("case", "split", "patient")  # of a split file; the last is optional


def split_patients(
    cases: Sequence[str], shares: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Assign each case to train, val or test, at random but always the same for the same seed.

    Each case counts as a patient. The shares are rounded by largest remainder; where there are
    enough patients, every split with a share gets at least one.
    """
    exact = np.array(shares) * len(cases)
    counts = np.floor(exact + 1e-9).astype(int)
    while counts.sum() < len(cases):
        counts[np.argmax(exact - counts)] += 1
    for part in np.flatnonzero((exact > 0) & (counts == 0)):
        if counts.max() > 1:
            counts[counts.argmax()] -= 1
            counts[part] += 1
    order = np.random.default_rng(seed).permutation(sorted(cases)).tolist()
    return dict(zip(order, np.repeat(SPLITS, counts).tolist(), strict=True))


def read_split_file(
    path: str | Path, cases: Collection[str], unusable: Collection[str] = ()
) -> dict[str, dict[str, str]]:
    """The `split` and, if the file has that column, the `patient` of each of `cases`.

    The file is CSV with the columns `case`, `split` and, optionally, `patient`. It must name all
    `cases`, and may name those that are `unusable` and left out of the data set.

    Raises UserError: it cannot be read, columns or values are missing or unknown, a case is
    unknown, missing or listed twice, or a patient is in two splits.
    """
    rows = read_table(path, COLUMNS[:2], COLUMNS[2:])
    assigned: dict[str, dict[str, str]] = {}
    split_of: dict[str, str] = {}  # by patient
    if unknown := sorted(rows[0][1].keys() - set(COLUMNS)):
        raise UserError(f"{path}: unknown column {unknown[0]}; expected case,split[,patient]")
    for number, row in rows:
        case, split, patient = row["case"], row["split"], row.get("patient", row["case"])
        if not all(map(is_name, row.values())):
            problem = f"expected a value for each of {','.join(row)}"
        elif case not in cases and case not in unusable:
            problem = f"no case {case!r} in the data, whose cases are named like {min(cases)!r}"
        elif case in assigned:
            problem = f"case {case} is listed twice"
        elif split not in SPLITS:
            problem = f"split {split!r} is not one of {', '.join(SPLITS)}"
        elif split_of.setdefault(patient, split) != split:
            problem = f"patient {patient} is in {split} here but in {split_of[patient]} above"
        else:
            if case in cases:
                assigned[case] = {name: row[name] for name in COLUMNS[1:] if name in row}
            continue
        raise UserError(f"{path}, row {number}: {problem}; correct or remove the row")
    if missing := sorted(set(cases) - assigned.keys()):
        lacks = f"lacks {len(missing)} of the {len(cases)} cases, such as {missing[0]}"
        raise UserError(f"{path}: {lacks}; add a row for each")
    return assigned


# --- What the data set holds ---------------------------------------------------------------------
def patients_by_split(cases: Mapping[str, dict]) -> dict[str, set[str]]:
    """The patients of each split, from the entries of dataset.json by case."""
    patients: dict[str, set[str]] = {split: set() for split in SPLITS}
    for case, entry in cases.items():
        patients[entry["split"]].add(entry.get("patient", case))
    return patients


def summary(meta: dict) -> str:
    """Cases, slices, masks and the window, in lines of text, from the content of dataset.json."""
    names = {int(label): name for label, name in meta["label_names"].items()}
    totals = []
    masks: Counter[tuple[int, str]] = Counter()  # by label and split
    for split, patients in patients_by_split(meta["cases"]).items():
        cases = [case["slices"] for case in meta["cases"].values() if case["split"] == split]
        slices = [item for case in cases for item in case.values()]
        of_patients = f" of {plural(len(patients), 'patient')}" * (len(patients) < len(cases))
        totals.append(
            f"{split} {plural(len(cases), 'case')}{of_patients}, {plural(len(slices), 'slice')}"
        )
        for item in slices:
            labels = (item.get("parts", {}).get(n, [n])[0] for n in item["labels"])
            masks.update((int(label), split) for label in labels)
    lines = ["; ".join(totals), f"{'masks':<22}" + "".join(f"{split:>8}" for split in SPLITS)]
    for label in sorted({label for label, _ in masks}):
        row = "".join(f"{masks[label, split]:>8}" for split in SPLITS)
        lines.append(f"{label:>3} {label_name(names, label):<18}{row}")
    vanished = sum(case["vanished_masks"] for case in meta["cases"].values())
    dropped = sum(case["dropped_masks"] for case in meta["cases"].values()) - vanished
    if meta["min_pixels"]:
        lines.append(f"dropped {plural(dropped, 'mask')} of fewer than {meta['min_pixels']} pixels")
    if vanished:
        lines.append(f"dropped {plural(vanished, 'mask')} lost by downscaling to {IMAGE_SIZE} px")
    if meta["window"] is not None:
        window, (low, high) = tuple(meta["window"]), WINDOWS["medsam"]
        preset = next((f" ({name})" for name in WINDOWS if WINDOWS[name] == window), "")
        lines.append(f"window of {window[0]:g} to {window[1]:g} HU{preset}")
        if window != (low, high):
            trained = f"MedSAM's and LiteMedSAM's weights were trained on soft tissue with {low:g}"
            lines[-1] += f"; {trained} to {high:g} HU (--window medsam)"
    return "\n".join(lines)


def note_on_test_split(patients: int, needed: int) -> str:
    """A line that says whether test has the patients `needed` for a significant difference."""
    need = (
        f"for a conclusion (four comparisons need {needed} for any p under 0.05, one needs fewer)"
    )
    if patients >= needed:
        return f"patients in test: {patients}, enough {need}"
    return f"patients in test: {patients}, too few {need}; move some there with --split"
