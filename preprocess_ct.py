"""CT volumes with label maps -> 1024 x 1024 slices for training and evaluation.

    python preprocess_ct.py --download flare22 --out data/flare22
    python preprocess_ct.py --input FLARE22Train --out data/flare22
    python preprocess_ct.py --input nnUNet_raw/Dataset009_Spleen --out data/spleen
    python preprocess_ct.py --input npy/CT_Abd --label-names flare22 --out data/abdomen
    python preprocess_ct.py --images lung/images --labels lung/labels --out data/lung \\
        --window lung --label-names "1=left lung,2=right lung,3=tumour"

Reads the FLARE22 layout (images/<case>_0000.nii.gz, labels/<case>.nii.gz), nnU-Net's (imagesTr/,
labelsTr/, and dataset.json with label names), and DICOM series in the place of images
(images/<case>/), turns every volume to LPS, and writes for each axial slice that has a label

    imgs/<case>-<zzz>.npy   uint8 (1024, 1024): the CT window, min-max over the window, so that
                            a grey level is the same HU in every slice
    gts/<case>-<zzz>.npy    uint8 (1024, 1024): label ids
    dataset.json            window, label names, split, geometry and hash of every case and slice

MedSAM's own slices (imgs/, gts/ of .npy, made by its scripts) are taken as well: their grey levels
stay as they are, and of what is not in them, window and geometry, dataset.json says null.

A case counts as a patient: patients, not slices, are split into train, validation and test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.flare22 import FLARE22_LABELS, WINDOWS
from utils.data.labels import label_name, parse_label_names
from utils.system import signals
from utils.system.command_line import Parser, run, shell_command
from utils.system.errors import UserError

if TYPE_CHECKING:
    from utils.data.layouts import Source
    from utils.data.medsam_npy import NpyCase
    from utils.data.volumes import CasePair

    Case = CasePair | NpyCase
    Layer = tuple[int, np.ndarray, np.ndarray]  # number, grey levels (H, W), label ids (H, W)
    Opened = tuple[dict, Callable[[], Iterator[Layer]]]  # entry in dataset.json, labelled slices

# --- Defaults ------------------------------------------------------------------------------------
WINDOW = "flare22"  # HU, a preset or LO,HI
SPLIT = (0.8, 0.1, 0.1)  # shares of the patients: train, validation, test
SEED = 0  # of the split
MIN_PIXELS = 0  # 2D masks of fewer native pixels are dropped
WORKERS = min(4, os.cpu_count() or 1)  # each holds one volume at a time


def main(argv: list[str] | None = None) -> None:
    """The command line of `preprocess`."""
    args = parse_args(argv)
    source = source_of(args)
    if source.npy and args.window is not None:
        raise UserError(f"--window: {args.input} was windowed when it was made; leave it out")
    window = args.window or WINDOWS[WINDOW]
    names = source.label_names
    if args.label_names is not None:
        names = args.label_names
    elif names is None:
        names = FLARE22_LABELS if window == WINDOWS["flare22"] and not source.npy else {}
    preprocess(
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
    print("next: " + shell_command("python", "train_adaptive.py", "--data", args.out))


def source_of(args) -> Source:
    """The volumes that the options name.

    Raises:
        UserError: as `layouts.recognise`, `download.fetch` and `download.unpack`.
    """
    from utils.data.layouts import Source, recognise

    if args.download:
        from utils.system.downloads import DATA, fetch, unpack

        out = check_free(args.out)  # before hours of downloading
        folder = out.parent / Path(DATA[args.download].file).stem
        if out == folder:
            raise UserError(f"{out}: is where the data set is unpacked; choose another --out")
        if not folder.is_dir():  # else it is whole, and the archive may be gone
            archive = fetch(DATA[args.download], out.parent)
            unpack(archive, folder)
            print(f"{folder}: unpacked; {archive} can be removed")
        # The archive may hold the folders, or a folder with them (and __MACOSX beside it).
        inside = [found.parent for found in sorted(folder.glob("*/images"))]
        inside = [found for found in inside if (found / "labels").is_dir()]
        return recognise(inside[0] if inside else folder, "flare22")
    if args.input is None:
        return Source(Path(args.images), Path(args.labels))
    source = recognise(args.input, args.layout)
    print(f"{args.input}: {source.what}")
    return source


def preprocess(
    images: str | Path,
    labels: str | Path,
    out: str | Path,
    channel: int | None = None,
    npy: bool = False,
    window: tuple[float, float] = WINDOWS[WINDOW],
    label_names: dict[int, str] | None = None,
    split: tuple[float, float, float] = SPLIT,
    seed: int = SEED,
    min_pixels: int = MIN_PIXELS,
    skip_bad: bool = False,
    workers: int = WORKERS,
) -> None:
    """Write the slices of all cases to the new folder `out`, or nothing at all.

    Args:
        images, labels: folders in the FLARE22 layout, or MedSAM's.
        out: must not exist, or be empty.
        channel: of images that have several; see `volumes.find_pairs`.
        npy: the folders hold MedSAM's slices; see `medsam_npy`.
        window: (lowest, highest) HU; mapped linearly to 0-255, clipped outside. Not of slices.
        label_names: by label id; those of FLARE22 if None.
        split: shares of train, validation and test patients; they add up to 1.
        seed: of the split.
        min_pixels: 2D masks with fewer native pixels become background.
        skip_bad: list cases that cannot be used and go on without them.
        workers: processes.

    Raises:
        UserError: bad input (without `skip_bad`), or nothing to write.
    """
    from utils.data.slices import DATASET_FILE, FORMAT
    from utils.system.files import cannot_write, locked, write_json

    out = check_free(out)
    if npy:
        from utils.data.medsam_npy import find_cases, read_case

        usable, bad = find_cases(Path(images), Path(labels))
        read = read_case
    else:
        usable, bad = find_volumes(images, labels, channel)
        read = partial(read_volumes, window=window)
    refuse_or_list(bad, skip_bad)
    if not usable:
        raise UserError(f"{images}: no case has both an image and a label that fit")

    # Everything is written aside and renamed at the end: a run that fails leaves nothing behind,
    # and what one that was killed left is removed by the next.
    aside = out.with_name(f".{out.name}.partial")
    lock = out.with_name(f".{out.name}.lock")
    busy = f"{out}: another preprocess_ct.py is writing it; wait for it"
    with locked(lock, busy), signals.deferred():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            work = partial(process_case, read=read, out=aside, min_pixels=min_pixels)
            cases = write_slices(aside, usable, work, workers, bad, skip_bad)
            if not cases:
                raise UserError(
                    f"{labels}: no slice of any case has a label; are these label maps?"
                )
            for case, part in split_patients(list(cases), split, seed).items():
                cases[case]["split"] = part
            names = FLARE22_LABELS if label_names is None else label_names
            meta = {
                "format": FORMAT,
                "window": None if npy else list(window),
                "label_names": {str(label): name for label, name in names.items()},
                "split": {"shares": list(split), "seed": seed},
                "min_pixels": min_pixels,
                "cases": cases,
            }
            write_json(aside / DATASET_FILE, meta)
            if out.exists():
                out.rmdir()
            aside.replace(out)
        except OSError as error:
            raise cannot_write(out, error) from error
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError(f"{out}: out of memory, most likely; try fewer --workers") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    print_summary(out, meta, len(bad))


def find_volumes(
    images: str | Path, labels: str | Path, channel: int | None
) -> tuple[list[CasePair], list[str]]:
    """The cases whose image and label are on one grid, and a line for each file that is no use.

    Raises:
        UserError: as `volumes.find_pairs`.
    """
    from utils.data.volumes import check_geometry, find_pairs

    pairs, bad = find_pairs(images, labels, channel)
    usable = []
    for pair in pairs:
        try:
            check_geometry(pair)
            usable.append(pair)
        except UserError as error:
            bad.append(str(error))
    return usable, bad


def check_free(out: str | Path) -> Path:
    """The absolute path of a folder that is to be made.

    Raises:
        UserError: there is something in its place.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another --out or remove it first")
    return out


