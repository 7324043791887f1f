r"""The learning rate of each step of a training run, the weight of the KL divergence, the end.

.. math::
    \eta_t = \eta \, \min\bigl(1, \tfrac{t + 1}{t_0}\bigr) \cdot \begin{cases}
    1 & t < t_1 \\
    \epsilon + (1 - \epsilon) \tfrac{1}{2} \bigl(1 + \cos \pi \tfrac{t - t_1}{T - t_1}\bigr)
    & t \ge t_1 \end{cases}

The rate rises over :math:`t_0` steps, and falls from :math:`t_1` to the end :math:`T`. The fall
begins when the ELBO has settled, or at a fixed share of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["Schedule"]

# The steps of the rise, the share of steps of the fall, and the factor at its end.
WARM_UP, FALL, FLOOR = 100, 0.6, 0.01

# How many weights of an annealing function are saved, to tell it from another one.
NUM_SAVED = 20


class Schedule:
    """The learning rates of a run's steps, the weights of the KL divergence, and the end.

    Args:
        num_steps: The largest number of steps.
        lr: The largest learning rate.
        annealing: The number of steps over which the weight of the KL divergence rises to 1, or a
            function from steps to weights.
        early_stop: Whether the run may end earlier if the ELBO has settled.
    """

    def __init__(
        self,
        num_steps: int,
        lr: float,
        annealing: int | Callable[[int], float] | None,
        early_stop: bool,
    ) -> None:
        self.num_steps, self.lr = num_steps, lr
        self.annealing, self.early_stop = annealing, early_stop
        self.end = num_steps
        # Of an annealing function, at some steps.
        self.weights: dict[int, float] = {}
        self.falls_at = math.ceil((1 - FALL) * num_steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = self.lr * min(1.0, (step + 1) / min(WARM_UP, max(1, self.num_steps // 10)))
        if step < self.falls_at:
            return rise
        fallen = (step - self.falls_at) / max(1, self.end - self.falls_at)
        return rise * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * fallen)) / 2)

    def weight(self, step: int) -> float:
        """The weight of the KL divergence at a step."""
        if self.annealing is None:
            return 1.0
        if callable(self.annealing):
            weight = _checked(self.annealing(step), step)
            if step % max(1, self.num_steps // NUM_SAVED) == 0:
                self.weights.setdefault(step, weight)
            return weight
        return min(1.0, (step + 1) / self.annealing)

    @property
    def stretch(self) -> int:
        """The number of steps in each of the two windows that are compared to see a gain."""
        return max(100, self.num_steps // 10)

    def settle(self, step: int, losses: Sequence[float]) -> None:
        """Starts the fall of the rate at this step if the ELBO has settled and ``early_stop``.

        To be called after each :attr:`stretch` of steps.
        """
        if self.early_stop and step < self.falls_at and self._has_settled(step, losses):
            self.falls_at = step
            self.end = min(self.num_steps, math.ceil(step / (1 - FALL)))

    def _has_settled(self, step: int, losses: Sequence[float]) -> bool:
        """Whether the loss fell by less than its standard error from one window to the next."""
        size = self.stretch
        if len(losses) < 2 * size + WARM_UP or self.weight(step) != 1:
            return False
        before, after = torch.tensor(losses[-2 * size :], dtype=torch.float64).split(size)
        error = ((before.var() + after.var()) / size).sqrt()
        return bool(before.mean() - after.mean() < error)


def _checked(weight: Any, step: int) -> float:
    """A weight from a user's function, as a float."""
    is_number = isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.numel() == 1)
    if not (is_number and 0 <= float(weight) < math.inf):
        raise ValueError(
            "annealing should return the weight of the KL divergence, a finite number of at least "
            f"0; got {weight!r} at step {step}. A rise over 500 steps is annealing=500, or "
            "annealing=lambda step: min(1.0, (step + 1) / 500)."
        )
    return float(weight)
