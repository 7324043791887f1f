r"""The exact inverse of an autoregressive map, and its gradient.

.. math::
    y_i = f(x_i; p_i(x_{<i})) \quad\Longleftrightarrow\quad x_i = f^{-1}(y_i; p_i(x_{<i}))

It is computed by sweeps, or coordinate by coordinate. Its gradient, by the implicit function
theorem, takes a solve with the transposed Jacobian and no graph of the iteration.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .blockwise import Autoregressive, Cut, can_be_cut, solve_in_blocks, transposed_in_blocks
from .fixed_point import has_values, runs_eagerly, solve_by_sweeps

__all__ = ["attach_gradient", "check_round_trip", "leaves_of", "walk_back"]
ROUND_TRIP = {torch.float64: 1e-10, torch.float32: 1e-4}


def walk_back(flow: Autoregressive, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
    """The noise of ``y`` and the log slopes there, both of the shape of ``y``; see :func:`invert`.

    Where gradients are on, both are differentiable as :func:`attach_gradient` says.
    """
    if provenance := get_provenance(y):  # of Pyro's TraceGraph_ELBO, under which sizes are tuples
        known: tuple[Tensor, Tensor] = walk_back(flow, detach_provenance(y), method)
        return track_provenance(known, provenance)  # type: ignore[no-any-return]
    if not runs_eagerly():
        x, params = _solve(flow, y, "incremental")
        log_slope = flow.univariate.forward(x, *params)[1]
        return x, log_slope.expand_as(x).to(x.dtype)
    with torch.no_grad():
        x, params = _solve(flow, y, method)
    if can_be_cut(flow):
        used = (y, flow.context, *flow.network.weights)
    else:  # its dependencies are unknown, and two calls may differ
        params = flow.params_at(x)
        used = (y, *params)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in used):
        return attach_gradient(flow, x, y)
    again, log_slope = flow.univariate.forward(x, *params)
    check_round_trip(flow, again, y)
    return x, log_slope.expand_as(x).to(x.dtype)


def attach_gradient(flow: Autoregressive, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Makes a known inverse ``x`` of ``y`` differentiable, by the implicit function theorem.

    Let :math:`y = f_\theta(x)` with the Jacobian :math:`J = \partial f_\theta / \partial x`, and
    let :math:`v, w` be the gradients in :math:`x` and in the log slope :math:`s_\theta(x)`. Then
    those in :math:`y` and :math:`\theta` are

    .. math::
        u = J^{-\mathsf T} \Bigl( v + \bigl(\tfrac{\partial s}{\partial x}\bigr)^{\mathsf T} w
        \Bigr), \qquad
        \bigl(\tfrac{\partial s}{\partial \theta}\bigr)^{\mathsf T} w -
        \bigl(\tfrac{\partial f}{\partial \theta}\bigr)^{\mathsf T} u.

    Costs one network pass. The backward pass costs as much as :func:`solve_transposed`, a backward
    pass to the parameters, and one to the noise if the log slope is used. The gradient is that of
    the map at this call, also if its parameters change before the backward pass.

    Args:
        flow: The autoregressive map.
        x: The inverse of ``y``, of the same shape. Its own graph is ignored.
        y: Value, of shape ``batch_shape + (D,)``.

    Returns:
        ``x``, and the map's log slope there, both like ``y`` and differentiable once in ``y``, the
        context and the parameters.

    Warns:
        RuntimeWarning: As :func:`check_round_trip`.

    Example:
        >>> flow = inverse_autoregressive_flow(3)
        >>> x = torch.randn(5, 3)
        >>> y = flow(x).detach().requires_grad_()
        >>> x, log_slope = attach_gradient(flow, x, y)
        >>> (x.square().sum() + log_slope.sum()).backward()
        >>> y.grad.shape
        torch.Size([5, 3])
    """
    point = x.detach().clone().requires_grad_()
    point.is_internal = True  # type: ignore[attr-defined]  # not a leaf for leaves_of
    again, log_slope = flow.univariate.forward(point, *flow.params_at(point))
    check_round_trip(flow, again, y)
    log_slope = log_slope.expand_as(again).to(again.dtype)
    x, log_slope = _Implicit.apply(flow, point, y, again, log_slope)
    return x, log_slope


