"""The mean of fine-tuned decoders and the weights that they started from: a "model soup".

Wortsman et al., *Model soups* (ICML 2022). By their greedy recipe the decoders are tried in the
order of their own validation scores, best first, and one stays if it raises the score of the mean.
The score is the mean DSC over the families of boxes by which eval.py judges a decoder, on the
validation patients of the runs' data, with box errors measured on the table's training patients
instead of its test patients. These patients have the organs of the training data, so they cannot
show what is forgotten about others: a share of the starting weights stays in every mean, as in
Wortsman et al., *Robust fine-tuning of zero-shot models* (CVPR 2022).
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from perturb import LIKE, Shift, box_families
from utils.data.slices import Slice, open_datasets
from utils.model.checkpoints import read_checkpoint
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter, load_model, save_decoder
from utils.system import UserError
from utils.system.device import choose_device, mixed_precision
from utils.system.files import atomic_write, write_json
from utils.system.loops import progress_bar
from utils.training import runs
from utils.training.batches import TargetStore
from utils.training.options import CONFIG
from utils.training.validation import MEASURED, SHIFT, mean_scores

FAMILIES = [f for f in box_families([SHIFT, Shift(20, "px")]) if f[0] not in LIKE] + [MEASURED]
Weights = dict[str, torch.Tensor]


def average_runs(
    folders: Sequence[str | Path], folder: Path, options: Namespace, **named: str
) -> None:
    """Write the greedy mean of the decoders of some runs to a new `folder`; print the scores.

    One of `folders` with several policies stands for all of its runs. `named` may give a `policy`,
    by which eval.py takes means of other seeds for runs of one training.

    Raises UserError: fewer than two runs, runs that differ in starting weights or data, bad input.
    """
    ingredients = runs.find_runs(folders)
    first = ingredients[0]
    if len(ingredients) < 2:
        raise UserError(f"--average: needs two decoders or more; {first.folder} has one")
    for run in ingredients:
        if run.training["data"] != first.training["data"]:
            raise UserError(
                f"{run.folder}: was not trained on the same data as {first.folder}; average "
                "decoders of the same data, whose validation patients can compare them"
            )
    device = choose_device(options.device)
    amp = mixed_precision(options.amp, device)
    datasets = open_datasets(first.options["data"])
    model = load_model(first.options["model"], first.options["checkpoint"], device)
    samples = [sample for dataset in datasets for sample in dataset.split("val")]
    decoders = [read_checkpoint(run.decoder)["mask_decoder"] for run in ingredients]
    start = {name: value.cpu().clone() for name, value in model.mask_decoder.state_dict().items()}
    with runs.claim(folder):
        runs.check_new(folder)
        embeddings = Embeddings(model, samples, options.cache == "on", options.cache_dir)
        score = partial(
            family_scores,
            model=model,
            embeddings=embeddings,
            samples=samples,
            boxes_per_call=options.boxes_per_call,
            amp=amp,
        )
        # Each decoder alone and in a mean, and the start.
        with progress_bar(desc="averaging", unit="mean", total=2 * len(decoders) + 1) as bar:

            def shown(weights: Weights) -> list[float]:
                bar.update()
                return score(weights)

            mean = greedy_mean(decoders, shown, start, options.start_share)
            of_start = shown(start)
        record = [
            {"run": str(run.folder), "kept": index in mean.kept, "options": run.options}
            for index, run in enumerate(ingredients)
        ]
        share = options.start_share
        options = {name: first.options[name] for name in ("model", "checkpoint", "data")} | named
        same = ("data", "base_weights", "start_weights", "perturb_sha256", "device", "amp")
        config = {"options": options} | {name: first.config[name] for name in same}
        config |= {"versions": runs.versions(), "git_commit": runs.git_commit()}
        write_json(folder / CONFIG, config | {"average": record, "start_share": share})
        table = score_table([str(run.folder) for run in ingredients], mean, of_start, share)
        with atomic_write(folder / runs.AVERAGE, "w") as file:
            table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
        model.mask_decoder.load_state_dict(mean.weights)
        seen = runs.seen_patients(first.decoder)
        save_decoder(folder / runs.BEST, model, seen, epoch=None)
    shown = table.to_string(index=False, float_format=lambda share: f"{100 * share:.2f}")
    print(f"validation DSC, %:\n{shown}")
    kept = f"the mean of {len(mean.kept)} of {len(ingredients)} decoders"
    print(f"{folder}: {kept}, with {100 * share:g} % of the weights that they started from")


def family_scores(
    weights: Weights,
    model: Segmenter,
    embeddings: Embeddings,
    samples: Sequence[Slice],
    boxes_per_call: int,
    amp: torch.dtype | None,
) -> list[float]:
    """The mean DSC in each of FAMILIES of a decoder's state dict, on the same boxes every time."""
    model.mask_decoder.load_state_dict(weights)
    targets = TargetStore(256)
    return mean_scores(model, embeddings, targets, samples, FAMILIES, boxes_per_call, amp)[1]


# --- The greedy recipe ---------------------------------------------------------------------------
class Mean(NamedTuple):
    """The mean of some of several decoders, with a share of their starting weights."""

    weights: Weights  # its state dict
    dsc: list[float]  # its mean DSC in each family
    alone: list[list[float]]  # those of each decoder alone
    kept: list[int]  # the indices of the decoders in it, in the order in which they were added


def greedy_mean(
    decoders: Sequence[Weights],
    score: Callable[[Weights], list[float]],
    start: Weights,
    share: float,
) -> Mean:
    """The mean of those state dicts that raise its score, the mean of the DSC in each family.

    Every mean holds a `share` of the weights `start`.
    """
    alone = [score(weights) for weights in decoders]
    order = np.argsort([-np.mean(dsc) for dsc in alone], kind="stable").tolist()
    mean = None
    for index in order:
        kept = [*(mean.kept if mean else ()), index]
        weights = mean_weights([decoders[n] for n in kept], start, share)
        dsc = score(weights)
        if mean is None or np.mean(dsc) > np.mean(mean.dsc):
            mean = Mean(weights=weights, dsc=dsc, alone=alone, kept=kept)
    return mean


def mean_weights(decoders: Sequence[Weights], start: Weights, share: float) -> Weights:
    """The mean of state dicts of one network and, by its `share`, of `start`, tensor by tensor."""
    return {
        name: torch.stack([weights[name] for weights in decoders]).mean(dim=0).lerp(value, share)
        for name, value in start.items()
    }


def score_table(names: Sequence[str], mean: Mean, start: list[float], share: float) -> pd.DataFrame:
    """One row per decoder, in the order in which they were tried, and one for the mean of the kept.

    Columns: decoder, kept, the DSC (0 to 1) in each of FAMILIES, and their mean. `start` are those
    of the starting weights, which the mean holds by a `share`.
    """
    order = np.argsort([-np.mean(dsc) for dsc in mean.alone], kind="stable").tolist()
    rows = [(names[n], "yes" if n in mean.kept else "no", mean.alone[n]) for n in order]
    rows += [("starting weights", f"{100 * share:g} %", start), ("kept and starting", "", mean.dsc)]
    alone = ("standard", MEASURED[0])  # kinds that have no shift
    families = [kind if kind in alone else f"{kind} {shift}" for kind, shift in FAMILIES]
    return pd.DataFrame(
        [(name, kept, *dsc, np.mean(dsc)) for name, kept, dsc in rows],
        columns=["decoder", "kept", *families, "mean"],
    )
