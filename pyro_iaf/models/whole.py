"""Draws of a guide with their importance weights on all rows, of which a model sees some at a time.

Weights on different subsamples differ by more than any guide does from its posterior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .arguments import Args, Kwargs, Program, batch_of
from .epoch import epoch_of
from .log_joint import LogJoint
from .particles import MAX_NUMBERS
from .rows import FirstRows, Part, all_rows, chosen_rows, parts_of, rows_of, times_of
from .traces import subsamples
from .weighted import WeightedParticles

__all__ = ["WholeParticles", "on_all_rows", "particles_on_all"]


class WholeParticles(WeightedParticles):
    """A model on all of its rows and a guide, run for many draws to compute importance weights.

    Args:
        parts: The rows, a part at a time.
        model: A Pyro model.
        guide: A guide for it, whose latents belong to no row.
        args: The usual positional arguments of both.
        kwargs: Their usual keyword arguments.
    """

    def __init__(
        self, parts: Sequence[Part], model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> None:
        self.parts, self.rows = parts, parts[0].rows
        self.first_model = poutine.Trace()
        super().__init__(model, guide, *(parts[0].batch or (args, kwargs)))
        self.subsampled = False
        times = times_of(parts)
        self._usual = self.num_numbers / times[0]
        self.num_numbers, self._work = (math.ceil(self._usual * f(times)) for f in (max, sum))

    @property
    def work(self) -> int:
        return self._work

    def _score(
        self, values: Mapping[str, Tensor], auxiliary: Mapping[str, Any], size: int
    ) -> tuple[Tensor, Tensor]:
        log_p: Any = 0.0
        squared_rounding: Any = 0.0
        for share, rows, batch, times in self.parts:
            part = copy.copy(self)
            part.rows = rows
            part.args, part.kwargs = batch or (self.args, self.kwargs)
            num = max(1, int(MAX_NUMBERS / (self._usual * times))) if self.at_once else size
            found = []
            for k in range(0, size, num):
                some = {name: draws[k : k + num] for name, draws in values.items()}
                few = min(num, size - k)
                found.append(super(WholeParticles, part)._score(some, auxiliary, few))
            own, rounding = map(torch.cat, zip(*found, strict=True))
            log_p = log_p + share * own
            squared_rounding = squared_rounding + share**2 * rounding
        return log_p, squared_rounding

    @property
    def num_at_once(self) -> int:
        # All draws for each part, as parts may be read from a disk.
        if not self.at_once or len(self.parts) == 1:
            return super().num_at_once
        num_latents: int = sum(site["value"].numel() for site in self.latents.values())
        return max(1, MAX_NUMBERS // num_latents)

    def run_model(
        self,
        values: Mapping[str, Any],
        auxiliary: Mapping[str, Any],
        num_draws: int | None = None,
        model: Program | None = None,
    ) -> poutine.Trace:
        plates = subsamples(self.first_model)  # of the first part, which others may not have
        auxiliary = {name: value for name, value in auxiliary.items() if name not in plates}
        with chosen_rows(self.rows):
            program = FirstRows()(model or self.model)
            return super().run_model(values, auxiliary, num_draws, program)

    def log_joint(self) -> LogJoint:
        joint = super().log_joint()
        joint.num_numbers = math.ceil(self._usual)
        return joint.on_parts(self.parts)


def on_all_rows(particles: WeightedParticles, model: Program) -> WeightedParticles:
    """The same on all rows of plates that subsample, if the model can be run on them."""
    args, kwargs, guide = particles.args, particles.kwargs, particles.guide
    rows = all_rows(particles.model, particles.first_model, args, kwargs)
    if not rows:
        return particles
    more = math.prod(size / drawn for drawn, size in rows_of(particles.first_model).values())
    parts = parts_of(rows, int(more * particles.num_numbers))
    return WholeParticles(parts, model, guide, args, kwargs)


def particles_on_all(
    model: Program, guide: Program, args: Args, kwargs: Kwargs, data: Iterable[Any] | None = None
) -> WeightedParticles:
    """A model and its guide, on all rows of plates that subsample or on all minibatches of data.

    Raises:
        ValueError: If the model says of minibatches nothing that adds up to all data.
    """
    if data is None:
        return on_all_rows(WeightedParticles(model, guide, args, kwargs), model)
    if isinstance(data, Iterator):
        raise ValueError("data should be minibatches that can be had again; got an iterator.")
    epoch = epoch_of(model, data, lambda anew=False: (batch_of(item, kwargs) for item in data))
    if epoch is None:
        raise ValueError(
            "All minibatches together should be the data of one model, the same in each epoch. The "
            "density of this one is random, or has latents that belong to the rows of a "
            "minibatch, or an epoch has other rows than the one before, or no end. Give the "
            "model's arguments for all data as args."
        )
    return WholeParticles(epoch, model, guide, *epoch[0].batch)