def write_slices(
    out: Path, pairs: list[Case], work: partial, workers: int, bad: list[str], skip_bad: bool
) -> dict[str, dict]:
    """Write the slices of all cases by `work`, and find their entries in dataset.json.

    Lines about cases that are not used are added to `bad`.

    Raises:
        UserError: there is such a case, and not `skip_bad`.
    """
    from tqdm import tqdm

    from utils.data.slices import repeated_images, slice_name

    for folder in (out / "imgs", out / "gts"):
        folder.mkdir(parents=True)
    cases: dict[str, dict] = {}
    with closing(run_all(work, pairs, workers)) as results:  # no worker outlives an error
        results = tqdm(results, total=len(pairs), unit="case", disable=None)
        for pair, (entry, error) in zip(pairs, results, strict=True):
            signals.raise_if_pending()
            if error:
                refuse_or_list([error], skip_bad)
                bad.append(error)
            elif entry["slices"]:
                cases[pair.case] = entry
            else:
                print(f"{pair.label}: holds no label; the case is not used")
    for case, other in repeated_images({case: e["image_sha256"] for case, e in cases.items()}):
        line = f"{cases[case]['image']}: the same image as {cases[other]['image']}; remove one"
        refuse_or_list([line], skip_bad)
        bad.append(line)
        for index in cases.pop(case)["slices"]:
            for folder in ("imgs", "gts"):
                (out / folder / f"{slice_name(case, int(index))}.npy").unlink()
    return cases


