"""What python perturb.py prints and draws: boxes of examples, of a slice, or of a data set."""

import itertools
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import perturb
from perturb import IMAGE_SIZE, POLICIES, SMALL_SHARE, Perturbation, box_sides, tight_boxes
from utils.data.given_boxes import box_paths, read_boxes
from utils.data.slices import DATASET_FILE, open_dataset, read_image, read_label_map
from utils.evaluation.prompts import EVERY, read_given
from utils.preview import measuring, statistics
from utils.system import UserError, plotting, plural
from utils.system.command_line import shell_command
from utils.system.files import atomic_write, read_json
from utils.system.plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, draw_box
from utils.training.errors import checked_errors
from utils.training.options import clamping

Target = tuple[str, np.ndarray]  # a name, and a mask (1024, 1024) bool

# Of policies, by their place in POLICIES, and again from the start after the last.
COLOURS = (PURPLE, BLACK, ORANGE, SKY, VERMILION, BLUE, GREEN)


def main(options: Namespace) -> None:
    """Print, draw and tabulate what the options of `utils.preview.options` ask for."""
    for perturbation in options.perturbations:
        for line in clamping(options, perturbation):
            print(line)
    if options.errors and not options.measures:
        checked_errors(options.errors)
    drawn = options.perturbations, options.draws, options.seed
    path = Path(options.out).with_suffix(".csv")
    if options.data is None:  # targets that are drawn here, or those of a slice
        image = read_image(options.image) if options.image else None
        targets = targets_of_slice(options.label) if options.label else drawn_targets()
        for target in targets:
            print(describe(target, options.perturbations))
        plotting.save_figure(draw_perturbation(targets, image, *drawn), options.out)
        print(f"wrote {options.out}")
    elif options.boxes is None:  # all masks of a data set
        masks = statistics.read_masks(options.data, options.label_names)
        masks = measuring.follow_targets(masks) if options.measures else masks
        measured = {EVERY.format(n): measuring.boxes_of_every(masks, n) for n in options.every}
        if options.neighbour:
            measured["neighbour"] = measuring.boxes_of_neighbours(masks)
        boxes = {each.policy: statistics.draw_boxes(masks, each, *drawn[1:]) for each in drawn[0]}
        table, overlap = statistics.box_statistics(masks, measured | boxes, *drawn)
        print(statistics.as_text(table))
        if measured:
            print(f"\n{measuring.sizes_text(masks, measured | boxes)}")
            write_measured(options, masks, measured)
        figure = draw_overlap(overlap, (masks.share < SMALL_SHARE).to_numpy())
        plotting.save_figure(figure, options.out, dpi=200)
        write_table(table, path)
        print(f"\nwrote {options.out} and, by label, {path}")
    else:
        show_given(options, path)


def show_given(options: Namespace, path: Path) -> None:
    """How far people's boxes lie from the tight ones; the table goes to `path`."""
    if path.resolve() in [given.resolve() for given in box_paths(options.boxes)]:
        raise UserError(f"--out: its table would replace the boxes in {path}; choose another name")
    dataset = open_dataset(options.data)
    samples = dataset.split("all")
    given, note = read_given(read_boxes(options.boxes), [dataset], samples)
    boxes, missed = statistics.beside_tight_boxes(samples, given)
    if missed:
        print(f"left out, as they miss their targets: {plural(len(missed), 'box', 'boxes')}")
        print("\n".join(missed))
    table = statistics.given_statistics(boxes)
    drawn = {"drawn": boxes[statistics.GIVEN].to_numpy(np.float64)[:, None]}
    print(f"{statistics.given_as_text(table)}\n\n{measuring.sizes_text(boxes, drawn)}")
    if note:
        print(f"note: {note}")
    write_measured(options, boxes, drawn)
    write_table(table, path)
    print(f"\nwrote {path}")


