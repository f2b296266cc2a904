"""The mean of fine-tuned decoders that started from the same weights: a "model soup".

Wortsman et al., *Model soups* (ICML 2022). By their greedy recipe the decoders are tried in the
order of their own validation scores, best first, and one stays if it raises the score of the mean.
The score is the mean DSC over the families of boxes by which eval.py judges a decoder, on the
validation patients of the runs' data.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from perturb import Shift, box_families, shift_boxes
from utils.data.slices import Slice
from utils.model.checkpoints import read_checkpoint
from utils.model.segmenter import save_decoder
from utils.system.device import explain_out_of_memory
from utils.system.errors import UserError
from utils.system.files import atomic_write, sha256
from utils.training import runs
from utils.training.batches import TargetStore
from utils.training.inputs import Inputs, memory_advice, open_inputs, run_embeddings
from utils.training.validation import SEED, SHIFT, mean_scores

FAMILIES = box_families([SHIFT, Shift(20, "px")])
Weights = dict[str, torch.Tensor]


def average_runs(folders: Sequence[str | Path], folder: Path, options: Namespace) -> None:
    """Write the greedy mean of the decoders of some runs to a folder of its own; print the scores.

    Args:
        folders: of the runs; one of several policies stands for all of its runs.
        folder: the new one; see utils/training/runs.py.
        options: device, amp, cache, cache_dir and boxes_per_call; model, weights and data are those
            of the runs.

    Raises:
        UserError: fewer than two runs, runs that differ in starting weights or data, or bad input.
    """
    ingredients = runs.find_runs(folders)
    first = ingredients[0]
    if len(ingredients) < 2:
        raise UserError(f"--average: needs two decoders or more; {first.folder} has one")
    for run in ingredients:
        if run.data != first.data:
            raise UserError(
                f"{run.folder}: was trained on other data than {first.folder}; average decoders "
                "of the same data, by whose validation patients they can be compared"
            )
    runs.check_new(folder)
    of_runs = {name: first.options[name] for name in ("model", "checkpoint", "data")}
    options = Namespace(**{**vars(options), **of_runs})
    inputs = open_inputs(options, list(first.data))
    if inputs.facts["start_weights"] != first.config.get("start_weights"):
        raise UserError(
            f"{options.checkpoint or options.model}: not the weights that {first.folder} started "
            "from any more"
        )
    with runs.claim(folder), explain_out_of_memory(memory_advice(options)):
        score = family_scorer(inputs, options)
        decoders = [read_checkpoint(run.decoder)["mask_decoder"] for run in ingredients]
        mean = greedy_mean(decoders, score)
        table = score_table([str(run.folder) for run in ingredients], mean)
        record = [
            {
                "run": str(run.folder),
                "sha256": sha256(run.decoder),
                "kept": index in mean.kept,
                "options": run.options,
            }
            for index, run in enumerate(ingredients)
        ]
        runs.start_run(folder, of_runs, **inputs.facts, average=record)
        inputs.model.mask_decoder.load_state_dict(mean.weights)
        notes = {"epoch": None, "average_of": [record[index]["run"] for index in mean.kept]}
        save_decoder(folder / runs.BEST, inputs.model, inputs.seen, **notes)
        with atomic_write(folder / runs.AVERAGE, "w") as file:
            table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    shown = table.to_string(index=False, float_format=lambda share: f"{100 * share:.2f}")
    print(f"validation DSC, %:\n{shown}")
    print(f"{folder}: the mean of {len(mean.kept)} of {len(ingredients)} decoders")


# --- The greedy recipe ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Mean:
    """The mean of some of several decoders.

    Attributes:
        weights: its state dict.
        dsc: its mean DSC in each family.
        alone: those of each decoder alone.
        kept: the indices of the decoders in it, in the order in which they were added.
    """

    weights: Weights
    dsc: list[float]
    alone: list[list[float]]
    kept: list[int]


def greedy_mean(decoders: Sequence[Weights], score: Callable[[Weights], list[float]]) -> Mean:
    """The mean of those decoders that raise its score.

    Args:
        decoders: state dicts of one network.
        score: maps a state dict to its DSC in each family; the mean of these decides.
    """
    alone = [score(weights) for weights in decoders]
    best, *others = np.argsort([-np.mean(dsc) for dsc in alone], kind="stable").tolist()
    mean = Mean(weights=decoders[best], dsc=alone[best], alone=alone, kept=[best])
    for index in others:
        kept = [*mean.kept, index]
        weights = mean_weights([decoders[n] for n in kept])
        dsc = score(weights)
        if np.mean(dsc) > np.mean(mean.dsc):
            mean = Mean(weights=weights, dsc=dsc, alone=alone, kept=kept)
    return mean


def mean_weights(decoders: Sequence[Weights]) -> Weights:
    """The mean of state dicts of one network, tensor by tensor."""
    return {
        name: torch.stack([weights[name] for weights in decoders]).mean(dim=0)
        for name in decoders[0]
    }


def score_table(names: Sequence[str], mean: Mean) -> pd.DataFrame:
    """One row per decoder, in the order in which they were tried, and one for the mean of the kept.

    Columns: decoder, kept, the DSC (0 to 1) in each of FAMILIES, and their mean.
    """
    order = np.argsort([-np.mean(dsc) for dsc in mean.alone], kind="stable").tolist()
    rows = [(names[n], "yes" if n in mean.kept else "no", mean.alone[n]) for n in order]
    rows.append(("mean of the kept", "", mean.dsc))
    families = [kind if kind == "standard" else f"{kind} {shift}" for kind, shift in FAMILIES]
    return pd.DataFrame(
        [(name, kept, *dsc, np.mean(dsc)) for name, kept, dsc in rows],
        columns=["decoder", "kept", *families, "mean"],
    )


# --- Scores --------------------------------------------------------------------------------------
def family_scorer(inputs: Inputs, options: Namespace) -> Callable[[Weights], list[float]]:
    """A function that maps a decoder's state dict to its mean DSC in each of FAMILIES.

    On the validation patients of the inputs' data, under boxes that are the same every time.
    """
    model, amp = inputs.model, inputs.amp
    slices = [entry for dataset in inputs.datasets for entry in dataset.split("val")]
    embeddings = run_embeddings(inputs, slices, options)
    targets = TargetStore(options.loss_resolution)
    autocast = torch.autocast(model.device.type, amp, enabled=amp is not None)

    def boxes_of(entry: Slice, tight_boxes: np.ndarray, areas: np.ndarray) -> list[np.ndarray]:
        return [
            np.concatenate(
                [
                    shift_boxes(box[None], kind, shift, entry.rng(SEED, "validation", label, 0))
                    for label, box in zip(sorted(entry.labels), tight_boxes, strict=True)
                ]
            )
            for kind, shift in FAMILIES
        ]

    def score(weights: Weights) -> list[float]:
        model.mask_decoder.load_state_dict(weights)
        _, dsc = mean_scores(
            *(model, embeddings, targets, slices, boxes_of, len(FAMILIES)),
            options.boxes_per_call,
            autocast,
        )
        return dsc

    return score