def refuse_or_list(bad: list[str], skip_bad: bool) -> None:
    """Stop at bad input, all of it in the message, or list it on the screen with `--skip-bad`."""
    if not bad:
        return
    if not skip_bad:
        raise UserError("; ".join(bad) + "; --skip-bad goes on without")
    for line in bad:
        print(f"skipped: {line}")


def run_all(work: partial, items: list, workers: int) -> Iterator[tuple[dict | None, str | None]]:
    """`work` for every item, in order, in this process or in several."""
    if workers <= 1 or len(items) == 1:
        yield from map(work, items)
        return
    own = signals.init_worker
    with ProcessPoolExecutor(min(workers, len(items)), initializer=own) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def process_case(
    case: Case, read: Callable[[Case], Opened], out: Path, min_pixels: int
) -> tuple[dict | None, str | None]:
    """Write the labelled slices of one case; runs in a worker process.

    Returns:
        The case's entry in dataset.json and None, or None and the line that says what is wrong.
    """
    from utils.data.frame import Frame
    from utils.data.slices import slice_name, write_slice

    try:
        entry, layers = read(case)
    except UserError as error:
        return None, str(error)
    frame = Frame.of(entry["shape"][1:], (entry["spacing_mm"] or [1.0] * 3)[1:])
    slices = {}
    dropped = 0
    for index, grey, labels in layers():
        pixels = np.bincount(labels.ravel(), minlength=256)
        pixels[0] = 0
        small = np.flatnonzero((pixels > 0) & (pixels < min_pixels))
        dropped += len(small)
        kept = np.where(np.isin(labels, small), 0, labels) if len(small) else labels
        there, kept, lost = frame.labels_there_and_back(kept)
        dropped += lost
        pixels = np.bincount(kept.ravel(), minlength=256)
        pixels[0] = 0
        if not pixels.any():
            continue
        name = slice_name(case.case, index)
        slices[str(index)] = {
            "labels": {str(label): int(pixels[label]) for label in np.flatnonzero(pixels)},
            "image_sha256": write_slice(out / "imgs" / f"{name}.npy", frame.image_to_frame(grey)),
            "label_sha256": write_slice(out / "gts" / f"{name}.npy", there),
        }
    return {
        "split": None,  # known when all cases are
        **entry,
        "frame": {"native": list(frame.native), "content": list(frame.content)},
        "dropped_masks": dropped,
        "slices": slices,
    }, None


