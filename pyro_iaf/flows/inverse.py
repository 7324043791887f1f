"""The inverse of a flow, by a method of choice, and the transposed solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._validation import check_tensors
from ..solvers.fixed_point import runs_eagerly

__all__ = ["invert", "solve_transposed"]
METHODS = ("auto", "incremental", "fixed_point")


def invert(flow: Any, y: Tensor, method: str = "auto") -> Tensor:
    r"""The noise ``x`` that a flow carries to ``y``, exact to rounding.

    ``flow.inv(y)`` is the same by method ``"auto"``, except that it looks up remembered passes.

    - ``"auto"``: solves blocks of coordinates one after the other, each by fixed-point sweeps until
      it has converged. If the batch is many times D, it goes coordinate by coordinate instead.
      Takes as long as three to ten network passes. A block that doesn't converge is finished
      coordinate by coordinate.
    - ``"incremental"``: coordinate by coordinate, each with the units of its degree. Does the
      arithmetic of half a network pass in D steps, whatever the weights are.
    - ``"fixed_point"``: sweeps over all coordinates at once, each with the arithmetic of one
      network pass. Coordinate k is exact after k sweeps; all converge in ten to fifty.

    A network that is not a :class:`~pyro_iaf.MaskedAutoregressiveNetwork` can't be cut into blocks.
    With such a network ``"auto"`` sweeps over all coordinates, ``"incremental"`` takes D network
    passes, and one more pass checks the result.

    Differentiable once in ``y``, the context and the parameters, by the implicit function theorem.
    This costs one more network pass, and in the backward pass a :func:`solve_transposed` and a
    backward pass through the network. Under ``torch.func`` and tracers, where tensors have no
    values, the inverse goes coordinate by coordinate, and is differentiated by unrolling, any
    number of times.

    Args:
        flow: An inverse autoregressive flow or a stack of them.
        y: Value, of shape ``batch_shape + (D,)``.
        method: ``"auto"``, ``"incremental"`` or ``"fixed_point"``.

    Returns:
        Tensor like ``y``, its batch shape broadcast with the context's.

    Warns:
        RuntimeWarning: If the flow carries the result to something that differs from ``y``,
            relative to ``1 + |y|``, by more than 1e-10 in float64 or 1e-4 in float32.

    Raises:
        ValueError: If there is no such method, or ``flow`` is not a flow.

    References:
        Song et al. (2021), Accelerating Feedforward Computation via Parallel Nonlinear Equation
        Solving, https://arxiv.org/abs/2002.03629

    Example:
        >>> flow = inverse_autoregressive_flow(3, num_flows=2)
        >>> y = torch.randn(5, 3)
        >>> x = invert(flow, y, method="fixed_point")
        >>> torch.allclose(flow(x), y, atol=1e-5)
        True
    """
    if method not in METHODS:
        raise ValueError(f"method should be one of {', '.join(METHODS)}; got {method!r}.")
    check_tensors(y=y)
    for part in reversed(_parts(flow)):
        y, _ = part._undo(y.expand(part.inverse_shape(y.shape)), method)
    return y


def solve_transposed(flow: Any, x: Tensor, v: Tensor) -> Tensor:
    r"""Solves :math:`J^{\mathsf T} u = v`, where :math:`J = \partial y / \partial x` at ``x``.

    The implicit function theorem and path derivatives need it: :math:`v` is a gradient in the
    noise, and :math:`u` the same gradient in the value. Exact to rounding. Costs one network pass
    and about as much as the inverse. For a network that is not a
    :class:`~pyro_iaf.MaskedAutoregressiveNetwork`, it costs one pass, and one backward pass for
    each sweep, D at most. Runs eagerly only: not under ``torch.func`` or ``torch.compile``.

    Args:
        flow: An inverse autoregressive flow or a stack of them.
        x: Noise, of shape ``batch_shape + (D,)``.
        v: Of the same shape.

    Returns:
        Tensor like ``v``, without a graph.

    Raises:
        ValueError: If ``flow`` is not a flow, or ``v`` is not like the value.
        RuntimeError: Under ``torch.func`` and tracers.

    Example:
        >>> flow = inverse_autoregressive_flow(3)
        >>> x, v = torch.randn(3), torch.randn(3)
        >>> u = solve_transposed(flow, x, v)
        >>> jacobian = torch.func.jacrev(flow)(x)
        >>> torch.allclose(jacobian.T @ u, v, atol=1e-5)
        True
    """
    if not runs_eagerly():
        raise RuntimeError(
            "solve_transposed needs the values of its tensors; there are none under torch.func, "
            "torch.compile and other tracers. Call it outside."
        )
    check_tensors(x=x, v=v)
    with torch.inference_mode(False), torch.no_grad():
        x, v = x.clone(), v.clone()  # autograd takes no tensors from inference mode
        for part in _parts(flow):
            x = x.expand(part.forward_shape(x.shape))
            if v.shape != x.shape or v.dtype != x.dtype:
                raise ValueError(
                    f"v should have the shape and dtype of the value, {tuple(x.shape)} and "
                    f"{x.dtype}; got {tuple(v.shape)} and {v.dtype}."
                )
            v = part.solve_transposed(x, v)
            x = part(x)
    return v


def _parts(flow: Any) -> Sequence[Any]:
    parts: Sequence[Any] = getattr(flow, "parts", [flow])
    if not all(hasattr(part, "_undo") for part in parts):
        raise ValueError(
            "flow should be an inverse autoregressive flow, or a stack of them; got "
            f"{type(flow).__name__}. Give a conditional flow its context, flow.condition(context), "
            "and the flow instead of flow.inv; other transforms have an .inv of their own."
        )
    return parts
