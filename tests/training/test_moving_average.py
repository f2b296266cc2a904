"""The moving average of weights, by hand."""

import pytest
import torch
from torch import nn

from utils.training.moving_average import MovingAverage


class Weight(nn.Module):
    """A module of one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


def averaged(module: Weight, average: MovingAverage) -> float:
    with average.in_place():
        return module.weight.item()


def test_average_by_hand():
    module = Weight(0.0)
    average = MovingAverage(module, 0.25)
    for value, decay in ((1.0, 2 / 11), (3.0, 3 / 12), (2.0, 0.25)):  # (1 + n) / (10 + n), at most
        before = averaged(module, average)
        module.set(value)
        average.update()
        assert averaged(module, average) == pytest.approx(decay * before + (1 - decay) * value)
        assert module.weight.item() == value  # training goes on with the weights themselves


def test_without_a_decay_the_average_is_the_weights():
    module = Weight(0.0)
    average = MovingAverage(module, 0.0)
    module.set(5.0)
    average.update()
    assert averaged(module, average) == 5.0
    assert average.state_dict()["average"] == []


def test_the_weights_come_back_after_an_error():
    module = Weight(0.0)
    average = MovingAverage(module, 0.9)
    module.set(7.0)
    with pytest.raises(KeyboardInterrupt), average.in_place():
        assert module.weight.item() == 0.0
        raise KeyboardInterrupt
    assert module.weight.item() == 7.0


def test_an_average_goes_on_where_it_was():
    module, other = Weight(0.0), Weight(100.0)
    average, resumed = MovingAverage(module, 0.9), MovingAverage(other, 0.9)
    for value in (1.0, 2.0):
        module.set(value)
        average.update()
    resumed.load_state_dict(average.state_dict())
    for one in (module, other):
        one.set(4.0)
    average.update()
    resumed.update()
    assert averaged(other, resumed) == averaged(module, average)
    with pytest.raises(ValueError):
        MovingAverage(module, 0.0).load_state_dict(average.state_dict())
