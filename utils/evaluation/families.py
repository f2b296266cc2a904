"""How good each training is over the families of boxes, and its regret.

A family is a kind of box with its shift, see `perturb.box_families`. The regret of a training in a
family is how far its mean DSC lies below that of the best training in that family; its worst regret
is the largest over the families. A specialist is best in one family and has a large worst regret.
Where several models are runs of one training with different seeds, its means are over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturb import Shift, box_families
from utils.evaluation.instances import by_model, counts, mean, populations, under
from utils.evaluation.paper_tables import measured_how
from utils.evaluation.prompts import Protocol
from utils.evaluation.statistics import Estimate, combine
from utils.evaluation.tables import Table


@dataclass(frozen=True)
class FamilyScores:
    """One training over the families of boxes.

    Attributes:
        population: "all" or "small" instances.
        training: its name.
        dsc: by family, the mean DSC over instances and seeds.
        regret: by family, how far `dsc` lies below that of the best training.
        worst: the largest regret.
        worst_of_seeds: the largest regret of each seed alone, against the same best means.
    """

    population: str
    training: str
    dsc: dict[str, Estimate]
    regret: dict[str, Estimate]
    worst: Estimate
    worst_of_seeds: list[float]


def family_name(kind: str, shift: Shift) -> str:
    """A family in a table: "tight", "expansion 15%", "loose 15%"."""
    return "tight" if kind == "standard" else f"{kind} {shift}"


def family_scores(scores: pd.DataFrame, protocol: Protocol) -> list[FamilyScores]:
    """All trainings over the families, of all and of small instances, by worst regret.

    With one training alone there is nothing to regret, and the list is empty.
    """
    result = []
    for population, rows in populations(scores, "all", "small").items():
        of_models = {
            model: {
                family_name(kind, shift): mean(under(of_model, kind, shift), "dsc")
                for kind, shift in box_families(protocol.shifts_of_both_units)
            }
            for model, of_model in by_model(rows).items()
        }
        seeds: dict[str, list[str]] = {}
        for model in of_models:
            seeds.setdefault(protocol.trainings.get(model, model), []).append(model)
        if len(seeds) < 2:
            continue
        means = {
            training: {
                family: combine([of_models[model][family] for model in models])
                for family in of_models[models[0]]
            }
            for training, models in seeds.items()
        }
        families = list(next(iter(means.values())))
        best = {family: _largest([of[family] for of in means.values()]) for family in families}
        ranked = []
        for training, models in seeds.items():
            regret = {family: best[family] - means[training][family] for family in families}
            alone = [
                max(best[family].value - of_models[model][family].value for family in families)
                for model in models
            ]
            worst = _largest(list(regret.values()))
            ranked.append(FamilyScores(population, training, means[training], regret, worst, alone))
        result += sorted(ranked, key=lambda one: one.worst.value)
    return result


def _largest(estimates: Sequence[Estimate]) -> Estimate:
    """The largest of several means of the same patients, in every resample as well."""
    return Estimate(
        max(one.value for one in estimates),
        np.max([one.resampled for one in estimates], axis=0),
        estimates[0].names,
        min(one.instances for one in estimates),
    )


def family_table(ranked: Sequence[FamilyScores], protocol: Protocol, scores: pd.DataFrame) -> Table:
    """families.csv: one row per population and training, the smallest worst regret first."""
    rows = []
    for one in ranked:
        low, high = min(one.worst_of_seeds), max(one.worst_of_seeds)
        rows.append(
            {
                "instances are": one.population,
                "training": one.training,
                **counts(one.worst),
                "seeds": str(len(one.worst_of_seeds)),
                **one.dsc,
                "worst regret": one.worst,
                "of the seeds": f"{100 * low:.1f} … {100 * high:.1f}" if low < high else "",
            }
        )
    return Table(
        f"DSC over {len(ranked[0].dsc)} families of boxes, %, and worst regret, points.",
        f"{measured_how(scores, protocol, protocol.shifts[0])} Loose: each edge by U(-"
        f"{protocol.shifts[0]}, {protocol.shifts[0]}). The regret in a family is how far a mean "
        "lies below that of the best training here in that family; the worst is the largest of a "
        "row. Its interval is from the same resamples of patients; being a maximum, it lies "
        "rather too high than too low. Several seeds of a training: means over them.",
        pd.DataFrame(rows),
        digits=1,
    )


def headline(ranked: Sequence[FamilyScores], protocol: Protocol) -> str:
    """The smallest worst regret and that of the proposed model, as one line."""
    of_all = [one for one in ranked if one.population == "all"]
    best = of_all[0]
    text = (
        f"Smallest worst regret over {len(best.dsc)} families of boxes: {best.training}, "
        f"{best.worst.percent(1)} points of DSC"
    )
    name = protocol.trainings.get(protocol.proposed, protocol.proposed)
    proposed = next(one for one in of_all if one.training == name)
    if proposed is not best:
        text += f"; {name} has {proposed.worst.percent(1)}"
    return f"{text}."
