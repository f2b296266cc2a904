"""Compare models under standard, expansion and shrink boxes: the paper's tables and figures.

    python eval.py --runs ablation                      the run work_dir/ablation
    python eval.py --data data/flare22 --models untouched=medsam_vit_b:work_dir/medsam_vit_b.pth \\
        adaptive=medsam_vit_b:work_dir/flare22-adaptive/decoder_best.pth
    python eval.py --runs work_dir/ablation --models sam=sam_vit_b:download lite_medsam
    python eval.py --data data/lung --models lite_medsam --split all --no-sweep
    python eval.py --predict scan.nii.gz --boxes boxes.csv --runs mine/recommended
                                        a label volume of a scan without labels

--runs takes runs of train_adaptive.py and adds the weights that they started from. A model is
NAME=MODEL[:CHECKPOINT]; `lite_medsam` alone is LiteMedSAM's own weights under that name. Every
instance, one label in one slice, is prompted with boxes that are the same for every model: the
tight one, boxes whose edges lie outside it by U(0, shift), boxes whose edges lie inside, and for
the robustness curve boxes with all edges moved by the same shift. Predictions are scored in 2D at
the slice's native resolution. Into --out go report.html and report.md, the tables and figures in
them, and instances.csv, one row per model, instance and box, from which all else follows;
docs/evaluation.md lists the files.

A patient that a model was trained or selected on is an error, unless --allow-seen is given, which
marks the report. After an interruption the same command resumes with the next patient.
"""

from utils.evaluation.options import parse_options

if __name__ == "__main__":
    options = parse_options()  # before the imports that take seconds, so that --help is quick

import os
import signal
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd

