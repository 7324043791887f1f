r"""Where a guide starts: a location and a scale found before SVI begins.

From several points a path climbs the log joint density :math:`\ell`. At each of its points
:math:`z` the curvature makes two Gaussians,

.. math::
    N(z, \Sigma) \quad\text{and}\quad N(z + \Sigma \nabla \ell(z), \Sigma), \qquad
    \Sigma = |{-\nabla^2 \ell(z)}|^{-1},

and the one of the highest ELBO is where the guide starts: somewhere on the way, not at its end,
where the way leads into the neck of a funnel. Where second derivatives cost too much,
:math:`\Sigma` comes from the steps of the path itself (L-BFGS), as a diagonal and a matrix of low
rank. (Zhang et al. 2022, https://arxiv.org/abs/2108.03782)

A density may have no curvature, as that of a Laplace distribution, which is linear on both sides of
its kink. Along such directions the scale is how far one can go until the density has fallen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.log_joint import LogJoint
from .covariances import Dense, LowRank, Spread

__all__ = ["Start", "StartNotFound", "pathfinder"]

NUM_PATHS = 4

# The latents up to which every path takes second derivatives, and up to which the best one does.
EXACT_PATHS, EXACT_END = 64, 400

# L-BFGS remembers so many steps, and takes so many more of them than Newton's method.
NUM_HISTORY, NUM_STEPS, NUM_STEPS_EXACT = 10, 200, 60

# Step sizes that are tried together, and the share of the promised gain that they have to bring.
STEP_SIZES = (0.5, 0.25, 2.0**-3, 2.0**-4, 2.0**-6, 2.0**-9, 2.0**-13, 2.0**-18)
ARMIJO = 1e-4

# A path ends when a step promises less than this, in nats.
ENOUGH = 1e-4

# The scale along a direction without curvature is a step after which the density has fallen by what
# a normal's has after a standard deviation, in nats; and so it is where after the scale that
# curvature tells the density has fallen by much more.
FALL, STEEP = 0.5, 4.0
REACHES = 2.0 ** torch.arange(-20, 21, dtype=torch.float64)

# So many of the Gaussians on a path of L-BFGS are looked at.
NUM_LOOKED_AT = 40

# ELBOs are estimated from so many draws for all the Gaussians, then from more for the best ones.
NUM_DRAWS, NUM_BEST, NUM_DRAWS_BEST = 20, 10, 200


# Where all of them have draws without a density, they are shrunk by these factors.
SHRINKING = (1.0, 0.4, 0.16, 0.06)

# Numbers that all those draws may make a model's sites hold, one draw after the other.
MAX_WORK = 2**28

# Numbers that the sites of all paths may hold; with more data there are fewer paths.
MAX_NUMBERS = 2**18


class Start(NamedTuple):
    """Where a guide starts: a loc, and a scale for each latent or a lower-triangular matrix."""

    loc: Tensor
    scale: Tensor


class StartNotFound(Exception):  # noqa: N818
    """No path found a start; says why."""


def pathfinder(joint: LogJoint, loc: Tensor, dense: bool) -> Start:
    """The best Gaussian on the way to the modes of a log joint density.

    Args:
        joint: The log density.
        loc: Where the first path begins, of shape ``(D,)``. The others begin between -2 and 2.
        dense: Whether the scale may be a matrix.

    Raises:
        StartNotFound: If the density is not finite where the paths begin, has no Gaussian of
            finite ELBO near them, or is another one at each call.
    """
    reason = joint.check(torch.stack([loc, *(loc + torch.randn(6, len(loc)).to(loc))]))
    if reason is not None:
        raise StartNotFound(reason)
    exact = len(loc) <= EXACT_PATHS
    try:
        best = _best(joint, _climb(joint, _beginnings(joint, loc), exact), loc.dtype)
        if not exact and best is not None:
            best = _best(joint, [best, *_last_look(joint, best.loc.to(loc))], loc.dtype)
    except StartNotFound:
        raise
    except Exception as error:  # of the model, whatever it is: the guide has another start
        raise StartNotFound(f"a path ended in {type(error).__name__}: {error}") from error
    if best is None:
        raise StartNotFound("no Gaussian on the way uphill has a finite ELBO")
    scale = best.spread.root if dense and isinstance(best.spread, Dense) else best.spread.scale
    return Start(best.loc.to(loc), scale.to(loc))


def _last_look(joint: LogJoint, loc: Tensor) -> list[_Gaussian]:
    """Gaussians near the best one on a path of L-BFGS, by second derivatives there."""
    if len(loc) <= EXACT_END:
        return _climb(joint, loc.unsqueeze(0), True)
    squares = _squares(joint, loc)
    return [] if squares is None else [_Gaussian(loc.double(), LowRank(squares, []))]


def _squares(joint: LogJoint, loc: Tensor) -> Tensor | None:
    """The variances of each latent given the others, if the model can be differentiated twice."""
    try:
        second = joint.diagonal(loc).double().abs()
    except (NotImplementedError, RuntimeError):
        return None
    usable = second.isfinite() & (second > 0)
    return (1 / second).where(usable, 1.0) if usable.any() else None


def _beginnings(joint: LogJoint, loc: Tensor) -> Tensor:
    """Where the paths begin: points of finite density, ``loc`` first if it is one."""
    num_paths = max(1, min(NUM_PATHS if joint.at_once else 2, MAX_NUMBERS // joint.num_numbers))
    for reach in (2.0, 0.5, 0.05):
        around = torch.empty(8 * num_paths, len(loc), dtype=torch.float64).uniform_(-reach, reach)
        points = torch.cat([loc.unsqueeze(0), around.to(loc)])
        value, slope = joint.gradient(points)
        finite = value.isfinite() & slope.isfinite().all(-1)
        if finite.any():
            return points[finite][:num_paths]
    raise StartNotFound("its log density, or the gradient of it, is finite at no point tried")


# Climbing


class _Gaussian(NamedTuple):
    loc: Tensor
    spread: Spread


class _Path:
    """A path uphill: where it is, and the Gaussians on its way."""

    def __init__(self, z: Tensor, value: Tensor, slope: Tensor, eps: float) -> None:
        self.z, self.value, self.slope, self.eps = z, value, slope, eps
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.diagonal = torch.ones_like(slope)
        self.gaussians: list[_Gaussian] = []
        self.climbs = True

    def aim(self, joint: LogJoint, dtype: torch.dtype, hessian: Tensor | None) -> None:
        """Finds the next step, and how much it promises."""
        if hessian is not None and not hessian.isfinite().all():
            self.climbs = False
            return
        spread: Spread
        if hessian is None:
            spread = LowRank(self.diagonal, self.steps)
        else:
            spread = Dense.of_precision(-hessian, lambda ways: _reach(joint, self.z, ways, dtype))
            self.gaussians.append(_Gaussian(self.z, spread))
        self.step = spread.times(self.slope)
        self.gaussians.append(_Gaussian(self.z + self.step, spread))
        self.gain = (self.step @ self.slope).item()
        self.climbs = ENOUGH < self.gain < math.inf

    @property
    def _rounding(self) -> Tensor:
        return 8 * self.eps * self.value.abs()

    def accepts(self, value: Tensor, size: float | Tensor) -> Tensor:
        """Whether steps of this size bring enough of what they promise."""
        return value >= self.value + ARMIJO * size * self.gain - self._rounding

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


def _climb(joint: LogJoint, points: Tensor, exact: bool) -> list[_Gaussian]:
    """The Gaussians on the paths from these points uphill."""
    dtype, eps = points.dtype, torch.finfo(points.dtype).eps
    points = points.double()
    live = paths = [
        _Path(*parts, eps) for parts in zip(points, *_evaluate(joint, points, dtype), strict=True)
    ]
    if not exact:
        for path in paths:  # units of their own, to begin with, or a step of length one
            squares = _squares(joint, path.z.to(dtype))
            path.diagonal /= path.slope.norm().clamp(min=1.0)
            path.diagonal = path.diagonal if squares is None else squares
    for _ in range(NUM_STEPS_EXACT if exact else NUM_STEPS):
        if not live:
            break
        hessians: Any = [None] * len(live)
        if exact:
            z = torch.stack([path.z for path in live])
            try:
                second = joint.hessian(z.to(dtype)).double()
            except (NotImplementedError, RuntimeError):
                second = z.new_zeros(len(z), 1, 1)
            # Nothing, or an error: something in the model can be differentiated once only.
            exact = bool((second != 0).flatten(1).any(-1).all())
            hessians = second if exact else hessians
        for path, hessian in zip(live, hessians, strict=True):
            path.aim(joint, dtype, hessian)
        live = [path for path in live if path.climbs]
        if not live:
            break
        ends = torch.stack([path.z + path.step for path in live])
        short = []
        for path, z, value, slope in zip(live, ends, *_evaluate(joint, ends, dtype), strict=True):
            if path.accepts(value, 1.0):
                path.move(z, value, slope)
            else:
                short.append(path)
        if short:
            _shorten(short, joint, dtype)
            live = [path for path in live if path.climbs]
    if not exact:
        for path in paths:
            path.gaussians = path.gaussians[
                :: -math.ceil(len(path.gaussians) / NUM_LOOKED_AT) or -1
            ]
    return [gaussian for path in paths for gaussian in path.gaussians]


def _evaluate(joint: LogJoint, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    value, slope = joint.gradient(z.to(dtype))
    usable = value.isfinite() & slope.isfinite().all(-1)
    return torch.where(usable, value.double(), -torch.inf), slope.double()


def _fall(joint: LogJoint, z: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much the density has fallen after steps both ways, in the mean, less rounding."""
    ends = torch.stack([z + steps, z - steps])
    with torch.no_grad():
        value = joint(z.unsqueeze(0).to(dtype)).double()
        values = joint(ends.to(dtype).flatten(0, -2)).double().reshape(ends.shape[:-1])
    return value - values.mean(0) - 8 * torch.finfo(dtype).eps * value.abs()


