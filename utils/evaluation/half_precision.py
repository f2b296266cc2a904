"""What decoding in half precision does to the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from utils.data.slices import Slice, read_instances
from utils.evaluation.metrics import dsc
from utils.evaluation.models import predict
from utils.evaluation.prompts import Protocol, all_prompts, boxes_of
from utils.model.segmenter import Segmenter
from utils.system.wording import plural

COMPARED_SLICES = 16  # that are decoded both ways, spread over all slices


def precision_note(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    slices: Sequence[Slice],
    protocol: Protocol,
    amp: torch.dtype,
) -> str:
    """A note on how far DSC in half precision is from DSC in fp32.

    A few slices are decoded both ways, with one box of each kind at the first shift.

    Args:
        models, embeddings: by name, as in eval.py's `evaluate`.
        slices: of the evaluation.
        protocol: with its first shift.
        amp: the dtype of half precision.
    """
    prompts = all_prompts(replace(protocol, shifts=protocol.shifts[:1], sweep=(), draws=1))
    chosen = slices[:: max(1, len(slices) // COMPARED_SLICES)][:COMPARED_SLICES]
    differences = []
    for entry in chosen:
        label_map, labels, tight = read_instances(entry)
        native = entry.frame.labels_to_native(label_map)
        boxes = [boxes_of(entry, labels, tight, prompt, protocol.seed) for prompt in prompts]
        targets = [native == label for label in labels] * len(prompts)
        for name, model in models.items():
            embedding = embeddings[name](entry)
            full, half = (
                (predict(model, embedding, np.concatenate(boxes), entry.frame, dtype) > 0)
                .cpu()
                .numpy()
                for dtype in (None, amp)
            )
            for target, exact, fast in zip(targets, full, half, strict=True):
                differences.append(abs(dsc(fast, target) - dsc(exact, target)))
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[amp]
    return (
        f"Masks are decoded in {name}. On {plural(len(chosen), 'slice')} their DSC differs from "
        f"that in fp32 by {100 * np.mean(differences):.2f} points on average and by "
        f"{100 * max(differences):.2f} points at most."
    )
