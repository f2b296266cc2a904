"""From scores to evidence: paired comparisons, the robustness curve, and what they allow to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturb import BOX_KINDS, Shift
from utils.scores import Scores
from utils.statistics import (
    ALPHA,
    Estimate,
    combine,
    estimate,
    holm,
    least_p,
    patients_needed,
    wilcoxon,
)
from utils.tables import Table, show

TIGHT = "0%"  # the shift of standard boxes in instances.csv


@dataclass(frozen=True)
class Protocol:
    """How an evaluation was made, as far as its tables must say.

    Attributes:
        what: the data and the split.
        shifts: of expansion and shrink boxes; the first is the one of the conclusions.
        sweep: the signed shifts of the robustness curve, without 0.
        draws: random boxes for each instance, kind and shift.
        seed: of the boxes.
        tolerance: of NSD, as text.
        small_share: an instance under this share of the slice is small.
        error_leak, error_dsc: what counts as an error on a small instance.
        baseline, proposed: names of the models that the conclusions and figures compare.
    """

    what: str
    shifts: tuple[Shift, ...]
    sweep: tuple[Shift, ...]
    draws: int
    seed: int
    tolerance: str
    small_share: float
    error_leak: float
    error_dsc: float
    baseline: str
    proposed: str

    @property
    def small(self) -> str:
        """What a small instance is, as text."""
        return f"mask under {100 * self.small_share:g} % of the slice"

    def how(self, scores: Scores, shift: Shift | None = None) -> str:
        """How the means of `scores` were measured: the header that every table has."""
        if not len(scores):
            return f"No such instance in {self.what}."
        draws = "1 draw" if self.draws == 1 else f"{self.draws} draws"
        moved = ""
        if shift:
            of = "box's side" if shift.unit == "side" else "1024 frame"
            moved = f" Expansion and shrink: each edge by U(0, {shift}) of the {of}, {draws}."
        return (
            f"{scores.patients} patients, {scores.instances} instances (label in slice) of "
            f"{self.what}. 2D at each slice's native resolution, NSD at {self.tolerance}; means "
            f"over instances in %, in brackets 95 % intervals by bootstrap over patients.{moved}"
        )


def boxes_of(scores: Scores, kind: str, shift: Shift) -> Scores:
    """The rows under one kind of box; standard boxes have no shift."""
    return scores.where(box=kind, shift=TIGHT if kind == "standard" else str(shift))


def both_units(protocol: Protocol) -> list[Shift]:
    """The first shift and, if there is one, the first of the other unit."""
    first = protocol.shifts[0]
    return [first, *[s for s in protocol.shifts if s.unit != first.unit][:1]]


# --- Comparisons ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """The proposed model against another one, on the same boxes of the same patients.

    Attributes:
        population, box, shift, score, other: what is compared with whom.
        difference: proposed minus other.
        p, p_holm: paired Wilcoxon over patients; corrected for the other models.
        comparisons: how many the correction is for.
    """

    population: str
    box: str
    shift: Shift
    score: str
    other: str
    difference: Estimate
    p: float
    p_holm: float
    comparisons: int

    @property
    def can_conclude(self) -> bool:
        """Whether this many patients could reach p < 0.05 at all."""
        return least_p(self.difference.patients, self.comparisons) < ALPHA

    @property
    def verdict(self) -> str:
        """better, worse, not distinguishable, or too few patients."""
        if not self.can_conclude:
            return "too few patients"
        low, high = self.difference.interval
        if self.p_holm >= ALPHA or low <= 0 <= high:
            return "not distinguishable"
        return "better" if low > 0 else "worse"


def compare(scores: Scores, protocol: Protocol) -> list[Comparison]:
    """The proposed model against each other one, for every kind of box, shift and population."""
    others = [m for m in scores.distinct("model") if m != protocol.proposed]
    found = []
    for population in ("all", "small", "large"):
        those = scores.where(population)
        if not len(those) or (population == "large" and len(those) == len(scores)):
            continue
        for shift in protocol.shifts:
            for kind in BOX_KINDS:
                if kind == "standard" and shift != protocol.shifts[0]:
                    continue
                boxes = boxes_of(those, kind, shift).group("model")
                for score in ("dsc", "nsd"):
                    pairs = [(boxes[(protocol.proposed,)], boxes[(o,)]) for o in others]
                    p_values = [paired_p(a, b, score) for a, b in pairs]
                    lines = zip(others, pairs, p_values, holm(p_values), strict=True)
                    for other, (a, b), p, p_holm in lines:
                        difference = a.mean(score) - b.mean(score)
                        found.append(
                            Comparison(
                                *(population, kind, shift, score, other),
                                *(difference, p, p_holm, len(others)),
                            )
                        )
    return found


def paired_p(a: Scores, b: Scores, score: str) -> float:
    """p of the paired Wilcoxon test over patients between two models' scores."""
    first, second = a.by_instance(score), b.by_instance(score)
    differences = [first[key] - second[key] for key in first]
    return wilcoxon(differences, [case for case, _, _ in first])


