"""What the benchmarks share: data, interleaved repetitions, and how a result is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from perturb import BOX_KINDS, IMAGE_SIZE
from utils.data.frame import rescale_boxes
from utils.data.slices import (
    DATASET_FILE,
    Slice,
    SliceDataset,
    open_dataset,
    read_instances,
    slice_name,
)
from utils.model.decoder import mask_logits
from utils.model.segmenter import Segmenter
from utils.system.device import choose_device, keep_freed_memory

CPU = torch.device("cpu")


def arguments(description: str, **defaults: int) -> argparse.ArgumentParser:
    """Options of every benchmark, and `defaults` as further options that are numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="a folder of preprocess_ct.py (default: synthetic slices)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto (default)")
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help="(default %(default)s)")
    return parser


@contextlib.contextmanager
def slices_to_measure(folder: str | None, patients: int = 12, each: int = 8) -> Iterator:
    """A data set: the one in `folder`, or synthetic patients in a temporary folder."""
    if folder:
        yield open_dataset(folder)
        return
    from tests.helpers import preprocess
    from utils.data.synthetic import write_patients

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_patients(root / "ct", patients, each)
        preprocess(root / "ct", root / "synthetic")
        yield open_dataset(root / "synthetic")


def spread(slices: Sequence[Slice], count: int) -> list[Slice]:
    """`count` of the slices, or all if there are fewer, evenly spaced."""
    count = min(count, len(slices))
    return [slices[n * len(slices) // count] for n in range(count)]


def device_of(args: argparse.Namespace) -> torch.device:
    """The device to measure on, with memory kept as the scripts keep it."""
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    tasks: dict[str, Callable[[], object]], repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each task, in interleaved repetitions after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repeats + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if device:
                finish(device)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device = CPU) -> str:
    """The machine in words."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        cpu = name.partition(":")[2].strip()
    words = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
    words += f"torch {torch.__version__}"
    if device.type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}; {words}"
    return words


def describe(dataset: SliceDataset, device: torch.device) -> None:
    """Print what is measured on."""
    print(f"data: {dataset.name}; machine: {machine(device)}")


def goal(text: str, measured: float, limit: float, at_least: bool = False) -> None:
    """Print a figure beside its goal."""
    met = measured >= limit if at_least else measured <= limit
    bound = "at least" if at_least else "at most"
    print(f"{text}: {measured:.3g} (goal: {bound} {limit:g}, {'met' if met else 'MISSED'})")


class BareDecoder:
    """A decoder's calls on embeddings and prompts that lie in memory, one call a slice."""

    def __init__(
        self,
        model: Segmenter,
        embeddings: Callable[[Slice], torch.Tensor],
        slices: Sequence[Slice],
        boxes: Callable[[Slice, np.ndarray], np.ndarray],
        most: int = 16,
    ) -> None:
        """Encode slices and prompts; at most `most` boxes are for one call."""
        self.decoder = model.mask_decoder
        self.images, self.prompts = [], []
        with torch.no_grad():
            self.position = model.prompt_encoder.get_dense_pe()
            for entry in slices:
                asked = rescale_boxes(
                    boxes(entry, read_instances(entry)[2]), IMAGE_SIZE, model.input_size
                )
                sparse, dense = model.prompt_encoder(
                    points=None, boxes=torch.from_numpy(asked).to(model.device), masks=None
                )
                image = embeddings(entry)[None] + dense[:1]
                for part in sparse.split(most):
                    self.images.append(image)
                    self.prompts.append(part)
        self.count = sum(map(len, self.prompts))

    def ours(self, image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Logits (K, 256, 256) as the scripts compute them."""
        return mask_logits(self.decoder, image, self.position, prompts, [len(prompts)])

    def segment_anythings(self, image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """The same by segment-anything's own forward."""
        return self.decoder(
            image_embeddings=image,
            image_pe=self.position,
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=torch.zeros(1, device=image.device),
            multimask_output=False,
        )[0]

    def forward(self, call: Callable, autocast: torch.autocast) -> None:
        """All slices, forward."""
        with torch.no_grad(), autocast:
            for image, prompts in zip(self.images, self.prompts, strict=True):
                call(image, prompts)

    def backward(self, call: Callable, autocast: torch.autocast) -> None:
        """All slices, forward and backward."""
        for image, prompts in zip(self.images, self.prompts, strict=True):
            with autocast:
                logits = call(image, prompts)
            logits.float().sum().backward()
            self.decoder.zero_grad(set_to_none=True)


def seconds_per_epoch(
    data: Path, device: torch.device, repeats: int, **options: object
) -> Callable[[], float]:
    """A function to the seconds of the training part of an epoch of train_adaptive.py.

    It trains `repeats` epochs after one that does not count, and takes the median. Validation is
    left out; the checkpoints and the log are written between epochs, outside of what is measured.
    """
    import train_adaptive
    from utils.training import validation

    def nothing(*_: object) -> dict[str, float]:
        finish(device)
        return {"val_loss": 1.0} | {f"dsc_{kind}": 0.0 for kind in BOX_KINDS}

    def measure() -> float:
        validate, validation.validate = validation.validate, nothing
        given = {"batch": 1, "device": device.type, "data": [str(data)], "epochs": repeats + 1}
        try:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                with contextlib.redirect_stdout(None):
                    train_adaptive.train(train_adaptive.default_options(**given | options), run)
                seconds = pd.read_csv(run / "log.csv")["seconds"]
        finally:
            validation.validate = validate
        return float(seconds[2:].median())

    return measure


@contextlib.contextmanager
def few_slices(
    dataset: SliceDataset, train: int, val: int, organs: int = 0
) -> Iterator[SliceDataset]:
    """A data set of evenly spaced training and validation slices, links to those of `dataset`.

    With `organs`, they are slices of so many organs.
    """
    chosen = {}
    for part, count in (("train", train), ("val", val)):
        slices = dataset.split(part)
        slices = [entry for entry in slices if not organs or len(entry.labels) == organs]
        chosen[part] = spread(slices, count)
        if not chosen[part]:
            raise SystemExit(f"{dataset.folder}: no {part} slice with {organs} organs")
    meta = json.loads((dataset.folder / DATASET_FILE).read_text())
    names = {entry.name for entries in chosen.values() for entry in entries}
    for case, entry in list(meta["cases"].items()):
        slices = {z: s for z, s in entry["slices"].items() if slice_name(case, int(z)) in names}
        meta["cases"][case]["slices"] = slices
        if not slices:
            del meta["cases"][case]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / dataset.name
        for kind in ("imgs", "gts"):
            (folder / kind).mkdir(parents=True)
            for name in names:
                source = (dataset.folder / kind / f"{name}.npy").resolve()
                (folder / kind / f"{name}.npy").symlink_to(source)
        (folder / DATASET_FILE).write_text(json.dumps(meta))
        yield open_dataset(folder)
