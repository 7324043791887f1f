"""The distribution that a guide draws from: base noise carried through its flows."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from . import pass_cache

__all__ = ["Posterior"]


class Posterior(dist.TransformedDistribution):  # type: ignore[misc]
    """A guide's distribution, which scores its last draw without an inverse also when detached."""

    _drawn: Tensor | None = None

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        self._drawn = super().rsample(sample_shape)
        return self._drawn

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None:  # reweighted wake-sleep scores detached draws
            pass_cache.recognise(value, self._drawn)
        (transform,) = self.transforms
        x, log_det = transform.noise_and_log_det(value)
        log_prob: Tensor = self.base_dist.log_prob(x) - log_det
        return log_prob
