"""How far encoding, training and evaluation are from what the card could do.

    python -m tests.benchmarks.gpu [--out gpu.json]

On synthetic slices, with LiteMedSAM and a ViT-B of random weights, in under five minutes on a GPU:

- slices encoded per second, beside segment-anything's own encoder in the same precision and batch;
- milliseconds of a training step by its number of boxes, as it is and as a CUDA graph, beside its
  floors: the time that its matrix products take at the card's measured throughput, and that its
  operations take to read and write their tensors at the card's measured bandwidth;
- an epoch of the training loop over the bare step of its slices;
- boxes per second of eval.py, with and without processes that score, and of the bare networks;
- peak memory of each.

On a CPU there are fewer repetitions and no graphs.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import evaluation, training_step
from tests.benchmarks.common import device_of, machine, medians, slices_to_measure
from utils.data.frame import Frame
from utils.model.graphs import GraphedDecoder
from utils.model.segmenter import MODELS, Segmenter, load_model
from utils.system.device import mixed_precision, peak_gib
from utils.training.losses import segmentation_loss

BOXES = (1, 2, 6, 16)
SIDE = 4096  # of the matrices by which the throughput is measured
COPIED = 2**28  # bytes by which the bandwidth is measured


class Counted(TorchDispatchMode):
    """Counts dispatched operations, those of them that compute, and the bytes that these move."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.kernels = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        if not function.is_view and "view" not in function.name():
            self.kernels += 1
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


def random_vit_b() -> tuple[Segmenter, torch.nn.Module]:
    """Our ViT-B, and segment-anything's encoder of the same random weights."""
    torch.manual_seed(0)
    network = sam_model_registry["vit_b"]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit_b.pth"
        torch.save(network.state_dict(), path)
        return Segmenter("medsam_vit_b", path), network.image_encoder


def encoding(device: torch.device, repeats: int) -> dict[str, float]:
    """Slices encoded per second, and the relative difference (L2) of the two ViT-B."""
    fp16 = device.type == "cuda"
    batch = 4 if fp16 else 1
    images = torch.randint(256, (batch, 1024, 1024), dtype=torch.uint8)
    frames = [Frame((1024, 1024), (1024, 1024))] * batch
    vit_b, theirs = random_vit_b()
    vit_b, theirs = vit_b.to(device), theirs.to(device)
    lite = load_model("lite_medsam", None, device)
    results = {}

    def of_segment_anything() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=fp16):
            inputs = MODELS["medsam_vit_b"].normalise(images.to(device), frames)
            results["theirs"] = theirs(inputs).float()

    def of_ours() -> None:
        results["ours"] = vit_b.encode(images, frames, fp16).float()

    tasks: dict[str, Callable] = {
        "ViT-B, segment-anything": of_segment_anything,
        "ViT-B, ours": of_ours,
        "LiteMedSAM, ours": partial(lite.encode, images, frames, fp16),
    }
    seconds = medians(tasks, repeats, device)
    speeds = {name: batch / value for name, value in seconds.items()}
    ratio = speeds["ViT-B, ours"] / speeds["ViT-B, segment-anything"]
    difference = (results["ours"] - results["theirs"]).norm() / results["theirs"].norm()
    return speeds | {"ViT-B, ratio": ratio, "ViT-B, relative difference": difference.item()}


def limits(device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Operations per second of a product of matrices, and bytes per second of a copy."""
    one, other = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    copied = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    tasks = {"product": lambda: one @ other, "copy": copied.clone}
    seconds = medians(tasks, repeats, device)
    return 2 * SIDE**3 / seconds["product"], 2 * COPIED / seconds["copy"]


def steps(device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """By the number of boxes: ms of a step and of its floors, and its operations."""
    model, amp = load_model("lite_medsam", None, device), mixed_precision("auto", device)
    trained = [weight for weight in model.mask_decoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    per_second, bandwidth = limits(device, amp or torch.float32, repeats)
    embedding = torch.randn(1, *model.embedding_shape, device=device)
    rng = np.random.default_rng(0)
    decoders: dict[str, Callable] = {"ms": model.decode_batch}
    if device.type == "cuda":
        decoders["ms, graph"] = GraphedDecoder(model, max(BOXES), amp)
    result = {}
    for count in BOXES:
        corners = rng.uniform(0, 400, (count, 2))
        boxes = np.hstack([corners, corners + rng.uniform(50, 500, (count, 2))]).astype(np.float32)
        targets = torch.randint(2, (count, 256, 256), dtype=torch.uint8, device=device)

        def step(decode: Callable, boxes=boxes, targets=targets) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = decode(embedding, [boxes])
            scaler.scale(segmentation_loss(logits, targets).mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        step(model.decode_batch)
        with Counted() as counted:
            step(model.decode_batch)
        with FlopCounterMode(display=False) as flops:
            step(model.decode_batch)
        tasks = {name: partial(step, decode) for name, decode in decoders.items()}
        seconds = medians(tasks, repeats, device)
        result[str(count)] = {name: 1000 * value for name, value in seconds.items()} | {
            "operations": counted.operations,
            "kernels": counted.kernels,
            "ms, floor of products": 1000 * flops.get_total_flops() / per_second,
            "ms, floor of memory": 1000 * counted.bytes / bandwidth,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto (default)")
    parser.add_argument("--out", default="gpu.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    device = device_of(args)
    repeats, slices, scored = (10, 40, 10) if device.type == "cuda" else (1, 4, 1)
    result = {"machine": machine(device), "cuda": torch.version.cuda}
    with slices_to_measure(None) as dataset:
        for name, measure in {
            "slices encoded per second": partial(encoding, device, repeats),
            "a training step, by boxes": partial(steps, device, repeats),
            "training, seconds": partial(training_step.measure, dataset, device, repeats, slices),
            "evaluation, seconds": partial(evaluation.measure, dataset, device, repeats, scored),
        }.items():
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            result[name] = measure() | {"peak memory, GiB": peak_gib(device)}
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    Path(args.out).write_text(f"{json.dumps(result, indent=1)}\n")


if __name__ == "__main__":
    main()