def comparison_table(comparisons: Sequence[Comparison], protocol: Protocol) -> Table:
    """All comparisons, a row a population, box, shift, score and other model."""
    rows: list[list] = []
    for one in comparisons:
        n = [str(one.difference.patients), str(one.difference.instances)]
        rows.append(
            [
                *(one.population, one.box, "" if one.box == "standard" else str(one.shift)),
                *(one.score.upper(), one.other, *n, one.difference),
                *(f"{one.p:.2g}", f"{one.p_holm:.2g}", one.verdict),
            ]
        )
    return Table(
        "comparisons",
        f"{protocol.proposed} minus each other model, in points.",
        "Differences of means over the same instances, in brackets 95 % intervals by bootstrap "
        "over patients; p by paired Wilcoxon over patients' means, Holm-corrected over the other "
        "models. “better” or “worse”: corrected p < 0.05 and the interval excludes 0.",
        ["instances are", "box", "shift", "score", "against", "patients", "instances"]
        + ["difference", "p", "p (Holm)", "verdict"],
        rows,
    )


# --- Robustness ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Curve:
    """One model's mean score against the signed shift of all edges.

    Attributes:
        population, unit, score, model: whose curve it is; unit is "side" or "px".
        shifts: ascending, with 0.
        means: at each shift.
    """

    population: str
    unit: str
    score: str
    model: str
    shifts: list[Shift]
    means: list[Estimate]

    @property
    def area(self) -> Estimate:
        """The area under the curve divided by its width: the mean score over the shifts."""
        x = np.array([shift.size for shift in self.shifts])
        weights = np.zeros(len(x))
        weights[:-1] += np.diff(x) / 2
        weights[1:] += np.diff(x) / 2
        return combine(self.means, weights / (x[-1] - x[0]))

    @property
    def worst(self) -> tuple[Shift, Estimate]:
        """The shift of the lowest mean, and that mean."""
        lowest = min(range(len(self.means)), key=lambda index: self.means[index].value)
        return self.shifts[lowest], self.means[lowest]


def curves(scores: Scores, protocol: Protocol) -> list[Curve]:
    """The robustness curves: both units, all and small instances, both scores, every model."""
    found = []
    for unit in ("side", "px"):
        shifts = sorted(
            [s for s in protocol.sweep if s.unit == unit] + [Shift(0.0, unit)],
            key=lambda shift: shift.size,
        )
        if len(shifts) == 1:
            continue
        for population in ("all", "small"):
            boxes = scores.where(population).group("model", "box", "shift")
            for score in ("dsc", "nsd"):
                for model in scores.where(population).distinct("model"):
                    keys = [
                        (model, "sweep", str(s)) if s.size else (model, "standard", TIGHT)
                        for s in shifts
                    ]
                    means = [boxes[key].mean(score) for key in keys]
                    found.append(Curve(population, unit, score, model, shifts, means))
    return found


def robustness_table(found: Sequence[Curve]) -> Table:
    """robustness.csv: a row a point of a curve."""
    rows = [
        [
            *(curve.population, curve.unit, str(shift), curve.model, curve.score.upper()),
            *(str(mean.patients), str(mean.instances), mean),
        ]
        for curve in found
        for shift, mean in zip(curve.shifts, curve.means, strict=True)
    ]
    header = ["instances are", "unit", "shift", "model", "score", "patients", "instances", "mean"]
    return Table("robustness", "Scores against the shift of every edge, %.", "", header, rows)


def area_table(found: Sequence[Curve], protocol: Protocol) -> Table:
    """Area under each robustness curve and its worst point: numbers for the figure."""
    rows: list[list] = []
    for curve in found:
        if curve.score != "dsc":
            continue
        nsd = next(
            other
            for other in found
            if other.score == "nsd"
            and (other.population, other.unit, other.model)
            == (curve.population, curve.unit, curve.model)
        )
        width = f"{curve.shifts[0]} … {curve.shifts[-1]}"
        line: list = [curve.population, width, curve.model]
        line += [str(curve.means[0].patients), str(curve.means[0].instances)]
        for one in (curve, nsd):
            line += [one.area, f"{100 * one.worst[1].value:.1f} at {one.worst[0]}"]
        rows.append(line)
    return Table(
        "area",
        "Robustness: mean score over the shifts (area under the curve / width), and the worst.",
        f"Every edge moved by the same shift, outward positive. NSD at {protocol.tolerance}.",
        ["instances are", "shifts", "model", "patients", "instances"]
        + ["DSC area", "DSC worst", "NSD area", "NSD worst"],
        rows,
        digits=1,
    )


