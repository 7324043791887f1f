"""The distributions of a guide's sites: points that its flow drew."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
from pyro.distributions.distribution import Distribution
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..flows.mixture import GivenComponent

__all__ = ["KL_DIVERGENCES", "MaskedSiteDelta", "SiteDelta", "SiteDeltas"]


class SiteDelta(dist.Delta):
    """A point that a guide drew, with the log-determinant of its constraint as a log density."""


def _kl_site(p: SiteDelta, q: TorchDistribution) -> Tensor:
    """With the point's log density, which Pyro's divergence of a Delta leaves out."""
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


class MaskedSiteDelta(SiteDelta):
    """The same at a site that the model masks and whose prior is a factor of the guide."""


def _kl_masked(p: MaskedSiteDelta, q: TorchDistribution) -> Tensor:
    """Undefined, so that losses with analytic divergences, which ignore masks, use draws here."""
    raise NotImplementedError


KL_DIVERGENCES = {(SiteDelta, Distribution): _kl_site, (MaskedSiteDelta, Distribution): _kl_masked}


class SiteDeltas(Messenger):
    """Turns the Deltas of Pyro's :class:`AutoContinuous` into these; masked ones by name.

    The first one has the log density of a vector whose own site leaves it out, too, unless nobody
    asks for densities.
    """

    def __init__(self, masked: Collection[str], is_scored: bool = True) -> None:
        super().__init__()
        self.masked, self.is_scored = masked, is_scored
        self._to_state: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            fn.__class__ = MaskedSiteDelta if msg["name"] in self.masked else SiteDelta
            if self._to_state is not None and fn.log_density.numel():
                per_row = self._to_state * (self._to_state.numel() / fn.log_density.numel())
                fn.log_density = fn.log_density + per_row
                self._to_state = None

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.is_scored and isinstance(msg["fn"], GivenComponent):
            self._to_state = msg["fn"].log_density(msg["value"])
