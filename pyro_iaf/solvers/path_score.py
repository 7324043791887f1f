r"""The score of a flow's density at its own draws, for gradients that stick the landing.

Along the pass from noise to value, one flow :math:`x \mapsto y` after the other,

.. math::
    \nabla_y \log q(y) = J^{-\mathsf T} \bigl( \nabla_x \log q(x) - \nabla_x \log |\det J| \bigr).

The gradient of an ELBO through the draws alone, with this score held still, is right in mean
and has no variance where the guide is the posterior (Roeder et al. 2017,
https://arxiv.org/abs/1703.09194; for flows, Vaitl et al. 2022, https://arxiv.org/abs/2207.08219).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from ..nn.made import product
from ..nn.univariate import Derivatives
from .blockwise import Autoregressive, can_be_cut
from .fixed_point import runs_eagerly
from .score_kernel import MAX_WRITTEN_OUT, Carrier, by_jacobian, carried, has_kernel

__all__ = [
    "Carrier",
    "Drawn",
    "Scored",
    "Solver",
    "can_be_written_out",
    "draw_with_score",
    "noise_of_draw",
    "written_out",
]


class Scored(Protocol):
    """What a bijection owes, to be passed with the score of its density."""

    def forward_shape(self, shape: torch.Size) -> torch.Size: ...

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        """The value of ``x``, the log-slopes, and what the score is to be carried through."""

    def remember(self, x: Tensor, y: Tensor, log_slope: Tensor) -> None:
        """Keeps the pass from ``x`` for when ``y`` is scored."""

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        """The ``u`` with ``J^T u = v``, where J is the Jacobian at ``x``."""


class Solver(NamedTuple):
    """A flow that solves the transposed system by itself, with the slope of its log-determinant."""

    part: Scored
    x: Tensor
    slope: Tensor


Step: TypeAlias = Carrier | Solver


class Drawn(NamedTuple):
    """What flows make of noise, its log density, and the gradient of that there.

    Value and density have their graphs; the gradient has none. ``steps`` are what the gradient was
    carried through, of each flow.
    """

    value: Tensor
    log_prob: Tensor
    score: Tensor
    noise: Tensor
    parts: Sequence[Scored]
    steps: Sequence[Step]
    by_kernel: bool

    def solve_transposed(self, v: Tensor) -> Tensor:
        """The ``u`` with ``J^T u = v``, where J is the Jacobian of all the flows."""
        still: list[Step] = []
        for step in self.steps:
            if isinstance(step, Solver):
                still.append(step._replace(slope=torch.zeros_like(step.slope)))
            else:
                by_x, by_params, *_ = step.slopes
                slopes = Derivatives(by_x, by_params, None, [None] * len(by_params))
                still.append(step._replace(slopes=slopes))
        return _carry(v.expand_as(self.value), still, self.by_kernel)

    def lend_noise(self, leaf: Tensor) -> Tensor | None:
        """A leaf that :func:`noise_of_draw` gives for this leaf, which is the value; or None.

        Noise that has no parameters is a constant of the draw. What is held still, and listens to
        it, is a function of the value through it: its gradient in the noise is to be solved for by
        hand, once.
        """
        if self.noise.requires_grad or self.noise.shape != leaf.shape:
            return None
        noise = self.noise.detach().requires_grad_()
        _lent[leaf] = self.parts, noise
        return noise


_lent = WeakIdKeyDictionary()  # a draw without its graph: the flows that made it, and its noise


def noise_of_draw(stack: Any, value: Tensor) -> Tensor:
    """The noise that a stack of flows made a value of, or would have."""
    parts, noise = _lent.get(value, ((), None))
    if len(parts) == len(stack.parts) and all(map(operator.is_, parts, stack.parts)):
        return noise  # type: ignore[no-any-return]
    return stack.noise_and_log_det(value)[0]  # type: ignore[no-any-return]


def draw_with_score(
    parts: Iterable[Scored],
    x: Tensor,
    log_q: Tensor | None = None,
    score: Tensor | None = None,
    remember: bool = False,
) -> Drawn:
    """Carries noise through flows, with its log density and its score.

    Args:
        parts: The flows, the first acts on the noise.
        x: Noise, of shape ``batch_shape + (D,)``.
        log_q: Its log density, by default that of the standard normal.
        score: The gradient of that.
        remember: Whether the flows are to know what they made, as in code that runs step by step;
            the kernel is loaded for it.
    """
    if log_q is None or score is None:
        log_q, score = -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1), -x
    noise, parts, by_kernel = x, list(parts), _goes_by_kernel(x, remember)
    steps: list[Step] = []
    for part in parts:
        shape = part.forward_shape(x.shape)
        before = x if x.shape == shape else x.expand(shape)  # the very tensor, to be known by
        x, log_slope, step = part.pass_with_score(before, by_kernel)
        steps.append(step)
        log_q = log_q - log_slope.sum(-1)
        if remember:
            part.remember(before, x, log_slope)
    score = _carry(score.expand_as(x), steps, by_kernel)
    return Drawn(x, log_q, score, noise, parts, steps, by_kernel)


def _goes_by_kernel(x: Tensor, is_wanted: bool) -> bool:
    """Whether a kernel of ours carries the score; what is recorded finds one later."""
    return x.device.type == "cpu" and (not runs_eagerly() or (is_wanted and has_kernel()))


@torch.no_grad()
def _carry(score: Tensor, steps: Sequence[Step], by_kernel: bool) -> Tensor:
    for _, alike in itertools.groupby(
        steps, lambda step: isinstance(step, Carrier) and step.layout
    ):
        run = list(alike)
        flows = [step for step in run if isinstance(step, Carrier)]
        if flows and by_kernel:
            score = carried(score, flows)  # at once
            continue
        for step in run:
            if isinstance(step, Solver):
                score = step.part.solve_transposed(step.x, score - step.slope)
            else:
                slopes, bends, weights, network = step
                score = by_jacobian(score, slopes, bends, weights, network.order)
    return score


def can_be_written_out(flow: Autoregressive, by_kernel: bool) -> bool:
    """Whether the Jacobian is made of a network of ours, and is small where there is no kernel."""
    return (by_kernel or len(flow.order) <= MAX_WRITTEN_OUT) and can_be_cut(flow)


def written_out(flow: Autoregressive, x: Tensor) -> tuple[Tensor, Tensor, Carrier]:
    """The value and the log-slopes, and what the Jacobian of a network of ours is made of."""
    network = flow.network
    *hidden, output, offsets = map(product, network.factors())
    if flow.context is None:
        shift = offsets[:, 0]
    else:
        shift = functional.linear(flow.context, offsets[:, 1:], offsets[:, 0])
    *shifts, last = shift.split_with_sizes([*network.hidden_dims, len(output)], -1)
    h: Tensor = x
    bends = []
    for weight, shift in zip(hidden, shifts, strict=True):
        h, bend = _bend(network.activation, _linear(h, weight, shift))
        bends.append(bend)
    inputs = torch.cat([h.expand(*x.shape[:-1], h.shape[-1]), x], -1)
    params = _linear(inputs, output, last).chunk(flow.univariate.num_params, -1)
    y, log_slope = flow.univariate.forward(x, *params)
    with torch.no_grad():
        slopes = flow.univariate.derivatives(x, *params)
    weights = [weight.detach() for weight in (*hidden, output)]
    return y, log_slope, Carrier(slopes, bends, weights, network)


def _linear(h: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.dim() == 1:
        return functional.linear(h, weight, shift)
    return functional.linear(h, weight) + shift


def _bend(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """An activation, and its slope without a graph."""
    if type(activation) is nn.ELU and activation.alpha == 1 and not activation.inplace:
        h = functional.elu(z)
        return h, h.detach().clamp(max=0).add_(1)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf.clone()).sum(), leaf)
    return activation(z), slope
