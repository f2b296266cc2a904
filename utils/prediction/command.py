"""eval.py --predict: scans and boxes that somebody drew, to label volumes. No labels are needed."""

import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

from utils.data.given_boxes import GivenBox, boxes_by_case, label_ids, read_boxes
from utils.data.volumes import check_window, read_geometry, read_image
from utils.evaluation.models import model_specs
from utils.evaluation.options import ModelSpec
from utils.model.segmenter import load_model
from utils.prediction.output import write_prediction
from utils.prediction.scan import ScanSegmenter, find_scans, predict_scan
from utils.system import UserError, plural, signals
from utils.system.device import (
    choose_device,
    explain_out_of_memory,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.files import new_folder, sha256, write_json
from utils.system.loops import progress_bar
from utils.training.runs import TrainedRun, find_runs, git_commit, versions

RECORD = "predictions.json"
Boxes = dict[str, list[GivenBox]]  # by case


def predict_scans(options: Namespace) -> None:
    """Segment scans from boxes and write <out>/<case>.nii.gz and what belongs to it.

    Raises UserError: bad scans, boxes, weights or options of eval.py; nothing is written then.
    """
    scans = find_scans(options.predict)
    files = read_boxes(options.boxes)
    boxes = boxes_by_case(files, scans, lambda case: read_geometry(scans[case]))
    name = Path(options.predict).resolve().name if len(scans) > 1 else next(iter(scans))
    out = options.out or Path("work_dir", "predict", name)
    (_, model_name, checkpoint), run = _one_model(options)
    window = options.window or _window_of(run)
    known = options.label_names or _label_names_of(run)
    boxes, ids = _with_ids(boxes, known)
    device = choose_device(options.device)
    amp = mixed_precision(options.amp, device)
    if device.type == "cpu":
        keep_freed_memory()
    with explain_out_of_memory("try --device cpu"), new_folder(out) as folder:
        model = load_model(model_name, checkpoint, device)
        record = {
            "command": options.command,
            "model": model_name,
            "run": str(run.folder) if run else None,
            "weights": str(checkpoint) if checkpoint else "as packaged",
            "weights_sha256": sha256(checkpoint) if checkpoint else model.base_sha256,
            "window_hu": list(window),
            "interpolate": options.interpolate,
            "propagate": options.propagate,
            "label_names": {str(number): label for label, number in ids.items()},
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
            for note in image.notes:
                print(note)
            segmenter = ScanSegmenter(model, image, window, amp)
            of_case = {box.label: ids[box.label] for box in boxes[case]}
            further = (options.interpolate, options.propagate, options.probabilities)
            prediction = predict_scan(segmenter, boxes[case], of_case, *further)
            seconds = time.monotonic() - started
            record["scans"][case] = {
                "image": scans[case].name,
                **write_prediction(folder, case, segmenter, prediction),
                "seconds": round(seconds, 2),
            }
            sources = Counter(source for _, source in prediction.boxes)
            numbers = ", ".join(f"{number} {source}" for source, number in sources.items())
            each = seconds / sources.total()
            print(
                f"{case}: {plural(sources.total(), 'box', 'boxes')} ({numbers}), {each:.2f} s each"
            )
        write_json(folder / RECORD, record)
    for case in scans.keys() - boxes.keys():
        print(f"{case}: has no box and is left out")
    print(f"wrote {plural(len(boxes), 'label volume')}, pictures and {RECORD} to {out}")
    named = ", ".join(f"{n} {label}" for label, n in ids.items() if not label.isdecimal())
    if named:
        same = f"; other scans get the same ids with --label-names {out / RECORD}"
        print(f"labels: {named}{same * (not known)}")


def _one_model(options: Namespace) -> tuple[ModelSpec, TrainedRun | None]:
    """The model that the options name, and its run; a UserError if there are several."""
    runs = find_runs(options.runs)
    names = [f"--runs {run.folder}" for run in runs] + [
        f"--models {spec.name}" for spec in options.models
    ]
    if len(names) > 1:
        raise UserError(f"--predict takes one model; give one of {', '.join(names)}")
    if runs:
        return ModelSpec(runs[0].name, runs[0].options["model"], runs[0].decoder), runs[0]
    return model_specs(options.models, [])[0], None


def _label_names_of(run: TrainedRun | None) -> dict[int, str]:
    """The label names of a run's data, by id; {} where it has none, or data sets have different."""
    recorded = run.config.get("data", {}).values() if run else ()
    names = [of.get("label_names", {}) for of in recorded if isinstance(of, dict)]
    pairs = {pair for of_data in names for pair in of_data.items()}
    if len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs}):
        return {int(number): name for number, name in sorted(pairs)}
    return {}


def _with_ids(boxes: Boxes, known: dict[int, str]) -> tuple[Boxes, dict[str, int]]:
    """Boxes whose labels have the `known` names in place of ids, and the ids of their labels."""
    names = {str(number): name for number, name in known.items()}
    boxes = {
        case: [replace(box, label=names.get(box.label, box.label)) for box in of_case]
        for case, of_case in boxes.items()
    }
    labels = {box.label for of_case in boxes.values() for box in of_case}
    return boxes, label_ids(labels, {name: number for number, name in known.items()})


def _window_of(run: TrainedRun | None) -> tuple[float, float]:
    """The one window of the data that a run was trained on; otherwise a UserError."""
    if run is None:
        raise UserError("--window: with --models, say which; MedSAM's and LiteMedSAM's is medsam")
    recorded = run.config.get("data", {}).values()
    windows = {tuple(of["window"]) for of in recorded if isinstance(of, dict) and of.get("window")}
    if len(windows) != 1:
        raise UserError(
            f"--window: {run.folder} was trained on data of {len(windows)} recorded windows; say "
            "which to use"
        )
    return next(iter(windows))
