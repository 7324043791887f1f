r"""Triangular equations, solved by sweeps.

An autoregressive map turned round, :math:`x_i = (y_i - m_i(x_{<i}))\, e^{-s_i(x_{<i})}`, improves a
guess of :math:`x` at every sweep, and coordinate k is exact after k of them. Mostly a few settle
all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Sweep", "runs_eagerly", "settle"]

#: One sweep: a better solution from a guess, and what was found on the way.
Sweep: TypeAlias = Callable[[Tensor], tuple[Tensor, Any]]


def runs_eagerly() -> bool:
    """Whether this is plain eager autograd, with values to look at: no tracer, no torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def settle(
    sweep: Sweep, start: Tensor, position: Tensor, method: str, first: int = 1
) -> tuple[Tensor, Any, int]:
    """Sweeps until nothing moves, or once for each coordinate.

    Args:
        sweep: Gives a better solution, exact in one coordinate more, and whatever else.
        start: The first guess; finite, wherever it is.
        position: Which coordinate comes when; broadcasts with the solution.
        method: If ``"incremental"``, settles one coordinate a sweep.
        first: The first sweep after which to look whether it has settled.

    Returns:
        The solution, what else the last sweep gave, and the number of sweeps.
    """
    x, D, eps = start, position.numel(), torch.finfo(start.dtype).eps
    if method != "incremental" and start.numel() and not start.is_meta and runs_eagerly():
        change = 0.0
        for k in range(1, D + 1):
            guess, (x, found) = x, sweep(x)
            if k < first and k < D:
                continue
            last, change = change, _largest(x - guess)
            # The next change is about as much smaller again; a sudden drop may be luck.
            shrinks = max(change / last, 0.125) if last else 1.0
            if change * min(shrinks, 1.0) <= 4 * eps or not math.isfinite(change):
                break
            # Changes that don't shrink any more are rounding, if they are small beside x.
            small = 16 * eps * (1 + x.abs()) if last and shrinks > 0.5 else None
            if small is not None and bool(((x - guess).abs_() <= small).all()):
                break
        if math.isfinite(change):
            return x, found, k
    # Coordinate k listens only to the k - 1 before it, so sweep k settles it for good. The others
    # wait at the start: a half-found value could overflow, and zero weights don't stop a NaN.
    x = start
    for k in range(D):
        new, found = sweep(x)
        x = torch.where(position == k, new, x)
    return x, found, D


def _largest(x: Tensor) -> float:
    try:
        return float(x.abs_().amax())
    except RuntimeError:
        return math.nan  # batched gradients have no single answer
