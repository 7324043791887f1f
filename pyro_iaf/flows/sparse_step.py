r"""The last step of a guide over many latents: a few globals, and given them sparse conditionals.

.. math::
    g = g_0 + R v, \qquad x_i = u_i - m_i(v) =
    \sum_{p} (a_{ip}(v) \, x_p + c_{ip} \, r_p^2)
    + s_i(v) \, e^{\sum_p d_{ip} r_p} \, b_i(\varepsilon_i), \qquad r_p = \tau(x_p / \sigma_p)

where :math:`p` are the few parents of :math:`i` (:mod:`pyro_iaf.solvers.sparse`), of which
:math:`\sigma_p` is the spread at the start, and :math:`b` bends each coordinate as in
:mod:`pyro_iaf.flows.sinh_arcsinh`. With c and d of zero, as at the start, the others are normal
given the globals, with a precision whose triangular factor is sparse. With them a parent may be the
scale of its child, or bend it. Means, coefficients and logarithms of scales are linear in bounded
features of the globals,

.. math::
    \phi(v) = (1, \; \tau(v_j), \; \tau(v_j) \tau(v_k), \; \tau(v_j)^3, \;
    \tanh(w_h \cdot v + c_h)), \qquad \tau(v) = 10 \tanh(v / 10).

A draw takes the rounds of the factor one after the other; the inverse and the density take all at
once. Both cost O(non-zeros).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._validation import module_repr
from ..solvers.fused import ScoredPass
from ..solvers.path_score import Solver, Step, Within
from ..solvers.sparse import Elimination, eliminated
from .base import SinglePass

__all__ = ["Coordinates", "Leading", "SparseStep", "feature_degrees", "features"]

# Up to so many globals there are features of their squares, products and cubes.
MOST_SQUARED = 12

# About so many standard deviations are told apart.
BOUND = 10.0

# Units of what is learned: a step of an optimiser should not spoil a start that is nearly right.
# Changes that move with the globals are many.
UNIT, UNIT_OF_MOVING = 0.3, 0.1

# The spreads of the others are found by so many draws.
NUM_SPREAD = 64

# How many features are learned.
NUM_LEARNED = 8


def _bounded(x: Tensor) -> Tensor:
    """The identity near zero, and nowhere more than ``BOUND``."""
    return BOUND * (x / BOUND).tanh()


def features(v: Tensor) -> Tensor:
    """One, and bounded functions of globals of shape ``(..., G)``."""
    bounded = _bounded(v)
    found = [torch.ones_like(v[..., :1]), bounded]
    G = v.shape[-1]
    if 0 < G <= MOST_SQUARED:
        j, k = torch.triu_indices(G, G, device=v.device)
        found += [bounded[..., j] * bounded[..., k], bounded**3]
    return torch.cat(found, -1) if G else v.new_ones(*v.shape[:-1], 1)


def feature_degrees(num_globals: int) -> Tensor:
    """The degree of each, on the CPU."""
    G = num_globals
    of_degree = [1, G, *((G * (G + 1) // 2, G) if G <= MOST_SQUARED else ())]
    return torch.arange(len(of_degree), device="cpu").repeat_interleave(
        torch.tensor(of_degree, device="cpu")
    )


class Leading(SinglePass):
    """A flow that acts on the first coordinates, and leaves the others as they are.

    Args:
        flow: A flow on vectors of G coordinates.
        input_dim: The number of all coordinates.
    """

    def __init__(self, flow: Any, input_dim: int) -> None:
        super().__init__()
        self.flow, self.input_dim = flow, input_dim

    @property
    def num_leading(self) -> int:
        """How many coordinates the flow acts on."""
        return int(self.flow.input_dim)

    @property
    def _sources(self) -> tuple[object, ...]:
        sources: tuple[object, ...] = self.flow._sources
        return sources

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._joined(self.flow._compute(x[..., : self.num_leading]), x)

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        return self._joined(self.flow._undo(y[..., : self.num_leading], method), y)

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        G = self.num_leading
        return self._joined(self.flow._undo_known(x[..., :G], y[..., :G]), y)

    def _joined(self, found: tuple[Tensor, Tensor], whole: Tensor) -> tuple[Tensor, Tensor]:
        value, log_slope = found
        rest = whole[..., self.num_leading :]
        return torch.cat([value, rest], -1), torch.cat([log_slope, torch.zeros_like(rest)], -1)

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        G = self.num_leading
        return torch.cat([self.flow.solve_transposed(x[..., :G], v[..., :G]), v[..., G:]], -1)

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        value, log_slope, step = self.flow.pass_with_score(x[..., : self.num_leading], by_kernel)
        return *self._joined((value, log_slope), x), Within(step, self.num_leading)

    def pass_at_once(self, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass | None:
        G = self.num_leading
        known = self.flow.pass_at_once(x[..., :G].contiguous(), log_prob, score[..., :G])
        if known is None:
            return None
        return ScoredPass(
            torch.cat([known.value, x[..., G:]], -1),
            known.log_prob,
            torch.cat([known.score, score[..., G:]], -1),
        )


class SparseStep(SinglePass):
    """Globals, and sparse conditionals of all other latents.

    Args:
        elimination: The order of the others, and the parents of each.
        loc: Where the globals are if ``v`` is zero, of shape ``(G,)``.
        scale_tril: The scale of the globals, of shape ``(G, G)``.
        coefficients: Of each fixed feature for the means, the logarithms of scales, and the
            coefficients of parents, of shape ``(F, 2 n + E)``.
    """

    edges_frame: Tensor
    globals_frame: Tensor
    start_frame: Tensor
    spread_frame: Tensor
    unit_frame: Tensor

    def __init__(
        self, elimination: Elimination, loc: Tensor, scale_tril: Tensor, coefficients: Tensor
    ) -> None:
        super().__init__()
        self.elimination = elimination
        G, n = len(loc), len(elimination.order)
        self.num_globals, self.num_others, self.input_dim = G, n, G + n
        self.register_buffer("edges_frame", elimination.edges.clone())
        self.register_buffer("globals_frame", torch.cat([loc.unsqueeze(0), scale_tril]))
        self.register_buffer(
            "start_frame", coefficients.clone(memory_format=torch.contiguous_format)
        )
        elimination = elimination.mapped(lambda index: index.to(coefficients.device))
        spread = _spread(elimination, coefficients[0])
        self.register_buffer("spread_frame", spread)
        self.register_buffer("unit_frame", _units(elimination, coefficients[0], spread))
        num_learned = NUM_LEARNED if G else 0
        self.changes = nn.Parameter(
            coefficients.new_zeros(len(coefficients) + num_learned, coefficients.shape[1])
        )
        self.bend = nn.Parameter(coefficients.new_zeros(2, n))  # skewness, log tail weight
        # of parents on means and on logarithms of scales, beyond what is linear
        self.by_parents = nn.Parameter(coefficients.new_zeros(2, elimination.num_coefficients))
        weight = torch.randn(num_learned, G + 1) / math.sqrt(G + 1)
        self.weight = nn.Parameter(weight.to(coefficients))

    @property
    def _sources(self) -> tuple[object, ...]:
        frames = self.globals_frame, self.start_frame, self.spread_frame, self.unit_frame
        return (self.changes, self.bend, self.by_parents, self.weight, *frames)

    @property
    def loc(self) -> Tensor:
        """Where the globals are if ``v`` is zero, of shape ``(G,)``."""
        return self.globals_frame[0]

    @property
    def scale_tril(self) -> Tensor:
        """The scale of the globals, of shape ``(G, G)``."""
        return self.globals_frame[1:]

    def _given(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The means, logarithms of scales and coefficients for globals."""
        fixed, n = features(v), self.num_others
        learned = (v @ self.weight[:, :-1].mT + self.weight[:, -1]).tanh()
        moving = UNIT_OF_MOVING / UNIT * torch.cat([fixed[..., 1:], learned], -1)
        changes = self.changes[0] + moving @ self.changes[1:]
        found = fixed @ self.start_frame + changes * self.unit_frame
        mean, log_scale, coefficients = found.split([n, n, found.shape[-1] - 2 * n], -1)
        none = torch.zeros_like(mean[..., :1])
        return mean, log_scale, torch.cat([coefficients, none], -1)

    def _parent_coefficients(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Coefficients of each parent: linear, of its square, of the log scale; and its spread.

        They are as in :attr:`.Elimination.all_slots`.
        """
        elimination, n = self.elimination, self.num_others
        slots, children = elimination.all_slots, elimination.children
        of_mean = self.by_parents[0] * self.unit_frame[children]
        of_scale = self.by_parents[1] * self.unit_frame[children + n]
        none = of_mean.new_zeros(1)
        return (
            coefficients[..., slots],
            torch.cat([of_mean, none])[slots],
            torch.cat([of_scale, none])[slots],
            self.spread_frame[elimination.all_parents],
        )

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, noise = x.split([self.num_globals, self.num_others], -1)
        mean, log_scale, coefficients = self._given(v)
        skew, log_tail = self.bend
        bent = (log_tail.exp() * noise.asinh() + skew).sinh()
        others, log_scale = self._drawn(coefficients, log_scale, bent)
        value = torch.cat([self.loc + v @ self.scale_tril.mT, mean + others], -1)
        return value, self._log_slope(v, noise, bent, log_scale)

    def _drawn(
        self, coefficients: Tensor, log_scale: Tensor, bent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The others without their means, round by round, and the logarithms of their scales."""
        elimination, x, log_scales = self.elimination, bent[..., :0], []
        by_round = map(elimination.by_round, self._parent_coefficients(coefficients))
        for each, *of_parents in zip(elimination.rounds, *by_round, strict=True):
            here = slice(each.first, each.last)
            known, log_factor = (part.sum(-1) for part in _parent_terms(each.near(x), *of_parents))
            log_scales.append(log_scale[..., here] + log_factor)
            x = torch.cat([x, known + log_scales[-1].exp() * bent[..., here]], -1)
        return x, torch.cat(log_scales, -1)

    def _bent_noise(
        self, coefficients: Tensor, log_scale: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The bent noise of the others without their means, and the logarithms of scales."""
        elimination = self.elimination
        near = x[..., elimination.all_parents]
        known, log_factor = (
            torch.cat([part.sum(-1) for part in elimination.by_round(terms)], -1)
            for terms in _parent_terms(near, *self._parent_coefficients(coefficients))
        )
        log_scale = log_scale + log_factor
        return (x - known) * (-log_scale).exp(), log_scale

    def _log_slope(self, v: Tensor, noise: Tensor, bent: Tensor, log_scale: Tensor) -> Tensor:
        of_globals = self.scale_tril.diagonal().log().expand_as(v)
        ratio = ((1 + bent.square()).log() - (1 + noise.square()).log()) / 2
        return torch.cat([of_globals, log_scale + self.bend[1] + ratio], -1)

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        g, others = y.split([self.num_globals, self.num_others], -1)
        away = (g - self.loc).unsqueeze(-1)
        v = torch.linalg.solve_triangular(self.scale_tril, away, upper=False).squeeze(-1)
        mean, log_scale, coefficients = self._given(v)
        bent, log_scale = self._bent_noise(coefficients, log_scale, others - mean)
        noise = ((bent.asinh() - self.bend[0]) / self.bend[1].exp()).sinh()
        x = torch.cat([v, noise], -1)
        return x, self._log_slope(v, noise, bent, log_scale)

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        return _solved_by_inverse(self, x, v)  # which has no loop over rounds

    @torch.no_grad()
    def widen_tails(self, by: float) -> None:
        """Adds ``by`` to the log weights of all tails."""
        self.bend[1].add_(by)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        edges = self.edges_frame
        if not torch.equal(edges.cpu(), self.elimination.edges.cpu()):
            found = eliminated(self.num_others, edges.tolist())
            self.elimination = found.mapped(lambda index: index.to(edges.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseStep:
        super()._apply(fn, recurse)
        self.elimination = self.elimination.mapped(fn)
        return self

    def __repr__(self) -> str:
        return module_repr(
            self,
            f"{self.num_globals} globals",
            f"{self.num_others} others",
            f"{self.elimination.num_coefficients} coefficients",
        )


def _parent_terms(
    x: Tensor, linear: Tensor, squared: Tensor, of_scale: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """Terms of the mean and of the logarithm of the scale of a child, one for each parent."""
    ratio = _bounded(x / spread)
    return linear * x + squared * ratio.square(), of_scale * ratio


@torch.no_grad()
def _spread(elimination: Elimination, start: Tensor) -> Tensor:
    """The spread of each of the others where the globals are at their loc."""
    n = len(elimination.order)
    scale, coefficients = start[n : 2 * n].exp(), start[2 * n :]
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(NUM_SPREAD, n, generator=generator, device="cpu").to(start)
    padded = torch.cat([coefficients, start.new_zeros(1)])
    return elimination.draw(padded, scale * noise).square().mean(0).sqrt()


@torch.no_grad()
def _units(elimination: Elimination, start: Tensor, spread: Tensor) -> Tensor:
    """In which units changes are learned, so that a step of an optimiser moves no draw by much.

    Those of means are in units of the conditional scale, and those of coefficients of its ratio to
    the spread of the parent, where that is larger.
    """
    n = len(elimination.order)
    scale = start[n : 2 * n].exp()
    ratio = scale[elimination.children] / spread[elimination.parents]
    units = torch.cat([scale, torch.ones_like(scale), ratio.clamp(max=1.0)])
    units *= UNIT * min(1.0, (100 / n) ** 0.5)
    return units


class Coordinates(SinglePass):
    """From globals and others, in their order of drawing, to latents in the order of the model.

    Along a run, of which others are the cumulative sums, latents are their differences. The
    determinant is one.

    Args:
        place: Of each latent its place among globals and others, of shape ``(D,)``.
        before: Of each latent the latent before it in its run, or D.
    """

    place_frame: Tensor
    before_frame: Tensor

    def __init__(self, place: Tensor, before: Tensor) -> None:
        super().__init__()
        self.input_dim = len(place)
        self.register_buffer("place_frame", place)
        self.register_buffer("before_frame", before.clone())
        self.runs = _runs(before)

    @property
    def _sources(self) -> tuple[object, ...]:
        return (self.place_frame, self.before_frame)

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sums = x[..., self.place_frame]
        if not self.runs:
            return sums, torch.zeros_like(sums)
        padded = torch.cat([sums, torch.zeros_like(sums[..., :1])], -1)
        return sums - padded[..., self.before_frame], torch.zeros_like(sums)

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        sums = y
        for run in self.runs:
            sums = sums.index_copy(-1, run.flatten(), y[..., run].cumsum(-1).flatten(-2))
        return sums[..., self.place_frame.argsort()], torch.zeros_like(y)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.runs = _runs(self.before_frame)

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        return _solved_by_inverse(self, x, v)

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        y, log_slope = self._compute(x)
        return y, log_slope, Solver(self, x.detach(), torch.zeros_like(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coordinates:
        super()._apply(fn, recurse)
        self.runs = [fn(run) for run in self.runs]
        return self


def _solved_by_inverse(part: SinglePass, x: Tensor, v: Tensor) -> Tensor:
    """The ``u`` with ``J^T u = v``: a gradient of the inverse, whose Jacobian is that of J."""
    with torch.enable_grad():
        y = part._compute(x.detach())[0].detach().requires_grad_()
        (u,) = torch.autograd.grad(part._undo(y)[0], y, v)
    return u


def _runs(before: Tensor) -> list[Tensor]:
    """The runs of each length, as the rows of a matrix of indices."""
    after = {b: k for k, b in enumerate(before.tolist()) if b < len(before)}
    by_length: dict[int, list[list[int]]] = {}
    for first in sorted(set(after) - set(after.values())):
        run = [first]
        while run[-1] in after:
            run.append(after[run[-1]])
        by_length.setdefault(len(run), []).append(run)
    return [torch.tensor(rows, device=before.device) for rows in by_length.values()]
