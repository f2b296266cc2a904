"""Compare models under standard, expansion and shrink boxes: DSC and NSD, the paper's Table I.

    python eval.py --data data/flare22 --models untouched=medsam_vit_b:work_dir/medsam_vit_b.pth \\
        adaptive=medsam_vit_b:work_dir/flare22-adaptive/decoder_best.pth
    python eval.py --data data/lung --models lite_medsam --split all

A model is NAME=MODEL[:CHECKPOINT]; `lite_medsam` alone is LiteMedSAM's own weights under that
name. Every instance, one label in one slice, is prompted with three boxes: the tight one, one
whose edges lie outside it by U(0, r) of the side, and one whose edges lie inside. They are the
same for every model. Predictions are scored in 2D at the slice's native resolution. Into --out go

    results.md       the tables, and how they were measured
    instances.csv    model, case, slice, label, box, draw, pixels, dsc, nsd
    examples.png     the instance of median gain under each box and model
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perturb import BOX_KINDS, box_rng, shift_boxes, tight_boxes
from utils.cli import Parser, UserError, run
from utils.files import atomic_write
from utils.flare22 import FLARE22_TOLERANCES_MM
from utils.metrics import dsc, nsd
from utils.slices import Slice, label_name, open_datasets, read_image, read_labels_of
from utils.tables import count, label_table, markdown, shift_table, write_instances

if TYPE_CHECKING:
    import torch

    from utils.models import Segmenter

# --- Defaults ------------------------------------------------------------------------------------
SPLIT = "test"
R = 0.15  # largest shift of an edge as a share of the side; the paper does not give its own
TOLERANCE_MM = 2.0  # of NSD
OUT = "work_dir/eval"
SEED = 0  # of the boxes


def main(argv: list[str] | None = None) -> None:
    """The command line: score, write, print."""
    args = parse_args(argv)

    from utils.embeddings import cached_embeddings
    from utils.models import choose_device, load_model

    datasets = open_datasets(args.data)
    for dataset in datasets:
        if not dataset.split(args.split):
            raise UserError(
                f"{dataset.folder}: the {args.split} split is empty; choose another --split"
            )
    slices = [entry for dataset in datasets for entry in dataset.split(args.split)]
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    tolerances = tolerances_mm(args.tolerance, slices)
    device = choose_device(args.device)
    models = {name: load_model(model, path, device) for name, model, path in args.models}
    embeddings = {name: cached_embeddings(datasets, m, slices) for name, m in models.items()}

    rows = evaluate(models, embeddings, slices, tolerances, args.r, args.seed)
    text = report(rows, args)
    with atomic_write(out / "results.md", "w") as file:
        file.write(text)
    write_instances(out / "instances.csv", rows)
    draw_median_example(models, embeddings, slices, rows, args.r, args.seed, out / "examples.png")
    print(text)
    print(f"wrote {out / 'results.md'}, {out / 'instances.csv'}, {out / 'examples.png'}")


def evaluate(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: list[Slice],
    tolerances: dict[str, float],
    r: float,
    seed: int,
) -> list[dict]:
    """Score every instance of `slices` under every kind of box with every model.

    Args:
        models, embeddings: by name; an embedding is (256, 64, 64), from that model's encoder.
        slices: of one or several data sets.
        tolerances: of NSD in mm, by label name.
        r, seed: of the boxes.

    Returns:
        One dict per model, instance and box with the columns of instances.csv; scores in 0-1.
    """
    from tqdm import tqdm

    several = len({entry.dataset for entry in slices}) > 1
    rows = []
    for entry in tqdm(slices, unit="slice", desc="evaluating", disable=None):
        labels, boxes, native = prompts(entry, r, seed)
        targets = {label: native == label for label in labels}
        for model_name, model in models.items():
            masks = predict(model, embeddings[model_name](entry), entry, boxes)
            for box in BOX_KINDS:
                for label, mask in zip(labels, masks[box], strict=True):
                    target = targets[label]
                    tolerance = tolerances[label_name(entry.label_names, label)]
                    rows.append(
                        {
                            "model": model_name,
                            **instance_of(entry, label, several),
                            "box": box,
                            "draw": 0,
                            "pixels": int(target.sum()),
                            "dsc": dsc(mask, target),
                            "nsd": nsd(mask, target, tolerance, entry.spacing_mm),
                        }
                    )
    return rows


def prompts(
    entry: Slice, r: float, seed: int
) -> tuple[list[int], dict[str, np.ndarray], np.ndarray]:
    """The instances of a slice and their boxes, which depend on seed, case, slice and label alone.

    Returns:
        The K label ids; by kind of box, (K, 4) float32 XYXY in the 1024 frame; and the label map
        (H, W) at native resolution.
    """
    label_map = read_labels_of(entry)
    native = entry.frame.labels_to_native(label_map)
    labels, tight = tight_boxes(label_map)
    boxes: dict[str, list[np.ndarray]] = {kind: [] for kind in BOX_KINDS}
    for label, box in zip(labels, tight, strict=True):
        for kind in BOX_KINDS:  # an edge moves as far in under shrink as out under expansion
            rng = box_rng(seed, entry.case, entry.index, int(label), 0)
            boxes[kind].append(shift_boxes(box[None], kind, r, rng))
    return labels.tolist(), {k: np.concatenate(v) for k, v in boxes.items()}, native


def predict(
    model: Segmenter, embedding: torch.Tensor, entry: Slice, boxes: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Masks (K, H, W) bool at native resolution for each kind of box, in one decoder call."""
    import torch

    with torch.no_grad():
        logits = model.decode(embedding, np.concatenate(list(boxes.values())))
        masks = (entry.frame.logits_to_native(logits) > 0).cpu().numpy()
    parts = np.split(masks, np.cumsum([len(part) for part in boxes.values()])[:-1])
    return dict(zip(boxes, parts, strict=True))


