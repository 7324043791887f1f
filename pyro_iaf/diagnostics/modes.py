r"""A search for modes that a guide misses.

From many points at once the log joint density is climbed. Around each end where the guide
:math:`q_0` has too little mass, the curvature gives a normal. Draws of the guide and of these
normals :math:`q_1, \ldots, q_K` are weighted together by the balance heuristic,

.. math::
    w(z) = \frac{p(x, z)}{\sum_k \alpha_k q_k(z)}, \qquad
    \text{share missed} = \frac{\sum w(z) \, [q_0(z) < p(z \mid x) / 10]}{\sum w(z)} .

(Veach and Guibas 1995; Owen and Zhou 2000)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..guides.climbs import Climbs, climb
from ..guides.covariances import Dense, unit_reach
from ..importance import MAX_ROUNDING, rounding_message
from ..models.guide_density import Unscorable, guide_log_prob
from ..models.particles import threads_for
from ..models.weighted import WeightedParticles

__all__ = ["Mode", "Search", "search_modes"]


class _Numbers(NamedTuple):
    """How many starts there are of each kind, and draws of the guide and of each normal."""

    own: int
    widened: int
    prior: int
    flipped: int
    permuted: int
    draws: int
    draws_of_normal: int
    normals: int

    @property
    def starts(self) -> int:
        """How many starts there are in all."""
        return sum(self[:5])

    def at_most(self, num_evaluations: float) -> _Numbers:
        """Fewer of all, if these take more evaluations of the model."""
        share = min(1.0, num_evaluations / (NUM_A_CLIMB * self.starts))
        return _Numbers(*(max(2, math.ceil(share * number)) for number in self))


# About so many evaluations of the gradient a climb takes.
NUM_A_CLIMB = 40

# A model with few numbers in its sites is evaluated as often as it takes: this bounds the product.
CHEAP = 2**23

# If the model runs for many draws at once, or for one at a time.
AT_ONCE = _Numbers(12, 24, 48, 36, 12, draws=2000, draws_of_normal=200, normals=16)
ALONE = _Numbers(3, 3, 4, 6, 2, draws=400, draws_of_normal=40, normals=4)

# Draws of the prior whose median is the centre about which signs are changed.
NUM_PRIOR = 256

# The factors by which draws of the guide are widened.
WIDER = (2.0, 4.0)

# The guide misses a point where its density is below this share of the posterior's.
MISSED = 0.1

# With many latents there are fewer normals: second derivatives cost a gradient for each latent.
MOST_GRADIENTS = 2000

# Ends are one where the density differs by less, in nats, and each latent by less, in scales; or
# where the density between them falls by less, in nats, at so many points on a straight line.
SAME_VALUE, SAME_PLACE = 0.1, 0.5
SMALL_DIP, NUM_BETWEEN = 0.5, 5

# The most ends between which the density is looked at, and the most that the guide reaches itself.
MOST_ENDS, MOST_OWN = 24, 2

# A climb has ended at a peak where a step of Newton's method promises less, in nats.
SMALL_GAIN = 0.5

# Modes that hold less are not listed.
SMALLEST = 0.005

# How many numbers of a site are printed.
NUM_SHOWN = 4


@dataclass
class Mode:
    """A place that a guide misses; ``print(mode)`` says it in words.

    Attributes:
        share: Its share of the posterior's mass, from 0 to 1.
        share_se: The standard error of the share.
        sites: The values of the latents at its peak in unconstrained space, in the model's units.
        reached: What the climb began from, in words.
    """

    share: float
    share_se: float
    sites: dict[str, Tensor]
    reached: str

    def __str__(self) -> str:
        places = ", ".join(f"{name} = {_in_words(value)}" for name, value in self.sites.items())
        return f"{self.share:.0%} +/- {self.share_se:.0%} of the mass near {places}"


class Search(NamedTuple):
    """What a search found.

    Attributes:
        modes: Those that the guide misses, the largest share first.
        summary: How it went, or why there was none, in words.
    """

    modes: list[Mode]
    summary: str


class _Start(NamedTuple):
    point: Tensor
    reached: str
    is_own: bool = False


@torch.no_grad()
def search_modes(particles: WeightedParticles, num_evaluations: float) -> Search:
    """Modes that a guide misses.

    The climbs begin at draws of the guide, widened, with signs changed about the prior's median and
    with entries of plates permuted, and at draws of the prior. A mode at which none of the climbs
    ends is not found, and a climb in a density without a peak, such as a funnel's, has no end.

    Args:
        particles: The model and its guide.
        num_evaluations: About how many evaluations of the model's gradient are affordable. A small
            model that runs for many draws at once gets more, some thousands.
    """
    if particles.subsampled:
        return Search([], "not searched for other modes, as the model subsamples its data")
    if any(site["fn"].support.is_discrete for site in particles.latents.values()):
        return Search([], "not searched for other modes, as the model has discrete latents")
    numbers = ALONE
    if particles.at_once:
        numbers = AT_ONCE
        num_evaluations = max(num_evaluations, CHEAP / particles.num_numbers)
    numbers = numbers.at_most(num_evaluations)
    try:
        with threads_for(numbers.starts * particles.num_numbers):
            return _Searcher(particles, numbers).search(num_evaluations)
    except Unscorable as why:
        reason = str(why)
    except Exception as error:  # a model may raise anything; the draws are judged all the same
        reason = f"the search ended in {type(error).__name__}: {error}"
    return Search([], f"not searched for other modes, as {reason}")


class _Searcher:
    """A search, from draws of a guide and their weights."""

    def __init__(self, particles: WeightedParticles, numbers: _Numbers) -> None:
        self.particles, self.numbers = particles, numbers
        self.joint = particles.log_joint()
        draws = particles.weighted(numbers.draws)
        if draws.rounding > MAX_ROUNDING:
            raise Unscorable(rounding_message(draws.rounding))
        self.sites, self.log_weights = draws.sites, draws.log_weights
        self.z = self.joint.unconstrained(draws.sites)
        self.loc, self.scale = self.z.mean(0), self.z.std(0)
        # A latent that a guide keeps constant has no scale of its own.
        self.scale = self.scale.where(self.scale > 0, 1.0)

    def search(self, num_evaluations: float) -> Search:
        starts = [start for start in self._starts() if start.point.isfinite().all()]
        points = torch.stack([start.point for start in starts])
        climbs = climb(self.joint.gradient, points, self.scale, num_evaluations)
        own, others = self._distinct(climbs, [start.is_own for start in starts])
        others = self._missed(climbs, others) if others else []
        ends = [*own, *others] if others else []  # nothing to weigh
        normals = self._normals(climbs.z[ends]) if ends else {}
        shares = self._shares(list(normals.values())) if normals else []
        modes = [
            Mode(share, error, self.joint.sites_at(normal.loc), starts[ends[k]].reached)
            for (share, error), (k, normal) in zip(shares, normals.items(), strict=True)
            if share >= SMALLEST and k >= len(own)
        ]
        return Search(
            sorted(modes, key=lambda mode: -mode.share),
            f"searched by {len(starts)} climbs, of which {int(climbs.has_arrived.sum())} ended",
        )

    # Where to start

    def _starts(self) -> Iterator[_Start]:
        """Points further apart than the guide's draws."""
        numbers, device = self.numbers, self.z.device
        some = list(self.z[torch.randperm(len(self.z), device=device)])
        for _ in range(numbers.own):
            yield _Start(some.pop(), "a draw of the guide", is_own=True)
        for k in range(numbers.widened):
            by = WIDER[k % len(WIDER)]
            point = self.loc + by * (some.pop() - self.loc)
            yield _Start(point, f"a draw of the guide, {by:.0f} times as far out")
        prior = self.joint.prior_draws(NUM_PRIOR if self.joint.at_once else numbers.prior)
        for point in prior[: numbers.prior]:
            yield _Start(point, "a draw of the prior")
        centre = prior.median(0).values if len(prior) else torch.zeros_like(self.loc)
        for group in self._groups():
            point = some.pop()
            flipped = point.clone()
            flipped[group] = (2 * centre - point)[group]
            yield _Start(flipped, "a draw of the guide with signs changed")
        sizes = {n for draws in self.sites.values() for n in draws.shape[1:] if n > 1}
        for size in sizes:
            for k in range(numbers.permuted // len(sizes)):
                order = torch.randperm(size, device=device)
                permuted = {n: _permuted(draws[k], order) for n, draws in self.sites.items()}
                yield _Start(self._vector(permuted), "a draw of the guide with entries permuted")

    def _vector(self, sites: Mapping[str, Tensor]) -> Tensor:
        """One draw of the sites in unconstrained space."""
        return self.joint.unconstrained({n: value.unsqueeze(0) for n, value in sites.items()})[0]

    def _groups(self) -> Sequence[Tensor]:
        """Latents whose signs are changed together: all, each site, each one; or at random."""
        D, num = len(self.loc), self.numbers.flipped
        everything = torch.arange(D, device=self.z.device)
        groups = [everything, *everything.split(self.joint.sizes_of_sites), *everything.split(1)]
        if len(groups) <= num:
            return list(itertools.islice(itertools.cycle(groups), num))
        return [everything, *(torch.rand(num - 1, D, device=self.z.device) < 0.5)]

    # What is missed

    def _distinct(self, climbs: Climbs, is_own: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Indices of ends that differ, the highest first: those that the guide reaches, and others.

        Args:
            climbs: The climbs.
            is_own: Whether each began at a draw of the guide.
        """
        ends: list[int] = []
        reached: list[bool] = []
        for k in climbs.value.argsort(descending=True).tolist():
            if not (climbs.has_arrived[k] and climbs.value[k].isfinite()):
                continue
            is_near = ((climbs.z[ends] - climbs.z[k]) / self.scale).abs().amax(-1) < SAME_PLACE
            is_same = is_near & ((climbs.value[ends] - climbs.value[k]).abs() < SAME_VALUE)
            if is_same.any():
                reached[int(is_same.int().argmax())] |= is_own[k]
            elif len(ends) < MOST_ENDS:
                ends.append(k)
                reached.append(is_own[k])
        label: list[int] = []
        for j, row in enumerate(self._are_joined(climbs.z[ends], climbs.value[ends]).tolist()):
            label.append(next((label[i] for i in range(j) if row[i]), j))
            reached[label[j]] |= reached[j]
        distinct = [j for j, first in enumerate(label) if first == j]
        own = [ends[j] for j in distinct if reached[j]]
        return own[:MOST_OWN], [ends[j] for j in distinct if not reached[j]]

    def _are_joined(self, z: Tensor, value: Tensor) -> Tensor:
        """Whether the density hardly falls between two ends, of shape ``(K, K)``, for all pairs."""
        K = len(z)
        if K < 2:
            return torch.zeros(K, K, dtype=torch.bool)
        weights = torch.arange(1, NUM_BETWEEN + 1).to(z).view(-1, 1, 1, 1) / (NUM_BETWEEN + 1)
        between = weights * z + (1 - weights) * z.unsqueeze(1)
        upper = torch.ones(K, K, dtype=torch.bool, device=z.device).triu(1)
        lowest = self.joint(between[:, upper].flatten(0, 1)).view(NUM_BETWEEN, -1).amin(0)
        joined = torch.zeros_like(upper)
        joined[upper] = lowest > torch.minimum(value, value.unsqueeze(1))[upper] - SMALL_DIP
        return joined | joined.mT

    def _missed(self, climbs: Climbs, ends: list[int]) -> list[int]:
        """The ends at which the guide has too little density."""
        # The evidence of the part that the guide has, so that no end is left out by mistake.
        log_evidence = self.log_weights.logsumexp(0) - math.log(len(self.z))
        log_q = guide_log_prob(self.particles, self.joint, climbs.z[ends])
        is_missed = log_q + log_evidence < climbs.value[ends] + math.log(MISSED)
        most = max(1, min(self.numbers.normals, MOST_GRADIENTS // len(self.loc)))
        return [k for k, missed in zip(ends, is_missed.tolist(), strict=True) if missed][:most]

    def _normals(self, ends: Tensor) -> dict[int, MultivariateNormal]:
        """The normals that the curvature gives, by the indices of ends that are peaks."""
        found = {}
        slopes = self.joint.gradient(ends)[1]
        for k, (end, slope, hessian) in enumerate(
            zip(ends, slopes, self.joint.hessian(ends), strict=True)
        ):
            root = Dense.of_precision(-hessian, unit_reach).root
            if (slope @ root).square().sum() / 2 < SMALL_GAIN:
                found[k] = MultivariateNormal(end, scale_tril=root, validate_args=False)
        return found

    def _shares(self, normals: Sequence[MultivariateNormal]) -> list[tuple[float, float]]:
        """The shares of the mass that the guide misses around peaks, and their standard errors.

        Each missed draw counts for the peak whose normal has the highest density there, which may
        be one that the guide reaches.
        """
        num = self.numbers.draws_of_normal
        tried = torch.cat([normal.sample((num,)) for normal in normals])
        z = torch.cat([self.z, tried])
        log_p = self.joint(z)
        # Where the model has no density, that of the guide does not matter.
        known = (log_p[: len(self.z)] - self.log_weights.to(z)).nan_to_num(0.0, 0.0, 0.0)
        of_guide = torch.cat([known, guide_log_prob(self.particles, self.joint, tried)])
        of_normals = torch.stack([normal.log_prob(z) for normal in normals])
        counts = torch.tensor([len(self.z), *[num] * len(normals)]).to(z)
        parts = torch.cat([of_guide.unsqueeze(0), of_normals])
        log_mixture = (parts + (counts / counts.sum()).log().unsqueeze(-1)).logsumexp(0)
        log_ratio = (log_p - log_mixture).nan_to_num(-math.inf, -math.inf, -math.inf)
        log_evidence = log_ratio.logsumexp(0) - math.log(len(z))
        is_missed = of_guide + log_evidence < log_p + math.log(MISSED)
        weights, nearest, found = log_ratio.softmax(0), of_normals.argmax(0), []
        for k in range(len(normals)):
            is_part = (is_missed & (nearest == k)).to(weights)
            share = (weights * is_part).sum()
            error = (weights * (is_part - share)).square().sum().sqrt()
            found.append((share.item(), error.item()))
        return found


def _permuted(value: Tensor, order: Tensor) -> Tensor:
    """A value with its axes of this size permuted."""
    for dim, size in enumerate(value.shape):
        if size == len(order):
            value = value.index_select(dim, order)
    return value


def _in_words(value: Tensor) -> str:
    numbers = value.flatten().tolist()
    shown = ", ".join(f"{number:.3g}" for number in numbers[:NUM_SHOWN])
    if len(numbers) == 1:
        return shown
    return f"({shown}{', ...' if len(numbers) > NUM_SHOWN else ''})"
