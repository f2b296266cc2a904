"""The models of an evaluation: which they are, what they predict, and patients they have seen."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import perturb
from utils.data.frame import Frame
from utils.data.given_boxes import box_paths
from utils.data.slices import Slice, SliceDataset
from utils.data.synthetic import is_synthetic
from utils.evaluation.options import ModelSpec
from utils.evaluation.prompts import by_patient
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter, load_model, logits_to_native
from utils.system import UserError, plural
from utils.system.device import free_memory
from utils.system.downloads import DOWNLOAD, WEIGHTS, fetch, weights_path
from utils.system.files import sha256
from utils.training.runs import TrainedRun, differences, git_commit, seen_patients, versions

WEIGHTS_FOLDER = Path("work_dir")  # to which NAME=MODEL:download fetches them
# Options on which no score depends: with others the same scores are gone on with.
NO_SCORES = ("command", "workers", "data", "cache_dir", "out", "overwrite", "figures")
NO_SCORES += ("save_predictions", "baseline", "proposed", "allow_seen")
UNTOUCHED = "untouched"  # the name of the weights that the runs started from


# --- Which models --------------------------------------------------------------------------------
def model_specs(models: Sequence[ModelSpec], runs: Sequence[TrainedRun]) -> list[ModelSpec]:
    """The weights that the runs started from (UNTOUCHED, if not in `models`), `models`, the runs.

    A checkpoint "download" is fetched to WEIGHTS_FOLDER, and becomes its path. UserError if two
    have the same name, or weights cannot be downloaded.
    """
    specs = []
    for spec in models:
        if spec.checkpoint == DOWNLOAD:
            path = weights_path(spec.model, WEIGHTS_FOLDER, "--models")
            fetch(WEIGHTS[spec.model], WEIGHTS_FOLDER)
            spec = spec._replace(checkpoint=path)
        specs.append(spec)
    if runs:
        start = _weights(runs[0].options["model"], runs[0].options["checkpoint"])
        if start not in [_weights(spec.model, spec.checkpoint) for spec in specs]:
            specs.insert(0, ModelSpec(UNTOUCHED, *start))
        specs += [ModelSpec(run.name, run.options["model"], run.decoder) for run in runs]
    names = [spec.name for spec in specs]
    for name in set(names):
        if names.count(name) > 1:
            raise UserError(
                f"two models are named {name!r}; rename a run, or use --models NAME=MODEL"
            )
    return specs


def _weights(model: str, checkpoint: Path | str | None) -> tuple[str, str | None]:
    """What weights are, in a form that can be compared: model and absolute path."""
    return model, str(Path(checkpoint).resolve()) if checkpoint else None


def choose_roles(
    models: Sequence[str], baseline: str | None, proposed: str | None
) -> tuple[str, str]:
    """Baseline and proposed, by default first and last; UserError if unknown or the same."""
    for name in filter(None, (baseline, proposed)):
        if name not in models:
            raise UserError(f"no model {name!r} to compare; choose from {', '.join(models)}")
    if baseline and baseline == proposed and len(models) > 1:
        raise UserError(f"--baseline and --proposed are both {baseline!r}; name two models")
    baseline = baseline or next((name for name in models if name != proposed), models[0])
    proposed = proposed or next((name for name in models[::-1] if name != baseline), models[0])
    return baseline, proposed


def data_of(runs: Sequence[TrainedRun]) -> list[str]:
    """The folders that the runs were trained on; UserError if they differ or there is no run."""
    folders = {tuple(run.options["data"]) for run in runs}
    if len(folders) != 1:
        raise UserError("--data: give the folder(s) made by preprocess_ct.py to evaluate on")
    return list(folders.pop())


# --- Predicting ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Predictor:
    """A model to compare."""

    segmenter: Segmenter  # decodes
    embeddings: Callable[[Slice], torch.Tensor]  # (C, h, w), of its image encoder
    weights_sha256: str = ""  # of the file that its weights are from
    amp: torch.dtype | None = None  # in which the decoder computes, None for fp32

    def predict(
        self, sample: Slice, boxes: np.ndarray, embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mask logits (K, H, W) of a slice; see `predict`. Without the embedding, it is loaded."""
        embedding = self.embeddings(sample) if embedding is None else embedding
        return predict(self.segmenter, embedding, boxes, sample.frame, self.amp)


