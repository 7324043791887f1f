r"""Where a guide starts: a location and a scale found before SVI begins.

From several points a path climbs the log joint density :math:`\ell`. At each of its points
:math:`z` the curvature gives two Gaussians,

.. math::
    N(z, \Sigma) \quad\text{and}\quad N(z + \Sigma \nabla \ell(z), \Sigma), \qquad
    \Sigma = |{-\nabla^2 \ell(z)}|^{-1},

and the guide starts at the one with the highest ELBO. Of several modes that is the one with most
mass, if a path leads there: so draws of the prior are climbed too, all at once, and paths begin at
those of their ends where the curvature promises most mass.

If a path leads into the neck of a funnel, the Gaussian is on the way and not at the end. Where
second derivatives cost too much, :math:`\Sigma` comes from the steps of the path itself (L-BFGS),
as a diagonal plus a low-rank matrix. (Zhang et al. 2022, https://arxiv.org/abs/2108.03782)

A density may have no curvature: a Laplace density is linear on both sides of its kink. Along such
a direction the scale is the distance at which the density has fallen.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from ..models.log_joint import LogJoint
from ..models.particles import threads_for
from .climbs import climb
from .covariances import Covariance, Dense, LowRank, unit_reach

__all__ = [
    "Density",
    "Start",
    "StartNotFound",
    "further_starts",
    "narrowed",
    "pathfinder",
    "reach_of",
    "start_near",
]

NUM_PATHS = 4

# Up to so many latents every path takes second derivatives, and up to so many the best one does.
EXACT_PATHS, EXACT_END = 64, 400

# How many draws of the prior are climbed, by how many evaluations each, and at how many of their
# ends paths begin.
NUM_CLIMBED, NUM_A_CLIMB, NUM_ENDS = 32, 40, 3

# How many steps L-BFGS remembers, and the most steps that L-BFGS and Newton's method take.
NUM_HISTORY, NUM_STEPS, NUM_STEPS_EXACT = 10, 200, 30

# Step sizes that are tried together, and the share of the promised gain that a step has to bring.
STEP_SIZES = (0.5, 0.25, 2.0**-3, 2.0**-4, 2.0**-6, 2.0**-9, 2.0**-13, 2.0**-18)
ARMIJO = 1e-4

# A path ends when a step promises less than this, in nats.
MIN_GAIN = 1e-4

# The log density of a normal falls by FALL within a standard deviation, in nats. A step after which
# it has fallen by that much is the scale along a direction without curvature, and along one where
# it has fallen by more than STEEP after the scale that the curvature gives.
FALL, STEEP = 0.5, 4.0
REACHES = 2.0 ** torch.arange(-20, 21, dtype=torch.float64)

# How many of the Gaussians on a path of L-BFGS are compared.
NUM_COMPARED = 40

# ELBOs are estimated from NUM_DRAWS draws for all Gaussians, then from more for the best ones.
NUM_DRAWS, NUM_BEST, NUM_DRAWS_BEST = 20, 10, 200

# If every Gaussian has draws of zero density, all are shrunk by the next of these factors.
SHRINKING = (1.0, 0.4, 0.16, 0.06)

# Bound on the numbers that the model's sites hold over all those draws together.
MAX_WORK = 2**25

# Bound on the numbers that the sites of all paths hold; with more data there are fewer paths.
MAX_NUMBERS = 2**18


class Start(NamedTuple):
    """Where a guide starts: a loc, and a scale for each latent or a lower-triangular matrix."""

    loc: Tensor
    scale: Tensor

    def is_near(self, point: Tensor) -> bool:
        """Whether a point is within a standard deviation in each direction."""
        away = point - self.loc
        if self.scale.dim() == 1:
            units = away / self.scale
        else:
            units = torch.linalg.solve_triangular(self.scale, away.unsqueeze(-1), upper=False)
        return bool(units.abs().max() < 1)

    def posterior(self) -> Any:
        """The Gaussian."""
        if self.scale.dim() == 1:
            found = dist.Normal(self.loc, self.scale, validate_args=False).to_event(1)
        else:
            found = dist.MultivariateNormal(self.loc, scale_tril=self.scale, validate_args=False)
        return found

    def beside(self, size: float = 1.0) -> Start:
        """The same at a draw of the Gaussian, narrower by ``size``."""
        noise = size * torch.randn_like(self.loc)
        away = self.scale * noise if self.scale.dim() == 1 else self.scale @ noise
        return Start(self.loc + away, self.scale)


class StartNotFound(Exception):  # noqa: N818
    """No path found a start, for the reason in the message."""


def pathfinder(joint: LogJoint, loc: Tensor, dense: bool) -> Start:
    """The Gaussian with the highest ELBO on the way to the modes of a log joint density.

    Args:
        joint: The log density.
        loc: Where the first path begins, of shape ``(D,)``. The others begin between -2 and 2.
        dense: Whether the scale may be a matrix.

    Raises:
        StartNotFound: If the density is not finite where the paths begin, has no Gaussian of
            finite ELBO near them, or differs from call to call.
    """
    reason = joint.check(torch.stack([loc, *(loc + torch.randn(6, len(loc)).to(loc))]))
    if reason is not None:
        raise StartNotFound(reason)
    exact = len(loc) <= EXACT_PATHS
    density = Density(joint, loc.dtype)
    try:
        with threads_for(NUM_PATHS * joint.num_numbers):
            points = torch.cat([_beginnings(density, loc), _ends(density, loc, exact)])
            best = _best(density, _climb(density, points, exact))
            if not exact and best is not None:
                best = _best(density, [best, *_refined(density, best.loc.to(loc).double())])
    except StartNotFound:
        raise
    except Exception as error:  # a model may raise anything
        raise StartNotFound(f"a path ended in {type(error).__name__}: {error}") from error
    if best is None:
        raise StartNotFound("no Gaussian on the way uphill has a finite ELBO")
    return best.start(loc, dense)


def start_near(joint: LogJoint, point: Tensor, dense: bool) -> Start | None:
    """The Gaussian with the highest ELBO on a path that begins at this point, if there is one."""
    density, exact = Density(joint, point.dtype), len(point) <= EXACT_END
    with threads_for(joint.num_numbers):
        best = _best(density, _climb(density, point.double().unsqueeze(0), exact))
    return None if best is None else best.start(point, dense)


def further_starts(joint: LogJoint, first: Start, dense: bool, num: int) -> list[Start]:
    """So many starts besides the first: in other modes, the one with most mass first.

    If climbs from draws of the prior find fewer modes, the rest begin at draws of the Gaussians
    that were found.
    """
    if not num:
        return []
    density, exact = Density(joint, first.loc.dtype), len(first.loc) <= EXACT_PATHS
    with threads_for(NUM_PATHS * joint.num_numbers):
        ends = _ends(density, first.loc, exact, 4 * num)
        tried = [_best(density, _climb(density, end.unsqueeze(0), exact)) for end in ends]
        found = [gaussian for gaussian in tried if gaussian is not None]
        elbos = _elbos(density, found, NUM_DRAWS_BEST)
    starts = [first]
    for k in sorted(range(len(found)), key=lambda k: -elbos[k]):
        start = found[k].start(first.loc, dense)
        if not any(other.is_near(start.loc) for other in starts):
            starts.append(start)
    starts = starts[: num + 1]
    missing = itertools.islice(itertools.cycle(starts), num + 1 - len(starts))
    return [*starts[1:], *(start.beside() for start in missing)]


class Density:
    """A log joint density, evaluated in the model's precision at points in double precision."""

    def __init__(self, joint: LogJoint, dtype: torch.dtype) -> None:
        self.joint, self.dtype, self.eps = joint, dtype, torch.finfo(dtype).eps

    @torch.no_grad()
    def __call__(self, z: Tensor, together: int = 1) -> Tensor:
        flat = z.to(self.dtype).flatten(0, -2)
        return self.joint(flat, together).double().reshape(z.shape[:-1])

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values, ``-inf`` where either is not finite, and gradients."""
        value, slope = self.joint.gradient(z.to(self.dtype))
        usable = value.isfinite() & slope.isfinite().all(-1)
        return torch.where(usable, value.double(), -torch.inf), slope.double()

    def hessian(self, z: Tensor) -> Tensor | None:
        """Second derivatives, or None if the model can be differentiated only once."""
        try:
            hessian = self.joint.hessian(z.to(self.dtype)).double()
        except (NotImplementedError, RuntimeError):
            return None
        # All zeros: the gradient does not depend on the point, or has no graph.
        return hessian if (hessian != 0).flatten(1).any(-1).all() else None

    def variances(self, z: Tensor) -> Tensor | None:
        """Variances of each latent given the others, or None as for :meth:`hessian`."""
        try:
            second = self.joint.diagonal(z.to(self.dtype)).double().abs()
        except (NotImplementedError, RuntimeError):
            return None
        usable = second.isfinite() & (second > 0)
        return (1 / second).where(usable, 1.0) if usable.any() else None


def _refined(density: Density, loc: Tensor) -> list[_Gaussian]:
    """Gaussians near the best one on a path of L-BFGS, by second derivatives there."""
    if len(loc) <= EXACT_END:
        return _climb(density, loc.unsqueeze(0), True)
    variances = density.variances(loc)
    return [] if variances is None else [_Gaussian(loc, LowRank(variances, []))]


def _beginnings(density: Density, loc: Tensor) -> Tensor:
    """Where the paths begin: points of finite density, ``loc`` first if it is one."""
    joint = density.joint
    num_paths = max(1, min(NUM_PATHS if joint.at_once else 2, MAX_NUMBERS // joint.work))
    for reach in (2.0, 0.5, 0.05):
        around = torch.empty(8 * num_paths, len(loc), dtype=torch.float64).uniform_(-reach, reach)
        points = torch.cat([loc.unsqueeze(0), around.to(loc)]).double()
        finite = density.gradient(points)[0].isfinite()
        if finite.any():
            return points[finite][:num_paths]
    raise StartNotFound("its log density, or the gradient of it, is finite at no point tried")


@torch.no_grad()
def _ends(density: Density, loc: Tensor, exact: bool, most: int = NUM_ENDS) -> Tensor:
    """Ends of climbs from draws of the prior, those with most mass by their curvature."""
    joint, none = density.joint, loc.new_zeros(0, len(loc)).double()
    if not joint.at_once or NUM_CLIMBED * joint.work > MAX_NUMBERS:
        return none
    points = joint.prior_draws(NUM_CLIMBED).to(loc)
    points = points[points.isfinite().all(-1)]
    if len(points) < 2:
        return none
    scale = points.std(0)
    scale = scale.where(scale > 0, 1.0)
    climbs = climb(joint.gradient, points, scale, NUM_A_CLIMB * NUM_CLIMBED)
    ends = list(climbs.distinct(scale))
    z, mass = climbs.z[ends].double(), climbs.value[ends].double()
    if exact and len(ends) > most and (hessians := density.hessian(z)) is not None:
        for k, hessian in enumerate(hessians):
            finite = bool(hessian.isfinite().all())
            mass[k] += _log_det_root(hessian) if finite else -math.inf
    return z[mass.argsort(descending=True)[:most]]


def _log_det_root(hessian: Tensor) -> Tensor:
    return Dense.of_precision(-hessian, unit_reach).log_det_root


# Climbing


class _Gaussian(NamedTuple):
    loc: Tensor
    covariance: Covariance

    def start(self, like: Tensor, dense: bool) -> Start:
        """The same in the precision of a tensor, with a matrix if the scale may be one."""
        covariance = self.covariance
        scale = covariance.root if dense and isinstance(covariance, Dense) else covariance.scale
        return Start(self.loc.to(like), scale.to(like))


class _Path:
    """A path uphill: where it is, and the Gaussians on its way."""

    def __init__(self, density: Density, z: Tensor, value: Tensor, slope: Tensor) -> None:
        self.density, self.z, self.value, self.slope = density, z, value, slope
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.diagonal = torch.ones_like(slope)
        self.gaussians: list[_Gaussian] = []
        self.climbs = True

    def plan(self, hessian: Tensor | None) -> None:
        """Finds the next step and the gain that it promises."""
        covariance: Covariance = LowRank(self.diagonal, self.steps)
        if hessian is not None:
            if not hessian.isfinite().all():
                self.climbs = False
                return
            reach = functools.partial(reach_of, self.density, self.z)
            covariance = Dense.of_precision(-hessian, reach)
            self.gaussians.append(_Gaussian(self.z, covariance))
        self.step = covariance.times(self.slope)
        self.gaussians.append(_Gaussian(self.z + self.step, covariance))
        self.gain = (self.step @ self.slope).item()
        self.climbs = MIN_GAIN < self.gain < math.inf

    def accepts(self, value: Tensor, size: float | Tensor) -> Tensor:
        """Whether steps of this size bring enough of the promised gain, up to rounding."""
        rounding = 8 * self.density.eps * self.value.abs()
        return value >= self.value + ARMIJO * size * self.gain - rounding

    def move(self, z: Tensor, value: Tensor, slope: Tensor) -> None:
        s, y = z - self.z, self.slope - slope
        self.z, self.value, self.slope = z, value, slope
        if s @ y > 1e-10 * s.norm() * y.norm():
            self.diagonal = _updated(self.diagonal, s, y)
            self.steps = [*self.steps[1 - NUM_HISTORY :], (s, y)]


def _updated(diagonal: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The diagonal of an inverse Hessian after a step (Gilbert and Lemarechal 1989)."""
    a, b, c = y @ (diagonal * y), s @ y, s @ (s / diagonal)
    return 1 / (a / (b * diagonal) + y.square() / b - a / (b * c) * (s / diagonal).square())


