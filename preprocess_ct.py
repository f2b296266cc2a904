"""CT volumes with label maps -> 1024 x 1024 slices for training and evaluation.

    python preprocess_ct.py --download flare22 --out data/flare22
    python preprocess_ct.py --input FLARE22Train --out data/flare22
    python preprocess_ct.py --input nnUNet_raw/Dataset009_Spleen --out data/spleen
    python preprocess_ct.py --input npy/CT_Abd --label-names flare22 --out data/abdomen
    python preprocess_ct.py --images lung/images --labels lung/labels --out data/lung \\
        --window lung --label-names "1=left lung,2=right lung,3=tumour" --split split.csv

Reads the FLARE22 layout (images/<case>_0000.nii.gz, labels/<case>.nii.gz; NRRD or MetaImage too),
nnU-Net's, DICOM series in the place of images (images/<case>/), and MedSAM's own slices. Turns
every volume to LPS, and writes for each axial slice that has a label

    imgs/<case>-<zzz>.npy   uint8 (1024, 1024): the CT window, min-max over the window, so that
                            a grey level is the same HU in every slice
    gts/<case>-<zzz>.npy    uint8 (1024, 1024): label ids
    dataset.json            name, window, label names; split, geometry and hashes of every case

Patients, not slices, are split into train, validation and test, at random or by a CSV file.
"""

from utils.data.options import WINDOW, parse_options

if __name__ == "__main__":  # before the imports that are slow
    options = parse_options()

from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np

from utils.data import splits
from utils.data.frame import Frame
from utils.data.labels import WINDOWS
from utils.data.layouts import Case, Layout, Volumes, download, recognise
from utils.data.slices import (
    DATASET_FILE,
    FORMAT,
    SPLITS,
    repeated_images,
    slice_files,
    write_slice,
)
from utils.evaluation.statistics import patients_needed
from utils.system import UserError, signals
from utils.system.command_line import run, shell_command
from utils.system.files import new_folder, write_json
from utils.system.loops import progress_bar

COMPARISONS = 4  # of the ablation: adaptive with three other policies and with the model untouched


def main(options: Namespace) -> None:
    """Preprocess, and say what can follow."""
    print_outlook(preprocess(options), options.out)


def preprocess(options: Namespace) -> dict:
    """Write the slices of all cases to the new folder `options.out`, or nothing at all.

    Returns what was written to dataset.json. UserError: bad input (without `skip_bad`), or nothing
    to write.
    """
    with new_folder(options.out) as folder:
        layout = find_layout(options)
        window = None if layout.windowed else options.window or WINDOWS[WINDOW]
        cases, unusable = layout.cases()
        bad = list(unusable.values())
        refuse_or_list(bad, options.skip_bad)
        if not cases:
            raise UserError("no case has both an image and a label that fit")
        by_file = isinstance(options.split, Path)
        if by_file:
            assigned = splits.read_split_file(
                options.split, {case.name for case in cases}, unusable
            )
        work = partial(
            write_case, layout=layout, window=window, folder=folder, min_pixels=options.min_pixels
        )
        entries: dict[str, dict] = {}
        # Closed, so that no worker process outlives an error.
        with closing(in_workers(work, cases, options.workers)) as results:
            for case, entry in zip(cases, results, strict=True):
                for note in () if isinstance(entry, UserError) else entry.pop("notes", ()):
                    print(note)
                if isinstance(entry, UserError):
                    refuse_or_list([str(entry)], options.skip_bad)
                    bad.append(str(entry))
                elif entry["slices"]:
                    entries[case.name] = entry
                else:
                    print(f"{case.labels[0]}: holds no label; the case is not used")
        repeated = drop_repeated(entries, folder)
        refuse_or_list(repeated, options.skip_bad)
        bad += repeated
        if not entries:
            raise UserError("no slice of any case has a label; are these label maps?")
        if not by_file:
            parts = splits.split_patients(list(entries), options.split, options.seed)
            assigned = {case: {"split": part} for case, part in parts.items()}
        for case, entry in entries.items():
            entry.update(assigned[case])
        shares = {"shares": options.split, "seed": options.seed}
        meta = {
            "format": FORMAT,
            "name": Path(options.out).resolve().name,
            "window": window,
            "label_names": {str(label): name for label, name in layout.label_names.items()},
            "split": {"file": options.split.name} if by_file else shares,
            "min_pixels": options.min_pixels,
            "cases": entries,
        }
        write_json(folder / DATASET_FILE, meta)
    print(f"{options.out}: {splits.summary(meta)}")
    if bad:
        print(f"left out {len(bad)} bad files, listed above")
    return meta


