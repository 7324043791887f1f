r"""Many Markov chains at once in the coordinates of a guide's noise.

Each step of all chains is a trajectory of Hamiltonian Monte Carlo, and then an independent draw of
the guide as a proposal, by which chains go between modes. The step size, the length of trajectories
and the scales of momenta are the same for all chains, and found from all of them: the length by the
ChEES criterion, which makes squares of distances from the mean change fast.

References:
    Hoffman, Radul and Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths in
    Hamiltonian Monte Carlo, https://proceedings.mlr.press/v130/hoffman21a.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import NoiseCoordinates, Places

__all__ = ["Chains", "Step"]

# The mean probability of acceptance that the step size is chosen for.
TARGET = 0.8

# Adam's step for the logarithms of step size and trajectory length.
RATE = 0.05

# A trajectory takes at most so many steps, and is on average at most so long.
MOST_STEPS, LONGEST = 64, 10.0

# The step size of some chains is halved up to so many times.
MOST_HALVINGS = 3

# Scales of momenta, relative to those of the guide's noise.
SMALLEST_SCALE, LARGEST_SCALE = 0.1, 10.0


@dataclass
class Step:
    """What became of a step.

    Attributes:
        latent: The latents of all chains in unconstrained space.
        accepted: The share of the trajectories that were accepted.
        jumped: The share of the independent proposals that were.
        lost: How many proposals had no finite density.
    """

    latent: Tensor
    accepted: float
    jumped: float
    lost: int


class _Ascent:
    """Adam on one number."""

    def __init__(self, value: float) -> None:
        self.value, self.mean, self.square, self.count = value, 0.0, 0.0, 0

    def step(self, slope: float) -> None:
        if not math.isfinite(slope):
            return
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * slope
        self.square = 0.95 * self.square + 0.05 * slope**2
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.95**self.count)
        self.value += RATE * mean / (math.sqrt(square) + 1e-8)


class Chains:
    """Chains that start at draws of the guide.

    Args:
        target: The posterior in noise coordinates.
        start: Where they start, one for each chain.

    Attributes:
        now: Where they are.
        num_gradients: How many gradients of each chain were evaluated.
    """

    def __init__(self, target: NoiseCoordinates, start: Places) -> None:
        self.target, self.now = target, start
        self.num_gradients = 1
        D = start.noise.shape[1]
        self.log_size = _Ascent(math.log(1.0 / D**0.25))
        self.log_length = _Ascent(math.log(1.5))
        self.scale = start.noise.new_ones(D)
        self._halton = 0

    @torch.no_grad()
    def step(self, adapt: bool) -> Step:
        """A trajectory of all chains, and for each a draw of the guide as a proposal."""
        accepted, lost = self._trajectory(adapt)
        jumped, lost_draws = self._jump()
        return Step(self.now.found.latent, accepted, jumped, lost + lost_draws)

    def _trajectory(self, adapt: bool) -> tuple[float, int]:
        target, scale, start = self.target, self.scale, self.now
        jitter = self._next_jitter()
        size = math.exp(self.log_size.value)
        length = min(math.exp(self.log_length.value), MOST_STEPS * size)
        num_steps = max(1, math.ceil(2 * jitter * length / size))
        x, found = start.noise, start.found
        momentum = torch.randn_like(x)
        before = found.log_density - momentum.square().sum(-1) / 2
        smaller = self._smaller(len(x))
        step = size * scale * smaller
        momentum = momentum + step / 2 * found.slope
        for k in range(num_steps):
            x = x + step * momentum
            found = target.evaluate(x, start.component)
            momentum = momentum + (step if k < num_steps - 1 else step / 2) * found.slope
        self.num_gradients += num_steps
        end = target.places(x, start.component, found)
        after = found.log_density - momentum.square().sum(-1) / 2
        log_ratio = (after - before).nan_to_num(-math.inf, math.inf, -math.inf)
        probability = log_ratio.exp().clamp(max=1.0)
        if adapt:
            rows = smaller.squeeze(-1) == 1
            self._adapt(start.noise[rows], x[rows], momentum[rows], probability[rows], jitter)
        self._move(log_ratio + end.share - start.share, end)
        return probability.mean().item(), _num_lost(end)

    def _jump(self) -> tuple[float, int]:
        proposal = self.target.at(*self.target.draw(len(self.now.noise)))
        self.num_gradients += 1
        accept = self._move(proposal.log_weight - self.now.log_weight, proposal)
        return accept.double().mean().item(), _num_lost(proposal)

    def _move(self, log_ratio: Tensor, other: Places) -> Tensor:
        """Goes to other places with these probabilities; says which chains did."""
        log_ratio = log_ratio.nan_to_num(-math.inf, math.inf, -math.inf)
        accept = torch.rand_like(log_ratio).log() < log_ratio
        self.now = self.now.moved(accept, other)
        return accept

    def _adapt(
        self, start: Tensor, end: Tensor, momentum: Tensor, probability: Tensor, jitter: float
    ) -> None:
        self.log_size.step(probability.mean().item() - TARGET)
        weight = probability / probability.sum().clamp(min=1e-9)
        scaled = [point / self.scale for point in (start, end)]
        before = scaled[0] - scaled[0].mean(0)
        after = scaled[1].nan_to_num(0.0, 0.0, 0.0)
        after = after - weight @ after
        change = after.square().sum(-1) - before.square().sum(-1)
        slope = weight @ (change * (after * momentum).sum(-1)).nan_to_num(0.0, 0.0, 0.0)
        self.log_length.step(slope.item() * jitter)
        shortest, longest = self.log_size.value, math.log(LONGEST)
        self.log_length.value = min(max(self.log_length.value, shortest), longest)

    def rescale(self) -> None:
        """Takes the scales of momenta from the chains."""
        self.scale = self.now.noise.std(0).clamp(SMALLEST_SCALE, LARGEST_SCALE)

    def _smaller(self, num: int) -> Tensor:
        """Factors of the step size, 1 for half of the chains; a narrow place takes small steps."""
        halvings = (2 * torch.rand(num, 1).to(self.scale) - 1).clamp(min=0) * MOST_HALVINGS
        return 0.5**halvings

    def _next_jitter(self) -> float:
        """The next number of Halton's sequence of base 2, between 0 and 1."""
        self._halton += 1
        number, digit, place = 0.0, self._halton, 0.5
        while digit:
            number += place * (digit % 2)
            digit, place = digit // 2, place / 2
        return number


def _num_lost(places: Places) -> int:
    return int((places.found.log_density == -math.inf).sum())