def read_volumes(pair: CasePair, window: tuple[float, float]) -> Opened:
    """Read the two volumes of a case.

    Returns:
        The case's entry in dataset.json, and a function that goes through its labelled slices: z,
        grey levels (H, W) of the window, float 0-255, and label ids (H, W) uint8.

    Raises:
        UserError: a volume that cannot be used, or nothing within the window.
    """
    from utils.data.volumes import digest, read_image, read_label_map

    labels = read_label_map(pair.label).array
    image = read_image(pair.image)
    low, high = window
    lowest, highest = image.array.min(), image.array.max()
    if lowest >= high or highest <= low:
        raise UserError(
            f"{pair.image}: its values, {lowest:g} to {highest:g}, all lie outside the window of "
            f"{low:g} to {high:g} HU; are they Hounsfield units? See --window"
        )

    def layers() -> Iterator[Layer]:
        for z in np.flatnonzero(labels.any(axis=(1, 2))).tolist():
            grey = (np.clip(image.array[z], low, high) - low) * (255 / (high - low))
            yield z, grey, labels[z]

    entry = {
        "image": pair.image.name,
        "image_sha256": digest(pair.image),
        "label": pair.label.name,
        "label_sha256": digest(pair.label),
        "shape": list(labels.shape),
        "spacing_mm": list(image.spacing_mm),
        "origin_mm": list(image.origin_mm),
        "direction": list(image.direction),
        "stored_orientation": image.stored_orientation,
    }
    return entry, layers


