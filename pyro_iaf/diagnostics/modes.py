"""A search for modes that a guide misses.

From many points at once the log joint density is climbed. Around each end where the guide has too
little mass, the curvature gives a normal, by which :mod:`~pyro_iaf.diagnostics.shares` weighs it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..guides.climbs import Climbs, are_joined, climb
from ..guides.covariances import Dense
from ..guides.pathfinder import Density, narrowed, reach_of
from ..importance import MAX_ROUNDING, rounding_message
from ..models.guide_density import Unscorable, guide_log_prob
from ..models.particles import threads_for
from ..models.weighted import Draws, WeightedParticles
from .shares import MISSED, Carried, Peak, Share, Shares

__all__ = ["Mode", "Search", "search_modes"]


class _Numbers(NamedTuple):
    """How many starts there are of each kind, draws of a normal, normals, and carried copies."""

    own: int
    widened: int
    prior: int
    flipped: int
    permuted: int
    draws_of_normal: int
    normals: int
    carried: int

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
AT_ONCE = _Numbers(12, 24, 48, 36, 12, draws_of_normal=100, normals=16, carried=4)
ALONE = _Numbers(3, 3, 4, 6, 2, draws_of_normal=20, normals=4, carried=1)

# Draws of the prior whose median is the centre about which signs are changed.
NUM_PRIOR = 256

# The most labels all of whose orders are tried, where the density is the same for all.
MOST_LABELS = 4

# The factors by which draws of the guide are widened.
WIDER = (2.0, 4.0)

# Values at two peaks are the same if they differ by less, as a share of them and of the spread.
SAME_VALUE_TO = 0.02

# The most latents for which ends are weighed, and the most second derivatives for that.
MOST_LATENTS, MOST_GRADIENTS = 400, 2000

# Ends are compared by the density at so many points between them. The most ends that are compared,
# and the most of the guide's own that are weighed.
NUM_BETWEEN = 5
MOST_ENDS, MOST_OWN = 24, 2

# An end is the guide's own if this share of the climbs from its draws lead there. One of them may
# have jumped.
OWN_SHARE = 0.5

# An end is a peak if, after so many steps of Newton's method of these sizes, a further one brings
# less, in nats.
NUM_NEWTON, SIZES, SMALL_GAIN = 5, (1.0, 0.5, 0.25, 0.1, 0.01), 0.02

# The steps of differences of gradients, in scales of the guide.
DIFFERENCE = 1e-2

# The density of the guide at so many of its draws is compared with that of its sites.
NUM_COMPARED = 8

# Modes that hold less are not listed. What a mode changes counts if its share is so many standard
# errors.
SMALLEST, NUM_ERRORS = 0.005, 3

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
        change: The most that it moves a mean, in standard deviations of the guide, or the logarithm
            of a standard deviation, over the latents in their own units and in unconstrained space.
        is_relabelled: Whether it is another mode, or a peak of the guide, but for the order of
            entries, as of labels.

    Example:
        >>> mode = Mode(0.26, 0.01, {"x": torch.tensor([-3.0, 2.5])}, "a draw of the prior")
        >>> print(mode)
        26% +/- 1% of the mass near x = (-3, 2.5), reached from a draw of the prior
    """

    share: float
    share_se: float
    sites: dict[str, Tensor]
    reached: str
    change: float = 0.0
    is_relabelled: bool = False

    def moves(self, change: float) -> bool:
        """Whether it changes a mean or spread by more than this, as far as its error allows."""
        return self.change > change and self.share > NUM_ERRORS * self.share_se

    def __str__(self) -> str:
        places = ", ".join(f"{name} = {_in_words(value)}" for name, value in self.sites.items())
        share = f"{self.share:.0%} +/- {self.share_se:.0%}"
        return f"{share} of the mass near {places}, reached from {self.reached}"


class Search(NamedTuple):
    """What a search found.

    Attributes:
        modes: Those that the guide misses, the largest share first.
        summary: How it went, or why there was none, in words.
        peaks: Where climbs from the guide's own draws ended, the highest first: points in
            unconstrained space, of shape ``(J, D)``, between which the density falls; or None.
        is_sure: Whether it could tell of modes: climbs ended, and all that matters was weighed.
    """

    modes: list[Mode]
    summary: str
    peaks: Tensor | None = None
    is_sure: bool = False


class _Start(NamedTuple):
    point: Tensor
    reached: str
    is_own: bool = False


