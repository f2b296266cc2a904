"""Validation with known answers, and the moving average of weights by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from perturb import BOX_KINDS
from tests.helpers import options_for
from utils.data.slices import open_dataset
from utils.training.batches import TargetStore, coverage
from utils.training.validation import (
    KINDS,
    MEASURED,
    decoder_in_place,
    update_average,
    validate,
    validation_boxes,
)


class KnownAnswer:
    """A model and its embeddings; the embedding is the slice, and every box has one answer."""

    device = torch.device("cpu")

    def __init__(self, right: bool) -> None:
        self.right = right

    def load(self, sample):
        return None

    def embed(self, loaded, samples):
        (self.sample,) = samples
        return torch.zeros(1)

    def decode_batch(self, _, boxes):
        target = coverage(torch.from_numpy(TargetStore(256).get(self.sample)[2]))
        mask = target >= 0.5 if self.right else target < 0
        return 20 * mask.repeat(len(KINDS), 1, 1).float() - 10


@pytest.mark.parametrize("right", [True, False])
def test_scores_of_models_with_known_answers(toy_slices, right):
    model, samples = KnownAnswer(right), open_dataset(toy_slices).split("val")
    row = validate(model, model, TargetStore(256), samples, options_for(toy_slices), None)
    assert [row[f"dsc_{kind}"] for kind in BOX_KINDS] == [float(right)] * 3
    assert (row["val_loss"] < 0.3) == right  # pixels covered in part cost a little


def test_expansion_boxes_move_outward_as_far_as_shrink_boxes_move_inward(toy_slices):
    sample = open_dataset(toy_slices).split("val")[0]
    tight, areas, _ = TargetStore(256).get(sample)
    standard, expansion, shrink = (validation_boxes(sample, tight, areas, kind) for kind in KINDS)
    measured, again = (validation_boxes(sample, tight, areas, MEASURED) for _ in range(2))
    assert (measured == again).all() and (measured != tight).any()
    assert np.array_equal(standard, tight)
    assert ((expansion - tight) * [-1, -1, 1, 1] > 0).all()
    assert shrink - tight == pytest.approx(tight - expansion, abs=1e-3)


def test_moving_average_by_hand():
    module = nn.Linear(1, 1)
    average = AveragedModel(module, multi_avg_fn=partial(update_average, 0.25))
    expected = None
    for value, decay in ((1.0, 0.0), (3.0, 2 / 11), (2.0, 0.25), (5.0, 0.25)):
        nn.init.constant_(module.weight, value)
        average.update_parameters(module)
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected)
        assert module.weight.item() == value  # training goes on with the weights themselves


def test_the_decoder_comes_back_after_an_error():
    model, own, other = nn.Module(), nn.Linear(1, 1), nn.Linear(1, 1)
    model.mask_decoder = own
    with pytest.raises(KeyboardInterrupt), decoder_in_place(model, other):
        assert model.mask_decoder is other
        raise KeyboardInterrupt
    assert model.mask_decoder is own