def tolerances_mm(tolerance: float | str, slices: list[Slice]) -> dict[str, float]:
    """The tolerance of each label name in mm.

    Raises:
        UserError: FLARE22's tolerances are asked for and a label is not one of FLARE22's.
    """
    names = {label_name(entry.label_names, label) for entry in slices for label in entry.labels}
    if tolerance != "flare22":
        return dict.fromkeys(names, tolerance)
    unknown = sorted(names - FLARE22_TOLERANCES_MM.keys())
    if unknown:
        raise UserError(f"--tolerance flare22: none for {unknown[0]!r}; give a number of mm")
    return {name: FLARE22_TOLERANCES_MM[name] for name in names}


def report(rows: list[dict], args) -> str:
    """The text of results.md: how it was measured, Table I, and both scores per label."""
    tolerance = "FLARE22's tolerances" if args.tolerance == "flare22" else f"{args.tolerance:g} mm"
    models = ", ".join(
        f"{name} = {model}" + (f" with {Path(path).name}" if path else " as packaged")
        for name, model, path in args.models
    )
    one_model = [row for row in rows if row["model"] == rows[0]["model"]]
    patients, instances = count(one_model, "case"), count(one_model, "case", "slice", "label")
    how = (
        f"{patients} patients, {instances} instances (label in slice) of "
        f"{', '.join(Path(folder).name for folder in args.data)}, split {args.split}. "
        f"Scored in 2D at each slice's native resolution; DSC and NSD in %, means over instances; "
        f"NSD at {tolerance}. Expansion and shrink: each edge by U(0, {args.r:g}) of the side, "
        f"1 draw, seed {args.seed}. Models: {models}."
    )
    triple = " / ".join(BOX_KINDS)
    return "\n\n".join(
        (
            "# Evaluation",
            how,
            markdown(shift_table(rows)),
            f"## DSC per label, % ({triple})",
            markdown(label_table(rows, "dsc")),
            f"## NSD per label, % ({triple})",
            markdown(label_table(rows, "nsd")) + "\n",
        )
    )


