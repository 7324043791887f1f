r"""The exact inverse of an autoregressive map.

.. math::
    y_i = m_i(x_{<i}) + e^{s_i(x_{<i})}\, x_i
    \quad\Longleftrightarrow\quad
    x_i = \bigl( y_i - m_i(x_{<i}) \bigr)\, e^{-s_i(x_{<i})}

Coordinates are found one after the other, in the order of the map. A point that is known already,
because the map itself went through it, needs no search: only its derivatives are missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["attach_gradient", "check_round_trip", "invert", "runs_eagerly"]

#: What an autoregressive map does at ``x``: its shift and the logarithm of its scale.
Coefficients: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]

ROUND_TRIP = {torch.float64: 1e-10, torch.float32: 1e-4}


def invert(coefficients: Coefficients, y: Tensor, order: Tensor) -> Tensor:
    r"""Solves ``y = shift(x) + exp(log_scale(x)) * x`` for ``x``, where both are autoregressive.

    Exact to rounding. Differentiable, by unrolling, in ``y`` and in all that the map uses. Costs D
    calls of the map, and where gradients are on it keeps D graphs.

    Args:
        coefficients: Returns ``shift`` and ``log_scale`` at ``x``, each of shape
            ``batch_shape + (D,)``; coordinate ``order[k]`` of both listens to ``order[:k]`` alone.
        y: Value, of shape ``batch_shape + (D,)``.
        order: Permutation of the D coordinates.

    Returns:
        Tensor like ``y``, its batch shape broadcast with the map's.

    Warns:
        RuntimeWarning: If the map does not come back to ``y``, see :func:`check_round_trip`.

    Example:
        >>> def coefficients(x):  # y_0 = x_0 and y_1 = x_0^2 + 2 x_1
        ...     shift = torch.stack([torch.zeros_like(x[..., 0]), x[..., 0] ** 2], -1)
        ...     return shift, torch.tensor([1.0, 2.0]).log()
        >>> invert(coefficients, torch.tensor([3.0, 11.0]), torch.arange(2))
        tensor([3., 1.])
    """
    position = torch.argsort(order)
    x = torch.zeros_like(y)
    # Coordinate k listens only to the k - 1 before it, so sweep k settles it for good. The others
    # wait at zero: a half-found value could overflow, and zero weights don't stop a NaN.
    for k in range(y.shape[-1]):
        shift, log_scale = coefficients(x)
        x = torch.where(position == k, (y - shift) * (-log_scale).exp(), x)
    # The last coordinate moves nothing, so the last sweep saw the map at x already.
    check_round_trip(shift + log_scale.exp() * x, y)
    return x


def attach_gradient(coefficients: Coefficients, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Makes a known inverse ``x`` of ``y`` differentiable, by the implicit function theorem.

    With :math:`y = f_\theta(x)` and :math:`J = \partial f_\theta / \partial x`,

    .. math::
        \mathrm{d} x = J^{-1} \left( \mathrm{d} y - \tfrac{\partial f}{\partial \theta}\,
        \mathrm{d} \theta \right), \qquad \mathrm{d} \log|\det J| = \tfrac{\partial}{\partial x}
        \log|\det J| \cdot \mathrm{d} x + \tfrac{\partial}{\partial \theta} \log|\det J| \cdot
        \mathrm{d} \theta.

    Costs one call of the map and one backward pass now; the backward pass to come solves with
    :math:`J^{\mathsf T}`, in D products at most.

    Args:
        coefficients: As for :func:`invert`.
        x: The inverse of ``y``, of the same shape. Its own graph is left aside.
        y: Value, of shape ``batch_shape + (D,)``.

    Returns:
        ``x``, and the map's log-scale there, both like ``y`` and differentiable once in ``y`` and
        in all that the map uses. Only the sum of the log-scale, the log-determinant, has the right
        gradient.

    Example:
        >>> rate = torch.tensor([2.0], requires_grad=True)
        >>> known, y = torch.tensor([3.0]), torch.tensor([6.0])
        >>> x, log_scale = attach_gradient(lambda x: (0 * x, rate.log()), known, y)
        >>> torch.autograd.grad(x, rate)  # x = y / rate, so dx / d rate = -6 / 4
        (tensor([-1.5000]),)
    """
    known = x.detach()
    point = known.clone().requires_grad_()
    shift, log_scale = coefficients(point)
    scale = log_scale.exp()
    again = shift + scale * point
    log_scale = log_scale.expand_as(again).to(again.dtype)
    gap = y - again  # zero but for rounding; its gradient, once solved for, is all we want of it
    if gap.requires_grad:
        gap.register_hook(lambda v: v if v is None else _solve_transposed(again, point, scale, v))
    x = known + (gap - gap.detach())
    if log_scale.requires_grad:
        (slope,) = torch.autograd.grad(
            log_scale.sum(), point, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        log_scale = log_scale + slope * (x - known)
    return x, log_scale


def _solve_transposed(y: Tensor, x: Tensor, scale: Tensor, v: Tensor) -> Tensor:
    """The ``u`` with ``J^T u = v`` for the triangular ``J = dy / dx`` with diagonal ``scale``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A value drawn without gradients can be differentiated once, not twice. Draw it again "
            "where gradients are enabled, or score a clone of it: flow.inv(y.clone())."
        )
    scale = scale.detach()
    u = v / scale
    # J^T less its diagonal is nilpotent, so D sweeps are exact; most flows settle in a few.
    for _ in range(y.shape[-1]):
        (product,) = torch.autograd.grad(y, x, u, retain_graph=True)
        step = (v - product) / scale
        u = u + step
        if _all(step.abs() <= 4 * torch.finfo(u.dtype).eps * u.abs()):
            break
    return u


def _all(condition: Tensor) -> bool:
    try:
        return bool(condition.all())
    except RuntimeError:
        return False  # batched gradients and tracers have no single answer


def runs_eagerly() -> bool:
    """Whether this is plain eager autograd, with values to look at: no tracer, no torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def check_round_trip(again: Tensor, y: Tensor) -> None:
    """Warns if ``again``, made of the inverse of ``y``, is not ``y``.

    Rounding does that where huge numbers cancel: the map is too ill-conditioned for its dtype. The
    bound on ``|again - y| / (1 + |y|)`` is 1e-10 in float64, 1e-4 in float32 and 0.1 in half
    precision. Does nothing under vmap or a tracer, where there are no values to look at.

    Warns:
        RuntimeWarning: With the size of the residual.

    Example:
        >>> check_round_trip(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    """
    if not runs_eagerly() or y.is_meta or not y.numel():
        return
    with torch.no_grad():
        residual = float(((again - y).abs() / (1 + y.abs())).where(y.isfinite(), 0).max())
    if not residual <= ROUND_TRIP.get(y.dtype, 1e-1):
        remedy = "Look at the scales that training reached"
        remedy += "." if y.dtype == torch.float64 else ", or use .double()."
        warnings.warn(
            f"The inverse of a value of shape {tuple(y.shape)} comes back only to within "
            f"{residual:.1e} of it, relative to 1 + |y|, in {y.dtype}: the flow is too "
            f"ill-conditioned there. {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )
