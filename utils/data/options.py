"""The options of preprocess_ct.py, and types of options that are several numbers."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from utils.data.labels import FLARE22_LABELS, WINDOWS, parse_label_names
from utils.system.command_line import Parser, integer
from utils.system.downloads import DATA

# --- Defaults ------------------------------------------------------------------------------------
SPLIT = (0.8, 0.1, 0.1)  # shares of the patients: train, validation, test
WORKERS = min(4, os.cpu_count() or 1)  # each holds one volume at a time


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of preprocess_ct.py: exactly one of --input, --download and --images is given.

    Raises UserError: an unknown option, or a value out of range.
    """
    parser = Parser(
        description="CT volumes with label maps -> 1024 x 1024 slices for training and evaluation."
    )
    group = parser.add_argument_group("input and output")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    text = """folder of a data set: images/ and labels/; the layout of nnU-Net, TotalSegmentator,
        LiTS, BTCV or KiTS; or MedSAM's slices, imgs/ and gts/ or the CVPR 2024 challenge's .npz"""
    add("--input", metavar="DIR", help=text)
    text = "instead: download this data set into the parent folder of --out, and unpack it"
    add("--download", choices=tuple(DATA), help=text)
    text = "instead: folder of images, <case>_0000.nii.gz or <case>/ with one DICOM series each"
    add("--images", metavar="DIR", help=text)
    add = group.add_argument
    add("--labels", metavar="DIR", help="folder of their label maps, <case>.nii.gz, ids 0-255")
    text = """layout of --input: flare22, nnunet, totalsegmentator, lits, btcv, kits, medsam, cvpr24
        or auto, by file names; flare22 also names the labels, auto only if files are FLARE22's"""
    add("--layout", default="auto", metavar="NAME", help=text)
    add("--out", required=True, metavar="DIR", help="folder to create; must be new or empty")
    add = parser.add_argument_group("slice content").add_argument
    text = """Hounsfield units: medsam (-160,240, soft tissue, as for MedSAM's weights), lung
        (-1000,400), flare22 (-360,440, the paper's), or LO,HI (default flare22 for FLARE22;
        required for other data)"""
    add("--window", type=parse_window, metavar="HU", help=text)
    text = """flare22, a list "1=left lung,2=right lung", or a file: ITK-SNAP's label descriptions,
        nnU-Net's dataset.json, a label map of TotalSegmentator (default: those of nnU-Net's
        dataset.json or of --layout, else label 1, label 2, ...)"""
    add("--label-names", type=parse_label_names, metavar="NAMES", help=text)
    text = "drop 2D masks of fewer native pixels"
    add("--min-pixels", type=integer(0), default=0, metavar="N", help=text)
    text = """labels (ids or names, or all) whose connected parts in a slice each become an instance
        with its own box, such as both kidneys under one label, or several tumours"""
    add("--parts", metavar="LABEL[,LABEL]", help=text)
    add = parser.add_argument_group("train, validation and test patients").add_argument
    text = """shares of the patients for train, val, test, or a .csv file with the columns
        case,split or case,split,patient, where split is train, val or test"""
    shares = ",".join(map(str, SPLIT))
    add("--split", type=parse_split, default=shares, metavar="A,B,C|CSV", help=text)
    add("--seed", type=integer(0), default=0, metavar="N", help="seed of a split by shares")
    add = parser.add_argument_group("processing").add_argument
    add("--workers", type=integer(1), default=WORKERS, metavar="N", help="one volume per worker")
    add("--skip-bad", action="store_true", help="list bad cases and go on without them")
    options = parser.parse_args(argv)
    folders = [Path(folder).resolve() for folder in (options.images, options.labels) if folder]
    if folders[1:] == folders[:1] != []:
        parser.error("--labels: is the same as --images; give the folder of the label maps")
    if bool(options.images) != bool(options.labels):
        parser.error("--images DIR and --labels DIR go together, without --input or --download")
    if options.layout != "auto" and not options.input:
        parser.error("--layout: requires --input DIR; leave it out")
    if options.label_names is None and "flare22" in (options.layout, options.download):
        options.label_names = FLARE22_LABELS
    return options


# --- Types ---------------------------------------------------------------------------------------
def parse_window(text: str) -> tuple[float, float]:
    """(lowest, highest) HU of a preset's name or "LO,HI"."""
    low, high = WINDOWS[text] if text in WINDOWS else _numbers(text, 2, f" or {', '.join(WINDOWS)}")
    if not low < high:
        raise argparse.ArgumentTypeError(f"expected LO,HI with LO < HI, got {text}")
    return low, high


def parse_split(text: str) -> tuple[float, float, float] | Path:
    """Shares of train, val and test, which add up to 1, or the path of a .csv file."""
    if text.lower().endswith(".csv"):
        return Path(text)
    shares = _numbers(text, 3, " or a .csv file")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"shares must be 0 or more and add up to 1, got {text}")
    return shares


def _numbers(text: str, count: int, other: str = "") -> tuple[float, ...]:
    """`count` finite numbers joined by commas; an error also names `other` values."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        expected = f"{count} numbers joined by commas{other}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return numbers
