"""eval.py --predict: from scans and boxes, drawn before or now, to label volumes."""

import signal
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from utils.data.given_boxes import BoxFile, GivenBox, boxes_by_case, check_axial, read_boxes
from utils.data.labels import parse_label_names
from utils.data.volumes import check_window, read_geometry, read_image
from utils.evaluation.models import model_specs
from utils.evaluation.options import ModelSpec
from utils.model.segmenter import Segmenter, load_model
from utils.prediction.drawing import BOXES, Session
from utils.prediction.output import RECORD, WRITTEN, label_ids, write_prediction
from utils.prediction.scan import ScanSegmenter, find_scans, predict_scan, prompts_by_slice
from utils.system import UserError, plural, signals
from utils.system.command_line import shell_command
from utils.system.device import (
    choose_device,
    explain_out_of_memory,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.files import check_overwrite, locked, new_folder, read_json, sha256, write_json
from utils.system.loops import progress_bar
from utils.training.runs import TrainedRun, find_runs, git_commit, versions

UNTOUCHED = "untouched"  # the weights that a run started from


def predict_scans(options: Namespace) -> None:
    """Segment scans from boxes and write <out>/<case>.nii.gz and what belongs to it.

    Raises UserError: bad scans, boxes, weights or options of eval.py; nothing is written then.
    """
    scans = find_scans(options.predict)
    files = read_boxes(options.boxes)
    out = options.out or _default_folder(options, scans)
    check_overwrite(out, options.overwrite)
    spec, run = _one_model(options)
    known = options.label_names or _names_beside(files) or _label_names_of(run)
    boxes, ids = _boxes_and_ids(files, scans, known)
    window = options.window or _window_of(run)
    device, amp = _device_and_amp(options)
    replaceable = (*WRITTEN, RECORD) if options.overwrite else ()
    with explain_out_of_memory("try --device cpu"), new_folder(out, replaceable) as folder:
        model = load_model(spec.model, spec.checkpoint, device)
        record = {
            **_new_record(options, spec, run, model, window),
            "label_names": {str(number): label for label, number in ids.items()},
            "boxes": {str(file.path): sha256(file.path) for file in files},
        }
        for case in boxes:
            signals.raise_if_pending()
            started = time.monotonic()
            image = read_image(scans[case])
            check_window(image.array, scans[case], window)
            for note in image.notes:
                print(note)
            of_case = {box.label: ids[box.label] for box in boxes[case]}
            prompts = prompts_by_slice(boxes[case], of_case, options.interpolate)
            segmenter = ScanSegmenter(model, image, window, amp)
            with progress_bar(desc=case, unit="slice", total=len(prompts)) as progress:
                further = (options.propagate, options.probabilities, progress.update)
                prediction = predict_scan(segmenter, prompts, of_case, *further)
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
    _print_export(run)


def draw_scans(options: Namespace) -> None:
    """Serve the drawing page until the user is done; what was drawn is kept in --out.

    Raises UserError: bad scans, weights or options of eval.py, or --out holds something else.
    """
    try:
        from utils.prediction.server import serve  # an optional package
    except ImportError:
        raise UserError("--draw: needs Werkzeug; pip install werkzeug") from None
    scans = find_scans(options.predict)
    geometry = {case: read_geometry(path) for case, path in scans.items()}
    for case, grid in geometry.items():
        check_axial(str(scans[case]), grid)
    out = options.out or _default_folder(options, scans)
    spec, run = _one_model(options)
    window = options.window or _window_of(run)
    device, amp = _device_and_amp(options)
    lock = out.resolve().with_name(f".{out.name}.lock")
    busy = f"{out}: another process is drawing there; choose another --out"
    with explain_out_of_memory("try --device cpu"), locked(lock, busy):
        earlier = read_json(out / RECORD) if (out / RECORD).is_file() else {}
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not earlier.get("drawn"):
            raise UserError(f"{out}: holds files other than drawn boxes; choose another --out")
        recorded = {int(number): name for number, name in earlier.get("label_names", {}).items()}
        known = recorded or options.label_names or _label_names_of(run) or {1: "target"}
        files = read_boxes([out / BOXES] if (out / BOXES).is_file() else [])
        boxes, _ = _boxes_and_ids(files, scans, known)
        models = {spec.name: load_model(spec.model, spec.checkpoint, device)}
        record = {"drawn": True, **_new_record(options, spec, run, models[spec.name], window)}
        record["label_names"] = {str(number): name for number, name in known.items()}
        record["interpolate"] = options.interpolate or 0
        if all(earlier.get(key) == record[key] for key in ("model", "weights_sha256", "window_hu")):
            record["scans"] = earlier["scans"]
        if run:
            models[UNTOUCHED] = load_model(spec.model, run.options["checkpoint"], device)
            models[UNTOUCHED].drop_encoder()
        session = Session(scans, geometry, boxes, models, out, record, amp)
        session.open(next(iter(scans)))
        session.write_record()
        try:
            serve(session, options.draw)
            if session.unsaved:
                print("computing the remaining masks; Ctrl-C skips them")
            session.finish()
        except KeyboardInterrupt as stop:
            if getattr(stop, "signal", 0) == signal.SIGTERM:
                raise
        finally:
            session.close()
    print(f"wrote {BOXES}, {plural(len(record['scans']), 'label volume')} and {RECORD} to {out}")
    if session.unsaved:
        left, why = ", ".join(sorted(session.unsaved)), session.problem or "some masks are missing"
        print(f"{left}: {why}; go on with: {options.command}")
    else:
        _print_export(run)


def _print_export(run: TrainedRun | None) -> None:
    if run:
        words = ("--work-dir", run.folder.parent, "--run", run.folder.name)
        words = ("python", "train_adaptive.py", *words, "--export", "weights.pth")
        print(f"next, to use these weights in other programs: {shell_command(*words)}")


def _device_and_amp(options: Namespace) -> tuple[torch.device, torch.dtype | None]:
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device, mixed_precision(options.amp, device)


def _default_folder(options: Namespace, scans: Mapping[str, Path]) -> Path:
    """work_dir/predict/<case, or name of the folder of several>."""
    name = Path(options.predict).resolve().name if len(scans) > 1 else next(iter(scans))
    return Path("work_dir", "predict", name)


def _new_record(
    options: Namespace,
    spec: ModelSpec,
    run: TrainedRun | None,
    model: Segmenter,
    window: tuple[float, float],
) -> dict:
    """predictions.json before its scans: how they are made."""
    return {
        "command": options.command,
        "model": spec.model,
        "run": str(run.folder) if run else None,
        "weights": str(spec.checkpoint) if spec.checkpoint else "as packaged",
        "weights_sha256": sha256(spec.checkpoint) if spec.checkpoint else model.base_sha256,
        "window_hu": list(window),
        "interpolate": options.interpolate,
        "propagate": options.propagate,
        "label_names": {},
        "boxes": {},
        "coordinates": "z, and boxes x0, y0, x1, y1 in voxels of the volume turned to LPS, "
        "maxima inclusive",
        "versions": versions(),
        "git_commit": git_commit(),
        "device": model.device.type,
        "scans": {},
    }


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
        return dict(sorted((int(number), name) for number, name in pairs))
    return {}


def _names_beside(files: Sequence[BoxFile]) -> dict[int, str]:
    """The label names of the first predictions.json beside files of boxes; {} without one."""
    records = (file.path.with_name(RECORD) for file in files)
    return next((parse_label_names(str(path)) for path in records if path.is_file()), {})


def _boxes_and_ids(
    files: Sequence[BoxFile], scans: Mapping[str, Path], known: dict[int, str]
) -> tuple[dict[str, list[GivenBox]], dict[str, int]]:
    """Boxes by case, whose labels have the `known` names in place of ids, and the labels' ids."""
    names = {str(number): name for number, name in known.items()}
    geometry = cache(lambda case: read_geometry(scans[case]))
    boxes = {
        case: [replace(box, label=names.get(box.label, box.label)) for box in drawn]
        for case, drawn in boxes_by_case(files, scans, geometry).items()
    }
    labels = {box.label for drawn in boxes.values() for box in drawn}
    return boxes, label_ids(labels, {name: number for number, name in known.items()})


def _window_of(run: TrainedRun | None) -> tuple[float, float]:
    """The one window of the data that a run was trained on; otherwise a UserError."""
    if run is None:
        raise UserError("--window: required with --models; MedSAM's and LiteMedSAM's is medsam")
    recorded = run.config.get("data", {}).values()
    windows = {tuple(of["window"]) for of in recorded if isinstance(of, dict) and of.get("window")}
    if len(windows) != 1:
        raise UserError(
            f"--window: {run.folder} was trained on data with {len(windows)} recorded windows; "
            "choose one"
        )
    return next(iter(windows))
