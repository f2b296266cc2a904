"""eval.py --predict: scans and boxes that somebody drew, to label volumes. No labels are needed."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.data.given_boxes import boxes_by_case, label_ids, read_boxes
from utils.data.volumes import check_window, read_geometry, read_image
from utils.evaluation.models import Spec, fetch_weights, model_specs
from utils.model.segmenter import load_model
from utils.prediction.output import write_prediction
from utils.prediction.scan import find_scans, predict_scan
from utils.system import distributed, signals
from utils.system.device import (
    choose_device,
    explain_out_of_memory,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.errors import UserError
from utils.system.files import new_folder, sha256, write_json
from utils.system.progress_bar import progress_bar
from utils.system.wording import plural
from utils.training.runs import TrainedRun, find_runs, git_commit, versions

RECORD = "predictions.json"


def predict_scans(args: Namespace, command: str) -> None:
    """Segment scans from boxes and write <out>/<case>.nii.gz and what belongs to it.

    Args:
        args: the options of eval.py.
        command: the command line, for the record.

    Raises:
        UserError: bad scans, boxes, weights or options; nothing is written then.
    """
    if distributed.under_torchrun():
        raise UserError("--predict runs in one process; leave out torchrun")
    scans = find_scans(args.predict)
    files = [read_boxes(path) for path in args.boxes]
    boxes = boxes_by_case(files, scans, lambda case: read_geometry(scans[case]))
    labels = dict.fromkeys(box.label for of_case in boxes.values() for box in of_case)
    ids = label_ids([*labels])
    name = Path(args.predict).resolve().name if len(scans) > 1 else next(iter(scans))
    out = Path(args.out or Path("work_dir", "predict", name))
    runs = find_runs(args.runs)
    (_, model_name, checkpoint), run = _one_model(args.models, runs)
    window = args.window or _window_of(run)
    fetch_weights(args.models)
    device = choose_device(args.device)
    amp = mixed_precision(args.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    with explain_out_of_memory("try --device cpu"), new_folder(out) as folder:
        model = load_model(model_name, checkpoint, device)
        record = {
            "command": command,
            "model": model_name,
            "run": str(run.folder) if run else None,
            "weights": str(checkpoint) if checkpoint else "as packaged",
            "weights_sha256": sha256(checkpoint) if checkpoint else model.base_sha256,
            "window_hu": list(window),
            "propagate": args.propagate,
            "boxes": {str(file.path): sha256(file.path) for file in files},
            "coordinates": "z, and boxes x0, y0, x1, y1 in voxels of the volume turned to LPS, "
            "maxima inclusive",
            "versions": versions(),
            "git_commit": git_commit(),
            "device": device.type,
            "scans": {},
        }
        for case in progress_bar([*boxes], desc="predicting", unit="scan"):
            signals.raise_if_pending()
            started = time.monotonic()
            image = read_image(scans[case])
            check_window(image.array, scans[case], window)
            of_case = {box.label: ids[box.label] for box in boxes[case]}
            with torch.no_grad():
                prediction = predict_scan(
                    *(model, image, window, boxes[case], of_case),
                    *(args.propagate, args.probabilities, amp),
                )
            seconds = time.monotonic() - started
            entry = write_prediction(folder, case, image, window, prediction, of_case)
            entry |= {"seconds": round(seconds, 2)}
            record["scans"][case] = {"image": scans[case].name, **entry}
            total = plural(len(prediction.boxes), "box", "boxes")
            print(f"{case}: {total}, {seconds / len(prediction.boxes):.2f} s each")
        write_json(folder / RECORD, record)
    for case in scans.keys() - boxes.keys():
        print(f"{case}: has no box and is left out")
    print(f"wrote {plural(len(boxes), 'label volume')}, pictures and {RECORD} to {out}")


def _one_model(
    models: Sequence[Spec], runs: Sequence[TrainedRun]
) -> tuple[Spec, TrainedRun | None]:
    """The model that the options name, and its run.

    Raises:
        UserError: none, or several.
    """
    if runs and models:
        raise UserError("--predict takes one model: give --runs or --models, not both")
    if len(runs) > 1:
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"--predict takes one model; give one of these to --runs: {names}")
    if len(models) > 1:
        raise UserError("--predict takes one model; give one to --models")
    if runs:
        return (runs[0].name, runs[0].options["model"], runs[0].decoder), runs[0]
    return model_specs(models, [])[0], None


def _window_of(run: TrainedRun | None) -> tuple[float, float]:
    """The window of the data that a run was trained on.

    Raises:
        UserError: no run, one that does not record it, or data of several windows.
    """
    if run is None:
        raise UserError("--window: with --models, say which; MedSAM's and LiteMedSAM's is medsam")
    recorded = run.config.get("data", {}).values()
    windows = {tuple(of["window"]) for of in recorded if isinstance(of, dict) and of.get("window")}
    if len(windows) != 1:
        count = (
            f"data of {len(windows)} windows" if windows else "data whose window is not recorded"
        )
        raise UserError(f"--window: {run.folder} was trained on {count}; say which to use")
    return next(iter(windows))
