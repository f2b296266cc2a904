"""The command line of perturb.py: print and draw the range of boxes of each policy."""

from __future__ import annotations

from pathlib import Path

from perturb import (
    DELTA_EXPAND,
    EPSILON_SHRINK,
    POLICIES,
    SMALL_SHARE,
    clamp_factors,
)
from utils.data.labels import parse_label_names
from utils.system.command_line import Parser
from utils.system.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """The command line: print and draw the range of boxes of each policy."""
    args = parse_args(argv)
    policies, factors = args.policies, (args.delta_expand, args.epsilon_shrink)
    if args.data is None:
        from utils.data.slices import read_image
        from utils.preview.examples import made_up_targets, show_examples, targets_of

        image = read_image(args.image) if args.image else None
        targets = targets_of(args.label) if args.label else made_up_targets()
        show_examples(targets, image, policies, args.draws, args.seed, factors, args.out)
        print(f"wrote {args.out}")
        return

    from utils.preview.figures import draw_overlap
    from utils.preview.statistics import as_text, box_statistics, read_masks, write_csv

    masks = read_masks(args.data, args.label_names)
    rows, overlap = box_statistics(masks, policies, args.draws, args.seed, factors)
    print(as_text(rows))
    small = masks.share < SMALL_SHARE
    title = f"small: mask under {100 * SMALL_SHARE:g} % of the slice"
    panels = {
        f"{name}, N = {chosen.sum():,}": {p: iou[chosen] for p, iou in overlap.items()}
        for name, chosen in ((title, small), ("large", ~small))
    }
    draw_overlap(panels, args.out)
    write_csv(rows, args.csv)
    print(f"\nwrote {args.out} and {args.csv}")


def parse_args(argv: list[str] | None):
    """The options; the factors within bounds, `csv` the path of the table beside the picture.

    Raises:
        UserError: an unknown option, a value out of range, or options that exclude each other.
    """
    parser = Parser(description="Show the range of training boxes, of examples or of your data.")
    add = parser.add_argument_group("whose boxes (default: three drawn targets)").add_argument
    add("--image", metavar="NPY", help="a slice of your own (imgs/...npy)")
    add("--label", metavar="NPY", help="its label map (gts/...npy)")
    add(
        "--data",
        metavar="DIR",
        help="statistics over all masks of a folder of preprocess_ct.py, or of label volumes "
        "(.nii.gz) alone",
    )
    add(
        "--label-names",
        type=parse_label_names,
        metavar="NAMES",
        help='of label volumes: flare22, or like "1=left lung,2=right lung" (default flare22)',
    )
    add = parser.add_argument_group("perturbation").add_argument
    add(
        "--policies",
        metavar="NAME[,NAME]",
        help=f"from: {', '.join(POLICIES)} (default medsam,adaptive, with --data all)",
    )
    add(
        "--delta-expand",
        type=float,
        default=DELTA_EXPAND,
        metavar="PX",
        help="outward bound, px of the 1024 frame for a box as wide as the image, 0 ... 256 "
        "(default %(default)s)",
    )
    add(
        "--epsilon-shrink",
        type=float,
        default=EPSILON_SHRINK,
        metavar="PX",
        help="inward bound, likewise, -256 ... 0 (default %(default)s)",
    )
    add(
        "--draws",
        type=int,
        default=12,
        metavar="N",
        help="boxes drawn for each target or mask (default %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the boxes (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add(
        "--out",
        default="work_dir/perturb.png",
        metavar="PNG",
        help="(default %(default)s); with --data a .csv beside it",
    )
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.label):
        raise UserError("--image and --label go together: give both, or none for the examples")
    if args.data is None and args.label_names is not None:
        raise UserError("--label-names: is for label volumes; give their folder to --data")
    if args.data is not None:
        if args.image:
            raise UserError("--data and --image exclude each other: choose all slices or one")
        if args.draws < 1:
            raise UserError(f"--draws: must be 1 or more with --data, got {args.draws}")
        out = Path(args.out)
        if out.suffix.lower() == ".csv" or not out.name:
            raise UserError(f"--out: names the picture, and a .csv goes beside it; got {out}")
        args.csv = out.with_suffix(".csv")
    if args.draws < 0:
        raise UserError(f"--draws: must be 0 or more, got {args.draws}")
    default = "medsam,adaptive" if args.data is None else ",".join(POLICIES)
    args.policies = list(dict.fromkeys((args.policies or default).split(",")))
    for policy in args.policies:
        if policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise UserError(f"--policies: unknown policy {policy!r}: choose from {known}")
    try:
        factors = clamp_factors(args.delta_expand, args.epsilon_shrink)
    except ValueError as error:
        raise UserError(str(error)) from None
    if factors != (args.delta_expand, args.epsilon_shrink):
        print(f"factors clamped to delta_expand {factors[0]:g}, epsilon_shrink {factors[1]:g}")
    args.delta_expand, args.epsilon_shrink = factors
    return args
