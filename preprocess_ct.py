"""CT volumes with label maps -> 1024 x 1024 slices for training and evaluation.

    python preprocess_ct.py --download flare22 --out data/flare22
    python preprocess_ct.py --input FLARE22Train --out data/flare22
    python preprocess_ct.py --input nnUNet_raw/Dataset009_Spleen --window medsam --out data/spleen
    python preprocess_ct.py --input npy/CT_Abd --label-names flare22 --out data/abdomen
    python preprocess_ct.py --images lung/images --labels lung/labels --out data/lung \\
        --window lung --label-names "1=left lung,2=right lung,3=tumour" --split split.csv

Reads the FLARE22 layout (images/<case>_0000.nii.gz, labels/<case>.nii.gz; NRRD or MetaImage too),
nnU-Net's, DICOM series in place of image files (images/<case>/), and MedSAM's own slices. Reorients
every volume to LPS, and writes for each axial slice that has a label

    imgs/<case>-<zzz>.npy   uint8 (1024, 1024): the CT window, min-max over the window, so that
                            a grey level is the same HU in every slice
    gts/<case>-<zzz>.npy    uint8 (1024, 1024): label ids
    dataset.json            name, window, label names; split, geometry and hashes of every case

Patients, not slices, are split into train, validation and test, at random or by a CSV file.
"""

from utils.data.options import parse_options

if __name__ == "__main__":  # before the imports that are slow
    options = parse_options()

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from utils.data import splits
from utils.data.frame import Frame
from utils.data.labels import WINDOWS, label_name
from utils.data.layouts import Case, LabelledSlice, Layout, Volumes, download, recognise
from utils.data.slices import (
    DATASET_FILE,
    FORMAT,
    SPLITS,
    repeated_images,
    slice_files,
    write_slice,
)
from utils.evaluation.statistics import patients_needed
from utils.system import UserError, plural, signals
from utils.system.command_line import run, shell_command
from utils.system.files import new_folder, write_json
from utils.system.loops import progress_bar

PART_PIXELS = 10  # a smaller part is a speck, and not counted as another part
OFTEN = 0.1  # of a label's masks have several parts: preprocessing suggests --parts
COMPARISONS = 4  # of the ablation: adaptive with three other policies and with the model untouched


def main(options: Namespace) -> None:
    """Preprocess, and print the next step."""
    print_outlook(preprocess(options), options.out)


def preprocess(options: Namespace) -> dict:
    """Write the slices of all cases to the new folder `options.out`, or nothing at all.

    Returns what was written to dataset.json. UserError: bad input (without `skip_bad`), or nothing
    to write.
    """
    with new_folder(options.out) as folder:
        layout = find_layout(options)
        window = window_of(layout, options)
        cases, unusable = layout.cases()
        bad = list(unusable.values())
        refuse_or_list(bad, options.skip_bad)
        if not cases:
            raise UserError("no case has an image and a label map on the same grid")
        by_file = isinstance(options.split, Path)
        if by_file:
            assigned = splits.read_split_file(
                options.split, {case.name for case in cases}, unusable
            )
        work = partial(
            write_case,
            layout=layout,
            window=window,
            folder=folder,
            min_pixels=options.min_pixels,
            parts=labels_of_parts(options.parts, layout.label_names),
        )
        entries: dict[str, dict] = {}
        notes: dict[str, list[str]] = {}  # files by what is said of them
        # Closed, so that no worker process outlives an error.
        with closing(in_workers(work, cases, options.workers)) as results:
            for case, entry in zip(cases, results, strict=True):
                if isinstance(entry, UserError):
                    refuse_or_list([str(entry)], options.skip_bad)
                    bad.append(str(entry))
                    continue
                for path, _, note in (note.partition(": ") for note in entry.pop("notes", ())):
                    notes.setdefault(note, []).append(path)
                if entry["slices"]:
                    entries[case.name] = entry
                else:
                    print(f"{case.labels[0]}: has no labels; the case is left out")
        for note, paths in notes.items():
            print(f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}: {note}")
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
            "parts": options.parts,
            "cases": entries,
        }
        write_json(folder / DATASET_FILE, meta)
    print(f"{options.out}: {splits.summary(meta)}")
    if note := note_on_parts(entries, layout.label_names):
        print(note)
    if bad:
        print(f"left out {plural(len(bad), 'bad file')}, listed above")
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
    if options.label_names:
        layout.name_labels(options.label_names)
    if not layout.label_names:
        print(
            "the labels have no names and are called label 1, label 2, ...; name them with "
            '--label-names flare22 or "1=liver,2=..."'
        )
    return layout


def window_of(layout: Layout, options: Namespace) -> tuple[float, float] | None:
    """The lowest and the highest HU; None for slices that have been windowed already."""
    if layout.windowed:
        if options.window:
            raise UserError(f"--window: {options.input} is already windowed; leave it out")
        return None
    if options.window or layout.is_flare22 or "flare22" in (options.layout, options.download):
        return options.window or WINDOWS["flare22"]
    raise UserError(
        "--window: give the HU range to keep: medsam for soft tissue, lung, flare22 as in the "
        "paper, or any LO,HI"
    )


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
            raise UserError("probably out of memory; try fewer --workers") from error


def labels_of_parts(text: str | None, label_names: dict[int, str]) -> list[int]:
    """The ids of the labels, by id or name, whose parts become instances; UserError if unknown."""
    if text == "all":
        return list(range(1, 256))
    ids = {name: label for label, name in label_names.items()}
    ids |= {str(label): label for label in range(1, 256)}
    names = [name.strip() for name in text.split(",")] if text else []
    if unknown := [name for name in names if name not in ids]:
        known = ", ".join(label_names.values()) or "ids from 1 to 255"
        raise UserError(f"--parts: no label {unknown[0]!r}; choose from {known}, or all")
    return [ids[name] for name in names]