from perturb import Shift, mask_areas
from utils.data.given_boxes import read_boxes
from utils.data.slices import Slice, SliceDataset, open_datasets, read_instances
from utils.evaluation.examples import ExampleRenderer
from utils.evaluation.interpolation import find_tracks
from utils.evaluation.models import (
    Predictor,
    choose_roles,
    data_of,
    label_notes,
    load_models,
    model_specs,
    provenance,
    scores_key,
    synthetic_notes,
    training_overlap,
    window_notes,
)
from utils.evaluation.options import default_out
from utils.evaluation.prompts import (
    GIVEN,
    PROPAGATED,
    Patient,
    Protocol,
    ReportContext,
    box_chunks,
    by_patient,
    every_boxes,
    read_given,
    select_slices,
)
from utils.evaluation.report import RESULT_FILES, write_results
from utils.evaluation.scoring import (
    KeptScores,
    Scorer,
    Scores,
    targets_of,
    tolerance_text,
    tolerances_of,
)
from utils.evaluation.statistics import to_frame
from utils.evaluation.volume_scores import VolumeScores, follow, save_predictions
from utils.prediction.command import draw_scans, predict_scans
from utils.system import plural, signals
from utils.system.command_line import run, shell_command
from utils.system.device import (
    choose_device,
    explain_out_of_memory,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.files import check_overwrite, new_folder
from utils.system.loops import progress_bar
from utils.training.runs import find_runs, trainings

# Constants without an option (the options are in utils/evaluation/options.py)
SWEEP = (
    *(f"{share}%" for share in range(-25, 30, 5) if share),
    *(f"{pixels}px" for pixels in range(-20, 30, 10) if pixels),
)
DECODE_BOXES = 32  # boxes in one decoder call, roughly: more are no faster and take memory
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # processes that score, beside a GPU ...
WORKERS_ON_CPU = 0  # ... and on a CPU, where they would take its cores from the decoder
PREDICTIONS = "predictions"  # <model>/<data set>/<case>.nii.gz


# --- The evaluation ------------------------------------------------------------------------------
def evaluate(
    models: Mapping[str, Predictor],
    slices: Sequence[Slice],
    protocol: Protocol,
    tolerances: Mapping[str, float],
    workers: int = 0,
    volumes: VolumeScores | None = None,
) -> Iterator[tuple[Patient, Scores]]:
    """Score every instance of `slices` under every prompt with every model.

    Args:
        models: by name.
        slices: of one or several data sets.
        protocol: shifts, draws and seed of the boxes, and boxes that people drew or would draw.
        tolerances: of NSD in mm, or in pixels where no spacing is known, by label name.
        workers: processes that score while this one decodes; with 0, this one scores as well.
        volumes: collects masks for scores in 3D; needed where `protocol` has tracks.

    Yields:
        Each patient, when finished, with the rows of instances.csv, in the order of slices, models,
        prompts and labels, and with `volumes` those of volumes.csv.
    """
    progress = progress_bar(desc="evaluating", unit="slice", total=len(slices))
    with signals.deferred(), Scorer(workers) as scorer, progress:
        for patient, samples in by_patient(slices).items():
            for sample in samples:
                signals.raise_if_pending()
                label_map, labels, tight = read_instances(sample)  # (1024, 1024), (K,), (K, 4)
                areas = mask_areas(label_map, labels)  # (K,)
                native = sample.frame.labels_to_native(label_map)  # (H, W)
                targets = targets_of(sample, labels, native, tolerances)
                # Standard, expansion, shrink, loose, every n-th slice, sweep, given
                chunks = box_chunks(sample, labels, tight, areas, protocol, DECODE_BOXES)
                encoders = {model.embeddings for model in models.values()}
                embeddings = {encoder: encoder(sample) for encoder in encoders}

                for name, model in models.items():
                    for prompts, positions, boxes in chunks:
                        logits = model.predict(sample, boxes, embeddings[model.embeddings])
                        masks = (logits > 0).cpu().numpy()
                        masks = masks.reshape(len(prompts), -1, *native.shape)  # (P, K, H, W)
                        prompted = [targets[position] for position in positions]
                        scorer.submit(name, prompts, prompted, masks)  # DSC (13), NSD (14)
                        if volumes:
                            volumes.add(name, prompts, prompted, masks)
                progress.update()
            for name, model in models.items():  # one box of each target, propagated
                for track in protocol.tracks.get(patient, ()):
                    signals.raise_if_pending()
                    for z, mask in follow(model, track, samples):
                        volumes.add_mask(name, PROPAGATED, track.organ, z, mask)
            yield patient, Scores(scorer.finish(), volumes.finish() if volumes else [])


def main(options: Namespace) -> None:
    """Write an evaluation's results, or with --predict label volumes of scans.

    Raises:
        UserError: bad input; nothing is written then.
        Interrupted: by Ctrl-C or SIGTERM; it says how to go on.
    """
    if options.predict:
        return predict_scans(options) if options.draw is None else draw_scans(options)
    out = options.out or default_out(options)
    check_overwrite(out, options.overwrite)
    replaceable = (*RESULT_FILES, f"{PREDICTIONS}/**/*.nii.gz") if options.overwrite else ()
    try:
        with new_folder(out, replaceable, keep_partial=True) as folder:
            printed = compare_models(options, folder)
    except KeyboardInterrupt as stop:
        raise signals.Interrupted(
            getattr(stop, "signal", signal.SIGINT),
            "interrupted; the scores of finished patients are kept; go on with: " + options.command,
        ) from None
    print(printed)
    print(f"wrote {out / 'report.html'}, {out / 'report.md'} and the files behind them")
    if options.runs:
        words = ("--predict", "SCAN", "--draw", "--runs", find_runs(options.runs)[-1].folder)
        print("next: " + shell_command("python", "eval.py", *words))


def compare_models(options: Namespace, folder: Path) -> str:
    """Open what the options name, score it, and write the results to a folder.

    It may hold the scores of an earlier try. Returns Table I and the conclusions, for the terminal.
    """
    runs = find_runs(options.runs)
    specs = model_specs(options.models, runs)
    datasets = open_datasets(options.data or data_of(runs))
    slices = [s for data in datasets for s in select_slices(data, options.split, options.slices)]
    tolerance = tolerance_text(options, slices)
    tolerances = tolerances_of(options.tolerance, slices)
    names = [spec.name for spec in specs]
    baseline, proposed = choose_roles(names, options.baseline, options.proposed)
    given, given_note = {}, ""
    if options.boxes:
        given[GIVEN], given_note = read_given(read_boxes(options.boxes), datasets, slices)
    volumes = VolumeScores(datasets, slices, options.shift[0]) if options.volume else None
    patients, tracks = by_patient(slices), {}
    if options.every:
        tracks = {patient: find_tracks(of_patient) for patient, of_patient in patients.items()}
        given |= every_boxes(chain(*tracks.values()), options.every)
    sweep = tuple(map(Shift.parse, SWEEP)) if options.sweep else ()
    boxes = (tuple(options.shift), sweep, options.draws, options.seed)
    protocol = Protocol(*boxes, given, tuple(options.every), tracks)
    device = choose_device(options.device)
    amp = mixed_precision(options.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    workers = WORKERS_ON_CPU if device.type == "cpu" else WORKERS
    workers = workers if options.workers is None else options.workers
    overlap, leak = training_overlap(specs, slices, datasets, options.allow_seen)
    of_data = (*window_notes(datasets, runs), *label_notes(datasets, slices, runs))
    notes = [note for note in (*synthetic_notes(datasets), leak, *of_data, given_note) if note]
    for note in notes:  # before hours of work, and again on top of the results
        print(f"note: {note}")
    context = ReportContext(
        protocol=protocol,
        baseline=baseline,
        proposed=proposed,
        data=describe_data(options, datasets, leak),
        tolerance=tolerance,
        notes=tuple(notes),
        trainings=trainings(runs),
        run_names={run.name: run.run_name for run in runs},
    )
    with explain_out_of_memory("try fewer models at a time, or --device cpu"):
        cache = (options.cache == "on", options.cache_dir)
        models = load_models(specs, slices, *cache, device, amp)
        how_made = provenance(options.command, specs, models, runs, datasets, overlap)
        weights = {name: model.weights_sha256 for name, model in models.items()}
        kept = KeptScores(folder, scores_key(options, weights, datasets))
        done = kept.by_patient
        if done:
            print(f"resuming: {len(done)} of {len(patients)} patients are already scored")
        left = [s for patient, samples in patients.items() if patient not in done for s in samples]
        for patient, scores in evaluate(models, left, protocol, tolerances, workers, volumes):
            kept.append(patient, scores)
        if options.save_predictions:
            save_predictions(models, slices, datasets, folder / PREDICTIONS)
        scores = kept.joined()
        renderer = ExampleRenderer(models, slices, options.seed) if options.figures else None
        volume_scores = pd.DataFrame(scores.volume_rows) if volumes else None
        frame = to_frame(scores.rows)
        printed = write_results(frame, context, how_made, folder, renderer, volume_scores)
        kept.remove()
    return printed


def describe_data(options: Namespace, datasets: Sequence[SliceDataset], leak: str) -> str:
    """The evaluated data as the tables name them; `leak` is the note on training patients."""
    names = ", ".join(dataset.name for dataset in datasets)
    part = f"split {options.split}"
    if options.slices is not None:
        part += f", at most {plural(options.slices, 'slice')} of each patient"
    text = f"{names} ({part})"
    if leak:  # in the header of every table, as they are copied out of the report
        text += ", including patients that models were trained or selected on"
    return text


if __name__ == "__main__":
    del __file__  # or processes that score would import this file, and with it PyTorch, again
    run(main, options)
