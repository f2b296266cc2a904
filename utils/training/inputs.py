"""What the options of a training run name: data, weights and device, opened and checked."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data.slices import SliceDataset, open_datasets
from utils.model.segmenter import Segmenter, load_model
from utils.system import distributed
from utils.system.device import (
    be_deterministic,
    choose_device,
    keep_freed_memory,
    mixed_precision,
)
from utils.system.downloads import WEIGHTS, fetch
from utils.system.errors import UserError
from utils.system.files import sha256


@dataclass(frozen=True)
class Inputs:
    """What the options of a run name, opened and checked.

    Attributes:
        model: the starting weights, on their device.
        amp: the number format of mixed precision, or None for fp32.
        datasets: for training and validation.
        facts: what must not change between a run's start and its end, beside the options.
    """

    model: Segmenter
    amp: torch.dtype | None
    datasets: list[SliceDataset]
    facts: dict


def open_inputs(options: Namespace, constants: dict) -> Inputs:
    """Open what the options name; bad input is found here, before a run's folder is made.

    Args:
        options: of the run.
        constants: the constants without an option that the run depends on.

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
    facts = {
        "data": {dataset.name: dataset.sha256 for dataset in datasets},
        "base_weights": model.base_sha256,
        "start_weights": sha256(options.checkpoint or model.base_path),
        "constants": constants,
        "device": device.type,
        "amp": str(amp or "off"),
    }
    return Inputs(model, amp, datasets, facts)


def weights_path(model: str, work_dir: Path) -> str:
    """Where --checkpoint download keeps the weights of a model.

    Raises:
        UserError: the model has none to download.
    """
    if model not in WEIGHTS:
        raise UserError(f"--checkpoint download: is for {', '.join(WEIGHTS)}; {model} needs none")
    return str((work_dir / WEIGHTS[model].file).resolve())


def fetch_weights(options: Namespace) -> None:
    """Download the model's weights to the path in options.checkpoint, unless they are there.

    Raises:
        UserError: they cannot be had, or the data cannot be used, which is checked before.
    """
    open_datasets(options.data or [])
    folder = Path(options.checkpoint).parent
    distributed.rank_zero_first(lambda: fetch(WEIGHTS[options.model], folder))


def memory_advice(options: Namespace) -> str:
    """Which options make a run need less memory."""
    advice = []
    if options.boxes_per_call > 1:
        advice.append(f"--boxes-per-call {options.boxes_per_call // 2}")
    if options.batch > distributed.world_size():
        advice.append(f"--batch {distributed.world_size()}")
    if options.loss_resolution > 256:
        advice.append("--loss-resolution 256")
    if options.cache == "off":
        advice.append("--cache on")
    if options.amp == "off":
        advice.append("--amp fp16 on a GPU")
    return f"in a new run, try {', '.join([*advice, '--device cpu'])}"