def write_case(
    case: Case,
    layout: Layout,
    window: tuple[float, float],
    folder: Path,
    min_pixels: int,
    parts: Sequence[int],
) -> dict | UserError:
    """Write the labelled slices of a case, in a worker; its entry in dataset.json, or an error."""
    try:
        entry, arrays = layout.read(case, window)
        return entry_of_case(case, entry, arrays, folder, min_pixels, parts)
    except UserError as error:
        return error


def entry_of_case(
    case: Case,
    entry: dict,
    arrays: Iterator[LabelledSlice],
    folder: Path,
    min_pixels: int,
    parts: Sequence[int],
) -> dict:
    """Write the slices of a case; its `entry` of `Layout.read` becomes that of dataset.json."""
    frame = Frame.fit(entry["shape"][1:], (entry["spacing_mm"] or [1.0] * 3)[1:])
    slices, dropped, vanished, several = {}, 0, 0, Counter()
    for index, grey, labels in arrays:
        labels, further, small, in_parts = split_parts(labels, parts, min_pixels)
        framed, labels, lost = frame.labels_there_and_back(labels)
        dropped += small + lost
        vanished += lost
        several.update(in_parts)
        pixels = dict(enumerate(np.bincount(labels.ravel()).tolist()))
        present = {str(label): count for label, count in pixels.items() if label and count}
        further = {str(n): part for n, part in further.items() if str(n) in present}
        if present:
            image_path, label_path = slice_files(folder, case.name, index)
            slices[str(index)] = {
                "labels": present,
                **({"parts": further} if further else {}),
                "image_sha256": write_slice(image_path, frame.image_to_frame(grey)),
                "label_sha256": write_slice(label_path, framed),
            }
    return {
        "split": None,  # set once all cases are read
        **entry,
        "frame": {"native": list(frame.native), "content": list(frame.content)},
        "dropped_masks": dropped,
        "vanished_masks": vanished,  # of these, lost by shrinking to the 1024 frame
        "masks_of_several_parts": {str(label): count for label, count in sorted(several.items())},
        "slices": slices,
    }


def split_parts(
    labels: np.ndarray, parts: Sequence[int], min_pixels: int
) -> tuple[np.ndarray, dict[int, tuple[int, int]], int, list[int]]:
    """Make instances of a native label map (H, W) uint8, and drop those under `min_pixels`.

    Returns the map of instances (see utils/data/slices.py), label id and number of the further ones
    of the labels `parts` by their id, how many were dropped, and the labels that have several parts
    of PART_PIXELS or more all the same. Pixels that touch at a corner are connected.
    """
    instances, further, dropped, several = np.zeros_like(labels), {}, 0, []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is None:
            continue
        mask = labels[window] == label
        components, _ = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        if label not in parts:
            if np.count_nonzero(sizes >= PART_PIXELS) > 1:
                several.append(label)
            components, sizes = mask.astype(int), np.array([mask.sum()])
        for number, component in enumerate(np.argsort(-sizes, kind="stable"), start=1):
            if sizes[component] < min_pixels:
                dropped += 1
                continue
            instance = label if number == 1 else 255 - len(further)
            if number > 1:
                further[instance] = (label, number)
                if instance <= labels.max():
                    raise UserError(f"more than {len(further)} parts in a slice; see --min-pixels")
            instances[window][components == 1 + component] = instance
    return instances, further, dropped, several


def note_on_parts(entries: Mapping[str, dict], label_names: Mapping[int, str]) -> str:
    """Which labels often have several parts but one box, or ""; of entries of dataset.json."""
    masks, several = Counter(), Counter()
    for entry in entries.values():
        several.update(entry["masks_of_several_parts"])
        masks.update(label for item in entry["slices"].values() for label in item["labels"])
    often = [
        f"{label_name(label_names, int(label))} ({count / masks[label]:.0%} of the masks)"
        for label, count in several.most_common()
        if count > OFTEN * masks[label]
    ]
    return often and (
        f"labels with several parts in a slice, which share one box: {', '.join(often)}; use "
        "--parts to give every part its own"
    )


def drop_repeated(cases: dict[str, dict], folder: Path) -> list[str]:
    """Remove cases made from the image of an earlier one: one patient must not be in two splits.

    They go from `cases`, entries of dataset.json, and from `folder`. Returns a line for each.
    """
    lines = []
    for case, other in repeated_images({case: e["image_sha256"] for case, e in cases.items()}):
        image, same = cases[case]["image"], cases[other]["image"]
        lines.append(f"{image}: is the same image as {same}; remove one")
        for index in cases.pop(case)["slices"]:
            for path in slice_files(folder, case, int(index)):
                path.unlink()
    return lines


def refuse_or_list(bad: list[str], skip_bad: bool) -> None:
    """Stop at bad input with all of it in the message, or list it with `--skip-bad`."""
    if bad and not skip_bad:
        raise UserError("; ".join(bad) + "; use --skip-bad to leave them out")
    for line in bad:
        print(f"skipped: {line}")


def print_outlook(meta: dict, out: str) -> None:
    """Print what the test split of a dataset.json can show, and the command to go on with."""
    patients = splits.patients_by_split(meta["cases"])
    train, val, test = (len(patients[part]) for part in SPLITS)
    if test:
        print(splits.note_on_test_split(test, patients_needed(COMPARISONS)))
    if train and val:
        words = ("--data", out, "--run", Path(out).resolve().name)
        words += ("--policy", "recommended", "--ema")
        print("next: " + shell_command("python", "train_adaptive.py", *words))
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
