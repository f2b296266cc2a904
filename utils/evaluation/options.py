"""The options of eval.py. Quick to import, so that --help is: no PyTorch, pandas or matplotlib."""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

from perturb import Shift
from utils.data.labels import parse_label_names
from utils.data.options import parse_window
from utils.system.command_line import Parser, integer, shell_command
from utils.training.options import check_constants, run_folder

# The paper does not give its own.
SHIFTS = [*map(Shift.parse, ("15%", "20px", "5%", "10%", "20%", "25%"))]
DRAW_TAKES = {*"predict draw interpolate window label_names runs models out device amp".split()}
PREDICT_TAKES = {*DRAW_TAKES, "boxes", "propagate", "probabilities", "overwrite"} - {"draw"}
NAME_LENGTH = 60  # characters of a default folder's name, at most 4 bytes each


class ModelSpec(NamedTuple):
    """A model to compare."""

    name: str
    model: str  # the network with its normalisation
    checkpoint: Path | str | None  # a file, "download", or None: the weights that it comes with


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, and `command`, the command line to repeat them; a bad one ends the process."""
    check_constants()
    # fmt: off
    parser = Parser(description="Compare models under tight, too large and too small boxes, with "
                    "tables, figures and a report; or segment scans.")
    add = parser.add_argument_group("models and data").add_argument
    add("--runs", nargs="+", default=[], type=run_folder, metavar="RUN",
        help="runs of train_adaptive.py, folders or names in work_dir/; the weights they started "
        "from are added")
    add("--models", nargs="+", default=[], metavar="NAME=MODEL[:CHECKPOINT]", type=parse_model,
        help="MODEL is lite_medsam, medsam_vit_b or sam_vit_b|l|h; CHECKPOINT the full weights, a "
        "decoder_best.pth, or download, which fetches MedSAM's or SAM's into work_dir/ (not needed "
        "for lite_medsam)")
    add("--data", nargs="+", metavar="DIR",
        help="folder(s) made by preprocess_ct.py (default: those of --runs)")
    add("--split", choices=("train", "val", "test", "all"), default="test", help="data split")
    add("--allow-seen", action="store_true",
        help="also evaluate models on patients that they were trained or selected on, which is an "
        "error otherwise, and mark the report")
    add("--slices", type=integer(1), metavar="N",
        help="at most N slices of each patient (default: all)")
    add("--baseline", metavar="NAME", help="model to compare with (default: the first)")
    add("--proposed", metavar="NAME", help="model of interest (default: the last)")

    add = parser.add_argument_group("boxes").add_argument
    add("--shift", nargs="+", type=parse_shift, default=SHIFTS, metavar="SHIFT",
        help="largest shifts of an edge: %% of the side (under 50) or px of the 1024 frame; the "
        "conclusions are about the first (default 15%% 20px 5%% 10%% 20%% 25%%)")
    add("--draws", type=integer(1), default=1, metavar="N",
        help="random boxes for each instance, kind and shift")
    add("--sweep", action=argparse.BooleanOptionalAction, default=True,
        help="add the robustness curve: all edges moved by -25 to 25 %% and -20 to 20 px")
    add("--seed", type=integer(0), default=0, metavar="N", help="seed of the random boxes")
    add("--boxes", nargs="+", metavar="FILE",
        help="boxes that people drew, on --data, which adds scores, or on the scans of --predict: "
        "a .csv with case,label,z,x0,y0,x1,y1 (voxels of the stored file from 0, maxima inclusive; "
        "case is optional for one scan), a rough label map, 3D Slicer's .mrk.json, or a folder of "
        "such files, each named after its case")

    add = parser.add_argument_group("scoring").add_argument
    add("--tolerance", type=parse_tolerance, default=2.0, metavar="MM",
        help="NSD tolerance in mm, or flare22 for that challenge's tolerance of each organ; in "
        "pixels for MedSAM's slices, which have no spacing")
    add("--volume", action="store_true",
        help="score whole volumes in 3D as well; their slices must be contiguous")
    add("--every", nargs="+", type=integer(2), default=[], metavar="N",
        help="also score in 3D (implies --volume) tight boxes in every N-th slice of a target, "
        "with interpolation between them, and one box that is propagated")

    scans = parser.add_argument_group("instead: segment scans without labels").add_argument
    scans("--predict", metavar="SCAN",
          help="segment a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or a folder "
          "of either, from --boxes with the one model of --runs or --models; where masks overlap, "
          "the higher probability wins")
    scans("--draw", nargs="?", const=0, type=integer(0), metavar="PORT",
          help="draw the boxes in a browser on this machine instead of --boxes; with the same "
          "--out, earlier drawings are continued")
    scans("--interpolate", nargs="?", const=0, type=integer(1), metavar="N",
          help="fill the slices between two boxes of a label with boxes interpolated linearly in "
          "z; with N, only across at most N slices (--draw always interpolates)")
    scans("--propagate", action="store_true",
          help="follow every box to the slices above and below: the last mask gives the next box, "
          "until the mask is empty or its area doubles or halves")
    scans("--window", type=parse_window, metavar="HU",
          help="flare22, lung, medsam, or LO,HI (default: that of the run's data)")
    scans("--label-names", type=parse_label_names, metavar="NAMES",
          help="ids of the names in --boxes: flare22, a list 1=liver,2=spleen, or a file, such as "
          "predictions.json of other scans (default: those of the run's data, else alphabetical)")
    scans("--probabilities", action="store_true", help="also write a float volume per label")

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", type=Path, help="folder of the results (default work_dir/eval/NAME,"
        " named after the runs or models; for scans work_dir/predict/SCAN)")
    add("--overwrite", action="store_true",
        help="replace the results in --out; without it, existing results are an error")
    add("--figures", action=argparse.BooleanOptionalAction, default=True,
        help="draw examples, chosen by rule: fig4.png, fig5.png, fig6.png")
    add("--save-predictions", action="store_true",
        help="write label volumes from the tight boxes, in the source images' geometry")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=integer(0), metavar="N",
        help="processes that score while the models predict (default: up to 8 with a GPU, 0 on a "
        "CPU, where they would take cores from the decoder)")
    add("--cache", choices=("on", "off"), default="on",
        help="keep the embeddings, 2 MiB per slice, beside the slices; off encodes them each time")
    add("--cache-dir", metavar="DIR",
        help="keep them in this folder, e.g. if the slices' folder is read-only")
    add("--amp", choices=("off", "fp16", "bf16"), default="off",
        help="half precision for the decoder; fp16 needs a GPU")
    add("--device", default="auto", metavar="NAME", help="cuda, cuda:N, cpu, auto")
    # fmt: on
    options = parser.parse_args(argv)
    if not options.runs and not options.models:
        parser.error("give --runs RUN or --models NAME=MODEL")
    given = parser.given(argv)
    for name in ("draw", "interpolate", "propagate", "window", "label_names", "probabilities"):
        if name in given and not options.predict:
            parser.error(f"--{name.replace('_', '-')}: requires --predict SCAN")
    draws = options.draw is not None
    if options.predict and not options.boxes and not draws:
        parser.error("--predict: give the boxes of the scan, --boxes FILE, or --draw them")
    takes = DRAW_TAKES if draws else PREDICT_TAKES
    mode = "draw" if draws else "predict"
    for name in sorted(given.keys() - takes) if options.predict else ():
        parser.error(f"--{mode}: cannot be used with --{name.replace('_', '-')}")
    if len(set(options.shift)) < len(options.shift):
        parser.error("--shift: the same shift is given twice")
    if options.cache_dir and options.cache == "off":
        parser.error("--cache-dir: has no effect with --cache off; leave out one of the two")
    words = sys.argv[1:] if argv is None else argv
    options.every = sorted(set(options.every))
    options.volume |= bool(options.every)
    options.command = shell_command("python", "eval.py", *words)
    return options


def parse_model(text: str) -> ModelSpec:
    """NAME=MODEL[:CHECKPOINT]; NAME defaults to MODEL."""
    before_checkpoint = text.partition(":")[0]
    name, equals, rest = text.partition("=") if "=" in before_checkpoint else ("", "", text)
    model, _, checkpoint = rest.partition(":")
    if not model or (equals and not re.fullmatch(r"\w[\w.+-]*", name)):
        raise argparse.ArgumentTypeError(
            f"expected NAME=MODEL[:CHECKPOINT], NAME of letters, digits and _.+-, got {text!r}"
        )
    return ModelSpec(name or model, model, checkpoint or None)


def parse_shift(text: str) -> Shift:
    """A largest shift, "15%" or "20px"."""
    try:
        shift = Shift.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if shift.size <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return shift


def parse_tolerance(text: str) -> float | str:
    """A tolerance in mm, or "flare22"."""
    if text == "flare22":
        return text
    with contextlib.suppress(ValueError):
        if 0 <= (tolerance := float(text)) < float("inf"):
            return tolerance
    raise argparse.ArgumentTypeError(f"expected mm (0 or more) or flare22, got {text!r}")


def default_out(options: argparse.Namespace) -> Path:
    """work_dir/eval/<names of the runs or models joined by "+", cut at NAME_LENGTH>."""
    names = [Path(folder).resolve().name for folder in options.runs]
    name = "+".join(names or [spec.name for spec in options.models])
    return Path("work_dir", "eval", name[:NAME_LENGTH])
