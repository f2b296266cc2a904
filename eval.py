"""Compare models under standard, expansion and shrink boxes: the paper's tables and figures.

    python eval.py --runs work_dir/ablation --out work_dir/report
    python eval.py --data data/flare22 --models untouched=medsam_vit_b:work_dir/medsam_vit_b.pth \\
        adaptive=medsam_vit_b:work_dir/flare22-adaptive/decoder_best.pth
    python eval.py --runs work_dir/ablation --models sam=sam_vit_b:download lite_medsam
    python eval.py --data data/lung --models lite_medsam --split all --no-sweep
    python eval.py --predict scan.nii.gz --boxes boxes.csv --runs work_dir/mean
                                        a label volume of a scan without labels
    torchrun --nproc-per-node 2 -- eval.py ...              on several GPUs

--runs takes runs of train_adaptive.py and adds the weights that they started from. A model is
NAME=MODEL[:CHECKPOINT]; `lite_medsam` alone is LiteMedSAM's own weights under that name. Every
instance, one label in one slice, is prompted with boxes that are the same for every model: the
tight one, boxes whose edges lie outside it by U(0, shift), boxes whose edges lie inside, and for
the robustness curve boxes with all edges moved by the same shift. Predictions are scored in 2D at
the slice's native resolution. Into --out, work_dir/eval/<name of the run> by default, go

    report.md, report.html      everything below, and what can be concluded
    instances.csv               one row per model, instance and box; all else follows from it
    families.csv, families.png  DSC over families of boxes, and how far from the best in each
    table1, table2, table3      the paper's tables, as .md .csv .tex
    small.csv                   errors on small instances by definition and label
    given.csv                   with --boxes, scores under boxes that people drew
    labels.csv                  both scores per label
    comparisons.csv             the proposed model against each other one
    robustness.csv, robustness_side.png, robustness_px.png      scores against the shift
    fig4.png, fig5.png, fig6.png    the paper's figures, the cases chosen by rule
    volumes.csv, predictions/   with --volume and --save-predictions

A patient that a model was trained on or chosen by is an error, unless --allow-seen is given, which
marks the report. After an interruption the same command goes on with the next patient. Earlier
results in --out are replaced only with --overwrite.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perturb import SMALL_SHARE, Shift
from utils.data.options import parse_window
from utils.data.slices import SPLITS, Slice, SliceDataset, open_datasets, read_instances
from utils.evaluation.inputs import (
    BASELINE,
    PROPOSED,
    by_patient,
    check_unit,
    data_of,
    instances_of,
    roles_of,
    select_slices,
    shard_patients,
    tolerance_text,
    tolerances_of,
    unit_of,
)
from utils.evaluation.output_folder import (
    NEW,
    PREDICTIONS,
    check_free,
    claimed,
    default_out,
    replace_results,
)
from utils.evaluation.prompts import Protocol, all_prompts, boxes_of
from utils.system import distributed, signals
from utils.system.command_line import Parser, integer, run, shell_command
from utils.system.progress_bar import progress_bar
from utils.system.wording import plural

if TYPE_CHECKING:
    import torch

    from utils.evaluation.given import Given
    from utils.evaluation.kept_scores import KeptScores
    from utils.evaluation.scoring import Scores
    from utils.evaluation.volume_scores import VolumeScores
    from utils.model.segmenter import Segmenter

# Constants without an option (the options and their defaults are in parse_args)
SWEEP = (
    *(f"{share}%" for share in range(-25, 30, 5) if share),
    *(f"{pixels}px" for pixels in range(-20, 30, 10) if pixels),
)
ERROR_LEAK = 0.10  # an error: more than this share of the target's area beyond the tolerance ...
ERROR_DSC = 0.5  # ... or a DSC below this
DECODE_BOXES = 32  # boxes in one decoder call, roughly: more are no faster and take memory
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # processes that score, beside a GPU ...
WORKERS_ON_CPU = 0  # ... and on a CPU, where they would take its cores from the decoder


# --- The evaluation ------------------------------------------------------------------------------
def evaluate(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: Sequence[Slice],
    tolerances: dict[str, float],
    protocol: Protocol,
    volumes: VolumeScores | None = None,
    workers: int = 0,
    amp: torch.dtype | None = None,
    kept: KeptScores | None = None,
    given: Given | None = None,
) -> Scores:
    """Score every instance of `slices` under every prompt with every model.

    Args:
        models, embeddings: by name; an embedding is (256, 64, 64), from that model's encoder.
        slices: of one or several data sets.
        tolerances: of NSD in mm, or in pixels where no spacing is known, by label name.
        protocol: shifts, draws and seed of the boxes.
        volumes: collects masks for scores in 3D.
        workers: processes that score while this one decodes; with 0, this one scores as well.
        amp: the dtype in which the decoder computes, None for fp32.
        kept: keeps the scores of patients that are finished, and has those of an earlier try.
        given: boxes that people drew around some of the instances.

    Returns:
        The rows of instances.csv, in the order of patients, slices, models, prompts and labels, and
        with `volumes` those of volumes.csv.
    """
    # Imports of torch, pandas and what needs them take seconds: in functions, so that --help is
    # quick, here and in main.
    from utils.evaluation.given import given_prompts
    from utils.evaluation.models import predict
    from utils.evaluation.scoring import Scorer, Scores, joined, targets_of

    prompts = all_prompts(protocol)  # standard, expansion, shrink, loose, sweep
    patients = by_patient(slices)
    scores = kept.read(patients) if kept else {}
    done = sum(len(patients[patient]) for patient in scores)
    bar = progress_bar(desc="evaluating", unit="slice", total=len(slices), initial=done)
    with signals.deferred(), Scorer(workers) as scorer, bar:
        for patient, of_patient in patients.items():
            if patient in scores:
                continue
            for entry in of_patient:
                signals.raise_if_pending()
                label_map, labels, tight = read_instances(entry)  # (1024, 1024), (K,), (K, 4)
                native = entry.frame.labels_to_native(label_map)  # (H, W)
                targets = targets_of(entry, labels, native, tolerances, protocol)
                boxes = [boxes_of(entry, labels, tight, one, protocol.seed) for one in prompts]
                encoded = {encoder: encoder(entry) for encoder in set(embeddings.values())}
                step = max(1, DECODE_BOXES // len(labels))  # prompts in one decoder call

                for name, model in models.items():
                    embedding = encoded[embeddings[name]]
                    for start in range(0, len(prompts), step):
                        part = slice(start, start + step)
                        some_boxes = np.concatenate(boxes[part])
                        logits = predict(model, embedding, some_boxes, entry.frame, amp)
                        masks = (logits > 0).cpu().numpy()
                        masks = masks.reshape(-1, len(labels), *native.shape)  # (P, K, H, W)
                        scorer.submit(name, prompts[part], targets, masks)
                        if volumes:
                            volumes.add_masks(name, prompts[part], labels, masks, entry.index)
                    for prompt, chosen, some_boxes in given_prompts(given or {}, entry, labels):
                        logits = predict(model, embedding, some_boxes, entry.frame, amp)
                        masks = (logits > 0).cpu().numpy()[None]  # (1, K', H, W)
                        scorer.submit(name, [prompt], [targets[n] for n in chosen], masks)
                if volumes:
                    volumes.finish_slice(entry, native)
                bar.update()
            scores[patient] = Scores(scorer.finish(), volumes.finish() if volumes else [])
            if kept:
                kept.write(patient, scores[patient])
    return joined(scores[patient] for patient in patients)


def main(argv: list[str] | None = None) -> None:
    """The command line; interrupted, it says how to go on.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM.
    """
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    if args.predict:
        from utils.prediction.command import predict_scans

        return predict_scans(args, shell_command("python", "eval.py", *words))
    distributed.init()
    try:
        compare_models(args, shell_command("python", "eval.py", *words))
    except KeyboardInterrupt as stop:
        size = distributed.world_size()
        launcher = ("torchrun", "--nproc-per-node", str(size), "--") if size > 1 else ("python",)
        raise signals.Interrupted(
            getattr(stop, "signal", signal.SIGINT),
            "interrupted; the scores of patients that are finished are kept; go on with: "
            + shell_command(*launcher, "eval.py", *words),
        ) from None


def compare_models(args: argparse.Namespace, command: str) -> None:
    """Open what the options name, score it, write the results, print Table I and the conclusions.

    Args:
        args: the options.
        command: the command line, for the report.
    """
    from utils.data.given_boxes import read_boxes
    from utils.evaluation.figures import illustrator
    from utils.evaluation.given import given_boxes
    from utils.evaluation.half_precision import precision_note
    from utils.evaluation.instances import to_frame
    from utils.evaluation.kept_scores import KeptScores, scores_key
    from utils.evaluation.models import (
        fetch_weights,
        load_models,
        model_specs,
        provenance,
        weight_hashes,
    )
    from utils.evaluation.report import write_results
    from utils.evaluation.scoring import joined
    from utils.evaluation.seen import check_seen, seen_by_models, window_notes
    from utils.evaluation.volume_scores import VolumeScores, save_predictions, volume_frame
    from utils.system.device import (
        choose_device,
        explain_out_of_memory,
        keep_freed_memory,
        mixed_precision,
    )
    from utils.training.runs import find_runs, trainings

    names = [Path(folder).resolve().name for folder in args.runs] or [m for m, _, _ in args.models]
    out = Path(args.out) if args.out else default_out(names)
    distributed.rank_zero_first(lambda: check_free(out, args.overwrite))
    runs = find_runs(args.runs)
    specs = model_specs(args.models, runs)
    datasets = open_datasets(args.data or data_of(runs))
    slices = [s for dataset in datasets for s in select_slices(dataset, args.split, args.slices)]
    patients, own = by_patient(slices), shard_patients(slices)
    fetch_weights(args.models)
    seen = seen_by_models(specs, slices, datasets)
    leak = check_seen(seen, len(patients), args.allow_seen)
    unit = unit_of(slices)
    check_unit(args, unit)
    tolerances = tolerances_of(args.tolerance, slices)
    tuned = {run.name for run in runs} | {name for name, known in seen.items() if known is not None}
    protocol = protocol_of(args, datasets, [*seen], unit, leak, tuned, trainings(runs))
    volumes = None
    if args.volume:
        volumes = VolumeScores(datasets, own, tolerances, protocol.shifts[0])
    device = choose_device(distributed.local_device(args.device))
    amp = mixed_precision(args.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    workers = scoring_processes(args.workers, device)

    notes = [*protocol.notes, *window_notes(datasets, runs)]
    given = None
    if args.boxes:
        given, note = given_boxes([read_boxes(path) for path in args.boxes], datasets, slices)
        notes += [note] if note else []
    for note in notes:  # before hours of work, and again on top of the results
        distributed.print_once(f"note: {note}")
    with explain_out_of_memory("try fewer models at a time, or --device cpu"), ExitStack() as stack:
        models, embeddings = load_models(specs, slices, args.cache == "on", args.cache_dir, device)
        weights = weight_hashes(specs, models)
        how_made = provenance(command, specs, weights, device, runs, datasets, seen, len(patients))
        named = [(name, model, weights[name]) for name, model, _ in specs]
        key = scores_key(args, protocol, tolerances, named, datasets, device.type)
        kept = KeptScores(out, distributed.broadcast(key))

        def claim_out() -> None:
            stack.enter_context(claimed(out, args.overwrite))
            kept.begin(patients)

        distributed.rank_zero_first(claim_out)
        if amp and distributed.rank() == 0:
            notes.append(precision_note(models, embeddings, slices, protocol, amp))
            print(f"note: {notes[-1]}")
        scores = evaluate(
            models, embeddings, own, tolerances, protocol, volumes, workers, amp, kept, given
        )
        scores = joined(distributed.gather(scores))
        if args.save_predictions:
            save_predictions(models, embeddings, datasets, own, out / NEW / PREDICTIONS, amp)
            distributed.barrier()  # rank 0 moves the files of all
        if distributed.rank() == 0:
            instances = instances_of(slices, protocol.several_datasets)
            illustrate = None
            if args.figures:
                illustrate = illustrator(models, embeddings, instances, args.seed, amp)
            printed = write_results(
                to_frame(scores.rows, case_order=[case for case, _, _ in instances]),
                replace(protocol, notes=tuple(notes)),
                how_made,
                out / NEW,
                illustrate,
                volume_frame(scores.volume_rows) if volumes else None,
            )
            replace_results(out)
            kept.remove()
            print(printed)
            print(f"wrote {out / 'report.html'}, {out / 'report.md'} and what they are made of")
    distributed.barrier()


def scoring_processes(workers: int | None, device: torch.device) -> int:
    """How many processes score beside this one: `workers`, or by default what suits the device."""
    if workers is not None:
        return workers
    share = max(1, WORKERS // distributed.world_size())
    return WORKERS_ON_CPU if device.type == "cpu" else share


def protocol_of(
    args: argparse.Namespace,
    datasets: Sequence[SliceDataset],
    models: Sequence[str],
    unit: str = "mm",
    leak: str = "",
    tuned: Collection[str] = (),
    trainings: Mapping[str, str] | None = None,
) -> Protocol:
    """How the evaluation is made.

    Args:
        args: the options.
        datasets: to evaluate on.
        models: their names.
        unit: of --tolerance.
        leak: the note that models have seen some of the patients, or empty.
        tuned: the names of fine-tuned models.
        trainings: the training of each run.

    Raises:
        UserError: --baseline or --proposed names no model, or both name the same one.
    """
    trainings = trainings or {}
    baseline, proposed = roles_of(models, args.baseline, args.proposed, tuned, trainings)
    slices = (
        "" if args.slices is None else f", at most {plural(args.slices, 'slice')} of each patient"
    )
    data = f"{', '.join(dataset.name for dataset in datasets)} (split {args.split}{slices})"
    if leak:  # in the header of every table, as they are copied out of the report
        data += ", among them patients that models were trained on or chosen by"
    return Protocol(
        data=data,
        shifts=tuple(args.shift),
        sweep=tuple(map(Shift.parse, SWEEP)) if args.sweep else (),
        draws=args.draws,
        seed=args.seed,
        tolerance=tolerance_text(args.tolerance, unit),
        small_share=SMALL_SHARE,
        error_leak=ERROR_LEAK,
        error_dsc=ERROR_DSC,
        baseline=baseline,
        proposed=proposed,
        notes=(leak,) if leak else (),
        several_datasets=len(datasets) > 1,
        trainings=trainings,
    )


# --- Options -------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options; `models` as (name, model, checkpoint) and `shift` as Shifts.

    Raises:
        UserError: an unknown option or a value out of range.
    """
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
        help="MODEL is lite_medsam, medsam_vit_b or sam_vit_b|l|h; CHECKPOINT the full weights, a "
        "decoder_best.pth, or download, which fetches MedSAM's or SAM's into work_dir/ (not needed "
        "for lite_medsam)",
    )
    what.add_argument(
        "--data",
        nargs="+",
        metavar="DIR",
        help="folder(s) of preprocess_ct.py (default: those of --runs)",
    )
    what.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="(default test)")
    what.add_argument(
        "--allow-seen",
        action="store_true",
        help="evaluate models on patients that they were trained on or chosen by too, which is an "
        "error otherwise, and mark the report",
    )
    what.add_argument(
        "--slices",
        type=integer(1),
        metavar="N",
        help="at most N slices of each patient (default: all)",
    )
    what.add_argument(
        "--baseline", metavar="NAME", help=f"compared with (default {BASELINE}, or the first)"
    )
    what.add_argument(
        "--proposed", metavar="NAME", help=f"of interest (default {PROPOSED}, or the last)"
    )

    boxes = parser.add_argument_group("boxes")
    shifts = ("15%", "20px", "5%", "10%", "20%", "25%")  # the paper does not give its own
    boxes.add_argument(
        "--shift",
        nargs="+",
        type=parse_shift,
        default=list(map(Shift.parse, shifts)),
        metavar="SHIFT",
        help="largest shifts of an edge: %% of the side (under 50) or px of the 1024 frame; the "
        f"conclusions are about the first (default {' '.join(shifts).replace('%', '%%')})",
    )
    boxes.add_argument(
        "--draws",
        type=integer(1),
        default=1,
        metavar="N",
        help="random boxes for each instance, kind and shift",
    )
    boxes.add_argument(
        "--sweep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the robustness curve: all edges by -25 to 25 %% and -20 to 20 px",
    )
    boxes.add_argument("--seed", type=int, default=0, metavar="N", help="of the random boxes")

    boxes.add_argument(
        "--boxes",
        nargs="+",
        metavar="FILE",
        help="boxes that people drew on --data, scored as well, or of the scans of --predict: a "
        ".csv with case,label,z,x0,y0,x1,y1 (voxels of the stored file from 0, maxima inclusive; "
        "no case if there is one), a rough label map, or 3D Slicer's .mrk.json",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--tolerance",
        type=parse_tolerance,
        default=2.0,
        metavar="MM",
        help="of NSD in mm, or flare22 for that challenge's own per organ; of MedSAM's slices, "
        "which have no spacing, in pixels",
    )
    scoring.add_argument(
        "--volume",
        action="store_true",
        help="score whole volumes in 3D as well; their slices must be contiguous",
    )

    scans = parser.add_argument_group("instead: label volumes of scans, without labels to compare")
    scans.add_argument(
        "--predict",
        metavar="SCAN",
        help="a NIfTI file, the folder of a DICOM series, or a folder of either, segmented from "
        "--boxes by the one model of --runs or --models; where masks overlap the greater "
        "probability wins",
    )
    scans.add_argument(
        "--propagate",
        action="store_true",
        help="follow every box to the slices above and below: the last mask gives the next box, "
        "until the mask is empty or its area doubles or halves",
    )
    scans.add_argument(
        "--window",
        type=parse_window,
        metavar="HU",
        help="flare22, lung, medsam, or LO,HI (default: that of the run's data)",
    )
    scans.add_argument(
        "--probabilities", action="store_true", help="a float volume for each label as well"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results (default work_dir/eval/NAME, of the runs' or models' names; of "
        "scans work_dir/predict/SCAN)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results that --out holds; without it they are kept and eval.py stops",
    )
    output.add_argument(
        "--figures",
        action=argparse.BooleanOptionalAction,
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
        type=integer(0),
        metavar="N",
        help="processes that score while the models go on, 0: none "
        f"(default {WORKERS} with a GPU here, {WORKERS_ON_CPU} on a CPU)",
    )
    machine.add_argument(
        "--cache",
        choices=("on", "off"),
        default="on",
        help="keep the embeddings, 2 MiB per slice, beside the slices; off encodes them each time",
    )
    machine.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="keep them in this folder, if the slices lie where nothing can be written",
    )
    machine.add_argument(
        "--amp",
        choices=("off", "fp16", "bf16"),
        default="off",
        help="half precision of the decoder: fp16 needs a GPU; what it does to DSC is told "
        "(default off)",
    )
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cuda, cuda:N, mps, cpu, auto"
    )
    args = parser.parse_args(argv)
    if not args.runs and not args.models:
        parser.error("give --runs DIR or --models NAME=MODEL")
    check_prediction_options(parser.given(argv), parser)
    if len(set(args.shift)) < len(args.shift):
        parser.error("--shift: the same shift is given twice")
    if args.cache_dir and args.cache == "off":
        parser.error("--cache-dir: --cache off keeps nothing; leave out one of the two")
    return args


