r"""The score of a flow's density at its own draws, for gradients that stick the landing.

Along the pass from noise to value, one flow :math:`x \mapsto y` after the other,

.. math::
    \nabla_y \log q(y) = J^{-\mathsf T} \bigl( \nabla_x \log q(x) - \nabla_x \log |\det J| \bigr).

The gradient of an ELBO through the draws alone, with this score held still, is right in mean
and has no variance where the guide is the posterior (Roeder et al. 2017,
https://arxiv.org/abs/1703.09194; for flows, Vaitl et al. 2022, https://arxiv.org/abs/2207.08219).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import memory
from .affine import LocScale
from .blocks import can_be_cut
from .carry import MAX_WRITTEN_OUT, Carrier, by_jacobian, carried, has_kernel
from .networks import product
from .sweeps import runs_eagerly
from .transforms import LOG_SCALE_BOUND

__all__ = ["draw_with_score"]


def draw_with_score(
    parts: Iterable[Any],
    x: Tensor,
    log_q: Tensor | None = None,
    score: Tensor | None = None,
    remember: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What flows make of noise, its log density, and the gradient of that there.

    The value has its graph; the density and the gradient have none.

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
    by_kernel = _goes_by_kernel(x, remember)
    waiting: list[Carrier] = []  # flows that the score has still to be carried through, at once
    for part in parts:
        shape = part.forward_shape(x.shape)
        before = x = x if x.shape == shape else x.expand(shape)  # the very tensor, to be known by
        score = score.expand(x.shape)
        is_small = by_kernel or part.input_dim <= MAX_WRITTEN_OUT
        if is_small and hasattr(part, "network") and can_be_cut(part):
            x, log_scale, carrier = _written_out(part, x)
            if waiting and len(waiting[0].bends) != len(carrier.bends):
                score, waiting = _carry(score, waiting, by_kernel), []
            waiting.append(carrier)
        else:
            score, waiting = _carry(score, waiting, by_kernel), []
            x, log_scale, score = _solved(part, x, score)
        log_q = log_q - log_scale.detach().sum(-1)
        if remember:
            memory.keep(part._sources, before, x, log_scale, before)
    return x, log_q, _carry(score, waiting, by_kernel)


def _goes_by_kernel(x: Tensor, is_wanted: bool) -> bool:
    """Whether a kernel of ours carries the score; what is recorded finds one later."""
    return x.device.type == "cpu" and (not runs_eagerly() or (is_wanted and has_kernel()))


@torch.no_grad()
def _carry(score: Tensor, flows: list[Carrier], by_kernel: bool) -> Tensor:
    if flows and by_kernel:
        return carried(score, flows)
    for slopes, bends, weights, network in flows:
        score = by_jacobian(score, slopes, bends, weights, network.order)
    return score


def _solved(part: Any, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the part's own solution of the transposed system."""
    if isinstance(part, LocScale):
        y, log_scale = part._compute(x)
        slope = part.slope_of_log_det(x)
    else:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y, log_scale = part._compute(x)
            total = log_scale.sum()
            (slope,) = torch.autograd.grad(total, x, retain_graph=True, materialize_grads=True)
    with torch.no_grad():
        return y, log_scale, part._solve_transposed(x.detach(), score - slope)


def _written_out(flow: Any, x: Tensor) -> tuple[Tensor, Tensor, Carrier]:
    """The value and the log-scale, and what the Jacobian of a network of ours is made of."""
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
    out = _linear(inputs, output, last).chunk(2, -1)
    y, log_scale = _applied(x, *flow._read(*out))
    with torch.no_grad():
        slopes = _slopes_of_reading(flow, x, *out)
    weights = [weight.detach() for weight in (*hidden, output)]
    return y, log_scale, Carrier(slopes, bends, weights, network)


def _linear(h: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.dim() == 1:
        return functional.linear(h, weight, shift)
    return functional.linear(h, weight) + shift


def _applied(x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(shift, log_scale.exp(), x), log_scale


def _bend(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """An activation, and its slope without a graph."""
    if type(activation) is nn.ELU and activation.alpha == 1 and not activation.inplace:
        h = functional.elu(z)
        return h, h.detach().clamp(max=0).add_(1)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf.clone()).sum(), leaf)
    return activation(z), slope


def _slopes_of_reading(flow: Any, x: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """The scale, the value's slopes in ``m`` and ``s``, and the slope of the log-scale in ``s``."""
    s = LOG_SCALE_BOUND * torch.tanh(s / LOG_SCALE_BOUND)
    slope = 1 - (s / LOG_SCALE_BOUND).square()
    if not flow.gated:
        scale = s.exp()
        return scale, torch.ones_like(m), scale * x * slope, slope
    scale = torch.sigmoid(s + flow.gate_bias)
    rest = 1 - scale
    slope = rest * slope
    return scale, rest, scale * slope * (x - m), slope
