"""Families of boxes and regret: by hand, over seeds, in every resample."""

from dataclasses import replace

import numpy as np
import pytest

from perturb import Shift
from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation.families import family_scores, family_table, headline

SIX = ["tight", "expansion 15%", "shrink 15%", "expansion 20px", "shrink 20px", "loose 15%"]


def by_training(ranked, population: str = "all") -> dict:
    return {one.training: one for one in ranked if one.population == population}


def where_not(scores, model: str):
    return scores[scores["model"] != model]


def means_of(scores, model: str) -> list[float]:
    """Its mean DSC in each of SIX."""
    prompts = [("standard", "0%")] + [tuple(name.split()) for name in SIX[1:]]
    return [where(scores, model=model, box=box, shift=s)["dsc"].mean() for box, s in prompts]


def test_regret_is_the_distance_from_the_best_training_in_each_family():
    scores = made_up(8)
    ranked = by_training(family_scores(scores, protocol()))
    models = scores["model"].unique()
    assert list(ranked["medsam"].dsc) == SIX and set(ranked) == set(models)
    means = {model: np.array(means_of(scores, model)) for model in models}
    best = np.max(list(means.values()), axis=0)
    for model in models:
        one = ranked[model]
        assert [dsc.value for dsc in one.dsc.values()] == pytest.approx(means[model])
        assert [r.value for r in one.regret.values()] == pytest.approx(best - means[model])
        assert one.worst.value == pytest.approx((best - means[model]).max())
        resampled = np.max([regret.resampled for regret in one.regret.values()], axis=0)
        assert (one.worst.resampled == resampled).all() and (resampled >= 0).all()
    assert [one.worst.value for one in ranked.values()] == sorted(
        one.worst.value for one in ranked.values()
    )


def test_in_each_resample_the_best_training_may_be_another_one():
    scores = made_up(8)
    # Equal on average, but not in every patient: neither is best in all resamples.
    patients = scores["patient"].cat.codes
    odd = 0.02 * (patients % 2) - 0.01
    scores["dsc"] = 0.5 + odd.where(scores["model"] == "medsam", -odd)
    ranked = by_training(family_scores(where_not(scores, "untouched"), protocol()))
    one, other = (ranked[name].regret["tight"] for name in ("medsam", "adaptive"))
    assert one.value == pytest.approx(0) and other.value == pytest.approx(0)
    assert (np.minimum(one.resampled, other.resampled) == 0).all()
    assert one.resampled.max() > 0 and other.resampled.max() > 0


def test_seeds_of_a_training_are_averaged():
    scores = made_up(8)
    seeds = {"medsam": "first", "adaptive": "first"}
    of_pair = by_training(family_scores(scores, protocol(trainings=seeds)))
    assert set(of_pair) == {"untouched", "first"}
    pair = of_pair["first"]
    alone = by_training(family_scores(scores, protocol()))
    for family in SIX:
        expected = (alone["medsam"].dsc[family].value + alone["adaptive"].dsc[family].value) / 2
        assert pair.dsc[family].value == pytest.approx(expected)
        best = max(expected, alone["untouched"].dsc[family].value)
        assert pair.regret[family].value == pytest.approx(best - expected)
    # A seed is held against the best means too: one that is above them has no regret.
    assert pair.worst.value == pytest.approx(0)
    best = {family: pair.dsc[family].value for family in SIX}
    expected = [
        max(best[family] - alone[model].dsc[family].value for family in SIX)
        for model in ("medsam", "adaptive")
    ]
    assert pair.worst_of_seeds == pytest.approx(expected)


def test_families_follow_the_shifts_and_small_instances_come_apart():
    scores = made_up(8)
    one = replace(protocol(), shifts=(Shift(0.15, "side"),))
    ranked = family_scores(scores, one)
    assert list(ranked[0].dsc) == ["tight", "expansion 15%", "shrink 15%", "loose 15%"]
    assert {each.population for each in ranked} == {"all", "small"}
    assert "over 4 families" in headline(ranked, one)


def test_headline_and_table_start_with_the_smallest_worst_regret():
    scores = made_up(8)
    ranked = family_scores(scores, protocol())
    best = ranked[0]
    line = headline(ranked, protocol())
    assert best.training == "adaptive" and line.startswith(
        f"Smallest worst regret over 6 families of boxes: adaptive, {100 * best.worst.value:.1f} ["
    )
    assert " has " not in line
    other = headline(ranked, protocol(baseline="adaptive", proposed="medsam"))
    medsam = by_training(ranked)["medsam"].worst
    assert other.endswith(f"; medsam has {medsam.percent(1)}.")
    frame = family_table(ranked, protocol(), scores).frame
    assert frame["training"].tolist() == [one.training for one in ranked]
    assert frame["worst regret"].tolist() == [one.worst for one in ranked]


def test_one_model_alone_has_nothing_to_regret():
    assert family_scores(where(made_up(8), model="medsam"), protocol()) == []
