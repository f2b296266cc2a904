"""The options of train_adaptive.py; a run stores those that are not in NOT_STORED."""

import math
import os
from argparse import Namespace
from pathlib import Path

import perturb
from perturb import MIXED_SCALE, POLICIES, READING, READINGS, Perturbation
from utils.system import UserError
from utils.system.command_line import Parser, fail, integer, number
from utils.system.downloads import DOWNLOAD
from utils.system.files import is_file_name, read_json
from utils.training.errors import checked_errors

CONFIG = "config.json"  # in the folder of a run
RECOMMENDED = "recommended"  # these policies, and the mean of their decoders
INGREDIENTS = ("none", "mixed", "measured")
DEMO_EPOCHS = 2  # to stay under five minutes on two cores
EMA_DECAY = 0.998  # of --ema without a number: an average over about 500 steps
MACHINE = ("device", "amp", "boxes_per_call", "cache", "cache_dir")
MAY_CHANGE = (
    "data",
    "epochs",
    "start_share",
    "cuda_graphs",
    *MACHINE,
)  # on resume: no boxes and no losses
NOT_STORED = ("demo", "work_dir", "run", "tensorboard", "export", "format", "average")
CONSTANTS = (  # of perturb.py: lowest and highest value, and what they are
    (("DELTA_EXPAND", "DELTA_EXPAND_MAX"), 0, math.inf, "px, >= 0 (it expands)"),
    (("EPSILON_SHRINK", "EPSILON_SHRINK_MIN"), -math.inf, 0, "px, <= 0 (it shrinks)"),
    (("MEDSAM_SHIFT", "SAM2_SHIFT_MAX"), 0, math.inf, "px, >= 0"),
    (("AREA_SCALE", "MIXED_SCALE"), 0, math.inf, "a factor, >= 0"),
    (("MIXED_TIGHT", "MIXED_OUTWARD", "MIXED_INWARD"), 0, 1, "a share, 0 to 1"),
    (("MEASURED_TIGHT", "SAM2_SHARE", "SMALL_SHARE"), 0, 1, "a share, 0 to 1"),
    (("MIXED_SIZE", "MEASURED_ROWS", "ERRORS_TRAIN"), 1, math.inf, "1 or more"),
)
TAKES = {  # what goes with an option that trains nothing
    "export": {"export", "format", "work_dir", "run"},
    "average": {"average", "start_share", "work_dir", "run", *MACHINE},
}


def parse_options(argv: list[str] | None = None) -> Namespace:
    """The options; with --resume those of the run, changed by those given.

    Raises UserError: an unknown option, a value out of range, options that exclude each other, or
    no run to resume.
    """
    check_constants()
    parser = make_parser()
    options = parser.parse_args(argv)
    given = parser.given(argv)
    for mode, takes in TAKES.items():
        for name in sorted(given.keys() - takes) if mode in given else ():
            parser.error(f"--{mode}: cannot be used with --{name.replace('_', '-')}")
    if options.demo:
        for name in {"data", "run"} & given.keys():
            parser.error(f"--demo: makes its own data and run; leave out --{name}")
        options.epochs = given.get("epochs", DEMO_EPOCHS)
    elif (options.resume or options.export or options.average) and not options.run:
        parser.error("--run: give its name")
    elif not (options.data or options.resume or options.export or options.average):
        parser.error("--data: give the folder(s) made by preprocess_ct.py, or try --demo")
    if options.run is not None and not is_file_name(options.run):
        parser.error(
            f"--run: expected a name, not a path, got {options.run!r}; for a run in another "
            "folder, such as one policy of several, use --work-dir FOLDER --run NAME"
        )
    if options.cache == "off" and options.cache_dir:
        parser.error("--cache-dir: has no effect with --cache off; leave out one of the two")
    if options.resume:
        set_stored_defaults(parser, Path(options.work_dir, options.run), given)
        options = parser.parse_args(argv)
    if "start_share" in given and not (options.average or options.policy == RECOMMENDED):
        parser.error(f"--start-share: requires --average or --policy {RECOMMENDED}")
    if "errors" in given and "measured" not in policies_of(options.policy):
        parser.error("--errors: requires --policy measured; add that policy, or leave it out")
    options.batch = options.batch or int(os.environ.get("WORLD_SIZE", 1))
    return options