def _reach(joint: LogJoint, z: Tensor, ways: Tensor, dtype: torch.dtype) -> Tensor:
    """How far one can go both ways along each of ``(J, D)`` directions, until it has fallen."""
    reaches = REACHES.to(ways)
    is_inside = _fall(joint, z, reaches.reshape(-1, 1, 1) * ways, dtype) <= FALL
    count = is_inside.cumprod(0).sum(0)  # a rise after the fall is another mode's
    return reaches[(count - 1).clamp(min=0)]


def _shorten(paths: list[_Path], joint: LogJoint, dtype: torch.dtype) -> None:
    """Moves paths whose full step is too long, by the best of several shorter ones."""
    sizes = torch.tensor(STEP_SIZES, dtype=torch.float64, device=paths[0].z.device)
    tried = torch.stack([path.z + sizes.unsqueeze(-1) * path.step for path in paths])
    with torch.no_grad():
        values = joint(tried.to(dtype).flatten(0, 1)).double().reshape(tried.shape[:-1])
    chosen = []
    for path, candidates, value in zip(paths, tried, values, strict=True):
        usable = value.isfinite() & path.accepts(value, sizes)
        value = torch.where(usable, value, -torch.inf)
        chosen.append(candidates[value.argmax()])
    ends = torch.stack(chosen)
    for path, z, value, slope in zip(paths, ends, *_evaluate(joint, ends, dtype), strict=True):
        path.climbs = bool(value.isfinite() & path.accepts(value, sizes[-1]))
        if path.climbs:
            path.move(z, value, slope)


