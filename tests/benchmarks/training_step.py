"""What an epoch costs beside the decoder's own arithmetic.

    python -m tests.benchmarks.training_step --data data/abdomen [--organs 1]

Compares training and validation of train_adaptive.py with the bare decoder on as many boxes, with
embeddings and prompts in memory; and that with segment-anything's own forward.
"""

from functools import partial

import numpy as np
import torch

import perturb
from tests.benchmarks.common import (
    BareDecoder,
    arguments,
    device_of,
    few_slices,
    goal,
    machine,
    medians,
    seconds_per_epoch,
    slices_to_measure,
)
from tests.helpers import options_for
from utils.data.slices import Slice, SliceDataset
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model
from utils.system.device import mixed_precision
from utils.training.batches import TargetStore
from utils.training.validation import validate


def perturbed(sample: Slice, tight: np.ndarray) -> np.ndarray:
    areas = perturb.box_sides(tight).prod(axis=1)
    return perturb.perturb(tight, areas, np.random.default_rng(0), perturb.Perturbation())


def measure(
    dataset: SliceDataset, device: torch.device, repeats: int, count: int, organs: int = 0
) -> dict[str, float]:
    """Seconds of training and validation on `count` slices each, and of the bare decoder."""
    dataset = few_slices(dataset, count, count, organs)
    model = load_model("lite_medsam", None, device)
    train, val = dataset.split("train"), dataset.split("val")
    embeddings = Embeddings(model, train + val)
    amp = mixed_precision("auto", device)
    autocast = torch.autocast(device.type, amp, enabled=amp is not None)
    options = options_for(dataset.folder, batch=1)
    targets = TargetStore(options.loss_resolution)
    bare = BareDecoder(model, embeddings, train, perturbed)
    bare_val = BareDecoder(model, embeddings, val, lambda _, tight: np.tile(tight, (3, 1)))
    tasks = {
        "bare": partial(bare.run, bare.ours, autocast, backward=True),
        "SAM": partial(bare.run, bare.segment_anythings, autocast, backward=True),
        "validation": partial(validate, model, embeddings, targets, val, options, amp),
        "bare validation": partial(bare_val.run, bare_val.ours, autocast),
        "SAM validation": partial(bare_val.run, bare_val.segment_anythings, autocast),
    }
    seconds = medians(tasks, repeats, device)
    variants = {
        "epoch": {},
        "4 slices per step": {"batch": 4},
        "1 box a call": {"boxes_per_call": 1},
        "loss at 1024": {"loss_resolution": 1024},
    }
    if device.type == "cuda":
        variants["CUDA graphs"] = {"cuda_graphs": True}
    for name, changes in variants.items():
        seconds[name] = seconds_per_epoch(dataset, device, repeats, **changes)
    return {"boxes": bare.count, "validation boxes": bare_val.count} | seconds


def main() -> None:
    args = arguments(__doc__.splitlines()[0], slices=40, organs=0).parse_args()
    device = device_of(args)
    with slices_to_measure(args.data) as dataset:
        print(f"data: {dataset.name}; machine: {machine(device)}")
        seconds = measure(dataset, device, args.repeats, args.slices, args.organs)
    boxes, validation_boxes = seconds.pop("boxes"), seconds.pop("validation boxes")
    print(f"{boxes} boxes; {validation_boxes} for validation")
    print("seconds per box:")
    for name, value in seconds.items():
        print(f"  {name:<17} {value / (validation_boxes if 'validation' in name else boxes):.4f}")
    goal("training part of an epoch / bare decoder", seconds["epoch"] / seconds["bare"], 1.15)
    print(f"validation / bare decoder: {seconds['validation'] / seconds['bare validation']:.3g}")
    forward = seconds["SAM validation"] / seconds["bare validation"]
    both = seconds["SAM"] / seconds["bare"]
    print(f"SAM's own forward / ours: {forward:.3g}, with backward {both:.3g}")


if __name__ == "__main__":
    main()
