"""Compare models under standard, expansion and shrink boxes: the paper's tables and figures.

    python eval.py --runs work_dir/ablation --out work_dir/report
    python eval.py --data data/flare22 --models untouched=medsam_vit_b:work_dir/medsam_vit_b.pth \\
        adaptive=medsam_vit_b:work_dir/flare22-adaptive/decoder_best.pth
    python eval.py --data data/lung --models lite_medsam --split all --no-sweep
    torchrun --nproc-per-node 2 -- eval.py ...              on several GPUs

--runs takes runs of train_adaptive.py and adds the weights that they started from. A model is
NAME=MODEL[:CHECKPOINT]; `lite_medsam` alone is LiteMedSAM's own weights under that name. Every
instance, one label in one slice, is prompted with boxes that are the same for every model: the
tight one, boxes whose edges lie outside it by U(0, shift), boxes whose edges lie inside, and for
the robustness curve boxes with all edges moved by the same shift. Predictions are scored in 2D at
the slice's native resolution. Into --out go

    report.md, report.html      everything below, and what can be concluded
    instances.csv               a row per model, instance and box; all else follows from it
    table1, table2, table3      the paper's tables, as .md .csv .tex
    labels.csv                  both scores per label
    comparisons.csv             the proposed model against each other one
    robustness.csv, robustness_side.png, robustness_px.png      scores against the shift
    fig4.png, fig5.png, fig6.png    the paper's figures, the cases chosen by rule
    volumes.csv, predictions/   with --volume and --save-predictions
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perturb import BOX_KINDS, SMALL_SHARE, Shift, box_rng, shift_boxes, sweep_boxes
from utils.data.flare22 import FLARE22_TOLERANCES_MM
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset, open_datasets, read_image, read_instances
from utils.evaluation.metrics import dsc
from utils.evaluation.scoring import Scorer, Target
from utils.system import distributed, signals
from utils.system.command_line import Parser, run, shell_command
from utils.system.errors import UserError

if TYPE_CHECKING:
    import torch

    from utils.evaluation.comparisons import Protocol
    from utils.evaluation.figures import Example
    from utils.evaluation.volume_scores import VolumeScores
    from utils.model.segmenter import Segmenter
    from utils.training.runs import TrainedRun

# --- Defaults of the options ---------------------------------------------------------------------
SPLIT = "test"
SHIFTS = ("15%", "20px", "5%", "10%", "20%", "25%")  # the paper does not give its own
TOLERANCE = 2.0  # of NSD: mm, or pixels of slices whose spacing is not known
OUT = "work_dir/eval"
DRAWS = 1  # random boxes for each instance, kind and shift
SEED = 0  # of the boxes
BASELINE, PROPOSED = "medsam", "adaptive"  # if there are such models, else the first and the last
UNTOUCHED = "untouched"  # the name of the weights that runs started from
# --- What has no option --------------------------------------------------------------------------
SWEEP = (
    *(f"{share}%" for share in range(-25, 30, 5) if share),
    *(f"{pixels}px" for pixels in range(-20, 30, 10) if pixels),
)
ERROR_LEAK = 0.10  # an error: more than this share of the target's area beyond the tolerance ...
ERROR_DSC = 0.5  # ... or a DSC below this
DECODE_BOXES = 32  # about so many boxes in one decoder call: more are no faster and take memory
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # processes that score, beside a GPU ...
WORKERS_ON_CPU = 0  # ... and on a CPU, where they would take its cores from the decoder


def main(argv: list[str] | None = None) -> None:
    """The command line: score, write, print."""
    args = parse_args(argv)

    from utils.evaluation.results import write_results
    from utils.evaluation.scores import Scores
    from utils.evaluation.volume_scores import VolumeScores, save_predictions
    from utils.model.embeddings import Embeddings, open_embeddings
    from utils.model.segmenter import load_model
    from utils.system.device import choose_device, explain_out_of_memory, keep_freed_memory
    from utils.system.files import check_writable, locked
    from utils.training.runs import find_runs

    distributed.init()
    out = Path(args.out)
    runs = find_runs(args.runs)
    specs = model_specs(args.models, runs)
    datasets = open_datasets(args.data or data_of(runs))
    check_data(datasets, runs)
    slices = [entry for dataset in datasets for entry in slices_of(dataset, args)]
    own = own_share(slices)
    unit = unit_of(slices)
    check_unit(args, unit)
    tolerances = tolerances_of(args.tolerance, slices)
    protocol = protocol_of(args, datasets, runs, [name for name, _, _ in specs], unit)
    volumes = VolumeScores(datasets, own, tolerances) if args.volume else None
    device = choose_device(distributed.local_device(args.device))
    if device.type == "cpu":
        keep_freed_memory()
    if args.workers is None:
        beside_gpu = max(1, WORKERS // distributed.world_size())
        args.workers = beside_gpu if device.type == "cuda" else WORKERS_ON_CPU
    models, embeddings = {}, {}
    sources: dict[tuple[str, str], Embeddings] = {}  # models of one encoder share it
    with explain_out_of_memory("try fewer models at a time, or --device cpu"), ExitStack() as held:
        for name, model, path in specs:  # with a cache one image encoder on the device at a time
            models[name] = load_model(model, path, device)
            key = (model, models[name].base_sha256)
            if key not in sources:
                cache = args.cache == "on"
                sources[key] = open_embeddings(datasets, models[name], slices, cache)
            else:
                models[name].image_encoder.cpu()
            embeddings[name] = sources[key]
        how_made = provenance(argv, specs, models, runs, datasets)
        busy = f"{out}: another eval.py is writing here; wait for it, or choose another --out"

        def claim() -> None:
            check_writable(out)
            held.enter_context(locked(out / ".lock", busy))

        distributed.rank_zero_first(claim)
        several = len(datasets) > 1
        rows = evaluate(
            models, embeddings, own, tolerances, protocol, volumes, args.workers, several
        )
        parts = distributed.gather(Scores.of(rows))
        if volumes:
            volumes.join(distributed.gather(volumes.rows))
        if args.save_predictions:
            save_predictions(models, embeddings, datasets, own, out / "predictions")
        if distributed.rank() == 0:
            order = [instance_of(entry, 0, several) for entry in slices]
            scores = Scores.join(parts, [(row["case"], row["slice"]) for row in order])
            illustrate = illustrator(models, embeddings, slices, args.seed)
            shown = write_results(
                scores, protocol, how_made, out, illustrate if args.figures else None, volumes
            )
            print(shown)
            print(f"wrote {out / 'report.html'}, {out / 'report.md'} and what they are made of")
    distributed.barrier()


def own_share(slices: list[Slice]) -> list[Slice]:
    """The slices of this process's patients; all of them without torchrun."""
    patients = Counter((entry.dataset, entry.case) for entry in slices)
    # Dealt out by size, so that the processes have about as much to do.
    own = set(distributed.shard([patient for patient, _ in patients.most_common()]))
    return [entry for entry in slices if (entry.dataset, entry.case) in own]