@torch.no_grad()
def search_modes(particles: WeightedParticles, draws: Draws, num_evaluations: float) -> Search:
    """Modes that a guide misses.

    The climbs begin at draws of the guide, widened, with signs changed about the prior's median and
    with entries of plates permuted, and at draws of the prior. A mode at which none of the climbs
    ends is not found, and a climb in a density without a peak, such as a funnel's, has no end.

    Args:
        particles: The model and its guide.
        draws: Draws of the guide with their weights.
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
        num_evaluations = max(num_evaluations, CHEAP / particles.work)
    numbers = numbers.at_most(num_evaluations)
    try:
        with threads_for(numbers.starts * particles.num_numbers):
            return _Searcher(particles, draws, numbers).search(num_evaluations)
    except Unscorable as why:
        reason = str(why)
    except Exception as error:  # a model may raise anything; the draws are judged all the same
        reason = f"the search ended in {type(error).__name__}: {error}"
    return Search([], f"not searched for other modes, as {reason}")


class _Searcher:
    """A search, from draws of a guide and their weights."""

    def __init__(self, particles: WeightedParticles, draws: Draws, numbers: _Numbers) -> None:
        self.particles, self.numbers = particles, numbers
        self.joint = particles.log_joint()
        if draws.rounding > MAX_ROUNDING:
            raise Unscorable(rounding_message(draws.rounding))
        self.sites, self.z = draws.sites, self.joint.unconstrained(draws.sites)
        self.density = Density(self.joint, self.z.dtype)
        self.log_p, self.log_weights = self.joint(self.z), draws.log_weights.to(self.z)
        self.loc, self.scale = _place(self.z)
        self.centre = torch.zeros_like(self.loc)

    def search(self, num_evaluations: float) -> Search:
        starts = [start for start in self._starts() if start.point.isfinite().all()]
        points = torch.stack([start.point for start in starts])
        carry = getattr(self.particles.guide, "frame_of_climbs", None)
        climbs = climb(self.joint.gradient, points, self.scale, num_evaluations, carry)
        num_ended = int(climbs.has_arrived.sum())
        summary = (
            f"searched by {len(starts)} climbs of all {len(self.loc)} latents, of which "
            f"{num_ended or 'none'} ended"
        )
        if not num_ended:
            return Search([], f"{summary}, so nothing is known of other modes")
        own, others = self._ends(climbs, [start.is_own for start in starts])
        reached = climbs.z[own]
        if len(self.loc) > MOST_LATENTS and others:
            many = f"{len(others)} elsewhere were not weighed, for more than {MOST_LATENTS} latents"
            return Search([], f"{summary}; {many}", reached)
        most = max(1, min(self.numbers.normals, MOST_GRADIENTS // len(self.loc)))
        if not others:
            return Search([], summary, reached, is_sure=True)
        peaks, num_failed = self._peaks(climbs, own[:MOST_OWN], others[:most])
        modes: list[Mode] = []
        num_unsure = num_failed + len(others[most:])
        shares = self._shares(peaks) if peaks else []
        for (share, error, is_sure), peak in zip(shares, peaks, strict=True):
            if peak.is_own:
                continue
            num_unsure += not is_sure
            if share >= SMALLEST:
                sites, reached_from = self.joint.sites_at(peak.z), starts[peak.climb].reached
                modes.append(
                    Mode(share, error, sites, reached_from, self._change(share, peak.z, sites))
                )
        if num_unsure:
            summary += f"; how much mass {num_unsure} elsewhere hold is not known"
        modes.sort(key=lambda mode: -mode.share)
        places = [mode.sites for mode in modes] + [self.joint.sites_at(z) for z in reached]
        for mode in modes:
            mode.is_relabelled = any(self._are_permuted(mode.sites, other) for other in places)
        return Search(modes, summary, reached, is_sure=not num_unsure)

    # Where to start

    def _starts(self) -> Iterator[_Start]:
        """Points further apart than the guide's draws."""
        numbers, device = self.numbers, self.z.device
        some = itertools.cycle(self.z[torch.randperm(len(self.z), device=device)])
        for _ in range(numbers.own):
            yield _Start(next(some), "a draw of the guide", is_own=True)
        for k in range(numbers.widened):
            by = WIDER[k % len(WIDER)]
            point = self.loc + by * (next(some) - self.loc)
            yield _Start(point, f"a draw of the guide, {by:.0f} times as far out")
        num_prior = NUM_PRIOR if self.joint.at_once else numbers.prior
        prior = self.joint.prior_draws(num_prior).to(self.z)
        for point in prior[: numbers.prior]:
            yield _Start(point, "a draw of the prior")
        if len(prior):
            self.centre = prior.median(0).values
        for group in self._groups():
            point = next(some)
            flipped = point.clone()
            flipped[group] = (2 * self.centre - point)[group]
            yield _Start(flipped, "a draw of the guide with signs changed")
        sizes = {n for draws in self.sites.values() for n in draws.shape[1:] if n > 1}
        for size in sizes:
            orders = [torch.randperm(size) for _ in range(numbers.permuted // len(sizes))]
            if size <= MOST_LABELS and self._is_symmetric(size):
                orders = [torch.tensor(order) for order in itertools.permutations(range(size))][1:]
            for k, order in enumerate(orders):
                yield _Start(self._permuted(k, order), "a draw of the guide with entries permuted")

    def _permuted(self, k: int, order: Tensor) -> Tensor:
        """A draw of the guide with all axes of this size permuted, in unconstrained space."""
        order = order.to(self.z.device)
        permuted = {n: _permuted(draws[k], order) for n, draws in self.sites.items()}
        return self.joint.unconstrained({n: v.unsqueeze(0) for n, v in permuted.items()})[0]

    def _is_symmetric(self, size: int) -> bool:
        """Whether the model's density is the same for any order of entries along such axes."""
        k = int(self.log_p.argmax())  # a usual draw: both orders generate all others
        orders = torch.stack([torch.arange(size).roll(1), torch.arange(size)])
        orders[1, :2] = orders[1, :2].flip(0)
        rounding = torch.finfo(self.z.dtype).eps ** 0.5 * (1 + self.log_p[k].abs())
        change = self.joint(torch.stack([self._permuted(k, order) for order in orders]))
        return bool(((change - self.log_p[k]).abs() < rounding).all())

    def _groups(self) -> Sequence[Tensor]:
        """Latents whose signs are changed together: all, each site; each one, or at random."""
        D, num = len(self.loc), self.numbers.flipped
        everything = torch.arange(D, device=self.z.device)
        sites = [everything, *everything.split(self.joint.sizes_of_sites)]
        groups = [*sites, *everything.split(1)]
        if len(groups) <= num:
            return list(itertools.islice(itertools.cycle(groups), num))
        sites = sites[: num // 2]
        return [*sites, *(torch.rand(num - len(sites), D, device=self.z.device) < 0.5)]

    # What is missed

    def _ends(self, climbs: Climbs, is_own: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Climbs to different modes, the highest first: the guide's own, and those that it misses.

        Args:
            climbs: The climbs.
            is_own: Whether each began at a draw of the guide.
        """
        groups = climbs.distinct(self.scale)
        ends = list(groups)[:MOST_ENDS]
        num_own = [sum(is_own[k] for k in groups[end]) for end in ends]
        # The evidence of the part that the guide has, so that no end is left out by mistake.
        log_evidence = self.log_weights.logsumexp(0) - math.log(len(self.z))
        self._compare()
        log_q = self._log_q(climbs.z[ends])
        is_missed = (log_q + log_evidence < climbs.value[ends] + math.log(MISSED)).tolist()
        own, others = [], []
        most = sum(num_own)
        for j, row in enumerate(self._are_joined(climbs.z[ends]).tolist()):
            if any(row[:j]):
                continue
            own_climbs = sum(num_own[i] for i in range(len(ends)) if i == j or row[i])
            if is_missed[j] and own_climbs < OWN_SHARE * most:
                others.append(ends[j])
            elif own_climbs:
                own.append(ends[j])
        return own, others

    def _are_joined(self, z: Tensor) -> Tensor:
        """Which ends the density joins, some by way of others, of shape ``(K, K)``."""
        K = len(z)
        joined = torch.zeros(K, K, dtype=torch.bool, device=z.device)
        if K < 2:
            return joined
        rows, columns = torch.triu_indices(K, K, 1, device=z.device)
        joined[rows, columns] = are_joined(self.joint, z[columns], z[rows], NUM_BETWEEN)
        reach = (joined | joined.mT).to(z) + torch.eye(K).to(z)
        for _ in range(K.bit_length()):
            reach = (reach @ reach).clamp(max=1.0)
        return (reach > 0) & ~torch.eye(K, dtype=torch.bool, device=z.device)

    def _peaks(self, climbs: Climbs, own: list[int], others: list[int]) -> tuple[list[Peak], int]:
        """The peaks at these ends, if there is one that the guide misses.

        Also the number of ends elsewhere next to which Newton's method finds none.
        """
        tried = {k: self._peak(climbs.z[k], k, k in own) for k in [*own, *others]}
        num_failed = sum(tried[k] is None for k in others)
        if num_failed == len(others):
            return [], num_failed
        peaks = [peak for peak in tried.values() if peak is not None]
        joined = self._are_joined(torch.stack([peak.z for peak in peaks])).tolist()
        return [p for j, p in enumerate(peaks) if p.is_own or not any(joined[j][:j])], num_failed

    def _peak(self, z: Tensor, k: int, is_own: bool) -> Peak | None:
        """The peak next to the end of a climb, if there is one, by Newton's method."""
        sizes = torch.tensor(SIZES).to(z).unsqueeze(-1)
        for _ in range(NUM_NEWTON):
            value, slope = self.joint.gradient(z.unsqueeze(0))
            hessian = self._hessian(z)
            if not (hessian.isfinite().all() and slope.isfinite().all()):
                return None
            covariance = Dense.of_precision(-hessian, partial(reach_of, self.density, z))
            points = z + sizes * covariance.times(slope[0])
            values = self.joint(points)
            if not values.max() > value + SMALL_GAIN:
                root = narrowed(self.density, z, covariance.root)
                return Peak(z, Dense(root.to(z)), k, is_own)
            z = points[values.argmax()]
        return None

    def _hessian(self, z: Tensor) -> Tensor:
        """Second derivatives, by differences if the model can be differentiated only once."""
        try:
            return self.joint.hessian(z.unsqueeze(0))[0]
        except (NotImplementedError, RuntimeError):
            steps = (DIFFERENCE * self.scale).diag()
            above, below = (self.joint.gradient(z + step)[1] for step in (steps, -steps))
            hessian = (above - below) / (2 * DIFFERENCE * self.scale).unsqueeze(-1)
            return (hessian + hessian.mT) / 2

    def _shares(self, peaks: Sequence[Peak]) -> list[Share]:
        """The shares of the mass that the guide misses around peaks."""
        # A draw without a density has no weight, whatever the guide's density is there.
        known = (self.log_p - self.log_weights).nan_to_num(0.0, 0.0, 0.0)
        bulk = MultivariateNormal(self.loc, scale_tril=self.scale.diag(), validate_args=False)
        shares = Shares(self.joint, self._log_q, self.z, self.log_p, known, bulk)
        own = [peak.z for peak in peaks if peak.is_own] or [self.loc]
        missed = [k for k, peak in enumerate(peaks) if not peak.is_own][: self.numbers.carried]
        more = self.centre, self.scale, self.joint.sizes_of_sites
        maps = {k: [m for z in own for m in Carried.between(z, peaks[k].z, *more)] for k in missed}
        carried = {k: shares.best(found) for k, found in maps.items()}
        return shares.of(peaks, carried, self.numbers.draws_of_normal)

    def _change(self, share: float, z: Tensor, sites: Mapping[str, Tensor]) -> float:
        """The most that a point with a share changes means and spreads of the guide."""
        in_units = ((value, *_place(self.sites[name])) for name, value in sites.items())
        changes = []
        for value, loc, scale in ((z, self.loc, self.scale), *in_units):
            away = (value.flatten() - loc).abs() / scale
            of_spread = (1 - share + share * (1 - share) * away.square()).log() / 2
            changes.append(torch.maximum(share * away, of_spread.abs()).max().item())
        return max(changes)

    def _are_permuted(self, some: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
        """Whether two points are the same but for the order of entries within sites."""
        is_moved = False
        for name, value in some.items():
            pair = torch.stack([value.flatten(), other[name].flatten()])
            tolerance = SAME_VALUE_TO * (self.sites[name].std() + pair.abs().amax())
            first, second = pair.sort(-1).values
            if ((first - second).abs() > tolerance).any():
                return False
            is_moved |= bool(((pair[0] - pair[1]).abs() > tolerance).any())
        return is_moved

    def _log_q(self, z: Tensor) -> Tensor:
        """The guide's log density; nothing where it can't be computed."""
        found = guide_log_prob(self.particles, self.joint, z).to(z)
        return found.nan_to_num(-math.inf, math.inf, -math.inf)

    def _compare(self) -> None:
        """Raises Unscorable if the guide's density is not that by which its draws are weighted."""
        known = (self.log_p - self.log_weights)[:NUM_COMPARED]
        usable = known.isfinite()
        found = self._log_q(self.z[:NUM_COMPARED])
        if not torch.allclose(found[usable], known[usable], rtol=1e-3, atol=0.05):
            raise Unscorable("the guide's density can't be found from the model's latents")


def _place(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Medians and scales of the columns, by quantiles, as one draw may be far out."""
    ordered, num = draws.reshape(len(draws), -1).sort(0).values, len(draws)
    low, loc, high = (ordered[int(share * num)] for share in (0.16, 0.5, 0.84))
    scale = (high - low) / 2  # a latent that is constant has none
    return loc, scale.where(scale.isfinite() & (scale > 0), 1.0)


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
