"""The command line of perturb.py: print and draw the range of boxes of each policy."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import perturb
from utils.data.labels import parse_label_names
from utils.system.command_line import Parser, integer, number
from utils.system.errors import UserError
from utils.training.options import factor_defaults, parse_policies

# delta_expand, epsilon_shrink (None: the policy's own) and reading, arguments of `perturb`
Factors = dict[str, float | str | None]

# pandas and matplotlib are imported where they are used, because --help needs neither.


def main(argv: list[str] | None = None) -> None:
    """python perturb.py: boxes of examples, of one slice, or of a data set."""
    args = parse_args(argv)
    factors: Factors = {
        name: getattr(args, name) for name in ("reading", "delta_expand", "epsilon_shrink")
    }
    try:
        used = perturb.Perturbation(**factors)
    except ValueError as error:
        raise UserError(f"perturb.py: {error}") from None
    for name in ("delta_expand", "epsilon_shrink"):
        if factors[name] not in (None, getattr(used, name)):
            factors[name] = getattr(used, name)
            print(f"out of bounds: clamped to {name} {factors[name]:g}")
    if args.data is None:
        show_examples(args, factors)
    elif args.boxes:
        show_given(args)
    else:
        show_statistics(args, factors)


def show_examples(args: Namespace, factors: Factors) -> None:
    """Print and draw the boxes of the drawn targets, or of the targets of one slice."""
    from utils.data.slices import read_image
    from utils.preview.examples import describe, drawn_targets, targets_of_slice
    from utils.preview.figures import draw_perturbation

    policies = args.policies or ["medsam", "adaptive"]
    image = read_image(args.image) if args.image else None
    targets = targets_of_slice(args.label) if args.label else drawn_targets()
    print(describe(targets, policies, factors))
    draw_perturbation(targets, image, policies, args.draws, args.seed, factors, args.out)
    print(f"wrote {args.out}")


def show_statistics(args: Namespace, factors: Factors) -> None:
    """Print, draw and tabulate the boxes of all masks of a data set."""
    from utils.preview.figures import draw_overlap
    from utils.preview.statistics import as_text, box_statistics, read_masks
    from utils.system.files import atomic_write

    policies = args.policies or list(perturb.POLICIES)
    masks = read_masks(args.data, args.label_names)
    rows, overlap = box_statistics(masks, policies, args.draws, args.seed, factors)
    print(as_text(rows))
    small = (masks.share < perturb.SMALL_SHARE).to_numpy()
    panels = {
        f"{name}, N = {chosen.sum():,}": {p: iou[chosen] for p, iou in overlap.items()}
        for name, chosen in (
            (f"small: mask under {100 * perturb.SMALL_SHARE:g} % of the slice", small),
            ("large", ~small),
        )
    }
    draw_overlap(panels, args.out)
    table = Path(args.out).with_suffix(".csv")
    with atomic_write(table, "w") as file:
        rows.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    print(f"\nwrote {args.out} and {table}")


def show_given(args: Namespace) -> None:
    """Print and tabulate how far people's boxes lie from the tight ones."""
    from utils.data.given_boxes import read_boxes
    from utils.preview.given import as_text, given_statistics, read_given
    from utils.preview.statistics import read_masks
    from utils.system.files import atomic_write

    path = Path(args.out).with_suffix(".csv")
    if path.resolve() in [Path(given).resolve() for given in args.boxes]:
        raise UserError(f"--out: its table would replace the boxes in {path}; choose another name")
    files = [read_boxes(given) for given in args.boxes]
    boxes, left_out = read_given(args.data, files, read_masks(args.data, args.label_names))
    table = given_statistics(boxes)
    print(as_text(table, left_out))
    with atomic_write(path, "w") as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    print(f"\nwrote {path}")


# fmt: off
def make_parser() -> Parser:
    parser = Parser(description="Show the range of training boxes, of examples or of your data.")
    add = parser.add_argument_group("whose boxes (default: three drawn targets)").add_argument
    add("--image", metavar="NPY", help="a slice of your own (imgs/...npy)")
    add("--label", metavar="NPY", help="its label map (gts/...npy)")
    add("--data", metavar="DIR",
        help="statistics over all masks of a folder of preprocess_ct.py, or of label volumes "
             "(.nii.gz) alone")
    add("--label-names", type=parse_label_names, metavar="NAMES",
        help='of label volumes: flare22, or like "1=left lung,2=right lung" (default: flare22 for '
             "files named as FLARE22's, else label 1, label 2, ...)")
    add("--boxes", nargs="+", metavar="FILE",
        help="instead: how far boxes that people drew on --data lie from the tight ones, and which "
             "constants cover that (.csv, label map or .mrk.json, as in eval.py)")
    add = parser.add_argument_group("perturbation").add_argument
    add("--policies", type=partial(parse_policies, source="--policies"), metavar="NAME[,NAME]",
        help=f"from: {', '.join(perturb.POLICIES)} (default medsam,adaptive, with --data all)")
    add("--reading", default=perturb.READING, choices=tuple(perturb.READINGS),
        help="of theta_omega, as in train_adaptive.py")
    add("--delta-expand", type=number(0, 1e6), metavar="PX",
        help="outward bound, px of the 1024 frame for theta_omega = 1 "
             f"{factor_defaults('delta_expand')}")
    add("--epsilon-shrink", type=number(-1e6, 0), metavar="PX",
        help=f"inward bound, likewise {factor_defaults('epsilon_shrink')}")
    add("--draws", default=12, type=integer(0), metavar="N",
        help="boxes drawn for each target or mask")
    add("--seed", default=0, type=integer(0), metavar="N", help="of the boxes")
    add = parser.add_argument_group("output").add_argument
    add("--out", default="work_dir/perturb.png", metavar="PNG",
        help="the picture; with --data also a .csv beside it, with --boxes only that")
    return parser
# fmt: on


def parse_args(argv: list[str] | None) -> Namespace:
    """The options of perturb.py.

    Raises:
        UserError: options that exclude each other.
    """
    args = make_parser().parse_args(argv)
    if bool(args.image) != bool(args.label):
        raise UserError("--image and --label go together: give both, or none for the examples")
    if args.boxes and args.data is None:
        raise UserError("--boxes: give the folder with their targets to --data")
    if args.data is None and args.label_names is not None:
        raise UserError("--label-names: is for label volumes; give their folder to --data")
    if args.data is not None and args.image:
        raise UserError("--data and --image exclude each other: choose all slices or one")
    if args.data is not None and args.draws < 1:
        raise UserError(f"--draws: must be 1 or more with --data, got {args.draws}")
    if Path(args.out).suffix.lower() == ".csv" or not Path(args.out).name:
        raise UserError(f"--out: names the picture, with --data a .csv beside it; got {args.out}")
    return args
