"""The sites of a model as a guide keeps and draws them: without graph, data or the user's code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.constraints import Constraint
from pyro.distributions.distribution import Distribution
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = [
    "KL_DIVERGENCES",
    "MaskedSiteDelta",
    "SiteDelta",
    "SiteDeltas",
    "each_tensor",
    "tensors_in",
    "without_graph",
]


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


class SiteDelta(dist.Delta):
    """A point that a guide drew, with the density that its constraint left it."""


def _kl_site(p: SiteDelta, q: TorchDistribution) -> Tensor:
    """Pyro's divergence of a Delta leaves the point's own density out."""
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


class MaskedSiteDelta(SiteDelta):
    """That of a site which the model masks, and whose prior is a factor of the guide."""


def _kl_masked(p: MaskedSiteDelta, q: TorchDistribution) -> Tensor:
    """None: a loss that asks for it leaves the model's masks out, and takes its draws otherwise."""
    raise NotImplementedError


KL_DIVERGENCES = {(SiteDelta, Distribution): _kl_site, (MaskedSiteDelta, Distribution): _kl_masked}


class SiteDeltas(Messenger):
    """Makes those Deltas of Pyro's :class:`AutoContinuous`.

    Args:
        masked: The sites that the model masks.
    """

    def __init__(self, masked: Collection[str]) -> None:
        super().__init__()
        self.masked = masked

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]) is dist.Delta:
            msg["fn"].__class__ = MaskedSiteDelta if msg["name"] in self.masked else SiteDelta
