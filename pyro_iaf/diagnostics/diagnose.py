"""How good a fitted guide is, in numbers and in words; and its draws for ArviZ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._validation import check_size
from ..importance import COARSE, LOWEST, RELIABLE, imprecise
from ..models.arguments import check_call, check_pair
from ..models.traces import taking_turns
from ..models.weighted import WeightedParticles

__all__ = ["Diagnosis", "diagnose"]
GOOD, USABLE = 0.5, RELIABLE

# How far weighting may move a good guide: its means in standard deviations, its spreads in shares.
STILL = 0.15

# Fewer draws say nothing.
FEWEST = 25


@dataclass
class Diagnosis:
    """How good a guide is; ``print(diagnosis)`` says it in words.

    Attributes:
        khat: Shape of the tail of the importance weights. Below 0.5 weights can be relied on, and
            the guide is good where they move little; up to 0.7 it is usable with resampled draws,
            beyond it isn't to be trusted.
        elbo: The ELBO in nats.
        elbo_se: Its standard error.
        iw_elbo: Logarithm of the mean weight: the evidence from below, and nearer than the ELBO.
        iw_elbo_se: Its standard error.
        ess: How many independent draws from the posterior the weighted draws are worth.
        log_weights: Of the draws, of shape ``(num_samples,)``, in double precision.
        sites: For each site how far weighting moves its mean at most, in standard deviations of
            the guide, and by which factor it changes the standard deviation at most.
        subsampled: Whether the model subsamples data. Then weights vary by that too.
        is_point: Whether all draws are the same, so that weights tell nothing.
        rounding: By how many nats the rounding of densities moves a log-weight.
        improper: Latents whose prior is flat and without ends, and that no density depends on.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> diagnosis = diagnose(model, AutoIAF(model), num_samples=1000)
        >>> diagnosis.worst_sites
        ['z']
    """

    khat: float
    elbo: float
    elbo_se: float
    iw_elbo: float
    iw_elbo_se: float
    ess: float
    log_weights: Tensor = field(repr=False)
    sites: dict[str, tuple[float, float]]
    subsampled: bool = False
    is_point: bool = False
    rounding: float = 0.0
    improper: Sequence[str] = ()

    @property
    def threshold(self) -> float:
        """``min(1 - 1 / log10(S), 0.7)``, which k-hat may reach for this number of draws S."""
        return min(1 - 1 / math.log10(max(len(self.log_weights), 2)), USABLE)

    @property
    def worst_sites(self) -> list[str]:
        """The sites, those first whose mean or spread weighting changes most."""
        return sorted(self.sites, key=lambda name: -_severity(self.sites[name]))

    def __str__(self) -> str:
        lines = [
            self._verdict(),
            f"  k-hat {self.khat:.2f} (below 0.5 good, below {self.threshold:.2f} usable)",
            f"  effective sample size {self.ess:.0f} of {len(self.log_weights)} draws",
            f"  ELBO {self.elbo:.2f} +/- {self.elbo_se:.2f} nats, "
            f"importance-weighted {self.iw_elbo:.2f} +/- {self.iw_elbo_se:.2f}",
        ]
        lost = int((~self.log_weights.isfinite()).sum())
        if lost:
            lines.append(f"  {lost} draws where the model has no finite density")
        for name in self.worst_sites[:3]:
            shift, factor = self.sites[name]
            lines.append(
                f"  site '{name}': weighting moves a mean by {shift:.2f} sd, and a spread by a "
                f"factor of {factor:.2f}"
            )
        if self.subsampled:
            lines.append(
                "  The model subsamples its data, so weights differ by that too. For the guide "
                "alone, diagnose it on all data."
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.is_point:
            return "No verdict: the guide is a point, and weights say nothing of the rest."
        if self.improper:
            names = ", ".join(f"'{name}'" for name in self.improper)
            return (
                f"No verdict: the posterior is improper, since the prior of {names} is flat and "
                "the model's density does not change with it. Give it a proper prior."
            )
        log_w = self.log_weights
        num_finite = int(log_w.isfinite().sum())
        if num_finite < FEWEST:
            return (
                f"No verdict: of {len(log_w)} draws {num_finite} have a finite weight, and it "
                f"takes {FEWEST}."
            )
        if self.rounding > COARSE:
            return f"No verdict: {imprecise(self.rounding)}"
        if math.isinf(self.khat) and int((log_w > log_w.max() + LOWEST).sum()) >= FEWEST:
            return "No verdict: so many weights are the same number that they show no tail."
        is_still = all(_severity(move) < STILL for move in self.sites.values())
        is_still = is_still and bool(self.log_weights.isfinite().all())
        if self.khat < min(GOOD, self.threshold) and is_still:
            return "Good: the guide is close to the posterior."
        if self.khat < self.threshold:
            return (
                "Usable: the guide misses something of the posterior; take "
                "sample_posterior(..., resample=True)."
            )
        return (
            "Not to be trusted: the guide misses too much. Train longer, with more flows or wider "
            "ones, or reparameterise."
        )


@torch.no_grad()
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 4000,
) -> Diagnosis:
    """Says how close a guide is to the posterior, from importance weights of its draws.

    It can't see a mode that the guide has no draws near, nor judge a guide that is a point. Costs
    ``num_samples`` runs of guide and model, at once where the model takes them.

    Args:
        model: A Pyro model.
        guide: A guide for it, any of Pyro's or ours or by hand.
        args: What they take.
        kwargs: Likewise.
        num_samples: How many draws.

    Threads take turns: of several calls, and of fits, one runs at a time. Processes run beside each
    other.

    Raises:
        ValueError: If ``num_samples`` is not positive, model and guide are swapped or are none, or
            the guide's sites are not the model's latents or have other shapes.
        RuntimeError: If the model raises an error at each draw.

    Warns:
        UserWarning: If the posterior is improper, since nothing depends on a latent with a flat
            prior.

    References:
        Yao et al. (2018), Yes, but did it work?, https://arxiv.org/abs/1802.02538;
        Vehtari et al. (2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> guide = AutoIAF(model)  # starts at the posterior, since that is normal
        >>> diagnosis = diagnose(model, guide)
        >>> diagnosis.khat < 0.7
        True
        >>> print(str(diagnosis).splitlines()[0])
        Good: the guide is close to the posterior.
    """
    check_size("num_samples", num_samples)
    check_pair("diagnose", model, guide)
    args, kwargs = check_call(args, kwargs, model)
    with taking_turns:
        particles = WeightedParticles(model, guide, args, kwargs)
        draws = particles.weighted(num_samples)
    log_w, S = draws.log_weights, num_samples
    largest = log_w.max()
    weights = (log_w - largest).exp() if largest.isfinite() else torch.zeros_like(log_w)
    total, squares = weights.sum(), weights.square().sum()
    ess = (total.square() / squares).item() if squares > 0 else 0.0
    return Diagnosis(
        khat=draws.khat,
        elbo=log_w.mean().item(),
        elbo_se=(log_w.std() / math.sqrt(S)).item() if S > 1 else math.nan,
        iw_elbo=(log_w.logsumexp(0) - math.log(S)).item(),
        iw_elbo_se=math.sqrt(max(1 / ess - 1 / S, 0.0)) if ess else math.nan,
        ess=ess,
        log_weights=log_w,
        sites=_moves(draws.weights, draws.sites) if total > 0 else {},
        subsampled=particles.subsampled,
        is_point=S > 1 and all(bool((d == d[:1]).all()) for d in draws.sites.values()),
        rounding=draws.rounding,
        improper=particles.loose,
    )


def _moves(weights: Tensor, sites: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """How far weighting moves means, and by which factor standard deviations."""
    moves = {}
    for name, draws in sites.items():
        if not draws.is_floating_point():
            continue
        flat = draws.double().reshape(len(draws), -1)
        mean, sd = flat.mean(0), flat.std(0, correction=min(1, len(flat) - 1))
        weighted = weights @ flat
        spread = (weights @ (flat - weighted).square()).sqrt()
        fixed = sd < 1e-12 * (1 + mean.abs())  # the last part of a Cholesky factor, say
        shift = ((weighted - mean).abs() / sd).where(~fixed, 0).max().item()
        factor = (spread / sd).where(~fixed, 1)
        furthest = factor[factor.clamp(min=1e-9).log().abs().argmax()].item()
        moves[name] = (shift, furthest)
    return moves


def _severity(move: tuple[float, float]) -> float:
    shift, factor = move
    return max(shift, abs(math.log(max(factor, 1e-9))))