def split_patients(
    cases: list[str], shares: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Assign each case to train, val or test, at random but the same for the same seed.

    Counts are the shares rounded by largest remainder; where there are enough cases, every split
    that has a share gets at least one.
    """
    from utils.data.slices import SPLITS

    exact = np.array(shares) * len(cases)
    counts = np.floor(exact + 1e-9).astype(int)
    while counts.sum() < len(cases):
        counts[np.argmax(exact - counts)] += 1
    for part in np.flatnonzero((exact > 0) & (counts == 0)):
        if counts.max() > 1:
            counts[counts.argmax()] -= 1
            counts[part] += 1
    order = np.random.default_rng(seed).permutation(sorted(cases))
    parts = np.repeat(SPLITS, counts)
    return {str(case): str(part) for case, part in zip(order, parts, strict=True)}


def print_summary(out: Path, meta: dict, skipped: int) -> None:
    """Cases, slices and instances by split and by label, and what was left out."""
    from utils.data.slices import SPLITS

    cases = meta["cases"].values()
    names = {int(label): name for label, name in meta["label_names"].items()}
    count: dict[int, dict[str, int]] = {}
    totals = []
    for split in SPLITS:
        chosen = [case for case in cases if case["split"] == split]
        slices = [item for case in chosen for item in case["slices"].values()]
        totals.append(f"{split} {len(chosen)} cases, {len(slices)} slices")
        for item in slices:
            for label in item["labels"]:
                by_split = count.setdefault(int(label), dict.fromkeys(SPLITS, 0))
                by_split[split] += 1
    print(f"{out}: " + "; ".join(totals))
    print(f"{'masks':<22}" + "".join(f"{split:>8}" for split in SPLITS))
    for label in sorted(count):
        row = "".join(f"{count[label][split]:>8}" for split in SPLITS)
        print(f"{label:>3} {label_name(names, label):<18}{row}")
    dropped = sum(case["dropped_masks"] for case in cases)
    if dropped or meta["min_pixels"]:
        print(f"dropped {dropped} masks under {max(1, meta['min_pixels'])} pixels")
    if skipped:
        print(f"left out {skipped} bad files, listed above")


def parse_args(argv: list[str] | None):
    """The options, as arguments of `preprocess`.

    Raises:
        UserError: an unknown option or a value out of range.
    """
    from utils.data.layouts import PARTS
    from utils.system.downloads import DATA

    parser = Parser(
        description="CT volumes with label maps -> 1024 x 1024 slices for training and evaluation."
    )
    add = parser.add_argument_group("volumes in, slices out").add_argument
    add(
        "--input",
        metavar="DIR",
        help="a data set's folder: images/ and labels/; nnU-Net's raw data with imagesTr/, "
        "labelsTr/ and dataset.json; or MedSAM's slices, imgs/ and gts/",
    )
    add(
        "--layout",
        choices=("auto", *PARTS),
        help="of --input (default auto, which tells by the folders' names)",
    )
    add(
        "--download",
        choices=tuple(DATA),
        help="instead: fetch this data set to the folder that --out is made in, and unpack it",
    )
    add(
        "--images",
        metavar="DIR",
        help="instead: the folder of <case>_0000.nii.gz, or of <case>/ with a DICOM series each",
    )
    add("--labels", metavar="DIR", help="and that of <case>.nii.gz, label ids 0-255")
    add("--out", required=True, metavar="DIR", help="folder to make; must be new or empty")
    add = parser.add_argument_group("what the slices show").add_argument
    add(
        "--window",
        type=parse_window,
        metavar="HU",
        help=f"{', '.join(WINDOWS)}, or LO,HI in Hounsfield units (default {WINDOW})",
    )
    add(
        "--label-names",
        type=parse_label_names,
        metavar="NAMES",
        help='flare22, or like "1=left lung,2=right lung" (default: those of dataset.json, else '
        "flare22 with its window, else plain numbers)",
    )
    add(
        "--min-pixels",
        type=int,
        default=MIN_PIXELS,
        metavar="N",
        help="drop 2D masks of fewer native pixels (default %(default)s)",
    )
    add = parser.add_argument_group("train, validation and test patients").add_argument
    add(
        "--split",
        type=parse_split,
        default=",".join(map(str, SPLIT)),
        metavar="A,B,C",
        help="shares of the patients for train, val, test (default %(default)s)",
    )
    add("--seed", type=int, default=SEED, help="of the split (default %(default)s)")
    add = parser.add_argument_group("the work").add_argument
    add(
        "--workers",
        type=int,
        default=WORKERS,
        metavar="N",
        help="processes, each holds one volume (default: the cores, %(default)s)",
    )
    add("--skip-bad", action="store_true", help="list bad cases and go on without them")
    args = parser.parse_args(argv)
    for option in ("seed", "min_pixels", "workers"):
        least = 1 if option == "workers" else 0
        if getattr(args, option) < least:
            raise UserError(f"--{option.replace('_', '-')}: must be {least} or more")
    folders = args.images is not None or args.labels is not None
    if [args.input is not None, args.download is not None, folders].count(True) > 1:
        raise UserError(
            "--input, --download, and --images with --labels exclude each other: give one of them"
        )
    if args.input is None:
        if args.download is None and (args.images is None or args.labels is None):
            raise UserError(
                "give --input DIR, --download NAME, or --images DIR and --labels DIR (see --help)"
            )
        if args.layout is not None:
            raise UserError("--layout: is of --input DIR; leave it out")
    args.layout = args.layout or "auto"
    return args


def parse_window(text: str) -> tuple[float, float]:
    """(lowest, highest) HU of a preset's name or "LO,HI"."""
    if text in WINDOWS:
        return WINDOWS[text]
    low, high = parse_numbers("--window", text, 2)
    if not low < high:
        raise UserError(f"--window: expected LO,HI with LO < HI, got {text}")
    return low, high


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of train, val and test, which add up to 1."""
    shares = parse_numbers("--split", text, 3)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--split: shares must be 0 or more and add up to 1, got {text}")
    return shares


def parse_numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers joined by commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UserError(f"{option}: expected {count} numbers joined by commas, got {text!r}")
    return numbers


if __name__ == "__main__":
    run(main)