# --- Scoring -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    """What kind of box: the columns box, shift and draw of instances.csv."""

    box: str
    shift: Shift
    draw: int

    @property
    def columns(self) -> dict:
        """As columns of a row."""
        return {"box": self.box, "shift": str(self.shift), "draw": self.draw}


def prompts(protocol: Protocol) -> list[Prompt]:
    """All kinds of box that an evaluation puts to every instance."""
    found = [Prompt("standard", Shift(0.0, "side"), 0)]
    for shift in protocol.shifts:
        for kind in BOX_KINDS[1:]:
            found += [Prompt(kind, shift, draw) for draw in range(protocol.draws)]
    return found + [Prompt("sweep", shift, 0) for shift in protocol.sweep]


def instances_of(entry: Slice) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The K label ids of a slice, their tight boxes (K, 4) in the 1024 frame, and the label map
    (H, W) at native resolution.

    Raises:
        UserError: the label map is damaged, or holds other labels than dataset.json lists.
    """
    label_map, labels, boxes = read_instances(entry)
    return labels.tolist(), boxes, entry.frame.labels_to_native(label_map)


def boxes_of(
    entry: Slice, labels: list[int], tight: np.ndarray, prompt: Prompt, seed: int
) -> np.ndarray:
    """The boxes (K, 4) of a slice's instances under one prompt, XYXY in the 1024 frame.

    They depend on seed, case, slice, label and draw alone: not on the model, the order or what else
    is evaluated. An edge moves as far in under shrink as out under expansion, and twice as far
    under twice the shift.
    """
    if prompt.box == "sweep":
        return sweep_boxes(tight, prompt.shift)
    boxes = []
    for label, box in zip(labels, tight, strict=True):
        rng = box_rng(seed, entry.case, entry.index, label, prompt.draw)
        boxes.append(shift_boxes(box[None], prompt.box, prompt.shift, rng))
    return np.concatenate(boxes)


def predict(
    model: Segmenter, embedding: torch.Tensor, entry: Slice, boxes: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Masks (P, K, H, W) bool at native resolution of P sets of boxes (K, 4), in several parts."""
    import torch

    count = len(boxes[0])
    at_once = max(1, DECODE_BOXES // count)
    for start in range(0, len(boxes), at_once):
        with torch.no_grad():
            logits = model.decode(embedding, np.concatenate(boxes[start : start + at_once]))
            masks = (entry.frame.logits_to_native(logits) > 0).cpu().numpy()
        yield masks.reshape(-1, count, *masks.shape[1:])


def evaluate(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: Sequence[Slice],
    tolerances: dict[str, float],
    protocol: Protocol,
    volumes: VolumeScores | None = None,
    workers: int = 0,
    several: bool = False,
) -> Iterator[dict]:
    """Score every instance of `slices` under every kind of box with every model.

    Args:
        models, embeddings: by name; an embedding is (256, 64, 64), from that model's encoder.
        slices: of one or several data sets.
        tolerances: of NSD in mm, or in pixels where no spacing is known, by label name.
        protocol: shifts, draws and seed of the boxes.
        volumes: collects the masks of the first shift for scores in 3D.
        workers: processes that score while this one decodes; 0 scores in between.
        several: whether the data set is part of the names of cases and labels.

    Yields:
        One dict per model, instance and box with the columns of instances.csv; scores in 0-1.
    """
    from tqdm import tqdm

    asked = prompts(protocol)
    in_3d = asked[:1] + [Prompt(kind, protocol.shifts[0], 0) for kind in BOX_KINDS[1:]]
    quiet = None if distributed.rank() == 0 else True
    with signals.deferred(), Scorer(workers) as scorer:
        for entry in tqdm(slices, unit="slice", desc="evaluating", disable=quiet):
            signals.raise_if_pending()
            labels, tight, native = instances_of(entry)
            boxes = [boxes_of(entry, labels, tight, prompt, protocol.seed) for prompt in asked]
            targets = [
                target_of(entry, label, native, tolerances, protocol, several) for label in labels
            ]
            encoded: dict[int, torch.Tensor] = {}  # models of one encoder share the embedding
            kept: dict[tuple[str, str], np.ndarray] = {}
            for name, model in models.items():
                source = embeddings[name]
                if id(source) not in encoded:
                    encoded[id(source)] = source(entry)
                done = 0
                for masks in predict(model, encoded[id(source)], entry, boxes):
                    part = asked[done : done + len(masks)]
                    done += len(masks)
                    columns = [{"model": name, **prompt.columns} for prompt in part]
                    scorer.add(columns, targets, masks)
                    if volumes:
                        for prompt, of_prompt in zip(part, masks, strict=True):
                            if prompt in in_3d:
                                kept[name, prompt.box] = of_prompt
                yield from scorer.rows()
            if volumes:
                volumes.add(entry, native, labels, kept)
        yield from scorer.rows(wait=True)


def target_of(
    entry: Slice,
    label: int,
    native: np.ndarray,
    tolerances: dict[str, float],
    protocol: Protocol,
    several: bool,
) -> Target:
    """The instance of `label` in a slice whose native label map (H, W) is `native`."""
    mask = native == label
    pixels = int(mask.sum())
    return Target(
        columns={
            **instance_of(entry, label, several),
            "pixels": pixels,
            "small": pixels < protocol.small_share * mask.size,
        },
        mask=mask,
        tolerance=tolerances[label_name(entry.label_names, label)],
        spacing=entry.spacing_mm or (1.0, 1.0),
        error_leak=protocol.error_leak,
        error_dsc=protocol.error_dsc,
    )


def instance_of(entry: Slice, label: int, several: bool) -> dict:
    """The columns that name an instance; with several data sets they say which one it is from."""
    name = label_name(entry.label_names, label)
    case = entry.case
    if several:
        name, case = f"{name} ({entry.dataset})", f"{entry.dataset}/{case}"
    return {"case": case, "slice": entry.index, "label": name}


# --- What the report needs beside the scores ------------------------------------------------------
def illustrator(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: list[Slice],
    seed: int,
) -> Callable[..., Example]:
    """A function that predicts one instance again, for the figures of examples."""
    from utils.evaluation.figures import Example

    several = len({entry.dataset for entry in slices}) > 1

    def illustrate(key: tuple, box: str, shift: Shift, names: Sequence[str]) -> Example:
        entry, label = next(
            (entry, label)
            for entry in slices
            for label in entry.labels
            if tuple(instance_of(entry, label, several).values()) == key
        )
        labels, tight, native = instances_of(entry)
        which = labels.index(label)
        boxes = boxes_of(entry, labels, tight, Prompt(box, shift, 0), seed)
        target = native == label
        cells = {}
        for name in names:
            ((masks,),) = predict(models[name], embeddings[name](entry), entry, [boxes])
            shown = entry.frame.boxes_to_native(boxes)[which]
            cells[name] = (shown, masks[which], dsc(masks[which], target))
        height, width = entry.frame.content
        return Example(
            box, read_image(entry.image_path, entry.image_sha256)[:height, :width], target, cells
        )

    return illustrate


def provenance(
    argv: list[str] | None,
    specs: list[Spec],
    models: dict[str, Segmenter],
    runs: list[TrainedRun],
    datasets: list[SliceDataset],
) -> list:
    """The report's last section: command, versions, commit, data, weights.

    Raises:
        UserError: the weights that the runs started from are not what they were.
    """
    from utils.evaluation.report import Code, Items, Text
    from utils.system.files import sha256
    from utils.training.runs import differences, git_commit, versions

    command = shell_command("python", "eval.py", *(sys.argv[1:] if argv is None else argv))
    told = []
    by_path = {run.decoder: run for run in runs}
    for name, model, path in specs:
        digest = sha256(path) if path else models[name].base_sha256
        if runs and name == UNTOUCHED and digest != runs[0].config.get("start_weights"):
            raise UserError(f"{path or model}: not the weights that the runs started from any more")
        line = f"`{name}`: {model}, {Path(path).name if path else 'as packaged'}"
        line += f", SHA-256 {digest[:16]}"
        if path in by_path:
            line += f", policy {by_path[path].options['policy']}, trained for "
            line += f"{by_path[path].epochs} epochs"
        told.append(line)
    told += [f"data `{d.name}`: dataset.json SHA-256 {d.sha256[:16]}" for d in datasets]
    told.append("versions: " + ", ".join(f"{name} {v}" for name, v in versions().items()))
    device = next(iter(models.values())).device
    told.append(f"device: {device.type}; commit: {git_commit() or 'not a git checkout'}")
    blocks: list = [Code(command), Items(told)]
    if len(runs) > 1:
        apart = differences(runs)
        blocks.append(
            Text(f"Beside their policy the runs differ in: {'; '.join(apart)}.")
            if apart
            else Text(
                "The runs differ in the policy of their boxes alone: same starting weights, data, "
                "options and seed."
            )
        )
    return blocks


# --- Options -------------------------------------------------------------------------------------
def model_specs(models: list[Spec], runs: list[TrainedRun]) -> list[Spec]:
    """All models to compare: the weights that the runs started from, the runs, then `models`.

    Raises:
        UserError: two have the same name.
    """
    specs: list[Spec] = []
    if runs:
        options = runs[0].options
        specs.append((UNTOUCHED, options["model"], options["checkpoint"]))
        specs += [(run.name, run.options["model"], run.decoder) for run in runs]
    specs += models
    names = [name for name, _, _ in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two models are named {name!r}; rename a run, or use --models NAME=MODEL"
            )
    return specs


def data_of(runs: list[TrainedRun]) -> list[str]:
    """The folders that the runs were trained on.

    Raises:
        UserError: there is no run, or they were trained on different folders.
    """
    folders = {tuple(run.options["data"]) for run in runs}
    if len(folders) != 1:
        raise UserError("--data: give the folder(s) of preprocess_ct.py to evaluate on")
    return list(folders.pop())


def check_data(datasets: list[SliceDataset], runs: list[TrainedRun]) -> None:
    """See that data which runs were trained on is as it was: its test patients were not trained on.

    Raises:
        UserError: it was preprocessed again since.
    """
    for trained in runs:
        trained_on = trained.config.get("data", {})
        for dataset in datasets:
            if trained_on.get(dataset.name, dataset.sha256) != dataset.sha256:
                raise UserError(
                    f"{dataset.folder}: changed since {trained.folder} was trained on it, so the "
                    "split may hold patients that were trained on; train again"
                )


def slices_of(dataset: SliceDataset, args) -> list[Slice]:
    """The slices of one data set to evaluate; with --slices N evenly spaced ones of each patient.

    Raises:
        UserError: there is none.
    """
    slices = dataset.split(args.split)
    if not slices:
        raise UserError(
            f"{dataset.folder}: the {args.split} split is empty; choose another --split"
        )
    if args.slices is None:
        return slices
    of_case: dict[str, list[Slice]] = {}
    for entry in slices:
        of_case.setdefault(entry.case, []).append(entry)
    return [
        entries[(2 * n + 1) * len(entries) // (2 * count)]
        for entries in of_case.values()
        for count in [min(args.slices, len(entries))]
        for n in range(count)
    ]


def unit_of(slices: Sequence[Slice]) -> str:
    """What distances are measured in: "mm", or "px" of slices whose spacing is not known.

    Raises:
        UserError: it is known of some of the slices alone.
    """
    known = {entry.spacing_mm is not None: entry for entry in slices}
    if len(known) > 1:
        raise UserError(
            f"{known[False].folder}: has no spacing, {known[True].folder} has: NSD would be in "
            "pixels here and in mm there; evaluate them one at a time"
        )
    return "mm" if True in known else "px"


def check_unit(args, unit: str) -> None:
    """See that nothing is asked for that takes millimetres where there are none.

    Raises:
        UserError: FLARE22's tolerances, --volume or --save-predictions with slices alone.
    """
    asked = {
        "--tolerance flare22": args.tolerance == "flare22",
        "--volume": args.volume,
        "--save-predictions": args.save_predictions,
    }
    for option, given in asked.items():
        if given and unit == "px":
            raise UserError(
                f"{option}: the data are MedSAM's slices, whose spacing and place in the patient "
                "are not known; leave it out, or preprocess the volumes"
            )


def tolerances_of(tolerance: float | str, slices: list[Slice]) -> dict[str, float]:
    """The tolerance of each label name, in the unit of the slices.

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


def protocol_of(
    args,
    datasets: list[SliceDataset],
    runs: list[TrainedRun],
    models: list[str],
    unit: str = "mm",
) -> Protocol:
    """How the evaluation is made, from the options; `unit` is that of --tolerance.

    Raises:
        UserError: --baseline or --proposed is none of the models, or both are the same.
    """
    from utils.evaluation.comparisons import Protocol

    for name in filter(None, (args.baseline, args.proposed)):
        if name not in models:
            raise UserError(f"no model {name!r} to compare; there are {', '.join(models)}")
    # Each role's usual model, else the last or the first, but never one model in both.
    others = [name for name in models if name != args.baseline]
    proposed = args.proposed or (PROPOSED if PROPOSED in others else [*models[:1], *others][-1])
    others = [name for name in models if name != proposed] or models
    baseline = args.baseline or (BASELINE if BASELINE in others else others[0])
    if baseline == proposed and len(models) > 1:
        raise UserError(f"--baseline and --proposed are both {baseline!r}; name two models")
    warning = ""
    if runs and args.split != "test":
        warning = (
            f"The split is {args.split}: models were trained on these patients or chosen by them. "
            "What follows says nothing about new patients."
        )
    slices = "" if args.slices is None else f", at most {args.slices} slices of each patient"
    tolerance = "FLARE22's tolerances" if args.tolerance == "flare22" else f"{args.tolerance:g} mm"
    if unit == "px":  # not to be compared with one in mm, so every table says it
        tolerance = f"{args.tolerance:g} pixels of the slices, whose spacing is not known"
    return Protocol(
        what=f"{', '.join(dataset.name for dataset in datasets)} (split {args.split}{slices})",
        shifts=tuple(args.shift),
        sweep=tuple(map(Shift.parse, SWEEP)) if args.sweep else (),
        draws=args.draws,
        seed=args.seed,
        tolerance=tolerance,
        small_share=SMALL_SHARE,
        error_leak=ERROR_LEAK,
        error_dsc=ERROR_DSC,
        baseline=baseline,
        proposed=proposed,
        warning=warning,
    )


def parse_args(argv: list[str] | None):
    """The options, `models` as specs and `shift` as Shifts.

    Raises:
        UserError: an unknown option or a value out of range.
    """
    from argparse import BooleanOptionalAction

    from utils.data.slices import SPLITS

    parser = Parser(
        description="Compare models under standard, expansion and shrink boxes: tables, figures, "
        "report."
    )
    what = parser.add_argument_group("what to compare on what")
    what.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="runs of train_adaptive.py; the weights they started from are added",
    )
    what.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME=MODEL[:CHECKPOINT]",
        type=parse_model,
        help="MODEL is lite_medsam, medsam_vit_b or sam_vit_b|l|h; CHECKPOINT the full weights or "
        "a decoder_best.pth (not needed for lite_medsam)",
    )
    what.add_argument(
        "--data",
        nargs="+",
        metavar="DIR",
        help="folder(s) of preprocess_ct.py (default: those of --runs)",
    )
    what.add_argument("--split", choices=(*SPLITS, "all"), default=SPLIT, help="(default test)")
    what.add_argument(
        "--slices", type=int, metavar="N", help="at most N slices of each patient (default: all)"
    )
    what.add_argument(
        "--baseline", metavar="NAME", help=f"compared with (default {BASELINE}, or the first)"
    )
    what.add_argument(
        "--proposed", metavar="NAME", help=f"of interest (default {PROPOSED}, or the last)"
    )

    boxes = parser.add_argument_group("boxes")
    boxes.add_argument(
        "--shift",
        nargs="+",
        type=parse_shift,
        default=list(map(Shift.parse, SHIFTS)),
        metavar="SHIFT",
        help="largest shifts of an edge: %% of the side (under 50) or px of the 1024 frame; the "
        f"conclusions are about the first (default {' '.join(SHIFTS).replace('%', '%%')})",
    )
    boxes.add_argument(
        "--draws",
        type=int,
        default=DRAWS,
        metavar="N",
        help="random boxes for each instance, kind and shift (default %(default)s)",
    )
    boxes.add_argument(
        "--sweep",
        action=BooleanOptionalAction,
        default=True,
        help="the robustness curve: all edges by -25 to 25 %% and -20 to 20 px",
    )
    boxes.add_argument("--seed", type=int, default=SEED, metavar="N", help="(default %(default)s)")

    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--tolerance",
        type=parse_tolerance,
        default=TOLERANCE,
        metavar="MM",
        help="of NSD in mm, or flare22 for that challenge's own per organ; of MedSAM's slices, "
        "which have no spacing, in pixels (default %(default)s)",
    )
    scoring.add_argument(
        "--volume",
        action="store_true",
        help="score whole volumes in 3D as well; their slices must be contiguous",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--out", default=OUT, metavar="DIR", help="(default %(default)s)")
    output.add_argument(
        "--figures",
        action=BooleanOptionalAction,
        default=True,
        help="examples, chosen by rule: fig4.png, fig5.png, fig6.png",
    )
    output.add_argument(
        "--save-predictions",
        action="store_true",
        help="label volumes of the tight boxes, in the source images' geometry",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that score while the models go on, 0: none "
        f"(default {WORKERS} with a GPU here, {WORKERS_ON_CPU} on a CPU)",
    )
    machine.add_argument(
        "--cache",
        choices=("on", "off"),
        default="on",
        help="keep the embeddings, 2 MiB a slice, beside the slices; off encodes them each time "
        "(default %(default)s)",
    )
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cuda, cuda:N, cpu or auto (default)"
    )
    args = parser.parse_args(argv)
    if not args.runs and not args.models:
        raise UserError("give --runs DIR or --models NAME=MODEL (see --help)")
    for option in ("draws", "slices"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option}: must be 1 or more, got {getattr(args, option)}")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers: must be 0 or more, got {args.workers}")
    if len(set(args.shift)) < len(args.shift):
        raise UserError("--shift: the same shift is given twice")
    return args


Spec = tuple[str, str, "Path | str | None"]  # name, model, checkpoint


def parse_model(text: str) -> Spec:
    """NAME=MODEL[:CHECKPOINT] as (name, model, checkpoint or None); NAME defaults to MODEL."""
    from_model = text.partition(":")[0]
    name, equals, rest = text.partition("=") if "=" in from_model else ("", "", text)
    model, _, checkpoint = rest.partition(":")
    if not model or (equals and not re.fullmatch(r"\w[\w.+-]*", name)):
        raise UserError(
            f"--models: expected NAME=MODEL[:CHECKPOINT], NAME of letters, digits and _.+-, "
            f"got {text!r}"
        )
    return name or model, model, checkpoint or None


def parse_shift(text: str) -> Shift:
    """A largest shift, "15%" or "20px"."""
    try:
        shift = Shift.parse(text)
    except ValueError as error:
        raise UserError(f"--shift: {error}") from None
    if shift.size <= 0:
        raise UserError(f"--shift: must be more than 0, got {text}")
    return shift


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
