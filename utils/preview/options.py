"""The options of python perturb.py."""

import itertools
import sys
from argparse import Namespace
from pathlib import Path

from perturb import POLICIES, READING, READINGS, Perturbation
from utils.data.labels import parse_label_names
from utils.system.command_line import Parser, integer, number
from utils.training.options import check_constants, factor_defaults, policies_of, policy_names


def parse_options(argv: list[str] | None = None) -> Namespace:
    """The options of perturb.py, and as `perturbations` one `Perturbation` for each policy."""
    check_constants()
    parser = make_parser()
    options = parser.parse_args(argv)
    if bool(options.image) != bool(options.label):
        parser.error("--image and --label go together: give both, or none for the examples")
    options.out = options.out or first_free()
    options.measures = bool(options.every or options.neighbour or options.boxes)
    options.words = sys.argv[1:] if argv is None else argv
    if options.boxes and (options.every or options.neighbour):
        parser.error("--boxes: cannot be used with --every or --neighbour; leave them out")
    if options.rows and not (options.errors and options.measures):
        parser.error("--rows: requires --errors with --every, --neighbour or --boxes")
    if options.data is None and options.measures:
        parser.error("--boxes, --every, --neighbour: give the folder with the targets to --data")
    if options.data is not None and options.image:
        parser.error("--data and --image cannot be combined: choose all slices or one")
    if Path(options.out).suffix.lower() == ".csv" or not Path(options.out).name:
        parser.error(f"--out: expected a picture, which --data adds a .csv to; got {options.out}")
    table = Path(options.out).with_suffix(".csv").resolve()  # of the statistics
    if options.errors and options.data is not None and Path(options.errors).resolve() == table:
        parser.error(f"--errors: --out writes its own table to {table.name}; choose another name")
    default = "medsam,adaptive" if options.data is None else ",".join(POLICIES)
    policies = policies_of(options.policy or default)
    factors = (options.reading, options.delta_expand, options.epsilon_shrink, False)
    table = None if options.measures else options.errors
    try:
        options.perturbations = [Perturbation(policy, *factors, table) for policy in policies]
    except ValueError as error:
        parser.error(f"perturb.py: {error}")
    return options


def first_free() -> str:
    """work_dir/perturb.png, or perturb-2.png and so on, so that no picture replaces another."""
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (Path("work_dir", f"perturb{ending}.png") for ending in endings)
    return str(next(path for path in paths if not path.exists()))


# fmt: off
def make_parser() -> Parser:
    parser = Parser(description="Show the range of training boxes, for examples or your data.")
    add = parser.add_argument_group("targets (default: three drawn examples)").add_argument
    add("--image", metavar="NPY", help="a slice of your own (imgs/...npy)")
    add("--label", metavar="NPY", help="its label map (gts/...npy)")
    add("--data", metavar="DIR",
        help="statistics over all masks of a folder made by preprocess_ct.py, or of a folder of "
             "label volumes (.nii.gz)")
    add("--label-names", type=parse_label_names, metavar="NAMES",
        help='for label volumes: flare22, or a list "1=left lung,2=right lung" (default: flare22 '
             "for files named like FLARE22's, else label 1, label 2, ...)")
    add("--boxes", nargs="+", metavar="FILE",
        help="instead: how far boxes that people drew lie from the tight boxes of --data, a folder "
             "made by preprocess_ct.py, and which constants cover them (files as in eval.py)")
    add = parser.add_argument_group("measuring: errors of other boxes on --data").add_argument
    add("--every", nargs="+", default=[], type=integer(2), metavar="N",
        help="measure boxes drawn in every n-th slice and interpolated in between")
    add("--neighbour", action="store_true", help="measure boxes copied from neighbouring slices")
    add("--errors", metavar="FILE",
        help="write the errors measured by --every, --neighbour or --boxes to this table (.csv), "
             "for train_adaptive.py --errors; without these: the table that measured draws from")
    add("--rows", type=integer(1), metavar="N",
        help="write about N rows, equally many per protocol and patient (default all)")
    add = parser.add_argument_group("perturbation").add_argument
    add("--policy", type=policy_names, metavar="NAME[,NAME]",
        help=f"one or several: {', '.join(POLICIES)} (default medsam,adaptive, with --data all)")
    add("--reading", default=READING, choices=tuple(READINGS),
        help="how theta_omega is measured, as in train_adaptive.py")
    add("--delta-expand", type=number(0, 1e6), metavar="PX",
        help="outward bound, px of the 1024 frame for theta_omega = 1 "
             f"{factor_defaults('delta_expand')}")
    add("--epsilon-shrink", type=number(-1e6, 0), metavar="PX",
        help=f"inward bound, likewise {factor_defaults('epsilon_shrink')}")
    add("--draws", default=12, type=integer(1), metavar="N",
        help="boxes drawn for each target or mask")
    add("--seed", default=0, type=integer(0), metavar="N", help="seed of the boxes")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="PNG",
        help="the picture; with --data also a .csv beside it, with --boxes only that (default "
             "work_dir/perturb.png, or perturb-2.png and so on if that exists)")
    return parser
# fmt: on
