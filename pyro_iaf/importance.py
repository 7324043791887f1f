r"""Pareto-smoothed importance sampling: the weights of a guide's draws, and their tail.

.. math::
    w_s = \frac{p(x, z_s)}{q(z_s)}, \qquad z_s \sim q

All weights are equal if the guide is the posterior.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = [
    "MAX_KHAT",
    "MAX_ROUNDING",
    "MIN_LOG_WEIGHT",
    "error_of_k",
    "hardly_differ",
    "pareto_k",
    "resampled",
    "rounding_message",
    "smoothed",
]

# A range of log-weights below MIN_RANGE nats, or below so many times their rounding, is no tail.
MIN_RANGE, MIN_RANGE_IN_ROUNDINGS = 1e-3, 10

# Larger rounding errors, in nats, can hide a tail or produce one.
MAX_ROUNDING = 0.1

# Weights with a larger k-hat are unreliable.
MAX_KHAT = 0.7

# With such a share of effective draws, and ELBOs closer than that in nats, weights hardly differ.
NEARLY_ALL, TINY_GAP = 0.95, 0.02

# Weights that are smaller than this, relative to the largest one, are negligible.
MIN_LOG_WEIGHT = math.log(torch.finfo(torch.float64).tiny)


def pareto_k(log_weights: Tensor, rounding: float = 0.0) -> float:
    """The shape k-hat of the tail of importance weights; infinite where it can't be estimated.

    Below 0.5 the weights have a finite variance; up to 0.7 estimates from them are useful.

    Args:
        log_weights: Of shape ``(S,)``, up to a constant.
        rounding: Rounding error of each in nats, if it is larger than their dtype implies.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646

    Example:
        >>> pareto_k(-2 * torch.rand(10_000).log()) > 0.7  # weights 1 / u^2: no mean
        True
    """
    return _Tail(log_weights, rounding).k


def hardly_differ(ess: float, gap: float, count: int) -> bool:
    """Whether weights are so similar that the shape of their tail says nothing.

    Args:
        ess: Their effective sample size.
        gap: The difference of the importance-weighted ELBO and the ELBO, in nats.
        count: How many they are.
    """
    return ess >= NEARLY_ALL * count and gap < TINY_GAP


def error_of_k(khat: float, count: int) -> float:
    """The standard error of the k-hat of so many weights, that of the maximum likelihood.

    References:
        Smith (1987), Estimating tails of probability distributions
    """
    return (1 + max(khat, 0.0)) / math.sqrt(_tail_size(count))


def smoothed(log_weights: Tensor, rounding: float = 0.0) -> Tensor:
    """Normalised weights, the largest of them replaced by quantiles of the fitted Pareto tail."""
    log_weights = log_weights.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
    tail = _Tail(log_weights, rounding)
    log_weights = log_weights.double()
    if not log_weights.max().isfinite():
        raise ValueError("No draw has a finite importance weight, so there is none to choose.")
    if tail.sigma > 0:
        largest = log_weights.argsort()[-len(tail.log_weights) :]
        quantiles = tail.log_quantiles().to(log_weights.device) + log_weights.max()
        log_weights = log_weights.index_put((largest,), quantiles)
    return log_weights.softmax(0)


def resampled(log_weights: Tensor, num_draws: int, rounding: float = 0.0) -> Tensor:
    """Indices of draws, each in proportion to its smoothed weight, in random order."""
    weights = smoothed(log_weights, rounding)
    device = weights.device
    # Systematic resampling: each count is within one of its expectation.
    points = torch.arange(num_draws, device=device) + torch.rand((), device=device)
    index = torch.searchsorted(weights.cumsum(0), points.to(weights) / num_draws)
    return index.clamp(max=len(weights) - 1)[torch.randperm(num_draws, device=device)]


def rounding_message(rounding: float) -> str:
    """Says that log-weights are inexact by so many nats, and what to do."""
    return (
        f"log densities are so large that their rounding error is {rounding:.2g} nats. Run the "
        "model in torch.float64, or drop constant terms from its density."
    )


def _tail_size(count: int) -> int:
    """How many of so many weights make up their tail."""
    return math.ceil(min(0.2 * count, 3 * math.sqrt(count)))


class _Tail:
    """A generalised Pareto distribution, fitted to the largest weights.

    Attributes:
        log_weights: The largest log-weights in ascending order, relative to the maximum.
        log_cutoff: The lower end of the tail, on the same scale.
        k: The shape.
        sigma: The scale; zero if no distribution was fitted.
    """

    def __init__(self, log_weights: Tensor, rounding: float) -> None:
        self.k, self.sigma = math.inf, 0.0
        count = len(log_weights)
        if count < 5 or not (largest := log_weights.max()).isfinite():  # NaN included
            return
        ordered = (log_weights.double() - largest).sort().values.cpu()
        size = _tail_size(count)
        self.log_cutoff = max(MIN_LOG_WEIGHT, ordered[-size - 1].item())
        self.log_weights = ordered[ordered > self.log_cutoff]
        rounding = max(rounding, torch.finfo(log_weights.dtype).eps * abs(largest.item()))
        if -self.log_cutoff < max(MIN_RANGE, MIN_RANGE_IN_ROUNDINGS * rounding):
            self.k = 0.0
        elif len(self.log_weights) >= 5:
            excesses = self.log_weights.exp() - math.exp(self.log_cutoff)
            # Pyro makes tensors on the default device, and fails if a quarter of the tail is equal.
            with torch.device("cpu"), suppress(ZeroDivisionError):
                self.k, self.sigma = fit_generalized_pareto(excesses)

    def log_quantiles(self) -> Tensor:
        """The logarithms of the quantiles that replace the largest weights."""
        count = len(self.log_weights)
        levels = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        k = self.k
        excesses = -torch.log1p(-levels) if abs(k) < 1e-9 else ((1 - levels) ** -k - 1) / k
        return (self.sigma * excesses + math.exp(self.log_cutoff)).log().clamp(max=0)
