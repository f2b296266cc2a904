"""CT volumes with label maps -> 1024 x 1024 slices for training and evaluation.

    python preprocess_ct.py --download flare22 --out data/flare22
    python preprocess_ct.py --input FLARE22Train --out data/flare22
    python preprocess_ct.py --input nnUNet_raw/Dataset009_Spleen --out data/spleen
    python preprocess_ct.py --input npy/CT_Abd --label-names flare22 --out data/abdomen
    python preprocess_ct.py --images lung/images --labels lung/labels --out data/lung \\
        --window lung --label-names "1=left lung,2=right lung,3=tumour" --split split.csv

Reads the FLARE22 layout (images/<case>_0000.nii.gz, labels/<case>.nii.gz), nnU-Net's (imagesTr/,
labelsTr/, and dataset.json with label names), and DICOM series in the place of images
(images/<case>/), turns every volume to LPS, and writes for each axial slice that has a label

    imgs/<case>-<zzz>.npy   uint8 (1024, 1024): the CT window, min-max over the window, so that
                            a grey level is the same HU in every slice
    gts/<case>-<zzz>.npy    uint8 (1024, 1024): label ids
    dataset.json            window, label names; split, geometry and hashes of every case

MedSAM's own slices (imgs/, gts/ of .npy, made by its scripts) are accepted as well: their grey
levels stay as they are, and dataset.json says null for window and geometry, which they lack.

Patients, not slices, are split into train, validation and test, at random or by a CSV file with the
columns case,split or case,split,patient. A case counts as a patient where that file names none.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from utils.data import medsam_npy, new_dataset, splits, volumes
from utils.data.flare22 import WINDOWS
from utils.data.frame import Frame
from utils.data.labels import parse_label_names
from utils.data.layouts import LAYOUTS, Source, download, recognise
from utils.data.options import parse_split, parse_window
from utils.data.slices import DATASET_FILE, FORMAT, SPLITS, slice_files, write_slice
from utils.system.command_line import Parser, integer, run, shell_command
from utils.system.downloads import DATA
from utils.system.errors import UserError
from utils.system.files import write_json

# --- Defaults ------------------------------------------------------------------------------------
WINDOW = "flare22"  # HU, a preset or LO,HI
SPLIT = (0.8, 0.1, 0.1)  # shares of the patients: train, validation, test
SEED = 0  # of the split
MIN_PIXELS = 0  # 2D masks of fewer native pixels are dropped
COMPARISONS = 4  # of the ablation: adaptive with three other policies and with the model untouched
WORKERS = min(4, os.cpu_count() or 1)  # each holds one volume at a time

Case = volumes.CasePair | medsam_npy.NpyCase
SliceArrays = tuple[int, np.ndarray, np.ndarray]  # number, grey levels (H, W), label ids (H, W)
ReadCase = Callable[[Case], tuple[dict, Iterator[SliceArrays]]]  # the entry in dataset.json, slices


def main(argv: list[str] | None = None) -> None:
    """The command line: find the volumes, or download them, and `preprocess` them."""
    args = parse_args(argv)
    new_dataset.unused_path(args.out)  # before hours of downloading
    if args.images:
        source = Source(Path(args.images), Path(args.labels))
    else:
        folder = download(args.download, args.out) if args.download else args.input
        source = recognise(folder, "flare22" if args.download else args.layout or "auto")
        print(f"{folder}: {source.what}")
    if source.npy and args.window:
        raise UserError(f"--window: {args.input} was windowed when it was made; leave it out")
    window = args.window or WINDOWS[WINDOW]
    names = args.label_names or source.label_names
    if not names:
        print(
            "the labels have no names and are called label 1, label 2, ...; name them with "
            '--label-names flare22 or "1=liver,2=..."'
        )
    meta = preprocess(
        source.images,
        source.labels,
        args.out,
        channel=source.channel,
        npy=source.npy,
        window=window,
        label_names=names,
        split=args.split,
        seed=args.seed,
        min_pixels=args.min_pixels,
        skip_bad=args.skip_bad,
        workers=args.workers,
    )
    print_outlook(meta, args.out)


def preprocess(
    images: str | Path,
    labels: str | Path,
    out: str | Path,
    channel: int | None = None,
    npy: bool = False,
    window: tuple[float, float] = WINDOWS[WINDOW],
    label_names: dict[int, str] | None = None,
    split: tuple[float, float, float] | str | Path = SPLIT,
    seed: int = SEED,
    min_pixels: int = MIN_PIXELS,
    skip_bad: bool = False,
    workers: int = WORKERS,
) -> dict:
    """Write the slices of all cases to the new folder `out`, or nothing at all.

    Args:
        images, labels: folders in the FLARE22 layout, or MedSAM's.
        out: must not exist, or be empty.
        channel: of images that have several; see `volumes.find_pairs`.
        npy: the folders hold MedSAM's slices; see `medsam_npy`. `window` is not used then.
        window: (lowest, highest) HU; mapped linearly to 0-255, clipped outside.
        label_names: by label id; label 7 is called "label 7" where it has none.
        split: shares of train, validation and test patients, which add up to 1, or a CSV file; see
            `splits.read_split_file`.
        seed: of a split by shares.
        min_pixels: 2D masks with fewer native pixels become background.
        skip_bad: list cases that cannot be used and go on without them.
        workers: processes.

    Returns:
        What was written to dataset.json.

    Raises:
        UserError: bad input (without `skip_bad`), or nothing to write.
    """
    out = new_dataset.unused_path(out)
    if npy:
        cases, unusable = medsam_npy.find_cases(Path(images), Path(labels))
        read: ReadCase = medsam_npy.read_case
    else:
        cases, unusable = volumes.find_pairs(images, labels, channel)
        read = partial(read_volumes, window=window)
    bad = list(unusable.values())
    refuse_or_list(bad, skip_bad)
    if not cases:
        raise UserError(f"{images}: no case has both an image and a label that fit")
    by_file = isinstance(split, str | Path)
    if by_file:
        assigned = splits.read_split_file(split, {case.case for case in cases}, unusable)
    with new_dataset.new_folder(out) as folder:
        work = partial(write_case, read=read, folder=folder, min_pixels=min_pixels)
        entries: dict[str, dict] = {}
        # Closed, so that no worker process outlives an error.
        with closing(new_dataset.in_workers(work, cases, workers)) as results:
            for case, entry in zip(cases, results, strict=True):
                if isinstance(entry, UserError):
                    refuse_or_list([str(entry)], skip_bad)
                    bad.append(str(entry))
                elif entry["slices"]:
                    entries[case.case] = entry
                else:
                    print(f"{case.label}: holds no label; the case is not used")
        repeated = new_dataset.drop_repeated(entries, folder)
        refuse_or_list(repeated, skip_bad)
        bad += repeated
        if not entries:
            raise UserError(f"{labels}: no slice of any case has a label; are these label maps?")
        if not by_file:
            parts = splits.split_patients(list(entries), split, seed)
            assigned = {case: {"split": part} for case, part in parts.items()}
        for case, entry in entries.items():
            entry.update(assigned[case])
        meta = {
            "format": FORMAT,
            "window": None if npy else list(window),
            "label_names": {str(label): name for label, name in (label_names or {}).items()},
            "split": {"file": Path(split).name} if by_file else {"shares": split, "seed": seed},
            "min_pixels": min_pixels,
            "cases": entries,
        }
        write_json(folder / DATASET_FILE, meta)
    print(f"{out}: {new_dataset.summary(meta)}")
    if bad:
        print(f"left out {len(bad)} bad files, listed above")
    return meta


def print_outlook(meta: dict, out: str) -> None:
    """Print what the data set's test split can show, and the command to go on with.

    Args:
        meta: what was written to dataset.json.
        out: the folder, as the user named it.
    """
    from utils.evaluation.statistics import patients_needed  # imports SciPy and pandas

    patients = splits.patients_by_split(meta["cases"])
    train, val, test = (len(patients[part]) for part in SPLITS)
    if test:
        counts = {part: len(names) for part, names in patients.items()}
        print(
            splits.note_on_test_split(counts, patients_needed(COMPARISONS), "file" in meta["split"])
        )
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


def read_volumes(
    pair: volumes.CasePair, window: tuple[float, float]
) -> tuple[dict, Iterator[SliceArrays]]:
    """Read the two volumes of a case.

    Returns:
        The case's entry in dataset.json, and its labelled slices: z, grey levels (H, W) of the
        window, float 0-255, and label ids (H, W) uint8.

    Raises:
        UserError: a volume that cannot be used, or no value within the window.
    """
    labels, image = volumes.read_label_map(pair.label), volumes.read_image(pair.image)
    volumes.check_window(image.array, pair.image, window)
    slices = (
        (z, volumes.grey_levels(image.array[z], window), labels.array[z])
        for z in np.flatnonzero(labels.array.any(axis=(1, 2))).tolist()
    )
    entry = {
        "image": pair.image.name,
        "image_sha256": image.sha256,
        "label": pair.label.name,
        "label_sha256": labels.sha256,
        "shape": list(image.shape),
        "spacing_mm": list(image.spacing_mm),
        "origin_mm": list(image.origin_mm),
        "direction": list(image.direction),
        "stored_orientation": image.stored_orientation,
    }
    return entry, slices


def write_case(case: Case, read: ReadCase, folder: Path, min_pixels: int) -> dict | UserError:
    """Write the labelled slices of one case to `folder`; runs in a worker process.

    Returns:
        The case's entry in dataset.json, or what is wrong with its files.
    """
    try:
        entry, arrays = read(case)
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
            image_path, label_path = slice_files(folder, case.case, index)
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


def refuse_or_list(bad: list[str], skip_bad: bool) -> None:
    """Stop at bad input with all of it in the message, or list it with `--skip-bad`."""
    if bad and not skip_bad:
        raise UserError("; ".join(bad) + "; --skip-bad goes on without them")
    for line in bad:
        print(f"skipped: {line}")


# --- Options -------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options, as arguments of `preprocess`.

    Raises:
        UserError: an unknown option, a value out of range, or not exactly one input.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("volumes in, slices out").add_argument
    text = "a data set's folder: images/ and labels/; nnU-Net's imagesTr/, labelsTr/ and "
    add("--input", metavar="DIR", help=text + "dataset.json; or MedSAM's slices, imgs/ and gts/")
    text = """of --input (default auto, which goes by the folders' names); flare22 also gives
        FLARE22's label names, auto only to files named as FLARE22's"""
    add("--layout", choices=("auto", *LAYOUTS), help=text)
    text = "instead: fetch this data set to the folder that --out is made in, and unpack it"
    add("--download", choices=tuple(DATA), help=text)
    text = "instead: the folder of <case>_0000.nii.gz, or of <case>/ with a DICOM series each"
    add("--images", metavar="DIR", help=text)
    add("--labels", metavar="DIR", help="and that of <case>.nii.gz, label ids 0-255")
    add("--out", required=True, metavar="DIR", help="folder to make; must be new or empty")
    add = parser.add_argument_group("what the slices show").add_argument
    text = f"{', '.join(WINDOWS)}, or LO,HI in Hounsfield units (default {WINDOW})"
    add("--window", type=parse_window, metavar="HU", help=text)
    text = """flare22, or like "1=left lung,2=right lung" (default: those of nnU-Net's dataset.json
        or of --layout, else label 1, label 2, ...)"""
    add("--label-names", type=parse_label_names, metavar="NAMES", help=text)
    text = "drop 2D masks of fewer native pixels"
    add("--min-pixels", type=integer(0), default=MIN_PIXELS, metavar="N", help=text)
    add = parser.add_argument_group("train, validation and test patients").add_argument
    text = """shares of the patients for train, val, test, or a .csv file with the columns
        case,split or case,split,patient, where split is train, val or test"""
    shares = ",".join(map(str, SPLIT))
    add("--split", type=parse_split, default=shares, metavar="A,B,C|CSV", help=text)
    add("--seed", type=integer(0), default=SEED, help="of a split by shares")
    add = parser.add_argument_group("the work").add_argument
    text = "processes, each holds one volume"
    add("--workers", type=integer(1), default=WORKERS, metavar="N", help=text)
    add("--skip-bad", action="store_true", help="list bad cases and go on without them")
    args = parser.parse_args(argv)
    given = [bool(args.input), bool(args.download), bool(args.images or args.labels)]
    if sum(given) > 1:
        raise UserError(
            "--input, --download, and --images with --labels exclude each other: give one of them"
        )
    if sum(given) == 0 or bool(args.images) != bool(args.labels):
        raise UserError(
            "give --input DIR, --download NAME, or --images DIR and --labels DIR (see --help)"
        )
    if args.layout and not args.input:
        raise UserError("--layout: goes with --input DIR; leave it out")
    return args


if __name__ == "__main__":
    run(main)
