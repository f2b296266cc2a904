"""Scores against one shift of all edges, and how scores vary over random boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturb import BOX_KINDS, Shift
from utils.evaluation.instances import (
    INSTANCE,
    TIGHT,
    by_model,
    count_patients,
    counts,
    mean,
    populations,
    under,
)
from utils.evaluation.paper_tables import measured_how
from utils.evaluation.prompts import Protocol
from utils.evaluation.statistics import Estimate, combine, estimate
from utils.evaluation.tables import Table


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
        """The area under the curve (trapezoids) divided by its width: the mean over the shifts."""
        x = np.array([shift.size for shift in self.shifts])
        weights = np.zeros(len(x))
        weights[:-1] += np.diff(x) / 2
        weights[1:] += np.diff(x) / 2
        return combine(self.means, weights / (x[-1] - x[0]))

    @property
    def worst(self) -> str:
        """The lowest mean in % and its shift."""
        lowest, shift = min(zip(self.means, self.shifts, strict=True), key=lambda p: p[0].value)
        return f"{100 * lowest.value:.1f} at {shift}"


def curves(scores: pd.DataFrame, protocol: Protocol) -> list[Curve]:
    """The robustness curves: both units, all and small instances, both scores, every model."""
    result = []
    for unit in ("side", "px"):
        swept = [shift for shift in protocol.sweep if shift.unit == unit]
        if not swept:
            continue
        shifts = sorted([*swept, Shift(0.0, unit)], key=lambda shift: shift.size)
        for population, rows in populations(scores, "all", "small").items():
            models = by_model(rows[rows["box"].isin(["standard", "sweep"])])
            parts = {model: _by_shift(of_model) for model, of_model in models.items()}
            for score in ("dsc", "nsd"):
                for model, part in parts.items():
                    means = [mean(part[str(s) if s.size else TIGHT], score) for s in shifts]
                    result.append(Curve(population, unit, score, model, shifts, means))
    return result


def _by_shift(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return dict(iter(scores.groupby("shift", observed=True)))


def robustness_table(curves: Sequence[Curve]) -> Table:
    """robustness.csv: one row per point of a curve."""
    rows = [
        {
            "instances are": curve.population,
            "unit": curve.unit,
            "shift": str(shift),
            "model": curve.model,
            "score": curve.score.upper(),
            **counts(point),
            "mean": point,
        }
        for curve in curves
        for shift, point in zip(curve.shifts, curve.means, strict=True)
    ]
    return Table("Scores against the shift of every edge, %.", "", pd.DataFrame(rows))


def area_table(curves: Sequence[Curve], protocol: Protocol) -> Table:
    """The area under each curve and its worst point, one row per population, unit and model."""
    rows: dict[tuple, dict] = {}
    for curve in curves:
        key = (curve.population, curve.unit, curve.model)
        row = rows.setdefault(
            key,
            {
                "instances are": curve.population,
                "shifts": f"{curve.shifts[0]} … {curve.shifts[-1]}",
                "model": curve.model,
                **counts(curve.means[0]),
            },
        )
        row[f"{curve.score.upper()} area"] = curve.area
        row[f"{curve.score.upper()} worst"] = curve.worst
    return Table(
        "Robustness: mean score over the shifts (area under the curve / width), and the worst.",
        f"Every edge moved by the same shift, outward positive. NSD at {protocol.tolerance}.",
        pd.DataFrame(list(rows.values())),
        digits=1,
    )


def spread_table(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """How far the DSC of one instance varies over the draws of its box."""
    shift = protocol.shifts[0]
    rows = []
    for model, of_model in by_model(scores).items():
        for kind in BOX_KINDS[1:]:
            drawn = under(of_model, kind, shift)
            dsc = drawn.groupby(INSTANCE, observed=True, sort=False)["dsc"].agg(["std", "min"])
            patients = dsc.index.get_level_values("patient")
            rows.append(
                {
                    "model": model,
                    "box": kind,
                    "patients": str(count_patients(drawn)),
                    "instances": str(len(dsc)),
                    "standard deviation": estimate(dsc["std"], patients, len(dsc)),
                    "worst draw": estimate(dsc["min"], patients, len(dsc)),
                }
            )
    return Table(
        f"DSC of one instance over {protocol.draws} draws of its box, %.",
        measured_how(scores, protocol, shift),
        pd.DataFrame(rows),
    )