def _climb(density: Density, points: Tensor, exact: bool) -> list[_Gaussian]:
    """The Gaussians on the paths from these points uphill."""
    starts = zip(points, *density.gradient(points), strict=True)
    live = paths = [_Path(density, *start) for start in starts]
    if not exact:
        for path in paths:
            variances = density.variances(path.z)
            first = path.diagonal / path.slope.norm().clamp(min=1.0)  # a step of length one
            path.diagonal = first if variances is None else variances
    for _ in range(NUM_STEPS_EXACT if exact else NUM_STEPS):
        if not live:
            break
        hessians = density.hessian(torch.stack([path.z for path in live])) if exact else None
        exact = hessians is not None
        for k, path in enumerate(live):
            path.plan(None if hessians is None else hessians[k])
        live = [path for path in live if path.climbs]
        if not live:
            break
        ends = torch.stack([path.z + path.step for path in live])
        too_far = []
        for path, z, value, slope in zip(live, ends, *density.gradient(ends), strict=True):
            if path.accepts(value, 1.0):
                path.move(z, value, slope)
            else:
                too_far.append(path)
        if too_far:
            _shorten(density, too_far)
            live = [path for path in live if path.climbs]
    if not exact:
        for path in paths:
            path.gaussians = _thinned(path.gaussians, NUM_COMPARED)
    return [gaussian for path in paths for gaussian in path.gaussians]


