r"""Climbs of a log density from many points at once, by L-BFGS.

.. math::
    z \leftarrow z + t \, H \, \nabla \ell(z)

where :math:`H` comes from the last steps of each climb (Nocedal and Wright 2006, algorithm 7.4),
and :math:`t` is halved twice after each step that does not bring enough. All climbs share a run of
the model, so many cost hardly more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Climbs", "are_joined", "climb"]

# How many steps are remembered, and the most that are taken.
NUM_HISTORY, NUM_STEPS = 8, 120

# The share of the promised gain that a step has to bring, the factor by which it is shortened if it
# does not, and how often it is.
ARMIJO, SHORTER, MOST_SHORTER = 1e-4, 0.25, 12

# A climb has arrived where a step promises less than this, in nats, or than the rounding error of
# the density, which is some machine epsilons of it.
MIN_GAIN, NUM_EPS = 1e-5, 8

# Two ends are the same if each latent differs by less, in scales, and the density by less, in nats.
SAME_PLACE, SAME_VALUE = 0.05, 0.05

# Points belong to one mode if the density falls by less between them, in nats.
SMALL_DIP = 0.5

# The longest step, in units of the scale and of the root of the number of latents; and the longest
# of a climb that knows nothing of the curvature, in units of the scale.
LONGEST, LONGEST_FIRST = 2.0, 1.0


class Climbs(NamedTuple):
    """Where climbs have ended.

    Attributes:
        z: Of shape ``(K, D)``.
        value: The log density there, of shape ``(K,)``.
        has_arrived: Whether no step leads further up; false where the density rises without end.
    """

    z: Tensor
    value: Tensor
    has_arrived: Tensor

    def distinct(self, scale: Tensor) -> dict[int, list[int]]:
        """The climbs that share an end, by the index of one of them; the highest end first."""
        ends: dict[int, list[int]] = {}
        for k in self.value.argsort(descending=True).tolist():
            if not (self.has_arrived[k] and self.value[k].isfinite()):
                continue
            others = list(ends)
            is_near = ((self.z[others] - self.z[k]) / scale).abs().amax(-1) < SAME_PLACE
            is_same = is_near & ((self.value[others] - self.value[k]).abs() < SAME_VALUE)
            if is_same.any():
                ends[others[int(is_same.int().argmax())]].append(k)
            else:
                ends[k] = [k]
        return ends


def climb(
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    points: Tensor,
    scale: Tensor,
    num_evaluations: float = math.inf,
    carry: Any = None,
) -> Climbs:
    """Climbs from points of shape ``(K, D)``.

    Args:
        gradient: Gives log densities of shape ``(K,)`` and gradients of shape ``(K, D)``.
        points: Where the climbs begin.
        scale: About how far the density reaches in each latent, of shape ``(D,)``.
        num_evaluations: The climbs stop when they have taken so many gradients together.
        carry: A transform in whose noise climbs begin again that have found no end by half of them.
            There they are short, but lead where its draws are.
    """
    if carry is not None:
        first = climb(gradient, points, scale, num_evaluations / 2)
        rest = ~first.has_arrived
        if rest.any():
            second = _climb_in(carry, gradient, points[rest], num_evaluations / 2)
            for ours, theirs in zip(first, second, strict=True):
                ours[rest] = theirs
        return first
    K, D = points.shape
    eps = torch.finfo(points.dtype).eps
    u, (value, slope) = points / scale, _usable(*gradient(points), scale)
    steps, changes = u.new_zeros(NUM_HISTORY, K, D), u.new_zeros(NUM_HISTORY, K, D)
    size, has_arrived = torch.ones_like(value), torch.zeros_like(value, dtype=torch.bool)
    is_anew = has_arrived.clone()
    live = value.isfinite().nonzero().squeeze(-1)
    for _ in range(NUM_STEPS):
        num_evaluations -= len(live)
        if not len(live) or num_evaluations < 0:
            break
        is_stuck = size[live] < SHORTER**MOST_SHORTER
        is_at_end = is_stuck & is_anew[live]
        # Without its history a climb goes straight uphill.
        again = live[is_stuck]
        steps[:, again], changes[:, again], size[again], is_anew[again] = 0.0, 0.0, 1.0, True
        step = _two_loops(slope[live], steps[:, live], changes[:, live])
        knows = (changes[-1, live] != 0).any(-1, keepdim=True)
        longest = torch.where(knows, LONGEST * math.sqrt(D), LONGEST_FIRST).to(u)
        step = step / (step.norm(dim=-1, keepdim=True) / longest).clamp(min=1.0)
        gain = (slope[live] * step).sum(-1)
        rounding = NUM_EPS * eps * value[live].abs()
        is_over = (gain < MIN_GAIN + rounding) | is_at_end
        has_arrived[live[is_over]] = True
        keep = ~is_over
        live, step, gain, rounding = live[keep], step[keep], gain[keep], rounding[keep]
        if not len(live):
            break
        ends = u[live] + size[live].unsqueeze(-1) * step
        there, slope_there = _usable(*gradient(ends * scale), scale)
        is_better = there >= value[live] + ARMIJO * size[live] * gain - rounding
        size[live] = torch.where(is_better, 1.0, SHORTER * size[live])
        moved = live[is_better]
        s, y = (ends - u[live])[is_better], (slope[live] - slope_there)[is_better]
        is_convex = ((s * y).sum(-1) > 1e-10 * s.norm(dim=-1) * y.norm(dim=-1)).unsqueeze(-1)
        for history, latest in ((steps, s), (changes, y)):
            before = history[:, moved]
            after = torch.cat([before[1:], latest.unsqueeze(0)])
            history[:, moved] = torch.where(is_convex, after, before)
        is_anew[moved] = False
        u[moved], value[moved] = ends[is_better], there[is_better]
        slope[moved] = slope_there[is_better]
    return Climbs(u * scale, value, has_arrived)


def _climb_in(
    carry: Any,
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    points: Tensor,
    num_evaluations: float,
) -> Climbs:
    """The same in the noise of a transform, where a density that it is near is nearly normal.

    What is climbed is the density of the noise, which has a peak also where that of the latents
    rises towards the end of a ridge.
    """

    def of_noise(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = carry(x)
            log_det = carry.log_abs_det_jacobian(x, z)
            value, slope = gradient(z.detach())
            slope = slope.where(slope.isfinite(), 0.0)
            (found,) = torch.autograd.grad([z, log_det], x, [slope, torch.ones_like(log_det)])
        return value + log_det.detach(), found

    noise = carry.inv(points)
    usable = noise.isfinite().all(-1, keepdim=True)
    noise = torch.where(usable, noise, torch.randn_like(noise))
    climbs = climb(of_noise, noise, torch.ones_like(noise[0]), num_evaluations)
    z = carry(climbs.z).detach()
    return Climbs(z, gradient(z)[0], climbs.has_arrived)


def _usable(value: Tensor, slope: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Values, ``-inf`` where either is not finite, and slopes in units of the scale."""
    usable = value.isfinite() & slope.isfinite().all(-1)
    slope = (slope * scale).where(usable.unsqueeze(-1), 0.0)
    return torch.where(usable, value, -math.inf), slope


