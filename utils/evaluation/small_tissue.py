"""Small instances: how often a prediction is an error, by which definition, and for which label.

The paper's Table II gives an error rate on "tiny tissues" and does not define it. Ours is a leak or
a low DSC, see `scoring.Target.score`; here the two stand apart.
"""

from __future__ import annotations

import pandas as pd

from perturb import BOX_KINDS
from utils.evaluation.instances import by_model, counts, mean, under
from utils.evaluation.paper_tables import measured_how, small_text
from utils.evaluation.prompts import Protocol
from utils.evaluation.statistics import Estimate, combine
from utils.evaluation.tables import Table


def small_table(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """small.csv: one row per label and training, all labels together first.

    Under tight boxes: the error rate, that by leak and that by DSC alone, and the means of DSC and
    leak; under the first shift the error rates of expansion and shrink boxes.
    """
    small = scores[scores["small"]]
    small = small.assign(
        leaks=(small["leak"] > protocol.error_leak).astype(float),
        low=(small["dsc"] < protocol.error_dsc).astype(float),
    )
    rows = []
    for label, of_label in [("all", small), *small.groupby("label", observed=True)]:
        trainings: dict[str, list[dict[str, Estimate]]] = {}
        for model, of_model in by_model(of_label).items():
            training = protocol.trainings.get(model, model)
            trainings.setdefault(training, []).append(_measures(of_model, protocol))
        for training, of_seeds in trainings.items():
            line = {name: combine([one[name] for one in of_seeds]) for name in of_seeds[0]}
            n = counts(next(iter(line.values())))
            rows.append({"label": label, "training": training} | n | line)
    return Table(
        "Small instances: errors under tight boxes by definition, and under shifted boxes, %.",
        f"Small: {small_text(protocol)}. A leak: more than {100 * protocol.error_leak:g} % of the "
        "target's area predicted farther than the NSD tolerance outside the target. Low: DSC under "
        f"{protocol.error_dsc:g}. {measured_how(small, protocol, protocol.shifts[0])}",
        pd.DataFrame(rows),
        digits=1,
    )


def _measures(scores: pd.DataFrame, protocol: Protocol) -> dict[str, Estimate]:
    """The columns of `small_table` for one model."""
    shift = protocol.shifts[0]
    tight = under(scores, "standard", shift)
    return {
        "error": mean(tight, "error"),
        "leak": mean(tight, "leaks"),
        "low": mean(tight, "low"),
        "DSC": mean(tight, "dsc"),
        "leaked area": mean(tight, "leak"),
    } | {f"error, {kind}": mean(under(scores, kind, shift), "error") for kind in BOX_KINDS[1:]}
