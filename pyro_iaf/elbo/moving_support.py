"""Whether the bounds of a distribution's support depend on its parameters.

If they do, the score has a mean other than zero, since it lacks the parameters' effect at the
bounds.
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
    """Whether the bounds of a distribution's support have gradients.

    Args:
        fn: A distribution.
        like: One of its draws, for dtype and device.
    """
    fn = bare(fn)
    if type(fn).support is TransformedDistribution.support:  # it ignores the transforms' parameters
        return support_moves(fn.base_dist, like) or _image_moves(fn, like)
    return any(tensor.requires_grad for tensor in tensors_in(fn.support))


def _image_moves(fn: TransformedDistribution, like: Tensor) -> bool:
    """Carries the bounds of the base's support through the transforms."""
    base = fn.base_dist
    zeros = like.new_zeros(base.batch_shape + base.event_shape)
    bounds = _bounds_of(base.support, zeros)
    for transform in fn.transforms:
        if bounds is not None and bounds.isinf().all() and _is_real(transform.codomain):
            continue  # the whole line to the whole line
        if bounds is None or transform.domain.event_dim:  # coordinates mix, so bounds don't suffice
            if _has_parameters(transform, fn, zeros):
                return True
            bounds = None
            continue
        image = transform(bounds)
        if image.isnan().any():
            return True
        if image.requires_grad and _has_slope(image[image.isfinite()].sum()):
            return True
        bounds = image.detach()
    return False


def _bounds_of(support: Any, like: Tensor) -> Tensor | None:
    """The lower and upper bounds, of shape ``(2,) + shape``; None if they are unknown."""
    support = _base_constraint(support)
    if not (
        hasattr(support, "lower_bound") or hasattr(support, "upper_bound") or _is_real(support)
    ):
        return None
    lower = getattr(support, "lower_bound", -math.inf)
    upper = getattr(support, "upper_bound", math.inf)
    return torch.stack([like + lower, like + upper]).detach()


def _has_parameters(transform: Any, fn: TransformedDistribution, zeros: Tensor) -> bool:
    """Whether outputs of this transform have gradients when its input has none."""
    x = biject_to(fn.base_dist.support)(zeros)
    for part in fn.transforms:
        x = part(x.detach())
        if part is transform:
            break
    return bool(x.requires_grad)


def _has_slope(value: Tensor) -> bool:
    leaves = leaves_of(value)
    slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    # At infinite bounds, which don't count, the gradient is 0 * inf.
    return any(s is not None and bool(s.nan_to_num(0.0).ne(0).any()) for s in slopes)


def _base_constraint(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _is_real(constraint: Any) -> bool:
    return _base_constraint(constraint) is constraints.real
