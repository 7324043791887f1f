"""What a distribution can be, and whether the ends of that move with its parameters.

Where they do, the score's mean is not zero: what a parameter does at the ends is missing in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints

from ..models.constraints import tensors_in
from ..models.traces import bare
from ..solvers.implicit import leaves_of

__all__ = ["support_moves"]


def support_moves(fn: Any, like: Tensor) -> bool:
    """Whether a gradient reaches the ends of a support.

    Args:
        fn: A distribution.
        like: One of its draws, for dtype and device.
    """
    fn = bare(fn)
    if type(fn).support is TransformedDistribution.support:  # which doesn't say
        return support_moves(fn.base_dist, like) or _image_moves(fn, like)
    return any(tensor.requires_grad for tensor in tensors_in(fn.support))


def _image_moves(fn: TransformedDistribution, like: Tensor) -> bool:
    """Follows the ends of the base's support through the transforms."""
    base = fn.base_dist
    zeros = like.new_zeros(base.batch_shape + base.event_shape)
    ends = _ends_of(base.support, zeros)
    for transform in fn.transforms:
        if ends is not None and ends.isinf().all() and _is_real(transform.codomain):
            continue  # the whole line to the whole line
        if ends is None or transform.domain.event_dim:  # coordinates mix: not by their ends alone
            if _moves_anything(transform, fn, zeros):
                return True
            ends = None
            continue
        image = transform(ends)
        if image.isnan().any():
            return True
        if image.requires_grad and _has_slope(image[image.isfinite()].sum()):
            return True
        ends = image.detach()
    return False


def _ends_of(support: Any, like: Tensor) -> Tensor | None:
    """The lowest and the highest values, of shape ``(2,) + shape``; None where they are unknown."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (constraints.real, constraints.real_vector):
        lower, upper = -math.inf, math.inf
    else:
        lower = getattr(support, "lower_bound", -math.inf)
        upper = getattr(support, "upper_bound", math.inf)
        if not (hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
            return None
    return torch.stack([like + lower, like + upper]).detach()


def _moves_anything(transform: Any, fn: TransformedDistribution, zeros: Tensor) -> bool:
    """Whether values of this transform have gradients where what goes in has none."""
    x = biject_to(fn.base_dist.support)(zeros)
    for part in fn.transforms:
        x = part(x.detach())
        if part is transform:
            break
    return bool(x.requires_grad)


def _has_slope(value: Tensor) -> bool:
    leaves = leaves_of(value)
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    # Infinite ends, which count nothing, have slopes of 0 * inf.
    return any(s is not None and bool(s.nan_to_num(0.0).ne(0).any()) for s in slopes)


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint in (constraints.real, constraints.real_vector)
