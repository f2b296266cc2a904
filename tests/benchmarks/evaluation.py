"""What an evaluation costs beside the networks' own arithmetic.

    python -m tests.benchmarks.evaluation --data data/abdomen

Compares `evaluate` of eval.py with the bare encoder and decoder on the same slices and boxes.
"""

from functools import partial

import numpy as np
import torch

import eval as script
from perturb import Shift, mask_areas
from tests.benchmarks.common import (
    BareDecoder,
    arguments,
    device_of,
    encode,
    goal,
    machine,
    medians,
    slices_to_measure,
    spread,
)
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.evaluation.models import Predictor
from utils.evaluation.prompts import Protocol, all_prompts, boxes_of
from utils.evaluation.scoring import tolerances_of
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model


def evaluate(*arguments: object) -> None:
    for _ in script.evaluate(*arguments):
        pass


def all_boxes(protocol: Protocol, sample: Slice, tight: np.ndarray) -> np.ndarray:
    label_map, labels, _ = read_instances(sample)
    masks = (labels, tight, mask_areas(label_map, labels))
    prompts = all_prompts(protocol)
    return np.concatenate([boxes_of(sample, *masks, p, protocol.seed) for p in prompts])


def measure(
    dataset: SliceDataset, device: torch.device, repeats: int, count: int
) -> dict[str, float]:
    """Seconds of scoring `count` slices with 27 kinds of box, and of the bare networks on them."""
    options = script.parse_options(["--models", "lite_medsam"])
    protocol = Protocol(tuple(options.shift), tuple(map(Shift.parse, script.SWEEP)))
    slices = spread(dataset.split("test"), count)
    model = load_model("lite_medsam", None, device)
    embeddings = Embeddings(model, slices, cache=False)
    models = {"lite_medsam": Predictor(model, embeddings, model.base_sha256)}
    tolerances = tolerances_of(options.tolerance, slices)
    bare = BareDecoder(model, embeddings, slices, partial(all_boxes, protocol), script.DECODE_BOXES)
    scoring = partial(evaluate, models, slices, protocol, tolerances)
    tasks = {
        "bare encoder": partial(encode, model, slices),
        "bare decoder": partial(bare.run, bare.ours, torch.autocast(device.type, enabled=False)),
        "scoring in this process": partial(scoring, 0),
        "scoring in others": partial(scoring, script.WORKERS),
    }
    return {"boxes": bare.count} | medians(tasks, repeats, device)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], slices=12).parse_args()
    device = device_of(args)
    with slices_to_measure(args.data) as dataset:
        print(f"data: {dataset.name}; machine: {machine(device)}")
        seconds = measure(dataset, device, args.repeats, args.slices)
    print(f"{seconds.pop('boxes')} boxes; seconds:")
    for name, value in seconds.items():
        print(f"  {name:<24} {value:.2f}")
    networks = seconds["bare encoder"] + seconds["bare decoder"]
    default = "scoring in " + ("others" if device.type == "cuda" else "this process")
    goal("evaluation / bare encoder and decoder", seconds[default] / networks, 1.3)


if __name__ == "__main__":
    main()
