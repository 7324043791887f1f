r"""Where a structured guide starts: a Laplace approximation nested in the globals.

For globals :math:`g` the others have a mode :math:`u^*(g)` and there a precision :math:`Q(g)`,
found by Newton's method with sparse factors. So up to a constant

.. math::
    \log p(g \mid \text{data}) \approx \ell(g, u^*(g)) - \tfrac12 \log |Q(g)|,

whose mode and curvature are found by finite differences. At draws of that normal modes and factors
are regressed on the features of :mod:`pyro_iaf.flows.sparse_step`. (Rue, Martino and Chopin 2009,
https://doi.org/10.1111/j.1467-9868.2008.00700.x)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..flows.sparse_step import Coordinates, feature_degrees, features
from ..models.log_joint import LogJoint
from ..solvers.sparse import Factor, coloured
from .structure import Structure

__all__ = ["NestedStart", "nested_laplace"]

# Newton's method for the others takes at most so many steps, and ends when steps promise less.
NUM_NEWTON, MIN_GAIN = 30, 1e-8
STEP_SIZES = (1.0, 0.5, 0.2, 0.05, 0.01)

# Derivatives are averaged so often, over as many pairs of draws as make about so many points. There
# are at most so many numbers in one run of the model.
NUM_AVERAGES, FEWEST_PAIRS, MOST_PAIRS, NUM_POINTS = 3, 4, 64, 512
MOST_NUMBERS = 2**20

# The globals' search takes at most so many steps.
NUM_STEPS = 60

MIN_GAIN_OF_GLOBALS = 1e-5

# Steps of finite differences, in units of about a standard deviation.
DIFFERENCE = 0.05

# Up to so many globals the curvature of the marginal is taken by finite differences.
MOST_EXACT = 12

# Conditionals are regressed at so many draws for each feature, which are so much wider.
DRAWS_PER_FEATURE, WIDER = 4, 1.7


class NestedStart(NamedTuple):
    """Where a structured guide starts: the globals' loc and scale, and the others' conditionals.

    Attributes:
        loc: Of shape ``(G,)``.
        scale_tril: Of shape ``(G, G)``.
        coefficients: As for :class:`~pyro_iaf.flows.sparse_step.SparseStep`.
    """

    loc: Tensor
    scale_tril: Tensor
    coefficients: Tensor


class _Derivatives(NamedTuple):
    """Log densities, gradients, and minus second derivatives on the diagonal and the edges."""

    value: Tensor
    slope: Tensor
    diagonal: Tensor
    edges: Tensor


class _Conditional:
    """The density of the others in their coordinates, for many values of the globals at once."""

    def __init__(self, joint: LogJoint, structure: Structure, device: torch.device) -> None:
        self.joint, self.device = joint, device
        with torch.device("cpu"):  # as the structure is, whatever the default
            self._index(structure)

    def _index(self, structure: Structure) -> None:
        """Places, colours and edges in the order of drawing."""
        device = self.device
        self.coordinates = Coordinates(structure.place, structure.before).to(device)
        elimination = structure.elimination
        n = len(elimination.order)
        place = torch.empty(n, dtype=torch.long)
        place[elimination.order] = torch.arange(n)
        G, D = len(structure.globals), len(structure.before)
        number = torch.full((D,), -1)
        number[structure.others] = torch.arange(n)
        edges = number[structure.edges]
        self.colours = coloured(n, edges.tolist())
        self.num_colours = int(self.colours.max()) + 1
        own = set(map(tuple, edges.sort(1).values.tolist()))
        pairs = torch.stack([elimination.children, elimination.parents], 1).sort(1).values
        self.is_edge = torch.tensor(
            [tuple(pair) in own for pair in pairs.tolist()], dtype=torch.bool
        )
        self.G, self.n = G, n
        self.colours, self.is_edge = self.colours.to(device), self.is_edge.to(device)
        self.elimination = elimination.mapped(lambda index: index.to(device))

    def value(self, g: Tensor, u: Tensor) -> Tensor:
        z = self.coordinates(torch.cat([g, u], -1))
        found: Tensor = self.joint(z)
        return found

    def derivatives(self, g: Tensor, u: Tensor) -> _Derivatives:
        """Values, gradients in the others, and minus their second derivatives."""
        most = max(1, min(self.joint.num_at_once, MOST_NUMBERS // self.n))
        if len(g) > most:
            pairs = zip(g.split(most), u.split(most), strict=True)
            parts = [self.derivatives(*pair) for pair in pairs]
            return _Derivatives(*map(torch.cat, zip(*parts, strict=True)))
        columns = []
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.value(g, u)
            (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            for colour in range(self.num_colours):
                total = (slope * (self.colours == colour).to(slope)).sum()
                columns.append(torch.autograd.grad(total, u, retain_graph=True)[0])
        products = -torch.stack(columns, -1)  # (K, n, colours)
        elimination = self.elimination
        diagonal = products[:, torch.arange(self.n, device=self.device), self.colours]
        edges = products[:, elimination.children, self.colours[elimination.parents]]
        return _Derivatives(value.detach(), slope.detach(), diagonal, edges * self.is_edge)

    def factor(self, found: _Derivatives) -> Factor:
        """Factors of minus the second derivatives."""
        return self.elimination.factor(found.diagonal, found.edges)

    @torch.no_grad()
    def solve(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Factor]:
        """Modes of the others for globals, log densities there, and factors."""
        for _ in range(NUM_NEWTON):
            found = self.derivatives(g, u)
            value, slope, factor = found.value, found.slope, self.factor(found)
            step = factor.solve(slope)
            gain = (slope * step).sum(-1)
            if not (gain > MIN_GAIN).any():
                break
            best, best_u = value, u
            for size in STEP_SIZES:
                ends = u + size * step
                there = self.value(g, ends).nan_to_num(-math.inf, -math.inf, -math.inf)
                is_better = there > best
                best = torch.where(is_better, there, best)
                best_u = torch.where(is_better.unsqueeze(-1), ends, best_u)
                if size == 1.0 and (is_better | (gain < MIN_GAIN)).all():
                    break
            if (best_u == u).all():
                break
            u = best_u
        else:
            found = self.derivatives(g, u)
            value, factor = found.value, self.factor(found)
        return u, value, factor

    @torch.no_grad()
    def normal(self, g: Tensor, u: Tensor, factor: Factor) -> tuple[Tensor, Factor]:
        """The normal with the highest ELBO given globals: its means and factors.

        Iterates on the averages of derivatives over draws in mirrored pairs, from Laplace's normal.
        (Opper and Archambeau 2009, https://doi.org/10.1162/neco.2008.08-07-592)
        """
        num_pairs = min(max(FEWEST_PAIRS, NUM_POINTS // len(g)), MOST_PAIRS)
        noise = torch.randn(num_pairs, 1, self.n).to(u)
        noise = torch.cat([noise, -noise])
        for _ in range(NUM_AVERAGES):
            away = factor.elimination.draw(factor.coefficients, noise / factor.precisions.sqrt())
            there = (u + away).flatten(0, 1)
            found = self.derivatives(g.repeat(len(noise), 1), there)
            mean = _Derivatives(*(part.unflatten(0, (len(noise), -1)).mean(0) for part in found))
            factor = self.factor(mean)
            u = u + factor.solve(mean.slope)
        return u, factor

    def marginal(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of globals by Laplace's method, and the modes of the others."""
        u, value, factor = self.solve(g, u)
        found = value - factor.log_det() / 2
        return found.nan_to_num(-math.inf, -math.inf, -math.inf), u


@torch.no_grad()
def nested_laplace(joint: LogJoint, structure: Structure, loc: Tensor) -> Iterator[NestedStart]:
    """Starts of a structured guide, at modes, then by averages; none if no mode is found.

    Args:
        joint: The log density.
        structure: Its globals, and the graph of the others.
        loc: Where the search begins, of shape ``(D,)``, in the model's order.
    """
    conditional = _Conditional(joint, structure, loc.device)
    G = conditional.G
    y = conditional.coordinates.inv(loc)
    g, u = y[:G].unsqueeze(0), y[G:].unsqueeze(0)
    scale = loc.new_ones(G)
    value, u = conditional.marginal(g, u)
    if not value.isfinite().all():
        return
    if G:
        g, u, scale = _climb(conditional, g, u, value)
    scale_tril = _scale(conditional, g, u, scale) if G else loc.new_zeros(0, 0)
    yield from _regressed(conditional, g, u, scale_tril)


def _climb(
    conditional: _Conditional, g: Tensor, u: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mode of the globals by BFGS with finite differences, and a scale for each of them."""
    G = g.shape[1]
    scale = torch.ones_like(g[0])
    for _ in range(2):  # the second time in the scales that the first has found
        inverse, slope, step = torch.eye(G).to(g), None, torch.zeros_like(scale)
        for _ in range(NUM_STEPS):
            h = DIFFERENCE * scale
            shifts = torch.cat([h.diag(), -h.diag()])
            values, _ = conditional.marginal(g + shifts, u.expand(2 * G, -1))
            up, down = values.view(2, G)
            if not (up.isfinite() & down.isfinite()).all():
                scale, inverse, slope = scale / 2, torch.eye(G).to(g), None
                continue
            new_slope = (up - down) / (2 * DIFFERENCE)  # in units of the scale
            if slope is not None:
                inverse = _updated(inverse, step, slope - new_slope)
            else:
                second = (2 * value - up - down) / DIFFERENCE**2
                inverse = (1 / second.clamp(min=0.1)).clamp(max=4.0).diag()
            slope = new_slope
            direction = inverse @ slope
            direction = direction * min(1.0, 3.0 / (direction.norm().item() + 1e-12))
            if (slope @ direction).item() < MIN_GAIN_OF_GLOBALS:
                break
            sizes = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.01]).to(g).unsqueeze(-1)
            ends = g + sizes * direction * scale
            found, modes = conditional.marginal(ends, u.expand(len(sizes), -1))
            k = int(found.argmax())
            if not found[k] > value:
                break
            step = (ends[k] - g[0]) / scale
            g, u, value = ends[k : k + 1], modes[k : k + 1], found[k : k + 1]
        root = inverse.diagonal().clamp(min=1e-8).sqrt()
        scale = scale * root
    return g, u, scale


def _updated(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The inverse Hessian of BFGS after a step."""
    sy = s @ y
    if not sy > 1e-10 * s.norm() * y.norm():
        return inverse
    identity = torch.eye(len(s)).to(s)
    left = identity - torch.outer(s, y) / sy
    return left @ inverse @ left.mT + torch.outer(s, s) / sy


def _scale(conditional: _Conditional, g: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """The scale of the globals by the curvature of their marginal."""
    G = len(scale)
    h = 0.5 * scale
    if G > MOST_EXACT:
        return scale.diag()
    j, k = torch.triu_indices(G, G, 1, device=g.device)
    steps = h.diag()
    shifts = torch.cat(
        [torch.zeros_like(g), steps, -steps, steps[j] + steps[k], -steps[j] - steps[k]]
    )
    values, _ = conditional.marginal(g + shifts, u.expand(len(shifts), -1))
    centre, up, down, both_up, both_down = values.split([1, G, G, len(j), len(j)])
    precision = torch.diag(2 * centre - up - down)
    # f(+j+k) + f(-j-k) - 2 f = H_jj + H_kk + 2 H_jk, in units of h
    mixed = (
        2 * centre - both_up - both_down - precision.diagonal()[j] - precision.diagonal()[k]
    ) / 2
    precision[j, k] = precision[k, j] = mixed
    if not precision.isfinite().all():
        return scale.diag()
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(min=0.02)
    covariance = (vectors / values) @ vectors.mT
    found: Tensor = h.unsqueeze(-1) * torch.linalg.cholesky(covariance)
    return found


def _regressed(
    conditional: _Conditional, g: Tensor, u: Tensor, scale_tril: Tensor
) -> Iterator[NestedStart]:
    """Modes and factors at draws of the globals, and averages, on features of each degree.

    The highest degree is the nearest where the draws are, and may be the worst farther out.
    """
    G = conditional.G
    degrees = feature_degrees(G).to(g.device)
    num = DRAWS_PER_FEATURE * len(degrees) if G else 1
    v = WIDER * torch.randn(num, G).to(g)
    v[0] = 0.0
    weight = (-v.square().sum(-1, keepdim=True) / 8).exp()
    at = g + v @ scale_tril.mT
    modes, value, factor = conditional.solve(at, u.expand(num, -1))
    for is_averaged in (False, True):
        found = conditional.normal(at, modes, factor) if is_averaged else (modes, factor)
        targets = _targets(*found)
        usable = value.isfinite() & targets.isfinite().all(-1)
        phi, w, wanted = features(v[usable]), weight[usable], weight[usable] * targets[usable]
        for degree in degrees.unique()[-3:].flip(0).tolist():
            used = degrees <= degree
            if len(phi) < int(used.sum()):
                continue
            coefficients = targets.new_zeros(len(degrees), targets.shape[1])
            coefficients[used] = torch.linalg.lstsq(w * phi[:, used], wanted).solution
            yield NestedStart(g[0], scale_tril, coefficients)


def _targets(means: Tensor, factor: Factor) -> Tensor:
    """What features are fitted to: means, logarithms of scales, and coefficients."""
    log_scales = -factor.precisions.log() / 2
    return torch.cat([means, log_scales, factor.coefficients[:, :-1]], 1)
