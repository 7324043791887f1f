"""The sites of a model as a guide stores them, and the tensors in their supports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.constraints import Constraint
from torch import Tensor

__all__ = ["map_tensors", "one_row", "tensors_in", "without_graph"]


def without_graph(sites: dict[str, Any]) -> poutine.Trace:
    """A trace of the sites' supports, shapes, plates and values, without graphs and priors."""
    trace = poutine.Trace()
    for name, site in sites.items():
        fn = site["fn"]
        support = map_tensors(fn.support, Tensor.detach)
        trace.add_node(
            name,
            type="sample",
            name=name,
            fn=dist.ImproperUniform(support, fn.batch_shape, fn.event_shape),
            value=site["value"].detach(),
            is_observed=False,
            infer={},
            cond_indep_stack=site["cond_indep_stack"],
        )
    return trace


def map_tensors(constraint: Constraint, fn: Callable[[Tensor], Tensor]) -> Constraint:
    """A copy of a constraint, with ``fn`` applied to the tensors in it."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fn(value)
        if isinstance(value, Constraint):
            return map_tensors(value, fn)
        if isinstance(value, list | tuple):
            return type(value)(map(convert, value))
        return value

    twin = copy.copy(constraint)
    vars(twin).update({name: convert(value) for name, value in vars(constraint).items()})
    return twin


def tensors_in(constraint: Constraint) -> list[Tensor]:
    """The tensors in a constraint, such as its bounds."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(constraint, collect)
    return found


def one_row(support: Any, event_dim: int) -> Any:
    """A copy of a support that has one row of each bound, where the bound is equal in all rows."""

    def first(bound: Tensor) -> Tensor:
        num_batch = bound.dim() - event_dim
        if num_batch <= 0 or not bound.numel():
            return bound
        rows = bound.flatten(0, num_batch - 1)
        return rows[0] if bool((rows == rows[0]).all()) else bound

    return map_tensors(support, first)