def _thinned(gaussians: list[_Gaussian], most: int) -> list[_Gaussian]:
    """At most so many of them, evenly spaced, from the last one back."""
    return gaussians[:: -max(1, math.ceil(len(gaussians) / most))]


def _fall(density: Density, z: Tensor, steps: Tensor) -> Tensor:
    """How far the log density falls over steps both ways, on average, less rounding."""
    value = density(z.unsqueeze(0))
    values = density(torch.stack([z + steps, z - steps]))
    return value - values.mean(0) - 8 * density.eps * value.abs()


def reach_of(density: Density, z: Tensor, axes: Tensor) -> Tensor:
    """How far one can go both ways along each of ``(J, D)`` directions before it falls."""
    reaches = REACHES.to(axes)
    is_inside = _fall(density, z, reaches.reshape(-1, 1, 1) * axes) <= FALL
    count = is_inside.cumprod(0).sum(0)  # a rise after the fall belongs to another mode
    return reaches[(count - 1).clamp(min=0)]


def _shorten(density: Density, paths: list[_Path]) -> None:
    """Moves paths whose full step is too long, by the best of several shorter ones."""
    sizes = torch.tensor(STEP_SIZES, dtype=torch.float64, device=paths[0].z.device)
    tried = torch.stack([path.z + sizes.unsqueeze(-1) * path.step for path in paths])
    chosen = []
    for path, candidates, value in zip(paths, tried, density(tried), strict=True):
        usable = value.isfinite() & path.accepts(value, sizes)
        chosen.append(candidates[torch.where(usable, value, -torch.inf).argmax()])
    ends = torch.stack(chosen)
    for path, z, value, slope in zip(paths, ends, *density.gradient(ends), strict=True):
        path.climbs = bool(value.isfinite() & path.accepts(value, sizes[-1]))
        if path.climbs:
            path.move(z, value, slope)