def _two_loops(slope: Tensor, steps: Tensor, changes: Tensor) -> Tensor:
    """The next step of each climb; steps of length zero in its history have no part in it."""
    products = (steps * changes).sum(-1, keepdim=True)
    inverse = torch.where(products > 0, 1 / products, 0.0)
    shares, v = [], slope
    for s, y, r in zip(steps.flip(0), changes.flip(0), inverse.flip(0), strict=True):
        shares.append(r * (s * v).sum(-1, keepdim=True))
        v = v - shares[-1] * y
    # The curvature of the last step, for directions that no step took.
    last = changes[-1].square().sum(-1, keepdim=True)
    v = torch.where(last > 0, products[-1] / last, 1.0) * v
    for s, y, r, share in zip(steps, changes, inverse, reversed(shares), strict=True):
        v = v + (share - r * (y * v).sum(-1, keepdim=True)) * s
    return v


def are_joined(
    joint: Callable[[Tensor], Tensor], some: Tensor, others: Tensor, num_between: int
) -> Tensor:
    """Whether the density falls by little on straight lines between pairs of points.

    Args:
        joint: The log density.
        some: Points of shape ``(K, D)``.
        others: As many, or one for all.
        num_between: At how many points of each line it is looked at.
    """
    weights = (torch.arange(1, num_between + 1).to(some) / (num_between + 1)).view(-1, 1, 1)
    between = joint((weights * some + (1 - weights) * others).flatten(0, 1))
    lowest = between.view(num_between, -1).amin(0)
    return lowest > torch.minimum(joint(some), joint(others)) - SMALL_DIP
