"""An exponential moving average (EMA) of weights, which varies less from step to step than they."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class MovingAverage:
    """The moving average of a module's parameters: after each step, decay * average + (1 - decay) *
    weights.

    In step n the decay is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage:
    otherwise the average of a short run would mostly be the weights that it started from.

    Args:
        module: whose parameters are averaged.
        decay: 0 to 1; with 0 nothing is kept, and the average is the weights themselves.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._weights = [weight.detach() for weight in module.parameters()] if decay else []
        self._average = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average."""
        self._steps += 1
        if self._weights:
            decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module has the averaged weights."""
        if not self._weights:
            yield
            return
        own = [weight.clone() for weight in self._weights]
        try:
            torch._foreach_copy_(self._weights, self._average)
            yield
        finally:
            torch._foreach_copy_(self._weights, own)

    def state_dict(self) -> dict:
        """The average and its number of steps."""
        return {"steps": self._steps, "average": self._average}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of another module, or of a run without an average.
        """
        for average, stored in zip(self._average, state["average"], strict=True):
            average.copy_(stored)
        self._steps = state["steps"]
