"""What the options of a training run name: data, weights and device, opened and checked."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data.slices import Slice, SliceDataset, open_datasets
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter, load_model
from utils.system import distributed
from utils.system.device import (
    be_deterministic,
    choose_device,
    explain_out_of_memory,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.downloads import WEIGHTS, fetch
from utils.system.errors import UserError
from utils.system.files import sha256
from utils.system.signals import Interrupted
from utils.training.runs import seen_patients


@dataclass(frozen=True)
class Inputs:
    """What the options of a run name, opened and checked.

    Attributes:
        model: the starting weights, on their device.
        amp: the number format of mixed precision, or None for fp32.
        datasets: for training and validation.
        seen: the patients that the trained weights will have seen, see `runs.seen_patients`.
        notes: lines to print at the start: what the user should know of weights and data.
        facts: what must not change between a run's start and its end, beside the options.
    """

    model: Segmenter
    amp: torch.dtype | None
    datasets: list[SliceDataset]
    seen: dict[str, str]
    notes: list[str]
    facts: dict


def open_inputs(options: Namespace) -> Inputs:
    """Open what the options name; bad input is found here, before a run's folder is made.

    Raises:
        UserError: bad input.
    """
    if options.deterministic:
        be_deterministic()
    device = choose_device(distributed.local_device(options.device))
    amp = mixed_precision(options.amp, device)
    if options.batch < distributed.world_size():
        raise UserError(
            f"--batch: {options.batch} slices per step are too few for "
            f"{distributed.world_size()} processes"
        )
    datasets = open_datasets(options.data)
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(options.model, options.checkpoint, device)
    remedy = "preprocess with more cases or another --split"
    for dataset in datasets:
        if not dataset.split("train"):
            raise UserError(f"{dataset.folder}: no slice in the train split; {remedy}")
    if not any(dataset.split("val") for dataset in datasets):
        raise UserError(f"{datasets[0].folder}: no slice in the val split; {remedy}")
    seen, notes = seen_by_training(options.checkpoint, model, datasets)
    facts = {
        "data": data_record(datasets),
        "base_weights": model.base_sha256,
        "start_weights": sha256(options.checkpoint or model.base_path),
        "device": device.type,
        "amp": str(amp or "off"),
    }
    return Inputs(model, amp, datasets, seen, notes, facts)


def run_embeddings(inputs: Inputs, slices: Sequence[Slice], options: Namespace) -> Embeddings:
    """The embeddings of a run's slices; those that are not cached are computed now.

    Raises:
        UserError: as `Embeddings`, or memory ran out.
        Interrupted: by Ctrl-C or SIGTERM; what is encoded is kept.
    """
    try:
        with explain_out_of_memory("encoding; close what else uses the GPU, or --device cpu"):
            cache = (options.cache == "on", options.cache_dir)
            return Embeddings(inputs.model, slices, *cache)
    except Interrupted as stop:
        raise Interrupted(stop.signal, "stopped in encoding; what is encoded is kept") from None


def data_record(datasets: Sequence[SliceDataset]) -> dict[str, dict]:
    """What config.json records of each data set, by name.

    That is the hash of its dataset.json, its window, and by case the hashes of the source images of
    train and val.
    """
    return {
        dataset.name: {
            "sha256": dataset.sha256,
            "window": dataset.window and list(dataset.window),
            "train": _patients(dataset, "train"),
            "val": _patients(dataset, "val"),
        }
        for dataset in datasets
    }


def _patients(dataset: SliceDataset, split: str) -> dict[str, str]:
    """By case, the SHA-256 of the source image."""
    return {entry.case: dataset.volumes[entry.case] for entry in dataset.split(split)}


def seen_by_training(
    checkpoint: str | None, model: Segmenter, datasets: Sequence[SliceDataset]
) -> tuple[dict[str, str], list[str]]:
    """The patients that weights trained from `checkpoint` will have seen, and notes on them.

    Args:
        checkpoint: that `model` was loaded from, full weights or a decoder.
        model: with the starting weights.
        datasets: to train and validate on.
    """
    seen, notes = {}, []
    if checkpoint and Path(checkpoint) != model.base_path:  # a decoder
        recorded = seen_patients(Path(checkpoint))
        seen = dict(recorded or {})
        if recorded is None:
            notes.append(
                f"note: {checkpoint} does not record which patients it was trained on; this run's "
                "decoder will record those of this run alone"
            )
    trained_on = [
        f"{dataset.name}/{case}"
        for dataset in datasets
        for case, image in _patients(dataset, "val").items()
        if seen.get(image) == "train"
    ]
    if trained_on:
        notes.append(
            f"warning: {checkpoint} was trained on {len(trained_on)} of the patients in val "
            f"({', '.join(trained_on[:3])}{', ...' if trained_on[3:] else ''}): the validation "
            "loss, which chooses the best epoch, is too good on them; move them to train in "
            "dataset.json, or "
            "start from other weights"
        )
    for dataset in datasets:
        seen = dict.fromkeys(_patients(dataset, "val").values(), "val") | seen
        seen |= dict.fromkeys(_patients(dataset, "train").values(), "train")
    return seen, notes


def fetch_weights(options: Namespace) -> None:
    """Download the model's weights to the path in options.checkpoint, unless they are there.

    Raises:
        UserError: they cannot be had, or the data cannot be used, which is checked before.
    """
    open_datasets(options.data or [])
    folder = Path(options.checkpoint).parent
    distributed.rank_zero_first(lambda: fetch(WEIGHTS[options.model], folder))


def memory_advice(options: Namespace) -> str:
    """Which options make a run need less memory, in this run and in a new one."""
    resumed, new = [], []
    if options.boxes_per_call > 1:
        resumed.append(f"--boxes-per-call {options.boxes_per_call // 2}")
    if options.cache == "off":
        resumed.append("--cache on")
    if options.batch > distributed.world_size():
        new.append(f"--batch {distributed.world_size()}")
    if options.loss_resolution > 256:
        new.append("--loss-resolution 256")
    if options.amp == "off":
        new.append("--amp fp16 on a GPU")
    new.append("--device cpu")
    advice = f"start a new run with {', '.join(new)}"
    return f"go on with --resume {' '.join(resumed)}, or {advice}" if resumed else advice
