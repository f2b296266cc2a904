"""What the benchmarks share: data, interleaved repetitions, and how a result is printed."""

import argparse
import contextlib
import dataclasses
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

import train_adaptive
from perturb import BOX_KINDS, IMAGE_SIZE
from tests.helpers import options_for, preprocess
from utils.data.frame import rescale_boxes
from utils.data.slices import Slice, SliceDataset, open_dataset, read_instances
from utils.data.synthetic import write_patients
from utils.model.decoder import mask_logits
from utils.model.embeddings import encode_all
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
        parser.add_argument(f"--{name}", type=int, default=default, help="(default %(default)s)")
    return parser


@contextlib.contextmanager
def slices_to_measure(folder: str | None) -> Iterator[SliceDataset]:
    """A data set: the one in `folder`, or twelve synthetic patients in a temporary folder."""
    if folder:
        yield open_dataset(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_patients(root / "ct", patients=12, slices=8)
        preprocess(root / "ct", root / "synthetic")
        yield open_dataset(root / "synthetic")


def spread(slices: Sequence[Slice], count: int) -> list[Slice]:
    """`count` of the slices, or all if there are fewer, evenly spaced."""
    count = min(count, len(slices))
    return [slices[n * len(slices) // count] for n in range(count)]


def few_slices(dataset: SliceDataset, train: int, val: int, organs: int = 0) -> SliceDataset:
    """The data set with evenly spaced train and val slices alone, of so many organs if given."""
    chosen = {"test": []}
    for split, count in (("train", train), ("val", val)):
        slices = [s for s in dataset.split(split) if not organs or len(s.labels) == organs]
        if not slices:
            raise SystemExit(f"{dataset.folder}: no {split} slice with {organs} organs")
        chosen[split] = spread(slices, count)
    return dataclasses.replace(dataset, slices=chosen)


def device_of(args: argparse.Namespace) -> torch.device:
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encode(model: Segmenter, slices: Sequence[Slice]) -> None:
    for _ in encode_all(model, slices, fp16=model.device.type == "cuda"):
        pass


def medians(
    tasks: dict[str, Callable[[], object]], repeats: int, device: torch.device = CPU
) -> dict[str, float]:
    """Median seconds of each task, in interleaved repetitions after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repeats + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            finish(device)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device = CPU) -> str:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    words = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
    words += f"torch {torch.__version__}"
    return words if device == CPU else f"{torch.cuda.get_device_name(device)}; {words}"


def goal(text: str, measured: float, limit: float, at_least: bool = False) -> None:
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
        max_boxes: int = 16,
    ) -> None:
        self.decoder = model.mask_decoder
        self.images, self.prompts = [], []
        with torch.no_grad():
            self.position = model.prompt_encoder.get_dense_pe()
            for sample in slices:
                asked = boxes(sample, read_instances(sample)[2])
                asked = torch.from_numpy(rescale_boxes(asked, IMAGE_SIZE, model.input_size))
                sparse, dense = model.prompt_encoder(None, asked.to(model.device), None)
                for prompts in sparse.split(max_boxes):
                    self.images.append(embeddings(sample)[None] + dense[:1])
                    self.prompts.append(prompts)
        self.count = sum(map(len, self.prompts))

    def ours(self, image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return mask_logits(self.decoder, image, self.position, prompts, [len(prompts)])

    def segment_anythings(self, image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(1, device=image.device)
        return self.decoder(image, self.position, prompts, zero, multimask_output=False)[0]

    def run(self, call: Callable, autocast: torch.autocast, backward: bool = False) -> None:
        for image, prompts in zip(self.images, self.prompts, strict=True):
            with torch.set_grad_enabled(backward), autocast:
                logits = call(image, prompts)
            if backward:
                logits.float().sum().backward()
                self.decoder.zero_grad(set_to_none=True)


def seconds_per_epoch(
    dataset: SliceDataset, device: torch.device, repeats: int, **options: object
) -> float:
    """Median seconds of training, without validation, in `repeats` epochs after one to warm up."""
    changes = {"batch": 1, "device": device.type, "epochs": repeats + 1} | options
    row = {"val_loss": 1.0} | {f"dsc_{kind}": 0.0 for kind in BOX_KINDS}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(train_adaptive, "open_datasets", lambda _: [dataset]),
        mock.patch.object(train_adaptive, "validate", lambda *_: (finish(device), row)[1]),
        contextlib.redirect_stdout(None),
    ):
        train_adaptive.train(options_for(dataset.folder, **changes), Path(folder) / "run")
        return float(pd.read_csv(Path(folder) / "run" / "log.csv")["seconds"][2:].median())
