"""Errors on small instances by definition, label and training."""

import numpy as np
import pytest

from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation.small_tissue import small_table


def test_errors_by_definition_label_and_training():
    scores = made_up(8)
    rng = np.random.default_rng(0)
    scores["leak"] = rng.choice([0.0, 0.1, 0.3], len(scores))
    scores["dsc"] = rng.choice([0.3, 0.5, 0.8], len(scores))
    seeds = {"medsam": "seeds", "adaptive": "seeds"}
    frame = small_table(scores, protocol(trainings=seeds)).frame.set_index(["label", "training"])
    assert list(frame.index) == [
        (label, training)
        for label in ("all", "adrenal gland")  # the liver is never small
        for training in ("untouched", "seeds")
    ]
    tight = where(scores, small=True, box="standard")
    for training, models in (("untouched", ["untouched"]), ("seeds", ["medsam", "adaptive"])):
        rows = tight[tight["model"].isin(models)]
        line = frame.loc[("all", training)]
        assert line["error"].value == pytest.approx(rows["error"].mean())
        assert line["leak"].value == pytest.approx((rows["leak"] > 0.1).mean())
        assert line["low"].value == pytest.approx((rows["dsc"] < 0.5).mean())
        assert line["DSC"].value == pytest.approx(rows["dsc"].mean())
        assert line["leaked area"].value == pytest.approx(rows["leak"].mean())
        assert (line["patients"], line["instances"]) == ("8", "8")
        shrunk = where(scores, small=True, box="shrink", shift="15%")
        shrunk = shrunk[shrunk["model"].isin(models)]
        assert line["error, shrink"].value == pytest.approx(shrunk["error"].mean())