# Comparing


def _best(density: Density, gaussians: list[_Gaussian]) -> _Gaussian | None:
    """The Gaussian with the highest ELBO, if any has a finite one."""
    gaussians = _thinned(gaussians, max(8, MAX_WORK // density.joint.work // NUM_DRAWS))
    few, many = (NUM_DRAWS, NUM_DRAWS_BEST) if density.joint.at_once else (4, 40)
    for factor in SHRINKING:
        shrunk = [_Gaussian(loc, covariance.shrunk(factor)) for loc, covariance in gaussians]
        elbos = _elbos(density, shrunk, few)
        ranked = sorted(range(len(elbos)), key=lambda i: -elbos[i])
        best = [shrunk[i] for i in ranked[:NUM_BEST] if elbos[i] > -math.inf]
        if best:
            # On the way into a funnel a point has correlations that the funnel as a whole lacks.
            best += [_Gaussian(g.loc, LowRank(g.covariance.scale.square(), [])) for g in best]
            best += _narrowed(density, best[0])
            affordable = MAX_WORK // density.joint.work // len(best)
            elbos = _elbos(density, best, max(few, min(many, affordable)))
            return best[max(range(len(best)), key=elbos.__getitem__)]
    return None


def _narrowed(density: Density, gaussian: _Gaussian) -> list[_Gaussian]:
    """The same Gaussian, narrower where the density falls faster than its curvature says."""
    loc, covariance = gaussian
    if len(loc) > EXACT_PATHS:
        return []
    root = covariance.root if isinstance(covariance, Dense) else covariance.scale.diag()
    narrower = narrowed(density, loc, root)
    return [] if narrower is root else [_Gaussian(loc, Dense(narrower))]


def narrowed(density: Density, loc: Tensor, root: Tensor) -> Tensor:
    """The root of a covariance, with columns shortened along which the density falls faster."""
    is_steep = ~(_fall(density, loc, root.mT) < STEEP)  # or not finite
    if not is_steep.any():
        return root
    size = torch.ones_like(loc)
    size[is_steep] = reach_of(density, loc, root.mT[is_steep]).clamp(max=1).to(size)
    return root * size


def _elbos(density: Density, gaussians: list[_Gaussian], num_draws: int) -> list[float]:
    """ELBOs up to a constant, from mirrored pairs of draws with the same noise for all."""
    if not gaussians:
        return []
    values = []
    loc = gaussians[0].loc
    noise = torch.randn(num_draws // 2, len(loc), dtype=torch.float64).to(loc.device)
    noise = torch.cat([noise, -noise])
    size = max(1, density.joint.num_at_once // num_draws)
    for start in range(0, len(gaussians), size):
        part = gaussians[start : start + size]
        draws = torch.stack([loc + covariance.stretch(noise) for loc, covariance in part])
        values.append(density(draws, together=num_draws).mean(-1))
    elbos = torch.cat(values) + torch.stack([g.covariance.log_det_root for g in gaussians])
    return [elbo if math.isfinite(elbo) else -math.inf for elbo in elbos.tolist()]
