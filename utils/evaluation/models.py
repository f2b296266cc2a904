"""The models of an evaluation, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from utils.data.frame import Frame
from utils.data.slices import Slice, SliceDataset
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter, load_model
from utils.system import distributed
from utils.system.device import free_memory
from utils.system.downloads import DOWNLOAD, WEIGHTS, fetch, weights_path
from utils.system.errors import UserError
from utils.system.files import sha256
from utils.system.wording import plural
from utils.training.runs import TrainedRun, differences, git_commit, versions

WEIGHTS_FOLDER = Path("work_dir")  # to which NAME=MODEL:download fetches them
UNTOUCHED = "untouched"  # the name of the weights that the runs started from
NEVER_BETTER = "none better than the weights it started from, and so these"
Spec = tuple[str, str, "Path | str | None"]  # name, model, checkpoint


def model_specs(models: Sequence[Spec], runs: Sequence[TrainedRun]) -> list[Spec]:
    """All models to compare: the weights that the runs started from, `models`, then the runs.

    The weights that the runs started from are named UNTOUCHED, unless `models` has them under
    another name. A checkpoint "download" becomes the path in WEIGHTS_FOLDER where it is fetched to.

    Raises:
        UserError: two have the same name, or a model has nothing to download.
    """
    named: list[Spec] = [
        (name, model, weights_path(model, WEIGHTS_FOLDER, "--models"))
        if checkpoint == DOWNLOAD
        else (name, model, checkpoint)
        for name, model, checkpoint in models
    ]
    specs = list(named)
    if runs:
        start = _weights(runs[0].options["model"], runs[0].options["checkpoint"])
        if start not in [_weights(model, checkpoint) for _, model, checkpoint in named]:
            specs.insert(0, (UNTOUCHED, *start))
        specs += [(run.name, run.options["model"], run.decoder) for run in runs]
    names = [name for name, _, _ in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two models are named {name!r}; rename a run, or use --models NAME=MODEL"
            )
    return specs


def _weights(model: str, checkpoint: Path | str | None) -> tuple[str, str | None]:
    """What weights are, in a form that can be compared: model and absolute path."""
    return model, str(Path(checkpoint).resolve()) if checkpoint else None


def fetch_weights(models: Sequence[Spec]) -> None:
    """Download the weights of those of `models` whose checkpoint is "download", unless there.

    Raises:
        UserError: they cannot be had.
    """
    for _, model, checkpoint in models:
        if checkpoint == DOWNLOAD:
            source = WEIGHTS[model]
            distributed.rank_zero_first(lambda source=source: fetch(source, WEIGHTS_FOLDER))


def load_models(
    specs: Sequence[Spec],
    slices: Sequence[Slice],
    cache: bool,
    cache_dir: str | None,
    device: torch.device,
) -> tuple[dict[str, Segmenter], dict[str, Callable[[Slice], torch.Tensor]]]:
    """Models and the embeddings of `slices`, by name; models of one encoder share the embeddings.

    With a cache, no image encoder stays in memory once its embeddings are there; without one, the
    first model of each encoder keeps it. `cache` and `cache_dir` are those of `Embeddings`.
    """
    models: dict[str, Segmenter] = {}
    by_encoder: dict[tuple[str, str], Embeddings] = {}
    embeddings: dict[str, Callable[[Slice], torch.Tensor]] = {}
    for name, model_name, checkpoint in specs:
        model = load_model(model_name, checkpoint, "cpu")
        encoder = (model_name, model.base_sha256)
        if encoder in by_encoder:
            model.drop_encoder()
            model.to(device)
        else:
            model.to(device)
            by_encoder[encoder] = Embeddings(model, slices, cache, cache_dir)
            if cache:
                model.drop_encoder()
        free_memory(device)
        models[name], embeddings[name] = model, by_encoder[encoder]
    return models, embeddings


@torch.no_grad()
def predict(
    model: Segmenter,
    embedding: torch.Tensor,
    boxes: np.ndarray,
    frame: Frame,
    amp: torch.dtype | None = None,
) -> torch.Tensor:
    """Mask logits (K, H, W) float32 at a slice's native resolution, on the model's device.

    Args:
        model: decodes.
        embedding: (256, 64, 64), of the slice.
        boxes: (K, 4) float32 XYXY in pixels of the 1024 frame.
        frame: of the slice.
        amp: the dtype in which the decoder computes, None for fp32.
    """
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        logits = model.decode(embedding, boxes)
    return frame.logits_to_native(logits.float())


def weight_hashes(specs: Sequence[Spec], models: dict[str, Segmenter]) -> dict[str, str]:
    """By model, the SHA-256 of the file that its weights are from."""
    return {
        name: sha256(checkpoint) if checkpoint else models[name].base_sha256
        for name, _, checkpoint in specs
    }


def provenance(
    command: str,
    specs: Sequence[Spec],
    weights: Mapping[str, str],
    device: torch.device,
    runs: Sequence[TrainedRun],
    datasets: Sequence[SliceDataset],
    seen: Mapping[str, list[Slice] | None],
    patients: int,
) -> str:
    """The report's last section, Markdown: command, versions, commit, data, weights.

    Args:
        command: the command line.
        specs, runs, datasets: what is evaluated on what.
        weights: their SHA-256, by model.
        device: that decodes.
        seen: by model, a slice of each of the `patients` evaluated that it has seen, or None.
        patients: how many are evaluated.

    Raises:
        UserError: the weights that the runs started from have changed.
    """
    lines = []
    run_of = {run.decoder: run for run in runs}
    for name, model, checkpoint in specs:
        digest = weights[name]
        start = _weights(runs[0].options["model"], runs[0].options["checkpoint"]) if runs else None
        untouched = _weights(model, checkpoint) == start
        if untouched and digest != runs[0].config.get("start_weights"):
            raise UserError(
                f"{checkpoint or model}: not the weights that the runs started from any more"
            )
        line = f"`{name}`: {model}, {Path(checkpoint).name if checkpoint else 'as packaged'}"
        line += f", SHA-256 {digest[:16]}"
        run = run_of.get(checkpoint)
        if run and run.average_of:
            count = plural(len(run.average_of), "decoder")
            line += f", mean of {count} chosen on validation: {', '.join(run.average_of)}"
        elif run:
            line += f", policy {run.options['policy']}, trained for {plural(run.epochs, 'epoch')}, "
            best = run.best_epoch
            line += f"weights of epoch {best}" if best else NEVER_BETTER
        known = seen[name]
        count = "not recorded" if known is None else f"{len(known)} of {patients}"
        lines.append(f"{line}; evaluated patients that it has seen: {count}")
    lines += [f"data `{d.name}`: dataset.json SHA-256 {d.sha256[:16]}" for d in datasets]
    lines.append("versions: " + ", ".join(f"{name} {v}" for name, v in versions().items()))
    lines.append(f"device: {device.type}; commit: {git_commit() or 'not a git checkout'}")
    indented = command.replace("\n", "\n    ")
    parts = [f"    {indented}", "\n".join(f"- {line}" for line in lines)]
    if len(runs) > 1:
        other = differences(runs)
        parts.append(
            f"Apart from their policy the runs differ in: {'; '.join(other)}."
            if other
            else "The runs differ in the policy of their boxes alone: same starting weights, data, "
            "options and seed."
        )
    return "\n\n".join(parts)
