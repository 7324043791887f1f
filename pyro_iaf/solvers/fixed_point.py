r"""Fixed-point iteration for triangular equations.

The inverse of an autoregressive map is the fixed point of :math:`x_i = f^{-1}(y_i; p_i(x_{<i}))`.
Each sweep evaluates this for all coordinates. Coordinate k is exact after k sweeps; in most cases
all converge in a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Sweep", "has_values", "runs_eagerly", "solve_by_sweeps"]

#: One sweep: a better solution from a guess, and any by-products.
Sweep: TypeAlias = Callable[[Tensor], tuple[Tensor, Any]]

# A coordinate has converged when a sweep moves it by at most this many times its own rounding. It
# then solves an equation whose coefficients differ by as much.
ROUNDING = 16
# The factor by which a sweep reduces the error in a flow that is nearly the identity. Others reduce
# it less. Decides when to check convergence next.
GAIN = 30


def runs_eagerly() -> bool:
    """Whether this is plain eager autograd, where tensors have values: no tracer, no torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def has_values(x: Tensor) -> bool:
    """Whether the tensor has values; batched gradients, for instance, have no storage."""
    return runs_eagerly() and not x.is_meta and torch._C._has_storage(x)


def solve_by_sweeps(
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
        sweep: Returns a better solution, exact in one more coordinate, and any by-products.
        start: The first guess, finite.
        position: The position of each coordinate in the order; broadcasts with the solution.
        method: If ``"incremental"``, solves for one coordinate in each sweep.
        size: The magnitude, from a sweep's by-products, of the terms whose difference each
            coordinate is.
        first: The first sweep after which to check convergence.

    Returns:
        The solution, the by-products of the last sweep, and the number of sweeps.
    """
    x, D, eps = start, position.numel(), torch.finfo(start.dtype).eps
    if method != "incremental" and start.numel() and has_values(start):
        for k in range(1, D + 1):
            guess, (x, found) = x, sweep(x)
            if k == D and bool(x.isfinite().all()):
                return x, found, k
            if k < first:
                continue
            # Relative to each coordinate: a small one may have large effects on later ones.
            own = (x.abs() + size(found).abs()).clamp_min_(torch.finfo(x.dtype).tiny)
            excess = float(((x - guess).abs_() / own).amax()) / (ROUNDING * eps)
            if excess <= 1:
                return x, found, k
            if math.isnan(excess):
                break
            first = k + max(1, int(math.log(min(excess, 1 / eps), GAIN)))
    # Coordinate k depends only on the k - 1 before it, so sweep k solves for it exactly. Later ones
    # stay at the start: intermediate values could overflow, and zero weights don't stop a NaN.
    x = start
    for k in range(D):
        new, found = sweep(x)
        x = torch.where(position == k, new, x)
    return x, found, D
