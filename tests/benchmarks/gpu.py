"""How far encoding and a training step are from what the card could do.

    python -m tests.benchmarks.gpu [--out gpu.json]

On random inputs: slices encoded per second, beside segment-anything's own encoder in the same
precision and batch, and milliseconds of a training step by its number of boxes, beside the time
that its matrix products alone would take at the card's measured throughput. It runs on a CPU too.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.common import arguments, device_of, machine, medians
from utils.data.frame import Frame
from utils.model.segmenter import MODELS, Segmenter, load_model
from utils.system.device import mixed_precision
from utils.training.losses import segmentation_loss

BOXES = (1, 2, 6, 16)
SIDE = 4096  # of the matrices by which the throughput is measured


class CountOperations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def random_vit_b() -> tuple[Segmenter, torch.nn.Module]:
    """Our ViT-B, and segment-anything's encoder of the same random weights."""
    torch.manual_seed(0)
    network = sam_model_registry["vit_b"]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit_b.pth"
        torch.save(network.state_dict(), path)
        return Segmenter("medsam_vit_b", path), network.image_encoder


def encoding(device: torch.device, repeats: int) -> dict[str, float]:
    """Slices encoded per second, and the largest relative difference of the two ViT-B."""
    batch = 4 if device.type == "cuda" else 1
    images = torch.randint(256, (batch, 1024, 1024), dtype=torch.uint8)
    frames = [Frame((1024, 1024), (1024, 1024))] * batch
    vit_b, theirs = random_vit_b()
    vit_b, theirs, lite = (
        vit_b.to(device),
        theirs.to(device),
        load_model("lite_medsam", None, device),
    )
    fp16 = device.type == "cuda"

    def of_segment_anything() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=fp16):
            return theirs(MODELS["medsam_vit_b"].normalise(images.to(device), frames))

    tasks: dict[str, Callable] = {"ViT-B, segment-anything": of_segment_anything}
    for name, model in (("ViT-B, ours", vit_b), ("LiteMedSAM, ours", lite)):
        tasks[name] = partial(model.encode, images, frames, fp16)
    expected = of_segment_anything().float()
    difference = (tasks["ViT-B, ours"]().float() - expected).norm() / expected.norm()
    seconds = medians(tasks, repeats, device)
    speeds = {name: batch / value for name, value in seconds.items()}
    ratio = speeds["ViT-B, ours"] / speeds["ViT-B, segment-anything"]
    return speeds | {"ViT-B, ratio": ratio, "ViT-B, relative difference": difference.item()}


def throughput(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations per second of a product of matrices."""
    one, other = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    return 2 * SIDE**3 / medians({"product": lambda: one @ other}, repeats, device)["product"]


def steps(device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """By the number of boxes: ms of a step, its operations, and the ms of its products alone."""
    model, amp = load_model("lite_medsam", None, device), mixed_precision("auto", device)
    trained = [weight for weight in model.mask_decoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    per_second = throughput(device, amp or torch.float32, repeats)
    embedding = torch.randn(1, *model.embedding_shape, device=device)
    rng = np.random.default_rng(0)
    result = {}
    for count in BOXES:
        corners = rng.uniform(0, 400, (count, 2))
        boxes = np.hstack([corners, corners + rng.uniform(50, 500, (count, 2))]).astype(np.float32)
        targets = torch.randint(2, (count, 256, 256), dtype=torch.uint8, device=device)

        def step(boxes=boxes, targets=targets) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model.decode_batch(embedding, [boxes])
            scaler.scale(segmentation_loss(logits, targets).mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        step()
        with CountOperations() as operations:
            step()
        with FlopCounterMode(display=False) as flops:
            step()
        result[str(count)] = {
            "ms": 1000 * medians({"step": step}, repeats, device)["step"],
            "operations": operations.count,
            "ms of the products": 1000 * flops.get_total_flops() / per_second,
        }
    return result


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    device = device_of(args)
    found = {"machine": machine(device)}
    found["slices per second"] = encoding(device, args.repeats)
    found["step, by boxes"] = steps(device, args.repeats)
    if device.type == "cuda":
        found["peak memory, GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    text = json.dumps(found, indent=1)
    Path(args.out).write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
