"""What an epoch costs beside the decoder's own arithmetic.

    python -m tests.benchmarks.training_step --data data/abdomen [--organs 1]

Compares the training part of an epoch of train_adaptive.py, and its validation, with the bare
decoder on the same number of boxes with embeddings and prompts in memory; and that with
segment-anything's own forward.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import perturb
import train_adaptive
from tests.benchmarks.common import (
    BareDecoder,
    arguments,
    describe,
    device_of,
    few_slices,
    goal,
    medians,
    seconds_per_epoch,
    slices_to_measure,
)
from utils.data.slices import Slice
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model
from utils.system.device import mixed_precision
from utils.training.batches import TargetStore
from utils.training.validation import validate


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=40, organs=0).parse_args()
    device = device_of(args)
    with (
        slices_to_measure(args.data) as whole,
        few_slices(whole, args.slices, args.slices, args.organs) as dataset,
    ):
        describe(dataset, device)
        model = load_model("lite_medsam", None, device)
        train, val = dataset.split("train"), dataset.split("val")
        embeddings = Embeddings(model, train + val)
        amp = mixed_precision("auto", device)
        autocast = torch.autocast(device.type, amp, enabled=amp is not None)
        options = train_adaptive.default_options(batch=1)
        targets = TargetStore(options.loss_resolution)

        def boxes(entry: Slice, tight: np.ndarray) -> np.ndarray:
            return perturb.perturb(tight, "adaptive", np.random.default_rng(0))

        bare = BareDecoder(model, embeddings, train, boxes)
        bare_val = BareDecoder(model, embeddings, val, lambda _, tight: np.concatenate([tight] * 3))
        seconds = medians(
            {
                "bare": partial(bare.backward, bare.ours, autocast),
                "SAM": partial(bare.backward, bare.segment_anythings, autocast),
                "validation": partial(validate, model, embeddings, targets, val, options, autocast),
                "bare validation": partial(bare_val.forward, bare_val.ours, autocast),
                "SAM validation": partial(bare_val.forward, bare_val.segment_anythings, autocast),
            },
            args.repeats,
            device,
        )
        epoch = partial(seconds_per_epoch, dataset.folder, device, args.repeats)
        seconds |= {
            "epoch": epoch()(),
            "4 slices per step": epoch(batch=4)(),
            "1 box a call": epoch(boxes_per_call=1)(),
            "loss at 1024": epoch(loss_resolution=1024)(),
        }
    print(
        f"{len(train)} slices, {bare.count} boxes; "
        f"{len(val)} for validation, {bare_val.count} boxes"
    )
    print("seconds per box:")
    for name, value in seconds.items():
        count = bare_val.count if "validation" in name else bare.count
        print(f"  {name:<16} {value / count:.4f}")
    goal("training part of an epoch / bare decoder", seconds["epoch"] / seconds["bare"], 1.15)
    print(f"validation / bare decoder: {seconds['validation'] / seconds['bare validation']:.3g}")
    print(
        f"SAM's own forward / ours: {seconds['SAM validation'] / seconds['bare validation']:.3g}, "
        f"with backward {seconds['SAM'] / seconds['bare']:.3g}"
    )


if __name__ == "__main__":
    main()
