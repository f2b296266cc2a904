"""Validation on an Apple GPU, by mock."""

import pytest
import torch

from tests.helpers import options_for, without_float64
from utils.data.slices import open_dataset
from utils.training.batches import TargetStore
from utils.training.validation import validate


class Given:
    """A model that always answers the same, and its embeddings."""

    device = torch.device("cpu")
    load = staticmethod(lambda entry: torch.zeros(1))
    embed = staticmethod(lambda loaded, slices: torch.stack(list(loaded)))
    decode_batch = staticmethod(lambda _, boxes: torch.ones(sum(map(len, boxes)), 256, 256))


def test_validation_needs_no_float64_on_an_apple_gpu(toy_slices, monkeypatch):
    arguments = (
        *(Given(), Given(), TargetStore(256), open_dataset(toy_slices).split("val")),
        *(options_for(toy_slices), torch.autocast("cpu", enabled=False)),
    )
    expected = validate(*arguments)
    with pytest.raises(AssertionError), without_float64():
        validate(*arguments)
    monkeypatch.setattr("utils.training.validation.sum_dtype", lambda _: torch.float32)
    with without_float64():
        assert validate(*arguments) == pytest.approx(expected)
