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
    parser = Parser(description="Compare models under boxes that are tight, too large and too small"
                    ": tables, figures, report.")
    add = parser.add_argument_group("what to compare on what").add_argument
    add("--runs", nargs="+", default=[], type=run_folder, metavar="RUN",
        help="runs of train_adaptive.py, folders or names in work_dir/; the weights they started "
        "from are added")
    add("--models", nargs="+", default=[], metavar="NAME=MODEL[:CHECKPOINT]", type=parse_model,
        help="MODEL is lite_medsam, medsam_vit_b or sam_vit_b|l|h; CHECKPOINT the full weights, a "
        "decoder_best.pth, or download, which fetches MedSAM's or SAM's into work_dir/ (not needed "
        "for lite_medsam)")
    add("--data", nargs="+", metavar="DIR",
        help="folder(s) of preprocess_ct.py (default: those of --runs)")
    add("--split", choices=("train", "val", "test", "all"), default="test", help="of the data")
    add("--allow-seen", action="store_true",
        help="evaluate models on patients that they were trained on or chosen by too, which is an "
        "error otherwise, and mark the report")
    add("--slices", type=integer(1), metavar="N",
        help="at most N slices of each patient (default: all)")
    add("--baseline", metavar="NAME", help="compared with (default: the first model)")
    add("--proposed", metavar="NAME", help="of interest (default: the last model)")

    add = parser.add_argument_group("boxes").add_argument
    add("--shift", nargs="+", type=parse_shift, default=SHIFTS, metavar="SHIFT",
        help="largest shifts of an edge: %% of the side (under 50) or px of the 1024 frame; the "
        "conclusions are about the first (default 15%% 20px 5%% 10%% 20%% 25%%)")
    add("--draws", type=integer(1), default=1, metavar="N",
        help="random boxes for each instance, kind and shift")
    add("--sweep", action=argparse.BooleanOptionalAction, default=True,
        help="the robustness curve: all edges by -25 to 25 %% and -20 to 20 px")
    add("--seed", type=int, default=0, metavar="N", help="of the random boxes")
    add("--boxes", nargs="+", metavar="FILE",
        help="boxes that people drew on --data, scored as well, or of the scans of --predict: a "
        ".csv with case,label,z,x0,y0,x1,y1 (voxels of the stored file from 0, maxima inclusive; "
        "no case if there is one), a rough label map, 3D Slicer's .mrk.json, or a folder of such "
        "files, each named after its case")

    add = parser.add_argument_group("scoring").add_argument
    add("--tolerance", type=parse_tolerance, default=2.0, metavar="MM",
        help="of NSD in mm, or flare22 for that challenge's own per organ; of MedSAM's slices, "
        "which have no spacing, in pixels")
    add("--volume", action="store_true",
        help="score whole volumes in 3D as well; their slices must be contiguous")

    add("--every", nargs="+", type=integer(2), default=[], metavar="N",
        help="score in 3D, with --volume, what comes of tight boxes in every N-th slice of a target"
        " that are interpolated between, and of one box that is propagated")

    scans = parser.add_argument_group("label volumes of scans without labels, instead").add_argument
    scans("--predict", metavar="SCAN",
          help="a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or a folder of "
          "either, segmented from --boxes by the one model of --runs or --models; where masks "
          "overlap the greater probability wins")
    scans("--draw", nargs="?", const=0, type=integer(0), metavar="PORT",
          help="draw the boxes in a browser on this machine, not --boxes; the same --out goes "
          "on with what was drawn before")
    scans("--interpolate", nargs="?", const=0, type=integer(1), metavar="N",
          help="fill the slices between two boxes of a label with boxes whose edges are linear in "
          "z; with N, not over more than N slices (--draw always does)")
    scans("--propagate", action="store_true",
          help="follow every box to the slices above and below: the last mask gives the next box, "
          "until the mask is empty or its area doubles or halves")
    scans("--window", type=parse_window, metavar="HU",
          help="flare22, lung, medsam, or LO,HI (default: that of the run's data)")
    scans("--label-names", type=parse_label_names, metavar="NAMES",
          help="ids of the names in --boxes: flare22, like 1=liver,2=spleen, or a file with them, "
          "also predictions.json of other scans (default: of the run's data, else by the alphabet)")
    scans("--probabilities", action="store_true", help="a float volume for each label as well")

    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", type=Path, help="folder of the results (default work_dir/eval/NAME,"
        " of the runs' or models' names; of scans work_dir/predict/SCAN)")
    add("--overwrite", action="store_true",
        help="replace the results that --out holds; without it they are kept and eval.py stops")
    add("--figures", action=argparse.BooleanOptionalAction, default=True,
        help="examples, chosen by rule: fig4.png, fig5.png, fig6.png")
    add("--save-predictions", action="store_true",
        help="label volumes of the tight boxes, in the source images' geometry")

    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=integer(0), metavar="N",
        help="processes that score while the models go on (default: up to 8 with a GPU, 0 on a "
        "CPU, where they would take its cores from the decoder)")
    add("--cache", choices=("on", "off"), default="on",
        help="keep the embeddings, 2 MiB per slice, beside the slices; off encodes them each time")
    add("--cache-dir", metavar="DIR",
        help="keep them in this folder, if the slices lie where nothing can be written")
    add("--amp", choices=("off", "fp16", "bf16"), default="off",
        help="half precision of the decoder; fp16 needs a GPU")
    add("--device", default="auto", metavar="NAME", help="cuda, cuda:N, cpu, auto")
    # fmt: on
    options = parser.parse_args(argv)
    if not options.runs and not options.models:
        parser.error("give --runs RUN or --models NAME=MODEL")
    given = parser.given(argv)
    for name in ("draw", "interpolate", "propagate", "window", "label_names", "probabilities"):
        if name in given and not options.predict:
            parser.error(f"--{name.replace('_', '-')}: goes with --predict SCAN")
    draws = options.draw is not None
    if options.predict and not options.boxes and not draws:
        parser.error("--predict: give the boxes of the scan, --boxes FILE, or --draw them")
    takes = DRAW_TAKES if draws else PREDICT_TAKES
    for name in sorted(given.keys() - takes) if options.predict else ():
        parser.error(f"--{'draw' if draws else 'predict'}: goes without --{name.replace('_', '-')}")
    if len(set(options.shift)) < len(options.shift):
        parser.error("--shift: the same shift is given twice")
    if options.cache_dir and options.cache == "off":
        parser.error("--cache-dir: --cache off keeps nothing; leave out one of the two")
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
