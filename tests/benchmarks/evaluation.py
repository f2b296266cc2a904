"""What an evaluation costs beside the networks' own arithmetic.

    python -m tests.benchmarks.evaluation --data data/abdomen

Compares `evaluate` of eval.py (encode each slice once, decode all kinds of box, bring the masks to
native resolution, score) with the bare image encoder and mask decoder on the same slices and boxes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import eval as script
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
from tests.benchmarks.peers import encode_slices
from utils.data.slices import Slice
from utils.evaluation.inputs import tolerances_of
from utils.evaluation.prompts import all_prompts, boxes_of
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=12).parse_args()
    device = device_of(args)
    options = script.parse_args(["--models", "lite_medsam"])
    with slices_to_measure(args.data) as dataset:
        describe(dataset, device)
        slices = spread(dataset.split("test"), args.slices)
        model = load_model("lite_medsam", None, device)
        models = {"lite_medsam": model}
        embeddings = {"lite_medsam": Embeddings(model, slices, cache=False)}
        protocol = script.protocol_of(options, [dataset], list(models))
        prompts = all_prompts(protocol)
        tolerances = tolerances_of(options.tolerance, slices)

        def boxes(entry: Slice, tight: np.ndarray) -> np.ndarray:
            labels = sorted(entry.labels)
            return np.concatenate(
                [boxes_of(entry, labels, tight, prompt, protocol.seed) for prompt in prompts]
            )

        def evaluate(workers: int) -> None:
            script.evaluate(models, embeddings, slices, tolerances, protocol, workers=workers)

        bare = BareDecoder(
            model, embeddings["lite_medsam"], slices, boxes, most=script.DECODE_BOXES
        )
        seconds = medians(
            {
                "scoring in the same process": partial(evaluate, 0),
                "scoring in another process": partial(evaluate, script.WORKERS),
                "bare encoder": partial(encode_slices, model, slices),
                "bare decoder": partial(
                    bare.forward, bare.ours, torch.autocast(device.type, enabled=False)
                ),
            },
            args.repeats,
            device,
        )
    print(f"{len(slices)} slices, {bare.count} boxes of {len(prompts)} kinds; seconds:")
    for name, value in seconds.items():
        print(f"  {name:<28} {value:.2f}")
    networks = seconds["bare encoder"] + seconds["bare decoder"]
    default = "another" if device.type == "cuda" else "the same"
    ratio = seconds[f"scoring in {default} process"] / networks
    goal("evaluation / bare encoder and decoder", ratio, 1.3)


if __name__ == "__main__":
    main()
