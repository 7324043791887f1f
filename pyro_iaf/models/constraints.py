"""The sites of a model as a guide keeps and draws them: without graph, data or the user's code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.constraints import Constraint
from torch import Tensor

__all__ = ["each_tensor", "one_row", "tensors_in", "without_graph"]


def without_graph(sites: dict[str, Any]) -> poutine.Trace:
    """What a guide has to know of its sites, free of graphs, data and the user's code."""
    bare = poutine.Trace()
    for name, site in sites.items():
        fn = site["fn"]
        support = each_tensor(fn.support, Tensor.detach)
        bare.add_node(
            name,
            type="sample",
            name=name,
            fn=dist.ImproperUniform(support, fn.batch_shape, fn.event_shape),
            value=site["value"].detach(),
            is_observed=False,
            infer={},
            cond_indep_stack=site["cond_indep_stack"],
        )
    return bare


def each_tensor(constraint: Constraint, fn: Callable[[Tensor], Tensor]) -> Constraint:
    """A copy of a constraint, with ``fn`` applied to the tensors in it."""

    def convert(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return fn(thing)
        if isinstance(thing, Constraint):
            return each_tensor(thing, fn)
        if isinstance(thing, list | tuple):
            return type(thing)(map(convert, thing))
        return thing

    twin = copy.copy(constraint)
    twin.__dict__.update({name: convert(thing) for name, thing in vars(constraint).items()})
    return twin


def tensors_in(constraint: Constraint) -> list[Tensor]:
    """The tensors that a constraint has, as its bounds."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(constraint, note)
    return found


def one_row(support: Any, event_dim: int) -> Any:
    """A support that is the same for all rows of a plate, as that of one."""

    def first(bound: Tensor) -> Tensor:
        num_batch = bound.dim() - event_dim
        if num_batch <= 0 or not bound.numel():
            return bound
        rows = bound.flatten(0, num_batch - 1)
        return rows[0] if bool((rows == rows[0]).all()) else bound

    return each_tensor(support, first)