def set_stored_defaults(parser: Parser, folder: Path, given: dict) -> None:
    """Make the options of a run in `folder` the parser's defaults.

    Raises UserError: no run of this version, or a given option that would change boxes or losses.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: nothing to resume (no {CONFIG}); start it without --resume")
    stored = read_json(folder / CONFIG).get("options")
    if not isinstance(stored, dict) or "policy" not in stored:
        raise UserError(f"{folder / CONFIG}: not from a run that can be resumed")
    if stored.keys() != stored_options(parser.parse_args([])).keys() - {"resume"}:
        raise UserError(f"{folder / CONFIG}: its options are of another version; start a new run")
    for name, value in given.items():
        if name in stored and name not in MAY_CHANGE and stored[name] != value:
            raise UserError(
                f"{folder}: was started with --{name.replace('_', '-')} {stored[name]}, not "
                f"{value}; resume it without that option, or start a new run"
            )
    for path in given.get("data", stored["data"]):
        if not Path(path).is_dir():
            raise UserError(f"{folder}: its data {path} is gone; give the new path with --data")
    parser.set_defaults(**stored)


def policies_of(text: str) -> list[str]:
    """The policies that --policy names."""
    return [*INGREDIENTS] if text == RECOMMENDED else text.split(",")


def stored_options(options: Namespace) -> dict:
    """The options that a run stores, and `resume`."""
    return {name: value for name, value in vars(options).items() if name not in NOT_STORED}


def perturbation_of(options: Namespace) -> Perturbation:
    """How a run of one policy perturbs its boxes; UserError if a factor has the wrong sign."""
    names = ("policy", "reading", "delta_expand", "epsilon_shrink", "literal", "errors")
    try:
        return Perturbation(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None


# --- Types of options ----------------------------------------------------------------------------
def policy_names(text: str) -> str:
    """One policy or several, comma-separated: known ones, and none twice; or RECOMMENDED."""
    policies = policies_of(text)
    for policy in policies:
        if policy not in POLICIES:
            known = ", ".join([*POLICIES, RECOMMENDED])
            raise UserError(f"unknown policy {policy!r}; choose from {known}")
    if len(set(policies)) < len(policies):
        raise UserError(f"{text} names a policy twice")
    return text


def check_constants() -> None:
    """End the process with one line that names a constant of perturb.py which cannot be used."""
    for names, low, high, expected in CONSTANTS:
        for name, value in ((name, getattr(perturb, name)) for name in names):
            if not isinstance(value, int | float) or not low <= value <= high:
                fail(f"perturb.py: {name} is {value!r}: expected {expected}")
            if "px" in expected and 0 < abs(value) < 1:
                fail(f"perturb.py: {name} is {value!r}: {perturb.NO_SHARE}")
    if perturb.READING not in [*READINGS]:
        fail(f"perturb.py: READING is {perturb.READING!r}: expected {', '.join(READINGS)}")
    try:
        Perturbation("mixed")  # its shares
    except ValueError as error:
        fail(f"perturb.py: {error}")


def clamping(options: Namespace, used: Perturbation) -> list[str]:
    """A line for each factor of the options, or constant in its place, that was clamped."""
    given = options.delta_expand, options.epsilon_shrink
    asked = perturb.unclamped_factors(used.policy, used.reading, *given)
    return [
        f"{used.policy}: {name} {value:g} px is out of bounds: clamped to {clamped:g} px"
        for name, value in zip(("delta_expand", "epsilon_shrink"), asked, strict=True)
        if (clamped := getattr(used, name)) != value
    ]


def factor_defaults(name: str) -> str:
    """The default of delta_expand or epsilon_shrink under each reading, for the help."""
    values = [f"{getattr(Perturbation(reading=r), name):g} under {r}" for r in READINGS]
    return f"(default {', '.join(values)}; mixed: {MIXED_SCALE:g} times that)"


def run_folder(text: str) -> str:
    """The folder of a run, also where only its name in work_dir/ is given."""
    in_work_dir = os.path.join("work_dir", text)
    return in_work_dir if os.path.isdir(in_work_dir) and not os.path.isdir(text) else text


def absolute_path(path: str) -> str:
    """An absolute path, so that a run resumes from anywhere."""
    return str(Path(path).resolve())


def checkpoint_path(text: str) -> str:
    """ "download", or an absolute path."""
    return text if text == DOWNLOAD else absolute_path(text)


# fmt: off
def make_parser() -> Parser:
    """The options, declared once with their defaults."""
    parser = Parser(
        description="Fine-tune the mask decoder of MedSAM, LiteMedSAM or SAM on perturbed boxes."
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--data", nargs="+", type=absolute_path, metavar="DIR",
        help="folder(s) made by preprocess_ct.py")
    add("--model", default="lite_medsam", metavar="NAME",
        help="lite_medsam, medsam_vit_b or sam_vit_b|l|h")
    add("--checkpoint", type=checkpoint_path, metavar="PTH",
        help="weights to start from: the full weights, or a decoder_best.pth; download fetches "
             "MedSAM's or SAM's into WORK_DIR (default: LiteMedSAM's, included in its package)")

    add = parser.add_argument_group("training boxes (the constants are in perturb.py)").add_argument
    add("--policy", default="adaptive", type=policy_names, metavar="NAME[,NAME]",
        help=f"perturbation of the boxes, one or several: {', '.join(POLICIES)}; or {RECOMMENDED}: "
             f"{', '.join(INGREDIENTS)}, and the mean of their decoders as with --average")
    add("--reading", default=READING, choices=tuple(READINGS),
        help="how theta_omega, left open by the paper, is measured: box width / image width, the "
             "cosine similarity of mask and image, or the share of the image that the mask covers")
    add("--delta-expand", type=float, metavar="PX",
        help="outward bound, px of the 1024 frame for theta_omega = 1: with --reading width, "
             f"102.4 is 10 %% of the side of any box {factor_defaults('delta_expand')}")
    add("--epsilon-shrink", type=float, metavar="PX",
        help=f"inward bound, in the same unit {factor_defaults('epsilon_shrink')}")
    add("--errors", type=checked_errors, metavar="FILE",
        help="table of errors that --policy measured draws from, written by perturb.py --errors "
             "(default: utils/data/errors.csv, measured on label volumes of FLARE22)")
    add("--literal", action="store_true",
        help="apply equations (5)-(8) as printed: both corners move by one signed interval, so a "
             "negative epsilon enlarges the box at its top-left corner")

    add = parser.add_argument_group("optimisation: AdamW, ReduceLROnPlateau").add_argument
    add("--epochs", default=20, type=integer(1), metavar="N",
        help="passes over the training slices")
    add("--lr", default=1e-4, type=number(1e-12, 1), metavar="X", help="AdamW's learning rate")
    add("--weight-decay", default=0.01, type=number(0, 1), metavar="X",
        help="AdamW's weight decay, lambda in (12)")
    add("--seed", default=0, type=integer(0), metavar="N", help="seed of boxes and slice order")
    add("--ema", nargs="?", default=0.0, const=EMA_DECAY, type=number(0, 0.999999), metavar="DECAY",
        help="validate and keep an exponential moving average of the decoder's weights, with this "
             f"decay per step ({EMA_DECAY} if none is given); training goes on with the weights "
             "themselves (default off)")
    add("--batch", type=integer(1), metavar="N",
        help="slices per step, over all processes of torchrun (default: one per process)")
    add("--loss-resolution", default=256, type=int, choices=(256, 1024),
        help="px at which the loss is computed: 256, the decoder's own, or 1024, as in MedSAM")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME",
        help="cuda, cuda:N, cpu or auto (cuda if available, else cpu)")
    add("--amp", default="auto", choices=("auto", "fp16", "bf16", "off"),
        help="mixed precision; auto is fp16 on cuda and off elsewhere")
    add("--boxes-per-call", default=16, type=integer(1), metavar="N",
        help="at most N boxes in a decoder call: fewer take less memory, the result is the same")
    add("--cuda-graphs", action="store_true",
        help="replay a step's decoder call as a CUDA graph: same losses, fewer kernel launches, "
             "which limit a step on a GPU (not yet run on one)")
    add("--cache", default="on", choices=("on", "off"),
        help="keep the embeddings, 2 MiB per slice, beside the slices; off encodes each slice in "
             "every epoch")
    add("--cache-dir", type=absolute_path, metavar="DIR",
        help="folder for the embeddings, e.g. if that of the data is read-only (default: "
             "DATA/embeddings)")
    add("--deterministic", action="store_true",
        help="make CUDA reproducible to the bit, which is slower (by how much was not measured); "
             "CPUs are anyway")

    group = parser.add_argument_group("the run's folder, WORK_DIR/NAME/")
    add = group.add_argument
    add("--work-dir", default="work_dir", metavar="DIR", help="folder of all runs")
    add("--run", metavar="NAME", help="name of the run (default: date, time and policy)")
    add("--tensorboard", action="store_true",
        help="also write WORK_DIR/NAME/tensorboard/, if TensorBoard is installed")
    add("--format", default="sam", choices=("sam", "transformers"),
        help="format of --export; transformers is a folder for Hugging Face's SamModel and "
             "SamProcessor, with a model card (not for lite_medsam)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="run all steps on synthetic CT, in minutes")
    add("--resume", action="store_true",
        help="resume --run NAME with its own options; --epochs, --cache, --cache-dir, "
             "--boxes-per-call, --cuda-graphs, a moved --data and a --device of the same kind "
             "may differ")
    add("--average", nargs="+", type=run_folder, metavar="RUN",
        help="write the mean of the decoders of these runs (folders, or names in work_dir/), which "
             "started from the same weights, to --run NAME; it keeps those that raise its DSC on "
             "the validation patients")
    group.add_argument("--start-share", default=0.2, type=number(0, 1), metavar="X",
        help="share of the runs' starting weights in a mean, which preserves what training on a "
             "few organs would forget about others (default 0.2)")
    add("--export", metavar="PTH",
        help="train nothing; write the full weights of --run NAME to a new file, a state dict that "
             "segment-anything, MedSAM's inference or LiteMedSAM's loader takes")
    return parser
# fmt: on
