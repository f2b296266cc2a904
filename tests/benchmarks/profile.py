"""Where the time of a training epoch and of an evaluation goes.

    python -m tests.benchmarks.profile --data data/abdomen

Prints PyTorch's own table of operators for each, and the share of the time inside the decoder.
"""

from __future__ import annotations

import tempfile

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import eval as evaluation
from tests.benchmarks.common import (
    arguments,
    describe,
    device_of,
    few_slices,
    seconds_per_epoch,
    slices_to_measure,
)
from utils.model import segmenter
from utils.model.decoder import mask_logits


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=12, rows=12).parse_args()
    device = device_of(args)

    def named(*arguments: object) -> torch.Tensor:
        with record_function("decoder, forward"):
            return mask_logits(*arguments)

    segmenter.mask_logits = named
    with (
        slices_to_measure(args.data) as whole,
        few_slices(whole, args.slices, args.slices) as dataset,
        tempfile.TemporaryDirectory() as out,
    ):
        describe(dataset, device)

        def evaluate() -> None:
            options = ["--models", "lite_medsam", "--data", str(dataset.folder), "--split", "val"]
            evaluation.main([*options, "--no-figures", "--device", device.type, "--out", out])

        epochs = seconds_per_epoch(dataset.folder, device, repeats=1)
        for name, task in (("two epochs", epochs), ("evaluation, embeddings cached", evaluate)):
            task()  # encodes
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
            with profile(activities=activities) as profiled, record_function("all"):
                task()
            table = profiled.key_averages()
            total, forward, backward = (
                sum(row.cpu_time_total for row in table if row.key.startswith(key)) / 1e6
                for key in ("all", "decoder, forward", "autograd::engine::evaluate_function")
            )
            print(
                f"\n{name}: {total:.2f} s; decoder forward {forward / total:.0%}, backward "
                f"{backward / total:.0%}"
            )
            print(table.table(sort_by="self_cpu_time_total", row_limit=args.rows))


if __name__ == "__main__":
    main()
