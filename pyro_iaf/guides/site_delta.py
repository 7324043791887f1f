"""The sites at which a guide gives values that its flow has made."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
from pyro.distributions.distribution import Distribution
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["KL_DIVERGENCES", "MaskedSiteDelta", "SiteDelta", "SiteDeltas"]


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
