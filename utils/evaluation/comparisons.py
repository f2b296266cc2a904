"""The proposed model against each other one, paired by instance, and what that allows to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from perturb import BOX_KINDS, Shift
from utils.evaluation.instances import (
    by_instance,
    by_model,
    counts,
    mean,
    models_of,
    populations,
    under,
)
from utils.evaluation.prompts import Protocol
from utils.evaluation.statistics import (
    ALPHA,
    Estimate,
    holm,
    least_p,
    patient_means,
    patients_needed,
    wilcoxon,
)
from utils.evaluation.tables import Table
from utils.system.wording import plural


@dataclass(frozen=True)
class Comparison:
    """The proposed model against another one, on the same boxes of the same patients.

    Attributes:
        population, box, shift, score, other: what is compared with which model.
        difference: mean of the proposed model minus that of the other.
        ahead: the number of patients in whom the proposed model is better.
        p, p_holm: paired Wilcoxon over patients; the same corrected for the number of models.
        comparisons: the number of models that the correction is for.
    """

    population: str
    box: str
    shift: Shift
    score: str
    other: str
    difference: Estimate
    ahead: int
    p: float
    p_holm: float
    comparisons: int

    @property
    def can_conclude(self) -> bool:
        """Whether this many patients could reach p < 0.05 at all."""
        return least_p(self.difference.patients, self.comparisons) < ALPHA

    @property
    def verdict(self) -> str:
        """better, worse, not distinguishable, or too few patients.

        The mean is over instances, the test over patients: both must point the same way.
        """
        if not self.can_conclude:
            return "too few patients"
        low, high = self.difference.interval
        most_ahead = self.ahead > self.difference.patients / 2
        if self.p_holm < ALPHA and low > 0 and most_ahead:
            return "better"
        if self.p_holm < ALPHA and high < 0 and not most_ahead:
            return "worse"
        return "not distinguishable"


def compare(scores: pd.DataFrame, protocol: Protocol) -> list[Comparison]:
    """The proposed model against each other: every population, box kind, shift and score."""
    return [
        comparison
        for population, rows in populations(scores, "all", "small", "large").items()
        for shift in protocol.shifts
        for kind in BOX_KINDS
        if kind != "standard" or shift == protocol.shifts[0]
        for score in ("dsc", "nsd")
        for comparison in _compare(
            under(rows, kind, shift), protocol, population, kind, shift, score
        )
    ]


def _compare(
    rows: pd.DataFrame, protocol: Protocol, population: str, kind: str, shift: Shift, score: str
) -> list[Comparison]:
    """The comparisons that are corrected together: one per other model."""
    instances = by_instance(rows, score)
    patients = instances.index.get_level_values("patient")
    means = {model: mean(of_model, score) for model, of_model in by_model(rows).items()}
    others = [model for model in means if model != protocol.proposed]
    gains = {other: instances[protocol.proposed] - instances[other] for other in others}
    p_values = [wilcoxon(gain, patients) for gain in gains.values()]
    return [
        Comparison(
            population,
            kind,
            shift,
            score,
            other,
            difference=means[protocol.proposed] - means[other],
            ahead=int((patient_means(gains[other], patients) > 0).sum()),
            p=p,
            p_holm=p_holm,
            comparisons=len(others),
        )
        for other, p, p_holm in zip(others, p_values, holm(p_values), strict=True)
    ]


def comparison_table(comparisons: Sequence[Comparison], protocol: Protocol) -> Table:
    """One row per population, box kind, shift, score and other model."""
    rows = [
        {
            "instances are": one.population,
            "box": one.box,
            "shift": "" if one.box == "standard" else str(one.shift),
            "score": one.score.upper(),
            "against": one.other,
            **counts(one.difference),
            "difference": one.difference,
            "patients ahead": str(one.ahead),
            "p": f"{one.p:.2g}",
            "p (Holm)": f"{one.p_holm:.2g}",
            "verdict": one.verdict,
        }
        for one in comparisons
    ]
    return Table(
        f"{protocol.proposed} minus each other model, in points.",
        "Differences of means over the same instances, in brackets 95 % intervals by bootstrap "
        "over patients; p by paired Wilcoxon over patients' means, Holm-corrected over the other "
        "models. “better” or “worse”: corrected p < 0.05, the interval excludes 0, and most "
        "patients agree.",
        pd.DataFrame(rows),
    )


# --- In plain language ---------------------------------------------------------------------------
def conclusions(
    scores: pd.DataFrame, comparisons: Sequence[Comparison], protocol: Protocol
) -> list[str]:
    """What the numbers allow to say, one line per question; nothing beyond the tables."""
    proposed, baseline = protocol.proposed, protocol.baseline
    first = protocol.shifts[0]
    questions = [("Tight boxes", ("all", "standard", first, baseline))]
    for shift in protocol.shifts_of_both_units:
        for kind, size in (("shrink", "small"), ("expansion", "large")):
            title = f"Boxes too {size} by up to {shift}"
            questions.append((title, ("all", kind, shift, baseline)))
    questions.append(("Small instances, tight boxes", ("small", "standard", first, baseline)))
    for other in models_of(scores):
        if other in ("bidirectional", "sam2") and other not in (proposed, baseline):
            for population in ("small", "large"):
                title = f"{population.capitalize()} instances, boxes too small by up to {first}"
                questions.append((title, (population, "shrink", first, other)))
    answers = {
        (one.population, one.box, one.shift, one.other): sentence(one, proposed)
        for one in comparisons
        if one.score == "dsc"
    }
    lines = [f"{title}: {answers[key]}" for title, key in questions if key in answers]
    tight, shrunk = (
        mean(under(by_model(scores)[proposed], kind, first), "dsc")
        for kind in ("standard", "shrink")
    )
    lines.append(
        f"From tight boxes to boxes too small by up to {first} the DSC of {proposed} changes by "
        f"{(shrunk - tight).percent(1, sign='+')} points."
    )
    return [line for line in (*lines, missing_patients(comparisons)) if line]


def sentence(one: Comparison, proposed: str) -> str:
    """One comparison in words."""
    verdict = {
        "better": f"{proposed} is better",
        "worse": f"{proposed} is worse",
        "not distinguishable": "not distinguishable here",
        "too few patients": "too few patients to conclude",
    }[one.verdict]
    patients, instances = one.difference.patients, one.difference.instances
    return (
        f"{verdict}, {one.difference.percent(1, sign='+')} points of DSC against {one.other} "
        f"(ahead in {one.ahead} of {patients}; Holm-corrected p {one.p_holm:.2g}; "
        f"{plural(patients, 'patient')}, {plural(instances, 'instance')})."
    )


def missing_patients(comparisons: Sequence[Comparison]) -> str:
    """Where the test could not reach significance, whatever the data."""
    few = {
        (one.population, one.difference.patients, one.comparisons)
        for one in comparisons
        if not one.can_conclude
    }
    return " ".join(
        f"{population.capitalize()} instances are of {plural(patients, 'patient')}: with "
        f"{plural(tests, 'comparison')} no p under {least_p(patients, tests):.2g} is possible, "
        f"{patients_needed(tests)} patients would be needed."
        for population, patients, tests in sorted(few)
    )
