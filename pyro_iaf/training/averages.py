"""The parameters of a run: averaged over its last steps, and kept where the guide was near."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .result import AVERAGED
from .schedule import Schedule

__all__ = ["Averages"]


class Averages:
    """Averages of a run's parameters over the last steps of a round.

    Args:
        params: The parameters by name; others may be added.

    Attributes:
        values: The averages, of those parameters that were in the last steps.
        kept: The parameters that were kept.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Gives parameters these values."""
        for name, value in values.items():
            self.params[name].copy_(value)

    def now(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return {name: param.detach().clone() for name, param in self.params.items()}

    def keep(self) -> None:
        """Keeps the parameters as they are."""
        self.kept = self.now()

    def restore(self) -> None:
        """Goes back to the parameters that were kept."""
        self.set(self.kept)
        self.values.update(self.kept)

    def update(self, done: int, params: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Adds the parameters after ``done`` steps, if these are among the last."""
        begin, end = schedule.begin, schedule.end
        taken = done - (end - int(AVERAGED * (end - begin)))
        if taken <= 0:
            return
        for name, param in params.items():
            value = param.detach()
            if name in self.values:
                self.values[name].lerp_(value, 1 / taken)
            else:
                self.values[name] = value.clone()