def draw_median_example(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: list[Slice],
    rows: list[dict],
    r: float,
    seed: int,
    path: Path,
) -> None:
    """Draw the instance whose gain from the first to the last model is the median one.

    The gain is that of the DSC, mean over the three boxes; with one model, the DSC itself.
    """
    from utils.figures import draw_examples

    names = list(models)
    gain: dict[tuple, float] = {}
    for row in rows:
        key = (row["case"], row["slice"], row["label"])
        sign = (row["model"] == names[-1]) - (len(names) > 1 and row["model"] == names[0])
        gain[key] = gain.get(key, 0.0) + sign * row["dsc"] / len(BOX_KINDS)
    case, index, name = sorted(gain, key=lambda key: gain[key])[(len(gain) - 1) // 2]
    several = len({entry.dataset for entry in slices}) > 1
    entry, label = next(
        (entry, label)
        for entry in slices
        for label in entry.labels
        if instance_of(entry, label, several) == {"case": case, "slice": index, "label": name}
    )
    labels, boxes, native = prompts(entry, r, seed)
    which = labels.index(label)
    masks = {name: predict(m, embeddings[name](entry), entry, boxes) for name, m in models.items()}
    cells = {
        kind: {
            model: (
                entry.frame.boxes_to_native(boxes[kind])[which],
                masks[model][kind][which],
                dsc(masks[model][kind][which], native == label),
            )
            for model in models
        }
        for kind in BOX_KINDS
    }
    rule = f"median gain in DSC from {names[0]} to {names[-1]}" if len(names) > 1 else "median DSC"
    draw_examples(
        read_image(entry.image_path)[: entry.frame.content[0], : entry.frame.content[1]],
        native == label,
        cells,
        title=f"{name}, {case}, slice {index}",
        caption=f"Chosen by rule: the instance of {rule} (mean of the boxes) among {len(gain)}.",
        path=path,
    )


def instance_of(entry: Slice, label: int, several: bool) -> dict:
    """The columns that name an instance; with several data sets they say which one it is from."""
    name = label_name(entry.label_names, label)
    case = entry.case
    if several:
        name, case = f"{name} ({entry.dataset})", f"{entry.dataset}/{case}"
    return {"case": case, "slice": entry.index, "label": name}


def parse_args(argv: list[str] | None):
    """The options, `models` as (name, model, checkpoint or None).

    Raises:
        UserError: an unknown option or a value out of range.
    """
    from utils.slices import SPLITS

    parser = Parser(
        description="Compare models under standard, expansion and shrink boxes: DSC and NSD."
    )
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="DIR", help="folder(s) of preprocess_ct.py")
    add(
        "--models",
        required=True,
        nargs="+",
        metavar="NAME=MODEL[:CHECKPOINT]",
        type=parse_model,
        help="MODEL is lite_medsam, medsam_vit_b or sam_vit_b|l|h; CHECKPOINT the full weights or "
        "a decoder_best.pth (not needed for lite_medsam)",
    )
    add("--split", choices=(*SPLITS, "all"), default=SPLIT, help="(default %(default)s)")
    add(
        "--r",
        type=float,
        default=R,
        metavar="SHARE",
        help="largest shift of an edge, share of the side, 0 to under 0.5 (default %(default)s)",
    )
    add(
        "--tolerance",
        type=parse_tolerance,
        default=TOLERANCE_MM,
        metavar="MM",
        help="of NSD in mm, or flare22 for that challenge's own per organ (default %(default)s)",
    )
    add("--out", default=OUT, metavar="DIR", help="(default %(default)s)")
    add("--seed", type=int, default=SEED, metavar="N", help="of the boxes (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="cuda, cuda:N, cpu or auto (default)")
    args = parser.parse_args(argv)
    if not 0 <= args.r < 0.5:
        raise UserError(f"--r: a share of the side, 0 to under 0.5, got {args.r:g}")
    names = [name for name, _, _ in args.models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--models: two are named {name!r}; give them names with NAME=MODEL")
    return args


def parse_model(text: str) -> tuple[str, str, str | None]:
    """NAME=MODEL[:CHECKPOINT] as (name, model, checkpoint or None); NAME defaults to MODEL."""
    from_model = text.partition(":")[0]
    name, equals, rest = text.partition("=") if "=" in from_model else ("", "", text)
    model, _, checkpoint = rest.partition(":")
    if not model or (equals and not name):
        raise UserError(f"--models: expected NAME=MODEL[:CHECKPOINT], got {text!r}")
    return name or model, model, checkpoint or None


def parse_tolerance(text: str) -> float | str:
    """A tolerance in mm, or "flare22"."""
    if text == "flare22":
        return text
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance: expected mm (0 or more) or flare22, got {text!r}")
    return tolerance


if __name__ == "__main__":
    run(main)