class _Implicit(torch.autograd.Function):
    """The inverse ``x`` and its log slope, where the map carries ``x`` to ``again``."""

    @staticmethod
    def forward(
        ctx: Any, flow: Autoregressive, x: Tensor, y: Tensor, again: Tensor, log_slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.x, ctx.log_slope = x, log_slope
        # Fixed here, as parameters may change before the backward pass.
        if can_be_cut(flow):
            ctx.solve = partial(transposed_in_blocks, Cut(flow, y.shape, "auto", keep=True), x)
        else:
            ctx.solve = partial(_transposed_by_sweeps, flow.order, x, again, log_slope)
        return x.detach().clone(), log_slope.detach().clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradient of an inverse can be taken once, not twice. Differentiate the "
                "inverse with torch.func, such as torch.func.hessian, which unrolls it."
            )
        if w is not None and ctx.log_slope.requires_grad:
            (slope,) = torch.autograd.grad(
                ctx.log_slope, ctx.x, w, retain_graph=True, materialize_grads=True
            )
            v = slope if v is None else v + slope
        if v is None:
            return None, None, None, None, w
        u = ctx.solve(v)
        return None, None, u, -u, w


def transposed_solution(flow: Autoregressive, x: Tensor, v: Tensor) -> Tensor:
    """The ``u`` with ``J^T u = v``, where J is the Jacobian at ``x``."""
    if can_be_cut(flow):
        return transposed_in_blocks(Cut(flow, v.shape, "auto"), x, v)
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y, log_slope = flow.univariate.forward(x, *flow.params_at(x))
    return _transposed_by_sweeps(flow.order, x, y, log_slope, v)


def _transposed_by_sweeps(
    order: Tensor, x: Tensor, y: Tensor, log_slope: Tensor, v: Tensor
) -> Tensor:
    scale = log_slope.detach().exp()

    def sweep(u: Tensor) -> tuple[Tensor, None]:
        (product,) = torch.autograd.grad(y, x, u, retain_graph=True)
        return u + (v - product) / scale, None

    position = torch.argsort(order.flip(0))  # from the last coordinate to the first
    start = torch.zeros_like(v)
    return solve_by_sweeps(sweep, start, position, "auto", size=lambda _: v / scale)[0]


def _solve(flow: Autoregressive, y: Tensor, method: str) -> tuple[Tensor, Sequence[Tensor]]:
    """The inverse of ``y``, and the map's parameters there."""
    if can_be_cut(flow):
        flow.network.check_inputs(y, flow.context)
        return solve_in_blocks(flow, y, method)

    def sweep(x: Tensor) -> tuple[Tensor, tuple[Sequence[Tensor], Tensor]]:
        params = flow.params_at(x)
        x, log_slope = flow.univariate.inverse(y, *params)
        return x, (params, log_slope)

    start, position = torch.zeros_like(y), torch.argsort(flow.order)
    x, (params, _), _ = solve_by_sweeps(
        sweep, start, position, method, size=lambda found: y / found[1].exp()
    )
    return x, params


# The residual of each network at its last warning.
_warned: Any = WeakIdKeyDictionary()


def check_round_trip(flow: Any, again: Tensor, y: Tensor) -> None:
    """Warns if ``again``, the value of the computed inverse of ``y``, is not ``y``.

    The cause is rounding where large numbers cancel: the map is too ill-conditioned for its dtype.
    The bound on ``|again - y| / (1 + |y|)`` is 1e-10 in float64, 1e-4 in float32 and 0.1 in half
    precision. Warns once for each network, and again if the residual is ten times as large. Does
    nothing under vmap or a tracer, where tensors have no values.

    Warns:
        RuntimeWarning: With the size of the residual.

    Example:
        >>> y = torch.tensor([1.0, 2.0])
        >>> check_round_trip(inverse_autoregressive_flow(2), y.clone(), y)
    """
    if not has_values(again) or not again.numel():
        return
    bound = ROUND_TRIP.get(y.dtype, 1e-1)
    with torch.no_grad():
        residuals = (again - y).abs_() / (1 + y.abs())
        if (residual := float(residuals.amax())) <= bound:
            return
        residual = float(residuals.where(y.isfinite(), 0).amax())
    network = getattr(flow, "network", flow)
    if not residual <= max(bound, 10 * _warned.get(network, 0.0)):
        _warned[network] = residual
        remedy = "Look at the scales that training reached"
        remedy += "." if y.dtype == torch.float64 else ", or use .double()."
        warnings.warn(
            f"The inverse of a value of shape {tuple(y.shape)} comes back only to within "
            f"{residual:.1e} of it, relative to 1 + |y|, in {y.dtype}, since the flow is too "
            f"ill-conditioned there. {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaf tensors, apart from internal ones, whose gradient a backward pass would fill."""
    found: dict[int, Tensor] = {}
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not hasattr(node.variable, "is_internal"):
            found[id(node.variable)] = node.variable
        queue += [source for source, _ in node.next_functions]
    return list(found.values())