@torch.no_grad()
def predict(
    model: Segmenter,
    embedding: torch.Tensor,
    boxes: np.ndarray,
    frame: Frame,
    amp: torch.dtype | None = None,
) -> torch.Tensor:
    """Mask logits (K, H, W) float32 at a slice's native resolution, on the model's device.

    The embedding is (C, h, w), boxes are (K, 4) float32 XYXY in pixels of the 1024 frame; `amp` is
    the dtype in which the decoder computes, None for fp32.
    """
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        logits = model.decode(embedding, boxes)
    return logits_to_native(logits.float(), frame)


def load_models(
    specs: Sequence[ModelSpec],
    slices: Sequence[Slice],
    cache: bool,
    cache_dir: str | None,
    device: torch.device,
    amp: torch.dtype | None = None,
) -> dict[str, Predictor]:
    """The models by name; those of one encoder share the embeddings of `slices`.

    With a cache (see `Embeddings`), no encoder stays in memory; without, one of each kind does.
    """
    predictors: dict[str, Predictor] = {}
    by_encoder: dict[tuple[str, str], Embeddings] = {}
    for name, model_name, checkpoint in specs:
        model = load_model(model_name, checkpoint, "cpu")
        encoder = (model_name, model.base_sha256)
        if encoder in by_encoder:
            model.drop_encoder()
        model.to(device)
        if encoder not in by_encoder:
            by_encoder[encoder] = Embeddings(model, slices, cache, cache_dir)
            if cache:
                model.drop_encoder()
        free_memory(device)
        weights = sha256(checkpoint) if checkpoint else model.base_sha256
        predictors[name] = Predictor(model, by_encoder[encoder], weights, amp)
    return predictors


# --- What the models were trained on -------------------------------------------------------------
def training_overlap(
    specs: Sequence[ModelSpec],
    slices: Sequence[Slice],
    datasets: Sequence[SliceDataset],
    allowed: bool,
) -> tuple[dict[str, str], str]:
    """The overlap of training and evaluation patients: those a model was trained on or chosen by.

    Patients are recognised by the source image's SHA-256. Returns by model "2 of 7", or "not
    recorded", and the note on an overlap, or "". UserError if there is one that is not `allowed`.
    """
    images = {(d.name, case): digest for d in datasets for case, digest in d.volumes.items()}
    overlap, first = {}, {}
    for name, _, checkpoint in specs:
        seen = seen_patients(Path(checkpoint)) if checkpoint else None
        known = [s for s in slices if seen and images[s.dataset, s.case] in seen]
        text = f"{len(by_patient(known))} of {len(by_patient(slices))}"
        overlap[name] = "not recorded" if seen is None else text
        first |= {name: known[0]} if known else {}
    if not first:
        return overlap, ""
    listed = ", ".join(f"{name} {overlap[name]}" for name in first)
    if not allowed:
        one = next(iter(first.values()))
        raise UserError(
            f"{one.folder}: models were trained or selected on patients to be evaluated "
            f"({listed}; {one.case} is one of them); evaluate on other patients, or use "
            "--allow-seen, which marks the report"
        )
    return overlap, (
        f"Models were trained or selected on patients of this evaluation ({listed}): what follows "
        "says nothing about new patients."
    )


def synthetic_notes(datasets: Sequence[SliceDataset]) -> list[str]:
    """A note if a data set was made by the demo."""
    if any(is_synthetic(dataset.folder) for dataset in datasets):
        return ["SYNTHETIC DATA, generated by a program: this says nothing about real CT."]
    return []


def window_notes(datasets: Sequence[SliceDataset], runs: Sequence[TrainedRun]) -> list[str]:
    """A note per data set of another window than runs were trained in, where both are known."""
    notes = []
    for dataset in datasets:
        if not dataset.window:
            continue
        low, high = dataset.window
        others = [
            run.name
            for run in runs
            if all(of["window"] not in (None, [low, high]) for of in run.config["data"].values())
        ]
        if others:
            notes.append(
                f"The window of the data set {dataset.name} is [{low:g}, {high:g}] HU, but "
                f"{', '.join(others)} trained with another window: the same tissue has different "
                "grey levels."
            )
    return notes


def label_notes(
    datasets: Sequence[SliceDataset], slices: Sequence[Slice], runs: Sequence[TrainedRun]
) -> list[str]:
    """A note per data set of whose labels no run was trained on one."""
    trained = {
        name
        for run in runs
        for of_data in run.config["data"].values()
        for name in of_data["label_names"].values()
    }
    notes = []
    for dataset in datasets:
        labels = {s.name_of(n) for s in slices if s.dataset == dataset.name for n in s.labels}
        if trained and labels and not labels & trained:
            notes.append(
                f"No label of the data set {dataset.name} ({', '.join(sorted(labels))}) was in the "
                "training data: fine-tuning may have made the weights worse here; compare with "
                "untouched."
            )
    return notes


def provenance(
    command: str,
    specs: Sequence[ModelSpec],
    models: Mapping[str, Predictor],
    runs: Sequence[TrainedRun],
    datasets: Sequence[SliceDataset],
    overlap: Mapping[str, str],
) -> str:
    """The report's last section, Markdown; UserError if the runs' starting weights have changed."""
    lines = []
    run_of = {run.decoder: run for run in runs}
    start = _weights(runs[0].options["model"], runs[0].options["checkpoint"]) if runs else None
    for name, model, checkpoint in specs:
        weights = models[name].weights_sha256
        if _weights(model, checkpoint) == start and weights != runs[0].config["start_weights"]:
            raise UserError(
                f"{checkpoint or model}: no longer the weights that the runs started from"
            )
        file = Path(checkpoint).name if checkpoint else "as packaged"
        line = f"`{name}`: {model}, {file}, SHA-256 {weights[:16]}"
        run = run_of.get(checkpoint)
        if run and run.average_of:
            count = plural(len(run.average_of), "decoder")
            line += f", mean of {count} chosen on validation: {', '.join(run.average_of)}"
        elif run:
            best = "none better than its starting weights, so these"
            if run.best_epoch:
                best = f"weights of epoch {run.best_epoch}"
            count = plural(run.epochs, "epoch")
            line += f", policy {run.options['policy']}, trained for {count}, {best}"
        lines.append(f"{line}; evaluated patients that it has seen: {overlap[name]}")
    lines += [f"data `{d.name}`: dataset.json SHA-256 {d.sha256[:16]}" for d in datasets]
    lines.append("versions: " + ", ".join(f"{name} {v}" for name, v in versions().items()))
    device = next(iter(models.values())).segmenter.device.type
    lines.append(f"device: {device}; commit: {git_commit() or 'not a git checkout'}")
    indented = command.replace("\n", "\n    ")
    text = f"    {indented}\n\n" + "\n".join(f"- {line}" for line in lines)
    if len(runs) > 1:
        others = "; ".join(differences(runs)) or "nothing"
        text += f"\n\nApart from their box policy, the runs differ in: {others}."
    return text


def scores_key(
    options: Namespace, weights: Mapping[str, str], datasets: Sequence[SliceDataset]
) -> str:
    """A hash of eval.py's options, the SHA-256 of each model's weights, data, code and versions."""
    parts = {
        "options": {k: v for k, v in vars(options).items() if k not in NO_SCORES},
        "weights": weights,
        "data": [(dataset.name, dataset.sha256) for dataset in datasets],
        "given": [sha256(path) for path in box_paths(options.boxes or ())],
        "perturb.py": sha256(perturb.__file__),  # which users edit between two commits
        "versions": versions(),
        "commit": git_commit(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
