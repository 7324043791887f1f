r"""The learning rate of each step of a training run, the weight of the KL divergence, the end.

.. math::
    \eta_t = \eta \, \min\bigl(1, \tfrac{t + 1 - s}{t_0}\bigr) \cdot \begin{cases}
    1 & t < t_1 \\
    \epsilon + (1 - \epsilon) \tfrac{1}{2} \bigl(1 + \cos \pi \tfrac{t - t_1}{T - t_1}\bigr)
    & t \ge t_1 \end{cases}

The rate rises over :math:`t_0` steps from the start :math:`s`, and falls from :math:`t_1` to the
end :math:`T`. The fall begins when the ELBO has settled, or at a fixed share of the steps. A run
without a number of steps takes rounds of such steps, each as long as all before it together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rounds", "Schedule"]

# The steps of the rise, the share of steps of the fall, and the factor at its end.
WARM_UP, FALL, FLOOR = 100, 0.6, 0.01

# The factor by which rates become smaller where the guide is near and training makes it worse.
SLOWER = 0.1

# How many weights of an annealing function are saved, to tell it from another one.
NUM_SAVED = 20

# The ends of the first round and of the last one. Half of the fits of benchmarks.certified stop
# after at most 200 steps; a few reach the last end, and some of those gain until then.
FIRST_END, LAST_END = 100, 6400

# The largest number of steps where none is given, and draws can't tell how good the guide is.
MAX_STEPS = 3000


class Schedule:
    """The learning rates of a run's steps, the weights of the KL divergence, and the end.

    Attributes:
        begin: The first step of the round.
        falls_at: The step at which the rate begins to fall.
        end: The step after the last one of the round.
        asked: The number of steps that the user gave, or None.
        factor: What all learning rates are multiplied by.

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
        # Of an annealing function, at some steps.
        self.weights: dict[int, float] = {}
        self.asked: int | None = num_steps
        self.factor = 1.0
        self._start(0, num_steps)

    def _start(self, begin: int, end: int) -> None:
        """Starts a round with the usual fall."""
        self.begin, self.end = begin, end
        self.falls_at = begin + math.ceil((1 - FALL) * (end - begin))

    def slow_down(self) -> None:
        """Has smaller learning rates from now on."""
        self.factor *= SLOWER

    def num_left(self, step: int) -> int:
        """How many steps are still to come at most, as far as that is decided."""
        return self.num_steps - step

    def reason(self, step: int) -> str:
        """Why a run stops that has taken so many steps, in words; empty if it goes on."""
        if step < self.end:
            return ""
        is_early = self.end < self.num_steps
        return "the ELBO had settled" if is_early else "all steps were taken"

    @property
    def place(self) -> list[float]:
        """What a checkpoint holds of it."""
        return [self.begin, self.falls_at, self.end, self.factor]

    @place.setter
    def place(self, saved: Sequence[float]) -> None:
        *steps, self.factor = saved
        self.begin, self.falls_at, self.end = map(int, steps)

    @property
    def _num_rising(self) -> int:
        return min(WARM_UP, max(1, self.num_steps // 10))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = self.factor * self.lr * min(1.0, (step + 1 - self.begin) / self._num_rising)
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


class Rounds(Schedule):
    """Rounds of steps, each as long as all before it together, until somebody ends them."""

    def __init__(self, lr: float, annealing: int | Callable[[int], float] | None) -> None:
        super().__init__(LAST_END, lr, annealing, early_stop=True)
        self.asked = None
        self._start(0, FIRST_END)

    def settle(self, step: int, losses: Sequence[float]) -> None:
        """Does nothing, since each round falls at its own time."""

    def next_round(self) -> None:
        """Begins the next round where this one ends."""
        self._start(self.end, 2 * self.end)

    def all_at_once(self) -> Schedule:
        """A schedule without rounds, which ends when the ELBO has settled."""
        schedule = Schedule(MAX_STEPS, self.lr, self.annealing, early_stop=True)
        schedule.asked = None
        return schedule

    @property
    def is_last(self) -> bool:
        """Whether no other round follows."""
        return self.num_rounds_left == 0

    @property
    def num_rounds_left(self) -> int:
        """How many rounds may follow this one."""
        return round(math.log2(LAST_END / self.end))

    def num_left(self, step: int) -> int:
        # Nobody knows how many rounds will follow; most fits that go on do so for one at least.
        return self.end - step + (0 if self.is_last else self.end)

    @property
    def _num_rising(self) -> int:
        return (self.end - self.begin) // 10


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