def _best(joint: LogJoint, gaussians: list[_Gaussian], dtype: torch.dtype) -> _Gaussian | None:
    """The Gaussian of the highest ELBO, if any has a finite one."""
    most = max(8, MAX_WORK // joint.num_numbers // NUM_DRAWS)
    gaussians = gaussians[:: -math.ceil(len(gaussians) / most) or -1]  # the last ones of them
    few, many = (NUM_DRAWS, NUM_DRAWS_BEST) if joint.at_once else (4, 40)
    for factor in SHRINKING:
        shrunk = [_Gaussian(loc, spread.shrunk(factor)) for loc, spread in gaussians]
        elbos = _elbos(joint, shrunk, few, dtype)
        ranked = sorted(range(len(elbos)), key=lambda i: -elbos[i])
        best = [shrunk[i] for i in ranked[:NUM_BEST] if elbos[i] > -math.inf]
        if best:
            # A correlation at a point on the way to a funnel is none of the funnel's.
            best += [_Gaussian(g.loc, LowRank(g.spread.scale.square(), [])) for g in best]
            best += _bounded(joint, best[0], dtype)
            elbos = _elbos(joint, best, many, dtype)
            return best[max(range(len(best)), key=elbos.__getitem__)]
    return None


def _bounded(joint: LogJoint, gaussian: _Gaussian, dtype: torch.dtype) -> list[_Gaussian]:
    """The same Gaussian, narrowed where the density falls faster than its curvature tells."""
    loc, spread = gaussian
    if len(loc) > EXACT_PATHS:
        return []
    root = spread.root if isinstance(spread, Dense) else spread.scale.diag()
    is_steep = ~(_fall(joint, loc, root.mT, dtype) < STEEP)  # or not finite
    if not is_steep.any():
        return []
    size = torch.ones_like(loc)
    size[is_steep] = _reach(joint, loc, root.mT[is_steep], dtype).clamp(max=1)
    return [_Gaussian(loc, Dense(root * size))]


def _elbos(
    joint: LogJoint, gaussians: list[_Gaussian], num_draws: int, dtype: torch.dtype
) -> list[float]:
    """Estimates from draws in mirrored pairs, of the same noise for all."""
    if not gaussians:
        return []
    values, entropies = [], []
    loc = gaussians[0].loc
    noise = torch.randn(num_draws // 2, len(loc), dtype=torch.float64).to(loc.device)
    noise = torch.cat([noise, -noise])
    for part in _parts(gaussians, max(1, joint.num_at_once // num_draws)):
        draws = []
        for loc, spread in part:
            draws.append(loc + spread.stretch(noise))
            entropies.append(spread.log_det_root)
        with torch.no_grad():
            value = joint(torch.cat(draws).to(dtype), together=num_draws)
        values.append(value.double().reshape(-1, num_draws).mean(-1))
    elbos = torch.cat(values) + torch.stack(entropies)
    constant = math.log(2 * math.pi * math.e) / 2
    return [
        elbo + len(gaussian.loc) * constant if math.isfinite(elbo) else -math.inf
        for elbo, gaussian in zip(elbos.tolist(), gaussians, strict=True)
    ]


def _parts(things: list[Any], size: int) -> list[list[Any]]:
    return [things[i : i + size] for i in range(0, len(things), size)]
