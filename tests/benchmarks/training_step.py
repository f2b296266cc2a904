"""What an epoch costs beside the decoder's own arithmetic.

    python -m tests.benchmarks.training_step --data data/abdomen

Compares train_epoch and validate of train_adaptive.py, all of them, with the bare decoder on the
same embeddings and prompts, which lie in memory; and that with segment-anything's own forward.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

import perturb
import train_adaptive as script
from tests.benchmarks.common import (
    BareDecoder,
    arguments,
    describe,
    device_of,
    goal,
    medians,
    slices_to_measure,
    spread,
)
from utils.data.slices import Slice
from utils.model.embeddings import open_embeddings
from utils.model.segmenter import load_model
from utils.system.device import mixed_precision
from utils.training.trainer import START, Trainer

FACTORS = {"delta_expand": perturb.DELTA_EXPAND, "epsilon_shrink": perturb.EPSILON_SHRINK}


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=40).parse_args()
    device = device_of(args)
    with slices_to_measure(args.data) as dataset:
        describe(dataset, device)
        model = load_model("lite_medsam", None, device)
        train, val = (spread(dataset.split(part), args.slices) for part in ("train", "val"))
        embeddings = open_embeddings([dataset], model, train + val)
        amp = mixed_precision("auto", device)
        autocast = torch.autocast(device.type, amp, enabled=amp is not None)

        def trained(**changes: int) -> partial:
            """An epoch's training part, beginning with the weights as they are."""
            options = {**script.DEFAULTS, **changes}
            trainer = Trainer(
                *(model, embeddings),
                **{key: options[key] for key in ("lr", "weight_decay", "boxes_per_call")},
                **{"factor": 0.1, "patience": 2, "amp": amp},
            )

            def epoch() -> None:
                trainer.at = {**START, "epoch": 2}
                trainer.begin_epoch()
                script.train_epoch(trainer, train, options, FACTORS, Path(), 0.0, lambda: None)

            return epoch

        def boxes(entry: Slice, tight: np.ndarray) -> np.ndarray:
            return perturb.perturb(tight, "adaptive", np.random.default_rng(0), **FACTORS)

        bare = BareDecoder(model, embeddings, train, boxes)
        of_val = BareDecoder(model, embeddings, val, lambda _, tight: np.concatenate([tight] * 3))
        trainer = Trainer(
            *(model, embeddings),
            **{"lr": 0.0, "weight_decay": 0.0, "factor": 0.1, "patience": 2, "amp": amp},
            boxes_per_call=script.DEFAULTS["boxes_per_call"],
        )
        found = medians(
            {
                "epoch": trained(),
                "bare": partial(bare.backward, bare.ours, autocast),
                "SAM": partial(bare.backward, bare.segment_anythings, autocast),
                "validation": partial(script.validate, trainer, val, 256),
                "bare validation": partial(of_val.forward, of_val.ours, autocast),
                "SAM validation": partial(of_val.forward, of_val.segment_anythings, autocast),
                "4 slices a step": trained(batch=4),
                "1 box a call": trained(boxes_per_call=1),
                "loss at 1024": trained(loss_resolution=1024),
            },
            args.repeats,
            device,
        )
    print(
        f"{len(train)} slices, {bare.count} boxes; {len(val)} for validation, {of_val.count} boxes"
    )
    print("seconds a box:")
    for name, seconds in found.items():
        count = of_val.count if "validation" in name else bare.count
        print(f"  {name:<16} {seconds / count:.4f}")
    goal("training part of an epoch / bare decoder", found["epoch"] / found["bare"], 1.15)
    print(f"validation / bare decoder: {found['validation'] / found['bare validation']:.3g}")
    print(
        f"SAM's own forward / ours: {found['SAM validation'] / found['bare validation']:.3g}, "
        f"with backward {found['SAM'] / found['bare']:.3g}"
    )


if __name__ == "__main__":
    main()
