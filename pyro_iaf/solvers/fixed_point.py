r"""Triangular equations, solved by sweeps.

An autoregressive map turned round, :math:`x_i = f^{-1}(y_i; p_i(x_{<i}))`, improves a guess of
:math:`x` at every sweep, and coordinate k is exact after k of them. Mostly a few settle all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Sweep", "has_values", "runs_eagerly", "settle"]

#: One sweep: a better solution from a guess, and what was found on the way.
Sweep: TypeAlias = Callable[[Tensor], tuple[Tensor, Any]]

# A sweep that moves a coordinate by no more than this many times its own rounding settles it: the
# solution is then that of an equation whose numbers are off by as much.
ROUNDING = 16
# What one sweep gains in a flow that is nearly the identity; others gain less. Says when to look.
GAIN = 30


def runs_eagerly() -> bool:
    """Whether this is plain eager autograd, with values to look at: no tracer, no torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in it to look at; batched gradients have no storage, for one."""
    return runs_eagerly() and not x.is_meta and torch._C._has_storage(x)


def settle(
    sweep: Sweep,
    start: Tensor,
    position: Tensor,
    method: str,
    *,
    size: Callable[[Any], Tensor],
    first: int = 1,
) -> tuple[Tensor, Any, int]:
    """Sweeps until no coordinate moves by more than its rounding, or once for each coordinate.

    Args:
        sweep: Gives a better solution, exact in one coordinate more, and whatever else.
        start: The first guess; finite, wherever it is.
        position: Which coordinate comes when; broadcasts with the solution.
        method: If ``"incremental"``, settles one coordinate a sweep.
        size: Of what else a sweep gave, the size of what each coordinate is a difference of.
        first: The first sweep after which to look.

    Returns:
        The solution, what else the last sweep gave, and the number of sweeps.
    """
    x, D, eps = start, position.numel(), torch.finfo(start.dtype).eps
    if method != "incremental" and start.numel() and has_values(start):
        for k in range(1, D + 1):
            guess, (x, found) = x, sweep(x)
            if k == D and bool(x.isfinite().all()):
                return x, found, k
            if k < first:
                continue
            # Relative to each coordinate: small ones may be large for those that come after.
            own = (x.abs() + size(found).abs()).clamp_min_(torch.finfo(x.dtype).tiny)
            excess = float(((x - guess).abs_() / own).amax()) / (ROUNDING * eps)
            if excess <= 1:
                return x, found, k
            if math.isnan(excess):
                break
            first = k + max(1, int(math.log(min(excess, 1 / eps), GAIN)))
    # Coordinate k listens only to the k - 1 before it, so sweep k settles it for good. The others
    # wait at the start: a half-found value could overflow, and zero weights don't stop a NaN.
    x = start
    for k in range(D):
        new, found = sweep(x)
        x = torch.where(position == k, new, x)
    return x, found, D