def find_layout(options: Namespace) -> Layout:
    """The data set that the options name, downloaded if they ask for that."""
    if options.images:
        layout = Volumes(Path(options.images), Path(options.labels))
    elif options.download:
        layout = recognise(download(options.download, options.out), "flare22")
    else:
        layout = recognise(options.input, options.layout)
        print(f"{options.input}: {layout.description}")
    if layout.windowed and options.window:
        raise UserError(f"--window: {options.input} was windowed when it was made; leave it out")
    if options.label_names:
        layout.name_labels(options.label_names)
    if not layout.label_names:
        print(
            "the labels have no names and are called label 1, label 2, ...; name them with "
            '--label-names flare22 or "1=liver,2=..."'
        )
    return layout


def in_workers(work: partial, cases: Sequence[Case], workers: int) -> Iterator[dict | UserError]:
    """`work` of every case, in order; in this process if `workers` is 1. Close it to end them.

    Raises UserError: out of memory, of which a killed worker is the usual sign.
    """
    with ExitStack() as stack:
        results = map(work, cases)
        if workers > 1 and len(cases) > 1:
            pool = ProcessPoolExecutor(min(workers, len(cases)), initializer=signals.init_worker)
            stack.enter_context(pool)
            results = pool.map(work, cases)
            stack.callback(pool.shutdown, cancel_futures=True)
        try:
            yield from progress_bar(results, desc="preprocessing", unit="case", total=len(cases))
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError("out of memory, most likely; try fewer --workers") from error


def write_case(
    case: Case, layout: Layout, window: tuple[float, float], folder: Path, min_pixels: int
) -> dict | UserError:
    """Write the labelled slices of a case, in a worker; its entry in dataset.json, or an error."""
    try:
        entry, arrays = layout.read(case, window)
    except UserError as error:
        return error
    frame = Frame.fit(entry["shape"][1:], (entry["spacing_mm"] or [1.0] * 3)[1:])
    slices, dropped, vanished = {}, 0, 0
    for index, grey, labels in arrays:
        pixels = np.bincount(labels.ravel(), minlength=256)[1:]
        small = 1 + np.flatnonzero((pixels > 0) & (pixels < min_pixels))
        if len(small):
            labels = np.where(np.isin(labels, small), 0, labels)
        framed, labels, lost = frame.labels_there_and_back(labels)
        dropped += len(small) + lost
        vanished += lost
        pixels = dict(enumerate(np.bincount(labels.ravel()).tolist()))
        present = {str(label): count for label, count in pixels.items() if label and count}
        if present:
            image_path, label_path = slice_files(folder, case.name, index)
            slices[str(index)] = {
                "labels": present,
                "image_sha256": write_slice(image_path, frame.image_to_frame(grey)),
                "label_sha256": write_slice(label_path, framed),
            }
    return {
        "split": None,  # set once all cases are read
        **entry,
        "frame": {"native": list(frame.native), "content": list(frame.content)},
        "dropped_masks": dropped,
        "vanished_masks": vanished,  # of these, lost by shrinking to the 1024 frame
        "slices": slices,
    }


def drop_repeated(cases: dict[str, dict], folder: Path) -> list[str]:
    """Remove cases made from the image of an earlier one: one patient must not be in two splits.

    They go from `cases`, entries of dataset.json, and from `folder`. Returns a line for each.
    """
    lines = []
    for case, other in repeated_images({case: e["image_sha256"] for case, e in cases.items()}):
        image, same = cases[case]["image"], cases[other]["image"]
        lines.append(f"{image}: the same image as {same}; remove one")
        for index in cases.pop(case)["slices"]:
            for path in slice_files(folder, case, int(index)):
                path.unlink()
    return lines


def refuse_or_list(bad: list[str], skip_bad: bool) -> None:
    """Stop at bad input with all of it in the message, or list it with `--skip-bad`."""
    if bad and not skip_bad:
        raise UserError("; ".join(bad) + "; --skip-bad goes on without them")
    for line in bad:
        print(f"skipped: {line}")


def print_outlook(meta: dict, out: str) -> None:
    """Print what the test split of a dataset.json can show, and the command to go on with."""
    patients = splits.patients_by_split(meta["cases"])
    train, val, test = (len(patients[part]) for part in SPLITS)
    if test:
        print(splits.note_on_test_split(test, patients_needed(COMPARISONS)))
    if train and val:
        print("next: " + shell_command("python", "train_adaptive.py", "--data", out))
    elif test and not train:
        command = ("python", "eval.py", "--data", out, "--models", "lite_medsam")
        print("next: " + shell_command(*command))
    else:
        print(
            f"training needs patients in train (here {train}) and in val (here {val}, or those of "
            "another data set in --data)"
        )


if __name__ == "__main__":
    run(main, options)