def write_measured(options: Namespace, masks: pd.DataFrame, boxes_of: dict) -> None:
    """Write the errors of boxes (N, M, 4) of N masks, by protocol, to --errors, if given."""
    if options.errors:
        shares = {name: statistics.offsets_of(masks, b)[1] for name, b in boxes_of.items()}
        errors = [measuring.error_rows(name, masks, share) for name, share in shares.items()]
        errors = pd.concat(errors, ignore_index=True)
        errors = measuring.thin(errors, options.rows, options.seed) if options.rows else errors
        how = shell_command("python", "perturb.py", *options.words)
        written = measuring.write_errors(options.errors, errors, how)
        print(f"\nwrote {options.errors}: {plural(written, 'box', 'boxes')}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV file atomically."""
    with atomic_write(path, "w") as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


# --- Examples ------------------------------------------------------------------------------------
def drawn_targets() -> list[Target]:
    """A large, a small and an elongated target."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    targets = []
    for name, (cx, cy), (a, b), angle in (
        ("large", (380, 480), (260, 210), 0.3),
        ("small", (640, 420), (16, 20), 0.5),
        ("elongated", (540, 560), (190, 24), 0.08),
    ):
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        bump = 1 + 0.1 * np.sin(3 * np.arctan2(v / b, u / a))  # an organ is no ellipse
        targets.append((name, (u / a) ** 2 + (v / b) ** 2 < bump))
    return targets


def targets_of_slice(path: str | Path) -> list[Target]:
    """The largest, the smallest and the most elongated target of a label map on disk.

    They have the names of the dataset.json in the folder above, if there is one.
    """
    label_map = read_label_map(path)
    labels, boxes = tight_boxes(label_map)
    if not len(labels):
        raise UserError(f"{path}: no target in this slice; choose one with labels")
    beside = Path(path).resolve().parents[1] / DATASET_FILE
    names = read_json(beside).get("label_names", {}) if beside.is_file() else {}
    areas = perturb.mask_areas(label_map, labels)
    chosen = (areas.argmax(), areas.argmin(), np.abs(np.log(perturb.xi(boxes))).argmax())
    chosen = dict.fromkeys(labels[list(chosen)].tolist())
    return [(names.get(str(n), f"label {n}"), label_map == n) for n in chosen]


def offset_range(
    boxes: np.ndarray, areas: np.ndarray, perturbation: Perturbation
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest offset (K, 2) px of the x and the y edges, outward positive."""
    draws = 100  # so that a policy that draws what kind of box it makes draws every kind
    many = np.repeat(boxes, draws, axis=0), np.repeat(areas, draws)
    low, high = perturb.edge_offsets(*many, np.random.default_rng(0), perturbation)
    shape = len(boxes), draws, 2, 2  # the last two: an edge towards 0 or away from it, x or y
    return low.reshape(shape).min(axis=(1, 2)), high.reshape(shape).max(axis=(1, 2))


def describe(target: Target, perturbations: Sequence[Perturbation]) -> str:
    """The size of a target and how far each policy moves its edges, as lines for the screen."""
    name, mask = target
    box, area = tight_boxes(mask)[1], np.array([mask.sum()])
    width, height = box_sides(box)[0]
    theta = perturb.theta_omega(box, area, perturbations[0].reading)[0]
    text = f"{name}: {width:.0f} x {height:.0f} px, theta_omega {theta:.3f}, "
    text += f"xi {perturb.xi(box)[0]:.2f}; an edge moves outward by"
    for perturbation in perturbations:
        low, high = offset_range(box, area, perturbation)
        x, y = (f"{a:+.1f} ... {b:+.1f} px" for a, b in zip(low[0], high[0], strict=True))
        text += f"\n  {perturbation.policy:<14} x {x}, y {y}"
    return text


# --- Pictures ------------------------------------------------------------------------------------
def draw_perturbation(
    targets: Sequence[Target],
    image: np.ndarray | None,
    perturbations: Sequence[Perturbation],
    draws: int,
    seed: int,
) -> Figure:
    """The range of training boxes, one row per target, one column per policy (the paper's Fig. 3).

    `image` holds uint8 (1024, 1024) grey levels behind the targets.
    """
    figure = plotting.new_figure(3.4 * len(perturbations), 3.5 * len(targets))
    grid = figure.subplots(len(targets), len(perturbations), squeeze=False)
    for axes_row, (name, mask) in zip(grid, targets, strict=True):
        tight, area = tight_boxes(mask)[1], np.array([mask.sum()])
        ranges = [offset_range(tight, area, perturbation) for perturbation in perturbations]
        smallest, largest = (
            np.vstack([perturb.move_edges(tight, np.tile(bound, 2)) for bound in bounds])
            for bounds in zip(*ranges, strict=True)
        )
        low, high = largest[:, :2].min(axis=0), largest[:, 2:].max(axis=0)
        for column, (axes, perturbation) in enumerate(zip(axes_row, perturbations, strict=True)):
            if image is not None:
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.set_facecolor("black")  # beyond the image
                axes.contour(mask, levels=[0.5], colors=GREEN, linewidths=1.2)
            else:
                axes.imshow(np.where(mask, 0.75, 1.0), cmap="gray", vmin=0, vmax=1)
            rng = perturb.box_rng(seed, "preview", "", name, 0, 0, 0)
            many = np.repeat(tight, draws, axis=0), np.repeat(area, draws)
            for box in perturb.perturb(*many, rng, perturbation):
                draw_box(axes, box, edgecolor=SKY, linewidth=0.7)
            draw_box(axes, largest[column], edgecolor=BLUE, linewidth=2)
            draw_box(axes, smallest[column], edgecolor=VERMILION, linewidth=2)
            draw_box(axes, tight[0], edgecolor=ORANGE, linewidth=1.5, linestyle="--")
            # One view per row, so that policies can be compared.
            plotting.show_square(axes, (low + high) / 2, 0.6 * (high - low).max() + 4)
            axes.set_title(perturbation.policy, fontsize=11)
        width, height = box_sides(tight)[0]
        axes_row[0].set_ylabel(f"{name}\n{width:.0f} x {height:.0f} px", fontsize=10)
    styles = [("tight", ORANGE, "--"), ("smallest", VERMILION, "-"), ("largest", BLUE, "-")]
    styles += [("drawn", SKY, "-"), ("target", GREEN, "-")][: 1 if image is None else 2]
    plotting.add_legend(figure, styles)
    return figure


def draw_overlap(overlap: dict[str, np.ndarray], small: np.ndarray) -> Figure:
    """The distribution of the IoU of boxes with the tight ones, one line per policy or protocol.

    `overlap` holds by policy the IoU (N, M) of the boxes of N masks; `none`, whose boxes are the
    tight ones, is left out beside others. `small` (N,) bool are the masks of the left panel.
    """
    figure = plotting.new_figure(2 * plotting.COLUMN, 3.2)
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(1, 2, sharex=True, sharey=True)
    policies = [policy for policy in overlap if policy != "none"] or list(overlap)
    names = dict.fromkeys([*POLICIES, *overlap])
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    lines = {name: "-" if name in POLICIES else "--" for name in names}
    thresholds = np.linspace(0, 1, 1001)
    panels = (f"small: mask under {100 * SMALL_SHARE:g} % of the slice", "large")
    for axes, name, chosen in zip(grid, panels, (small, ~small), strict=True):
        axes.set_title(f"{name}, N = {chosen.sum():,}", fontsize=9)
        for n, policy in enumerate(policies if chosen.any() else ()):
            ordered = np.sort(overlap[policy][chosen], axis=None)  # NaN last
            share = np.searchsorted(ordered, thresholds, side="right") / np.isfinite(ordered).sum()
            width = max(1, 3.6 - 0.4 * n)  # lines that coincide lie on wider ones
            line, colour = lines[policy], colours[policy]
            axes.plot(thresholds, 100 * share, line, color=colour, linewidth=width)
        axes.set_xlabel("IoU with the tight box", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(0, 100))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("boxes with at most this IoU, %", fontsize=9)
    styles = [(policy, colours[policy], lines[policy]) for policy in policies]
    plotting.add_legend(figure, styles, fontsize=9)
    return figure