def spread_table(scores: Scores, protocol: Protocol) -> Table:
    """How far the DSC of one instance varies over the draws of its box."""
    shift = protocol.shifts[0]
    rows: list[list] = []
    for model in scores.distinct("model"):
        for kind in BOX_KINDS[1:]:
            drawn = boxes_of(scores.where(model=model), kind, shift)
            groups = drawn.group("case", "slice", "label")
            cases = [case for case, _, _ in groups]
            deviation = [np.std(one["dsc"], ddof=1) for one in groups.values()]
            worst = [one["dsc"].min() for one in groups.values()]
            line = [estimate(values, cases, len(groups)) for values in (deviation, worst)]
            rows.append([model, kind, str(drawn.patients), str(len(groups)), *line])
    return Table(
        "spread",
        f"DSC of one instance over {protocol.draws} draws of its box, %.",
        protocol.how(scores, shift),
        ["model", "box", "patients", "instances", "standard deviation", "worst draw"],
        rows,
    )


# --- In plain language ---------------------------------------------------------------------------
def conclusions(scores: Scores, comparisons: Sequence[Comparison], protocol: Protocol) -> list[str]:
    """What the numbers allow to say, a sentence or two a question; nothing beyond the tables."""
    shift, *other_unit = both_units(protocol)
    proposed, baseline = protocol.proposed, protocol.baseline
    said = []

    def find(population: str, box: str, of: Shift, other: str) -> Comparison | None:
        return next(
            (
                one
                for one in comparisons
                if (one.population, one.box, one.other, one.score)
                == (population, box, other, "dsc")
                and (box == "standard" or one.shift == of)
            ),
            None,
        )

    questions = [
        ("Boxes that cut into the target", "all", "shrink", shift, baseline),
        ("Tight boxes", "all", "standard", shift, baseline),
        ("Boxes that are too large", "all", "expansion", shift, baseline),
    ]
    for px in other_unit:
        questions.append((f"Boxes too large by up to {px}", "all", "expansion", px, baseline))
        questions.append((f"Boxes too small by up to {px}", "all", "shrink", px, baseline))
    questions.append(("Small instances, tight boxes", "small", "standard", shift, baseline))
    for other in scores.distinct("model"):
        if other in ("bidirectional", "sam2") and other not in (proposed, baseline):
            for population in ("small", "large"):
                title = f"{population.capitalize()} instances, boxes that cut into them"
                questions.append((title, population, "shrink", shift, other))
    for title, population, box, of, other in questions:
        if found := find(population, box, of, other):
            said.append(f"{title}: {sentence(found, proposed)}")
    means = {
        kind: boxes_of(scores.where(model=proposed), kind, shift).mean("dsc")
        for kind in ("standard", "shrink")
    }
    gap = means["standard"] - means["shrink"]
    said.append(
        f"From tight to shrink boxes {proposed} loses {show(gap)} points of DSC "
        "(the paper's own model loses 4.4, on other data)."
    )
    said.append(enough_patients(comparisons))
    return [line for line in said if line]


def sentence(one: Comparison, proposed: str) -> str:
    """One comparison in words."""
    numbers = f"{show(one.difference, 1, sign='+')} points of DSC against {one.other}"
    n = f"{one.difference.patients} patients, {one.difference.instances} instances"
    verdict = {
        "better": f"{proposed} is better",
        "worse": f"{proposed} is worse",
        "not distinguishable": "not distinguishable here",
        "too few patients": "too few patients to conclude",
    }[one.verdict]
    return f"{verdict}, {numbers} (Holm-corrected p {one.p_holm:.2g}; {n})."


def enough_patients(comparisons: Sequence[Comparison]) -> str:
    """Where the test could not have found anything, whatever the data."""
    few = {
        (one.population, one.difference.patients, one.comparisons)
        for one in comparisons
        if not one.can_conclude
    }
    return " ".join(
        f"Of {population} instances there are {patients} patients: with {number} comparisons no "
        f"p under {least_p(patients, number):.2g} is possible, {patients_needed(number)} patients "
        "would be needed."
        for population, patients, number in sorted(few)
    )
