"""Where the time of a training epoch and of an evaluation goes.

    python -m tests.benchmarks.profile --data data/abdomen

Prints PyTorch's own table of operators for each, and the share of the time inside the decoder.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import eval as evaluation
from tests.benchmarks.common import arguments, describe, device_of, slices_to_measure, spread
from tests.benchmarks.peers import our_epoch, trainer_of
from utils.model import segmenter
from utils.model.decoder import mask_logits
from utils.model.embeddings import open_embeddings


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__.splitlines()[0], slices=12, rows=12).parse_args()
    device = device_of(args)

    def named(*arguments: object) -> torch.Tensor:
        with record_function("decoder, forward"):
            return mask_logits(*arguments)

    segmenter.mask_logits = named
    with slices_to_measure(args.data) as dataset:
        describe(dataset, device)
        model = segmenter.load_model("lite_medsam", None, device)
        train, test = (spread(dataset.split(part), args.slices) for part in ("train", "test"))
        embeddings = open_embeddings([dataset], model, train + test)
        trainer = trainer_of(model, embeddings)
        protocol = evaluation.protocol_of(
            evaluation.parse_args(["--models", "lite_medsam"]), [dataset], [], ["lite_medsam"]
        )

        def evaluate() -> None:
            for _ in evaluation.evaluate(
                {"lite_medsam": model},
                {"lite_medsam": embeddings},
                test,
                evaluation.tolerances_of(2.0, test),
                protocol,
            ):
                pass

        our_epoch(trainer, train)  # warm
        for name, task in (
            ("training", lambda: our_epoch(trainer, train)),
            ("evaluation, embeddings cached", evaluate),
        ):
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
            with profile(activities=activities) as found, record_function("all"):
                task()
            table = found.key_averages()
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
