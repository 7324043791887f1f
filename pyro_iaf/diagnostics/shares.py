r"""How much of the mass a guide misses around each of some peaks.

Draws of the guide :math:`q_0`, of normals at the peaks, and of the guide carried to peaks that it
misses by changes of signs and shifts, together :math:`q_1, \ldots, q_K`, are weighted by the
balance heuristic,

.. math::
    w(z) = \frac{p(x, z)}{\sum_k \alpha_k q_k(z)}, \qquad
    \text{share missed} = \frac{\sum w(z) \, [q_0(z) < p(z \mid x) / 10]}{\sum w(z)} .

(Veach and Guibas 1995; Owen and Zhou 2000)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..guides.covariances import Dense

__all__ = ["MISSED", "Carried", "Peak", "Share", "Shares"]

# The guide misses a point where its density is below this share of the posterior's.
MISSED = 0.1

# The factors of the normals' scales, as a mode may be wider than its peak says.
SCALES_OF_NORMAL = (1.0, 2.5)

# A share is unknown if its standard error is more than this part of it, although the peak alone
# would hold so much by its height and curvature.
UNSURE, MATTERS = 0.5, 0.05

# By so many draws of the guide maps that carry them are compared.
NUM_COMPARED = 32


class Peak(NamedTuple):
    """A peak, with the covariance that its curvature gives.

    Attributes:
        z: Where it is.
        covariance: The covariance.
        climb: The climb that led there.
        is_own: Whether the guide's own draws lead there.
    """

    z: Tensor
    covariance: Dense
    climb: int
    is_own: bool

    def normal(self, wider: float) -> MultivariateNormal:
        """The normal around it, wider by a factor."""
        root = wider * self.covariance.root
        return MultivariateNormal(self.z, scale_tril=root, validate_args=False)


@dataclass
class Carried:
    """A map that carries the guide's draws to a peak: signs about a centre, and a shift.

    It keeps volumes, so the density of carried draws is :math:`q_0(T^{-1}(z))`. Between modes that
    are the same but for signs it is exact, however skewed they are.
    """

    centre: Tensor
    signs: Tensor
    shift: Tensor

    @classmethod
    def between(
        cls, start: Tensor, end: Tensor, centre: Tensor, scale: Tensor, sizes: Sequence[int]
    ) -> list[Carried]:
        """Maps from a point to another that change no signs, those of sites, or of any latent."""
        away, flipped = (end - start) / scale, (end - (2 * centre - start)) / scale
        by_latent = flipped.abs() < away.abs()
        by_site = [
            (after.norm() < before.norm()).expand(len(before))
            for before, after in zip(away.split(sizes), flipped.split(sizes), strict=True)
        ]
        maps = []
        for is_flipped in (torch.zeros_like(by_latent), torch.cat(by_site), by_latent):
            signs = 1 - 2 * is_flipped.to(start)
            maps.append(cls(centre, signs, end - centre - signs * (start - centre)))
        return maps

    def __call__(self, z: Tensor) -> Tensor:
        return self.centre + self.signs * (z - self.centre) + self.shift

    def inverse(self, z: Tensor) -> Tensor:
        """Where the map takes these points from."""
        return self.centre + self.signs * (z - self.shift - self.centre)


class Share(NamedTuple):
    """A share of the mass that the guide misses, and its standard error.

    Attributes:
        value: The share, from 0 to 1.
        error: Its standard error.
        is_sure: Whether enough draws are there, where the peak may matter.
    """

    value: float
    error: float
    is_sure: bool


class Shares:
    """Draws of a guide, by which peaks are weighed.

    Args:
        joint: The model's log density.
        log_q: The guide's.
        z: Draws of the guide, of shape ``(S, D)``.
        log_p: The model's log density there.
        known: The guide's.
        bulk: About the place and size of the guide.
    """

    def __init__(
        self,
        joint: Callable[[Tensor], Tensor],
        log_q: Callable[[Tensor], Tensor],
        z: Tensor,
        log_p: Tensor,
        known: Tensor,
        bulk: MultivariateNormal,
    ) -> None:
        self.joint, self.log_q, self.z, self.log_p = joint, log_q, z, log_p
        self.known, self.bulk = known, bulk

    def best(self, maps: Sequence[Carried]) -> Carried:
        """The map under which the model's density at the guide's draws stays highest."""
        z = self.z[:NUM_COMPARED]
        return max(maps, key=lambda move: self.joint(move(z)).nan_to_num(-math.inf).median().item())

    def of(self, peaks: Sequence[Peak], carried: Mapping[int, Carried], num: int) -> list[Share]:
        """The shares around peaks, by so many draws of each proposal.

        A missed draw counts for the peak whose normal has the highest density there, which may be
        the guide's own.

        Args:
            peaks: The peaks.
            carried: Maps that carry draws of the guide to some of them, by their positions.
            num: The number of draws of a normal; four times as many are carried.
        """
        normals = [peak.normal(wider) for wider in SCALES_OF_NORMAL for peak in peaks]
        rows = torch.randint(len(self.z), (len(carried), 4 * num), device=self.z.device)
        tried = torch.cat(
            [
                *(normal.sample((num,)) for normal in normals),
                *(move(self.z[some]) for move, some in zip(carried.values(), rows, strict=True)),
            ]
        )
        z = torch.cat([self.z, tried])
        log_p = torch.cat([self.log_p, self.joint(tried)])
        of_guide = torch.cat([self.known, self.log_q(tried)])
        of_normals = torch.stack([normal.log_prob(z) for normal in normals])
        of_carried = [self.log_q(move.inverse(z)).unsqueeze(0) for move in carried.values()]
        counts = [len(self.z), *[num] * len(normals), *[4 * num] * len(carried)]
        log_counts = torch.tensor(counts).to(z).log().unsqueeze(-1)
        parts = torch.cat([of_guide.unsqueeze(0), of_normals, *of_carried])
        log_mixture = (parts + log_counts).logsumexp(0) - math.log(len(z))
        log_ratio = (log_p - log_mixture).nan_to_num(-math.inf, -math.inf, -math.inf)
        log_evidence = log_ratio.logsumexp(0) - math.log(len(z))
        is_missed = of_guide + log_evidence < log_p + math.log(MISSED)
        # The guide's own draws are around here, also where no climb of its own has ended. What it
        # misses here belongs to where its draws are carried.
        of_bulk = self.bulk.log_prob(z).unsqueeze(0)
        nearest = torch.cat([of_normals, of_bulk]).argmax(0)
        owner = torch.where(nearest < len(normals), nearest % len(peaks), -1)
        if carried:
            ends = torch.tensor(list(carried), device=z.device)[torch.cat(of_carried).argmax(0)]
            owner = torch.where(owner < 0, ends, owner)
        weights, found = log_ratio.softmax(0), []
        for k, by_peak in enumerate(_masses(self.joint, peaks)):
            is_part = (is_missed & (owner == k)).to(z)
            share = (weights * is_part).sum()
            error = (weights * (is_part - share)).square().sum().sqrt()
            is_sure = bool(error <= UNSURE * share) or by_peak < MATTERS
            found.append(Share(share.item(), error.item(), is_sure))
        return found


def _masses(joint: Callable[[Tensor], Tensor], peaks: Sequence[Peak]) -> list[float]:
    """The shares of the mass by Laplace's method, as if there were nothing but these peaks."""
    roots = torch.stack([peak.covariance.root.diagonal().log().sum() for peak in peaks])
    heights = joint(torch.stack([peak.z for peak in peaks]))
    found: list[float] = (heights + roots.to(heights)).softmax(0).tolist()
    return found
