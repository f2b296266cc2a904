"""From scores to evidence: paired comparisons, the robustness curve, and what they allow to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturb import BOX_KINDS, Shift
from utils.evaluation.scores import Scores
from utils.evaluation.statistics import (
    ALPHA,
    Estimate,
    combine,
    estimate,
    holm,
    least_p,
    patient_means,
    patients_needed,
    wilcoxon,
)
from utils.evaluation.tables import Table, show

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
        warning: what forbids conclusions about new patients, or nothing.
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
    warning: str = ""

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
            f"{number(scores.patients, 'patient')}, {number(scores.instances, 'instance')} (label "
            f"in slice) of {self.what}. 2D at each slice's native resolution, NSD at "
            f"{self.tolerance}; means over instances in %, "
            f"{self.intervals(scores.patients)}.{moved}"
        )

    @staticmethod
    def intervals(patients: int) -> str:
        """What stands in brackets, or why nothing does."""
        least = patients_needed(1)
        if patients < least:
            return f"without intervals, which need {least} patients"
        return "in brackets 95 % intervals by bootstrap over patients"


def number(n: int, thing: str) -> str:
    """1 patient, 2 patients."""
    return f"{n} {thing}" + ("" if n == 1 else "s")


def rows_of(scores: Scores, kind: str, shift: Shift) -> Scores:
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
        ahead: in how many patients the proposed one is the better.
        p, p_holm: paired Wilcoxon over patients; corrected for the other models.
        comparisons: how many the correction is for.
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
        most = self.ahead > self.difference.patients / 2
        if self.p_holm < ALPHA and low > 0 and most:
            return "better"
        if self.p_holm < ALPHA and high < 0 and not most:
            return "worse"
        return "not distinguishable"


def compare(scores: Scores, protocol: Protocol) -> list[Comparison]:
    """The proposed model against each other one, for every kind of box, shift and population."""
    others = [m for m in scores.distinct("model") if m != protocol.proposed]
    found = []
    for population, those in scores.populations("all", "small", "large").items():
        for shift in protocol.shifts:
            for kind in BOX_KINDS:
                if kind == "standard" and shift != protocol.shifts[0]:
                    continue
                boxes = rows_of(those, kind, shift).group("model")
                ours = boxes[(protocol.proposed,)]
                for score in ("dsc", "nsd"):
                    mean, by_instance = ours.mean(score), ours.by_instance(score)
                    cases = [case for case, _, _ in by_instance]
                    lines = []
                    for other in others:
                        theirs = boxes[(other,)].by_instance(score)
                        apart = [by_instance[key] - theirs[key] for key in by_instance]
                        ahead = int((patient_means(apart, cases) > 0).sum())
                        difference = mean - boxes[(other,)].mean(score)
                        lines.append((other, difference, ahead, wilcoxon(apart, cases)))
                    corrected = holm([line[-1] for line in lines])
                    found += [
                        Comparison(population, kind, shift, score, *line, p_holm, len(others))
                        for line, p_holm in zip(lines, corrected, strict=True)
                    ]
    return found


def comparison_table(comparisons: Sequence[Comparison], protocol: Protocol) -> Table:
    """All comparisons, a row a population, box, shift, score and other model."""
    rows: list[list] = []
    for one in comparisons:
        n = [str(one.difference.patients), str(one.difference.instances)]
        rows.append(
            [
                *(one.population, one.box, "" if one.box == "standard" else str(one.shift)),
                *(one.score.upper(), one.other, *n, one.difference, str(one.ahead)),
                *(f"{one.p:.2g}", f"{one.p_holm:.2g}", one.verdict),
            ]
        )
    return Table(
        f"{protocol.proposed} minus each other model, in points.",
        "Differences of means over the same instances, in brackets 95 % intervals by bootstrap "
        "over patients; p by paired Wilcoxon over patients' means, Holm-corrected over the other "
        "models. “better” or “worse”: corrected p < 0.05, the interval excludes 0, and most "
        "patients agree.",
        ["instances are", "box", "shift", "score", "against", "patients", "instances"]
        + ["difference", "patients ahead", "p", "p (Holm)", "verdict"],
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
        for population, those in scores.populations("all", "small").items():
            boxes = those.group("model", "box", "shift")
            for score in ("dsc", "nsd"):
                for model in those.distinct("model"):
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
    return Table("Scores against the shift of every edge, %.", "", header, rows)


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
            drawn = rows_of(scores.where(model=model), kind, shift)
            groups = drawn.group("case", "slice", "label")
            cases = [case for case, _, _ in groups]
            deviation = [np.std(one["dsc"], ddof=1) for one in groups.values()]
            worst = [one["dsc"].min() for one in groups.values()]
            line = [estimate(values, cases, len(groups)) for values in (deviation, worst)]
            rows.append([model, kind, str(drawn.patients), str(len(groups)), *line])
    return Table(
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
        ("Tight boxes", "all", "standard", shift, baseline),
        (f"Boxes too small by up to {shift}", "all", "shrink", shift, baseline),
        (f"Boxes too large by up to {shift}", "all", "expansion", shift, baseline),
    ]
    for px in other_unit:
        questions.append((f"Boxes too small by up to {px}", "all", "shrink", px, baseline))
        questions.append((f"Boxes too large by up to {px}", "all", "expansion", px, baseline))
    questions.append(("Small instances, tight boxes", "small", "standard", shift, baseline))
    for other in scores.distinct("model"):
        if other in ("bidirectional", "sam2") and other not in (proposed, baseline):
            for population in ("small", "large"):
                title = f"{population.capitalize()} instances, boxes too small by up to {shift}"
                questions.append((title, population, "shrink", shift, other))
    for title, population, box, of, other in questions:
        if found := find(population, box, of, other):
            said.append(f"{title}: {sentence(found, proposed)}")
    means = {
        kind: rows_of(scores.where(model=proposed), kind, shift).mean("dsc")
        for kind in ("standard", "shrink")
    }
    change = means["shrink"] - means["standard"]
    said.append(
        f"From tight boxes to boxes too small by up to {shift} the DSC of {proposed} changes by "
        f"{show(change, 1, sign='+')} points."
    )
    said.append(enough_patients(comparisons))
    return [line for line in (protocol.warning, *said) if line]


def sentence(one: Comparison, proposed: str) -> str:
    """One comparison in words."""
    numbers = f"{show(one.difference, 1, sign='+')} points of DSC against {one.other}"
    patients = one.difference.patients
    n = f"{number(patients, 'patient')}, {number(one.difference.instances, 'instance')}"
    verdict = {
        "better": f"{proposed} is better",
        "worse": f"{proposed} is worse",
        "not distinguishable": "not distinguishable here",
        "too few patients": "too few patients to conclude",
    }[one.verdict]
    ahead = f"ahead in {one.ahead} of {patients}"
    return f"{verdict}, {numbers} ({ahead}; Holm-corrected p {one.p_holm:.2g}; {n})."


def enough_patients(comparisons: Sequence[Comparison]) -> str:
    """Where the test could not have found anything, whatever the data."""
    few = {
        (one.population, one.difference.patients, one.comparisons)
        for one in comparisons
        if not one.can_conclude
    }
    return " ".join(
        f"{population.capitalize()} instances are of {number(patients, 'patient')}: with "
        f"{number(tests, 'comparison')} no p under {least_p(patients, tests):.2g} is possible, "
        f"{patients_needed(tests)} patients would be needed."
        for population, patients, tests in sorted(few)
    )