def check_prediction_options(given: dict[str, object], parser: Parser) -> None:
    """Check that options of predictions and of evaluations are not mixed.

    Raises:
        UserError: they are, or --predict has no boxes.
    """
    of_scans = {"predict", "propagate", "window", "probabilities"}
    if "predict" not in given:
        for name in sorted(of_scans & given.keys()):
            parser.error(f"--{name}: goes with --predict SCAN")
        return
    if "boxes" not in given:
        parser.error("--predict: give the boxes of the scan, --boxes FILE")
    usable = of_scans | {"boxes", "runs", "models", "out", "amp", "device"}
    for name in sorted(given.keys() - usable):
        parser.error(f"--{name.replace('_', '-')}: does not go with --predict")


def parse_model(text: str) -> tuple[str, str, str | None]:
    """NAME=MODEL[:CHECKPOINT] as (name, model, checkpoint or None); NAME defaults to MODEL."""
    before_checkpoint = text.partition(":")[0]
    name, equals, rest = text.partition("=") if "=" in before_checkpoint else ("", "", text)
    model, _, checkpoint = rest.partition(":")
    if not model or (equals and not re.fullmatch(r"\w[\w.+-]*", name)):
        raise argparse.ArgumentTypeError(
            f"expected NAME=MODEL[:CHECKPOINT], NAME of letters, digits and _.+-, got {text!r}"
        )
    return name or model, model, checkpoint or None


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
    try:
        tolerance = float(text)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise argparse.ArgumentTypeError(f"expected mm (0 or more) or flare22, got {text!r}")
    return tolerance


if __name__ == "__main__":
    run(main)
