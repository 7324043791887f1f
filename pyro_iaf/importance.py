r"""Importance weights: how far a guide's draws are from the posterior, one by one.

.. math::
    w_s = \frac{p(x, z_s)}{q(z_s)}, \qquad z_s \sim q

Were the guide the posterior, they would all be the same.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["COARSE", "LOWEST", "RELIABLE", "imprecise", "pareto_k", "resampled", "smoothed"]

# Log-weights that differ by less have no tail: more than the densities' rounding, many times over.
TIED, TIED_BY_ROUNDING = 1e-3, 10

# Beyond so many nats rounding might hide a tail, or make one.
COARSE = 0.1

# Beyond this k-hat weights can't be relied on.
RELIABLE = 0.7

# Weights whose share of the largest one is less count nothing.
LOWEST = math.log(torch.finfo(torch.float64).tiny)


def pareto_k(log_weights: Tensor, rounding: float = 0.0) -> float:
    """The shape k-hat of the tail of importance weights; infinite where there is no telling.

    Below 0.5 the weights have a variance; up to 0.7 estimates from them are of use.

    Args:
        log_weights: Of shape ``(S,)``, up to a constant.
        rounding: By how many nats rounding moves each, if more than their dtype tells.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646

    Example:
        >>> pareto_k(-2 * torch.rand(10_000).log()) > 0.7  # weights 1 / u^2: no mean
        True
    """
    return _Tail(log_weights, rounding).k


def smoothed(log_weights: Tensor, rounding: float = 0.0) -> Tensor:
    """Normalised weights whose largest are replaced by what is expected of a Pareto tail."""
    log_weights = log_weights.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
    tail = _Tail(log_weights, rounding)
    log_weights = log_weights.double()
    if not log_weights.max().isfinite():
        raise ValueError("No draw has a finite importance weight, so there is none to choose.")
    if tail.sigma > 0:
        largest = log_weights.argsort()[-len(tail.ordered) :]
        expected = tail.expected().to(log_weights.device) + log_weights.max()
        log_weights = log_weights.index_put((largest,), expected)
    return log_weights.softmax(0)


def resampled(log_weights: Tensor, num_draws: int, rounding: float = 0.0) -> Tensor:
    """Indices of draws, each as often as its smoothed weight says, in random order."""
    weights = smoothed(log_weights, rounding)
    device = weights.device
    # One random number for all keeps each count within one of what is expected.
    points = torch.arange(num_draws, device=device) + torch.rand((), device=device)
    index = torch.searchsorted(weights.cumsum(0), points.to(weights) / num_draws)
    return index.clamp(max=len(weights) - 1)[torch.randperm(num_draws, device=device)]


def imprecise(rounding: float) -> str:
    """What to do where log-weights are known to so many nats only, in words."""
    return (
        f"log densities are so large that rounding leaves them known to {rounding:.2g} nats only. "
        "Run the model in torch.float64, or leave constants out of it."
    )


class _Tail:
    """A generalised Pareto distribution, fitted to the largest weights.

    Attributes:
        ordered: Their logarithms in ascending order, relative to the largest.
        cutoff: What they exceed.
        k: The shape.
        sigma: The scale; zero where there is none to speak of.
    """

    def __init__(self, log_weights: Tensor, rounding: float) -> None:
        self.ordered, self.cutoff = log_weights[:0], -math.inf
        self.k, self.sigma = math.inf, 0.0
        count = len(log_weights)
        if count < 5 or log_weights.isnan().any():
            return
        largest = log_weights.max()
        if not largest.isfinite():
            return
        ordered = (log_weights.double() - largest).sort().values.cpu()
        size = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
        self.cutoff = max(LOWEST, ordered[-size - 1].item())
        self.ordered = ordered[ordered > self.cutoff]
        own = torch.finfo(log_weights.dtype).eps * abs(largest.item())
        if -self.cutoff < max(TIED, TIED_BY_ROUNDING * max(rounding, own)):
            self.k = 0.0
        elif len(self.ordered) >= 5:
            self._fit()

    def _fit(self) -> None:
        try:
            with torch.device("cpu"):  # where its own tensors should be too
                k, sigma = fit_generalized_pareto(self.ordered.exp() - math.exp(self.cutoff))
        except ZeroDivisionError:  # a quarter of it is one number
            return
        self.k, self.sigma = float(k), float(sigma)

    def expected(self) -> Tensor:
        """What is expected of the ordered ones."""
        count = len(self.ordered)
        levels = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        k = self.k
        beyond = -torch.log1p(-levels) if abs(k) < 1e-9 else ((1 - levels) ** -k - 1) / k
        return (self.sigma * beyond + math.exp(self.cutoff)).log().clamp(max=0)
