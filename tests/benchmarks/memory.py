"""Peak memory: of a GPU, computed without one; of this process, by the number of slices.

    python -m tests.benchmarks.memory                  GPU memory, for ViT-B
    python -m tests.benchmarks.memory --resident       resident memory, with 100 and 4000 slices

The GPU's peak is computed by running the same code on tensors without storage (PyTorch's
FakeTensorMode) and adding up those that are alive: weights, activations, gradients, AdamW's state.
The CUDA context, cuDNN's workspace and fragmentation come on top; train_adaptive.py prints the real
peak. Encoding runs under CUDA's autocast rules. A backward pass without a GPU runs under the CPU's,
which cast less to fp32; the fp32 figure is an upper bound.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import train_adaptive
from tests.benchmarks.common import goal, machine, slices_to_measure
from utils.data.slices import DATASET_FILE, slice_name
from utils.model.decoder import freeze_unused, mask_logits
from utils.model.embeddings import ENCODE_PIXELS
from utils.model.segmenter import Segmenter
from utils.training.losses import segmentation_loss

GIB = 2**30


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resident", action="store_true", help="memory by number of slices")
    parser.add_argument("--slices", type=int, nargs="+", default=[100, 4000])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train_on_links(Path(args.child), args.slices[0])
    if args.resident:
        print(f"machine: {machine()}; LiteMedSAM, one epoch, one organ per slice")
        for count in args.slices:
            resident(count)
        return
    print("computed, GiB, ViT-B:")
    for name, batch, half in (
        ("encoding, fp16, as eval.py and train_adaptive.py do", ENCODE_PIXELS // 1024**2, True),
        ("encoding, fp16, one slice", 1, True),
        ("encoding, fp32, one slice (the check of fp16)", 1, False),
    ):
        peak = encoding(batch, half)
        print(f"  {name}: {peak:.2f}")
        if half and batch > 1:
            goal("  encoding pass, GiB", peak, 6)
    boxes = train_adaptive.default_options().boxes_per_call
    for name, count, half in (
        (f"training, half precision, {boxes} boxes", boxes, True),
        (f"training, fp32, {boxes} boxes", boxes, False),
        ("training, fp32, 1 box", 1, False),
    ):
        peak = training(count, half)
        print(f"  {name}: {peak:.2f}")
        if count > 1:
            goal("  decoder training, GiB", peak, 3)
    print(
        f"  training, fp32, {boxes} boxes, segment-anything's own forward: "
        f"{training(boxes, False, own=False):.2f}"
    )


# --- A GPU's memory, computed --------------------------------------------------------------------
class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.bytes -= size


@contextlib.contextmanager
def cuda_half() -> Iterator[None]:
    """torch.autocast("cuda", torch.float16), which is a no-op without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def encoding(batch: int, half: bool) -> float:
    """Peak GiB of one encoder call of ViT-B."""
    with FakeTensorMode(), torch.device("cuda"), Alive() as alive, torch.no_grad():
        sam = sam_model_registry["vit_b"]()
        with cuda_half() if half else contextlib.nullcontext():
            sam.image_encoder(torch.empty(batch, 3, 1024, 1024)).half()
        return alive.peak / GIB


def training(boxes: int, half: bool, own: bool = True) -> float:
    """Peak GiB of two training steps of the mask decoder on one slice, without image encoder."""
    with FakeTensorMode(), Alive() as alive:
        decoder = sam_model_registry["vit_b"]().mask_decoder
        freeze_unused(decoder)
        gc.collect()
        alive.peak = alive.bytes
        trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        image, position = torch.empty(1, 256, 64, 64), torch.empty(1, 256, 64, 64)
        prompts, targets = torch.empty(boxes, 2, 256), torch.empty(boxes, 256, 256)
        for _ in range(2):
            with torch.autocast("cpu", torch.float16, enabled=half):
                if own:
                    logits = mask_logits(decoder, image, position, prompts, [boxes])
                else:
                    dense = torch.zeros(boxes, 256, 64, 64)
                    logits = decoder(image, position, prompts, dense, False)[0][:, 0]
            segmentation_loss(logits, targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return alive.peak / GIB


# --- Resident memory -----------------------------------------------------------------------------
def resident(count: int) -> None:
    """Train on `count` slices in a process of its own and print its memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.memory"]
        command += ["--child", folder, "--slices", str(count)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for file in Path(folder).rglob("rss"):
            peak, held = map(float, file.read_text().split())
            print(
                f"{count} slices: peak memory {peak:.2f} GiB, at the end {held:.2f} GiB",
                flush=True,
            )


def train_on_links(folder: Path, count: int) -> None:
    """Train an epoch on `count` links to one slice, with made-up embeddings."""
    data = folder / "data"
    for kind in ("imgs", "gts"):
        (data / kind).mkdir(parents=True)
    with slices_to_measure(None, patients=3, each=1) as dataset:
        meta = json.loads((dataset.folder / DATASET_FILE).read_text())
        source = dataset.split("train")[0]
        image, label_map = np.load(source.image_path), np.load(source.label_path)
    case = meta["cases"][source.case]
    label = int(np.bincount(label_map[label_map > 0]).argmax())
    np.save(folder / "img.npy", image)
    np.save(folder / "gts.npy", np.where(label_map == label, label, 0).astype(np.uint8))
    (item,) = case["slices"].values()
    item = {**item, "labels": {str(label): item["labels"][str(label)]}}
    meta["cases"] = {}
    for name, split, slices in (("links", "train", count), ("last", "val", 1)):
        meta["cases"][name] = {
            **case,
            "split": split,
            "slices": {str(n): item for n in range(slices)},
        }
        for n in range(slices):
            os.symlink(folder / "img.npy", data / "imgs" / f"{slice_name(name, n)}.npy")
            os.symlink(folder / "gts.npy", data / "gts" / f"{slice_name(name, n)}.npy")
    (data / DATASET_FILE).write_text(json.dumps(meta))

    rng = torch.Generator().manual_seed(0)
    made_up = torch.randn(1, 256, 64, 64, generator=rng) / 10
    Segmenter.encode = lambda self, images, *_: made_up.expand(len(images), -1, -1, -1)
    # A tiny learning rate: overfitted gradients become denormal, and those are slow on CPUs.
    options = train_adaptive.default_options(batch=1, data=[str(data)], epochs=1, lr=1e-12)
    train_adaptive.train(options, folder / "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmRSS:")[2].split()[0]) / 2**20
    (folder / "rss").write_text(f"{peak} {held}")


if __name__ == "__main__":
    main()
