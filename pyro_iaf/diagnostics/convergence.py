r"""Whether Markov chains agree, and how many independent draws theirs are worth.

The definitions are those of ArviZ and Stan: chains are split in halves, and draws replaced by the
normal scores of their ranks.

References:
    Vehtari et al. (2021), Rank-normalization, folding, and localization,
    https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ess", "rhat"]

# Draws between which the effective sample size is told of the tails.
TAILS = 0.05, 0.95

# With fewer draws of each chain nothing is known.
FEWEST = 4

# So many numbers are ranked at once.
MOST_NUMBERS = 2**22


def rhat(chains: Tensor) -> Tensor:
    r"""The rank-normalised split :math:`\widehat R` of each quantity, of bulk or tails.

    It is near 1 if all chains have the same distribution; use draws below 1.01.

    Args:
        chains: Draws of shape ``(chains, draws) + shape``.

    Returns:
        A tensor of shape ``shape``; NaN where draws are not finite or fewer than four, 1 where all
        are equal.
    """
    return _by_columns(_rhat, chains)


def _rhat(halves: Tensor) -> Tensor:
    folded = (halves - _quantile(halves.flatten(0, 1), 0.5)).abs()
    found = torch.maximum(_split_rhat(_normal_scores(halves)), _split_rhat(_normal_scores(folded)))
    return _where_known(found, halves, 1.0)


def ess(chains: Tensor) -> Tensor:
    """The effective sample size of each quantity: of its bulk or its tails, which is smaller.

    Args:
        chains: As for :func:`rhat`.

    Returns:
        A tensor of shape ``shape``; NaN where draws are not finite or fewer than four, the number
        of draws where all are equal.
    """
    return _by_columns(_ess, chains)


def _ess(halves: Tensor) -> Tensor:
    parts = [_ess_of_mean(_normal_scores(halves))]
    flat = halves.flatten(0, 1)
    for level in TAILS:
        parts.append(_ess_of_mean((halves <= _quantile(flat, level)).double()))
    return _where_known(torch.stack(parts).amin(0), halves, float(flat.shape[0]))


def _by_columns(fn: Callable[[Tensor], Tensor], chains: Tensor) -> Tensor:
    """A function of both halves of all chains, of shape ``(2 chains, draws / 2, Q)``, in parts."""
    if chains.shape[1] < FEWEST or not chains.numel():
        return torch.full(chains.shape[2:], math.nan, dtype=torch.float64, device=chains.device)
    flat = chains.reshape(*chains.shape[:2], -1)
    half, found = flat.shape[1] // 2, []
    for part in flat.split(max(1, MOST_NUMBERS // flat[..., :1].numel()), -1):
        part = part.double()
        found.append(fn(torch.cat([part[:, :half], part[:, part.shape[1] - half :]])))
    return torch.cat(found).reshape(chains.shape[2:])


def _where_known(found: Tensor, halves: Tensor, if_constant: float) -> Tensor:
    flat = halves.flatten(0, 1)
    found = torch.where((flat == flat[0]).all(0), if_constant, found)
    return torch.where(flat.isfinite().all(0), found, math.nan)


def _quantile(flat: Tensor, level: float) -> Tensor:
    """The quantile of each column, by linear interpolation; ``torch.quantile`` takes few draws."""
    ordered = flat.sort(0).values
    place = level * (len(flat) - 1)
    below = math.floor(place)
    above = min(below + 1, len(flat) - 1)
    return ordered[below].lerp(ordered[above], place - below)


def _normal_scores(halves: Tensor) -> Tensor:
    """The normal scores of ranks among all draws; those of equal draws are averaged."""
    flat = halves.flatten(0, 1).T.contiguous()
    order = flat.argsort(-1)
    ordered = flat.gather(-1, order)
    count = flat.shape[-1]
    place = torch.arange(count, device=flat.device).expand_as(flat)
    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = starts.roll(-1, -1)
    first = place.where(starts, 0).cummax(-1).values
    last = place.where(ends, count - 1).flip(-1).cummin(-1).values.flip(-1)
    ranks = torch.empty_like(flat).scatter_(-1, order, ((first + last) / 2 + 1).to(flat))
    scores: Tensor = torch.special.ndtri((ranks - 0.375) / (count + 0.25))
    return scores.T.reshape(halves.shape)


def _split_rhat(halves: Tensor) -> Tensor:
    num_draws = halves.shape[1]
    between = num_draws * halves.mean(1).var(0)
    within = halves.var(1).mean(0)
    return ((between / within + num_draws - 1) / num_draws).sqrt()


def _ess_of_mean(halves: Tensor) -> Tensor:
    """By Geyer's initial monotone sequence of autocorrelations."""
    num_chains, num_draws, _ = halves.shape
    covariance = _autocovariance(halves)
    mean_variance = covariance[:, 0].mean(0) * num_draws / (num_draws - 1)
    total = mean_variance * (num_draws - 1) / num_draws
    if num_chains > 1:
        total = total + halves.mean(1).var(0)
    correlation = 1 - (mean_variance - covariance.mean(0)) / total
    correlation[0] = 1.0
    most = (num_draws - 1) // 2 - 1
    pairs = correlation[: 2 * most].unflatten(0, (most, 2)).sum(1)
    is_positive = (pairs > 0).cumprod(0).bool()
    decreasing = pairs.where(is_positive, math.inf).cummin(0).values if most else pairs
    length = is_positive.sum(0)
    after = correlation[2 * length, torch.arange(len(length), device=length.device)]
    time = -1 + 2 * decreasing.where(is_positive, 0.0).sum(0) + after.clamp(min=0)
    count = num_chains * num_draws
    found: Tensor = count / time.clamp(min=1 / math.log10(count))
    return found.where(total > 0, float(count))


def _autocovariance(halves: Tensor) -> Tensor:
    """At all lags, along the draws."""
    num_draws = halves.shape[1]
    centred = halves - halves.mean(1, keepdim=True)
    size = 2 ** math.ceil(math.log2(2 * num_draws))
    spectrum = torch.fft.rfft(centred, size, dim=1).abs().square()
    found: Tensor = torch.fft.irfft(spectrum, size, dim=1)[:, :num_draws] / num_draws
    return found
