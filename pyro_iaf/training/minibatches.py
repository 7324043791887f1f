r"""What a run whose steps see some of the rows knows of all of them.

Plates that subsample go through their rows in turn. The guide starts at all of them, and is judged
on all of them. And an anchor takes the noise of minibatches away, which is measured in units of the
posterior:

.. math::
    \frac1D \sum_d \sigma_d^2 \, \mathrm{Var}_b \Bigl[ \mathbb{E}_q \,
    \frac{\partial}{\partial z_d} \log p_b(z) \Bigr]

for the standard deviations :math:`\sigma_d` of the guide.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..elbo.anchor import Anchor
from ..elbo.objectives import LatentLoss, Loss
from ..guides.climbs import climb
from ..models.arguments import Program
from ..models.epoch import MOST_AT_START, Epoch, epoch_of
from ..models.log_joint import LogJoint
from ..models.rows import RowsInTurn
from ..models.traces import quietly, samples
from ..models.weighted import WeightedParticles
from ..models.whole import WholeParticles, on_all_rows
from .batches import Batches

__all__ = ["Minibatches"]

# Draws of the guide that tell where it is, and the most gradients of all rows for a climb to the
# anchor, if they take at most so many numbers.
NUM_DRAWS, NUM_EVALUATIONS, MOST_NUMBERS = 64, 60, 2**28

# The anchor is placed anew when the guide's mean is further from it, in standard deviations.
FAR = 1.0

# The noise is measured by so many minibatches, at so many draws. An anchor is kept if it leaves at
# most this share of the noise.
NUM_MINIBATCHES, NUM_MEASURED, WORTHWHILE = 16, 8, 0.5


class Minibatches:
    """The rows of a run's steps, all rows, and the anchor.

    Args:
        model: The model.
        guide: The guide.
        batches: The arguments of each step.

    Attributes:
        noise: The variance of the gradient over minibatches without an anchor and with it, in units
            of the posterior; None if it was not measured.
    """

    def __init__(self, model: Program, guide: Any, batches: Batches) -> None:
        self.model, self.guide, self.batches = model, guide, batches
        self.epoch: Epoch | None = None
        self.rows = RowsInTurn()
        self.step = self.rows.step
        self.noise: tuple[float, float] | None = None
        self.whole: WeightedParticles | None = None
        self.joint: LogJoint | None = None  # of a minibatch, where it can be anchored

    def look(self) -> None:
        """Looks at all minibatches, if the data can be had again."""
        batches = self.batches
        if batches.can_repeat and not getattr(self.guide, "amortized", False):
            self.epoch = epoch_of(self.model, batches.data, batches.epoch)

    @contextmanager
    def as_start(self) -> Iterator[None]:
        """Has a guide that is set up in a ``with`` block start at all minibatches."""
        can_start = hasattr(self.guide, "parts_of_data")
        if can_start and self.epoch is not None:
            self.guide.parts_of_data = self.epoch.some(MOST_AT_START)
        try:
            yield
        finally:
            if can_start:
                self.guide.parts_of_data = ()

    def see_all(self, particles: WeightedParticles) -> None:
        """Finds how to run the model on all rows, if it can be."""
        self.rows.meet(particles.first_model)
        args, kwargs = particles.args, particles.kwargs
        whole: WeightedParticles
        if self.epoch is not None and self._guide_reads(particles):
            self.epoch = None
        if self.epoch is not None:
            whole = WholeParticles(self.epoch, self.model, self.guide, args, kwargs)
        else:
            whole = on_all_rows(particles, self.model)
        is_whole = self.epoch is not None or not self.batches.change
        self.whole = None if whole.subsampled or not is_whole else whole
        is_discrete = any(site["fn"].support.is_discrete for site in particles.latents.values())
        if isinstance(self.whole, WholeParticles) and not is_discrete:
            self.joint = particles.log_joint()

    def _guide_reads(self, particles: WeightedParticles) -> bool:
        """Whether the guide is another one for another minibatch."""
        assert self.epoch is not None
        draws = []
        for args, kwargs in itertools.islice(self.epoch.each(), 2):
            other = copy.copy(particles)
            other.args, other.kwargs = args, kwargs
            with torch.random.fork_rng(), torch.no_grad(), quietly():
                torch.manual_seed(0)
                trace = other.run_guide(None)
                trace.compute_log_prob()
            sites = samples(trace).values()
            draws.append([site[key] for site in sites for key in ("value", "log_prob_sum")])
        return len(draws) == 2 and not all(map(torch.equal, *draws))

    def serve(self, loss: Loss) -> None:
        """Gives a loss its rows, and an anchor if that is worthwhile."""
        self.loss, loss.rows = loss, self.rows
        if self.whole is not None and isinstance(loss, LatentLoss):
            loss.whole = self.whole.log_joint()

    @torch.no_grad()
    def place_anchor(self) -> None:
        """Finds an anchor at the beginning, and measures what it is worth."""
        if self.whole is None or self.joint is None or not self._can_anchor:
            return
        joint = self.whole.log_joint()
        with torch.random.fork_rng(), quietly():
            draws = self._draws(NUM_DRAWS)
            mean, sd = draws.mean(0), draws.std(0)
            affordable = min(NUM_EVALUATIONS, max(1, MOST_NUMBERS // joint.work))
            climbed = climb(joint.gradient, mean.unsqueeze(0), sd, affordable)
            anchor = Anchor.near(self.joint, mean)
            anchor.place(climbed.z[0] if climbed.value.isfinite().all() else mean, joint)
            if anchor.is_finite:
                near = anchor.point + (draws[:NUM_MEASURED] - mean)  # where the guide will be
                without, left = self._measured(anchor.point, near, sd)
                if math.isfinite(without + left):  # not of a single minibatch
                    self.noise = without, left
                if left <= WORTHWHILE * without:
                    self._use(anchor)

    def _use(self, anchor: Anchor) -> None:
        self.loss.anchor = anchor
        if not isinstance(self.loss, LatentLoss):  # which runs it beside its own draws
            self.loss.model = anchor(self.loss.model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        anchor = self.loss.anchor
        tensors = [] if anchor is None else anchor.tensors
        return {"rows": self.rows.state(), "anchor": tensors, "noise": list(self.noise or ())}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.rows.restore(state["rows"])
        self.noise = tuple(state["noise"]) or None
        if state["anchor"] and self.joint is not None:
            device = next(iter(self.joint.latents.values()))["value"].device
            anchor = Anchor.near(self.joint, state["anchor"][0].to(device))
            for ours, saved in zip(anchor.tensors, state["anchor"], strict=True):
                ours.copy_(saved)
            self._use(anchor)

    @property
    def _can_anchor(self) -> bool:
        if self.joint is None or self.whole is None:
            return False
        # With parameters of the model all that an anchor knows would change.
        sites = self.whole.first_model.nodes.values()
        return not any(site["type"] == "param" for site in sites)

    @torch.no_grad()
    def follow(self) -> None:
        """Places the anchor anew if the guide has moved away from it."""
        anchor = self.loss.anchor
        if anchor is None or self.whole is None or self.joint is None:
            return
        with torch.random.fork_rng(), quietly():
            draws = self._draws(NUM_DRAWS)
            mean, sd = draws.mean(0), draws.std(0)
            if ((mean - anchor.point) / sd).abs().max() > FAR:
                moved = Anchor.near(self.joint, mean)
                moved.place(mean, self.whole.log_joint())
                if moved.is_finite:
                    for old, new in zip(anchor.tensors, moved.tensors, strict=True):
                        old.copy_(new)

    def _draws(self, num: int) -> Tensor:
        """Draws of the guide in unconstrained space."""
        whole = self.whole
        assert whole is not None
        assert self.joint is not None
        parts = [whole.values(whole.run_guide(size), size) for size in whole.sizes(num)]
        return torch.cat([self.joint.unconstrained(part) for part in parts])

    def _measured(self, point: Tensor, draws: Tensor, sd: Tensor) -> tuple[float, float]:
        """The variance of the gradient over minibatches, without an anchor and with it."""
        points, slopes = torch.cat([draws, point.unsqueeze(0)]), []
        for joint in self._minibatches():
            slopes.append(joint.gradient(points)[1] * sd)
        found = torch.stack(slopes)
        plain = found[:, :-1].mean(1)
        without, left = (values.var(0).mean().item() for values in (plain, plain - found[:, -1]))
        return without, left

    def _minibatches(self) -> Iterator[LogJoint]:
        """The density of some minibatches."""
        joint = self.joint
        assert joint is not None
        if self.epoch is not None:
            some = itertools.islice(self.epoch.each(), NUM_MINIBATCHES)
            for batch in some:
                other = joint.with_data(*batch)
                other.turn = self.rows
                yield other
            return
        for _ in range(NUM_MINIBATCHES):
            self.step()
            other = joint.with_data(joint.args, joint.kwargs)
            other.turn = self.rows
            yield other
