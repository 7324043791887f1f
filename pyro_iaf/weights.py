r"""Importance weights: how far a guide's draws are from the posterior, one by one.

.. math::
    w_s = \frac{p(x, z_s)}{q(z_s)}, \qquad z_s \sim q

Were the guide the posterior, they would all be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from .joint import (
    MAX_NUMBERS,
    Given,
    compute_log_prob,
    is_subsampled,
    join,
    log_prob_of_particles,
    log_probs_of_particles,
    plate_nesting,
    quietly,
    same,
    samples,
    split_sizes,
    subsamples,
)

__all__ = ["Draws", "Particles", "pareto_k", "resampled", "smoothed"]

# Weights that differ by less than this share have no tail: rounding, mostly.
TIED = 1e-3

# Whether draws can go at once is tried on so many: a number that few plates have.
NUM_TRIED = 7


class Draws(NamedTuple):
    """Draws from a guide: log-weights of shape ``(S,)``, and sites with ``S`` in front."""

    log_weights: Tensor
    sites: dict[str, Tensor]


class Particles:
    """A model and a guide, run for many draws at once where they can be.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        args: What they take.
        kwargs: Likewise.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.at_once = False
        with quietly():
            self.first_model, self.first_guide = first = self._run(None)
        self.nesting = plate_nesting(*first)
        self.latents = _latents(self.first_model)
        self.hidden = self.latents.keys() - _latents(self.first_guide).keys()
        shapes = [torch.as_tensor(s["value"]).shape for s in samples(self.first_model).values()]
        self.num_numbers = sum(max(1, shape.numel()) for shape in shapes)
        self.subsampled = is_subsampled(self.first_model)
        self.at_once = True
        self.at_once = self._go_at_once()

    def weighted(self, num_draws: int) -> Draws:
        """Draws from the guide and their log-weights, ``-inf`` where the model has no density.

        Raises:
            ValueError: If the model has latents that the guide doesn't.
        """
        if self.hidden:
            raise ValueError(
                f"Importance weights need a guide for all latents; this one has none for site "
                f"'{min(self.hidden)}'. Sum it out of the model, or add a guide for it."
            )
        found = []
        # A subsample of its own for each draw, where there are subsamples.
        most = 1 if self.subsampled else self.most_at_once
        for size in split_sizes(num_draws, most):
            guide, log_weights = self._weigh(size)
            log_weights = log_weights.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
            found.append((log_weights, self.values(guide, size)))
        sites = {name: torch.cat([part[name] for _, part in found]) for name in found[0][1]}
        return Draws(torch.cat([log_weights for log_weights, _ in found]), sites)

    @torch.no_grad()
    def _weigh(self, size: int) -> tuple[poutine.Trace, Tensor]:
        """A run of the guide, and the log-weights of its draws."""
        nesting = self.nesting if self.at_once else None
        with quietly(), poutine.block():
            guide = poutine.trace(self.in_plate(self.guide, size))
            guide_trace = guide.get_trace(*self.args, **self.kwargs)
            compute_log_prob(guide_trace)
            try:
                replayed = poutine.replay(self.in_plate(self.model, size), guide_trace)
                model_trace = poutine.trace(replayed).get_trace(*self.args, **self.kwargs)
                compute_log_prob(model_trace)
                log_p = log_prob_of_particles(model_trace, size, nesting)
            except Exception:  # at some draw a matrix has no Cholesky factor, or a check fails
                log_p = self._one_by_one(guide_trace, size)
        return guide_trace, log_p - log_prob_of_particles(guide_trace, size, nesting)

    def _one_by_one(self, guide: poutine.Trace, size: int) -> Tensor:
        """The model's log densities at draws of the guide; ``-inf`` where it raises an error."""
        kept = {name: site["value"] for name, site in subsamples(guide).items()}
        drawn = self.values(guide, size)
        found = []
        for k in range(size):
            try:
                trace = self._alone({**kept, **{name: draws[k] for name, draws in drawn.items()}})
                found.append(log_prob_of_particles(trace, 1, None))
            except Exception:  # whatever a model may raise there
                found.append(torch.full((1,), -math.inf))
        return torch.cat([log_prob.to(found[0]) for log_prob in found])

    def _alone(self, values: dict[str, Any]) -> poutine.Trace:
        """A run of the model by itself at these values, with its log densities."""
        with poutine.block(), Given(values):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            compute_log_prob(trace)
        return trace

    def values(self, trace: poutine.Trace, num_draws: int) -> dict[str, Tensor]:
        """The guide's latents in a run, with the draws in front and no plate beside them."""
        sites = samples(trace)
        return {
            name: self.freed(sites[name]["value"], site["value"].shape, num_draws)
            for name, site in _latents(self.first_guide).items()
        }

    def freed(self, value: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
        """A value of a run at once as draws of what a single run has in this shape."""
        if value.numel() == shape.numel():  # the same for all draws
            return value.reshape(shape).expand(num_draws, *shape)
        return value.reshape(num_draws, *shape)

    def placed(self, name: str, draws: Tensor) -> Tensor:
        """Draws of a latent as a run takes them: left of all plates."""
        site = samples(self.first_model)[name]
        if not self.at_once:
            return draws.reshape(site["value"].shape)
        missing = self.nesting - len(site["fn"].batch_shape)
        return draws.reshape(len(draws), *[1] * missing, *draws.shape[1:])

    def in_plate(self, fn: Callable[..., Any], num_draws: int | None) -> Callable[..., Any]:
        """A model or a guide that is run for so many draws at once, if it can be."""
        if num_draws is None or not self.at_once:
            return fn
        plate = pyro.plate("num_particles_vectorized", num_draws, dim=-self.nesting - 1)
        in_plate: Callable[..., Any] = plate(fn)
        return in_plate

    @property
    def most_at_once(self) -> int:
        """How many draws a run should hold at most."""
        return max(1, MAX_NUMBERS // self.num_numbers) if self.at_once else 1

    def _run(self, num_draws: int | None) -> tuple[poutine.Trace, poutine.Trace]:
        model, guide = (self.in_plate(fn, num_draws) for fn in (self.model, self.guide))
        with torch.no_grad(), poutine.block():
            guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
            replayed = poutine.trace(poutine.replay(model, guide_trace))
            return replayed.get_trace(*self.args, **self.kwargs), guide_trace

    def _go_at_once(self) -> bool:
        """Whether draws at once have the densities that they have one after the other."""
        try:
            with torch.no_grad(), quietly():
                model, guide = self._run(NUM_TRIED)
                compute_log_prob(model)
                together = log_probs_of_particles(model, NUM_TRIED, self.nesting)
                kept = {n: site["value"] for n, site in subsamples(model).items()}
                drawn = self.values(guide, NUM_TRIED)
                alone = []
                for k in range(NUM_TRIED):
                    trace = self._alone({**kept, **{n: v[k] for n, v in drawn.items()}})
                    alone.append(log_probs_of_particles(trace, 1, None))
            return same(together, join(alone))
        except Exception:  # whatever a model that isn't made for it may raise
            return False


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in samples(trace).items()
        if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }


def pareto_k(log_weights: Tensor) -> float:
    """The shape k-hat of the tail of importance weights; infinite where there is no telling.

    Below 0.5 the weights have a variance; up to 0.7 estimates from them are of use.

    Args:
        log_weights: Of shape ``(S,)``, up to a constant.

    References:
        Vehtari et al. (2024), Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646

    Example:
        >>> pareto_k(-2 * torch.rand(10_000).log()) > 0.7  # weights 1 / u^2: no mean
        True
    """
    if len(log_weights) >= 5 and log_weights.max() - log_weights.min() < TIED:
        return 0.0
    return _pareto(*_tail(log_weights))[0]


def smoothed(log_weights: Tensor) -> Tensor:
    """Normalised weights whose largest are replaced by what is expected of a Pareto tail."""
    log_weights = log_weights.double().nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
    tail, cutoff = _tail(log_weights)
    k, sigma = _pareto(tail, cutoff)
    if sigma > 0:
        levels = (torch.arange(len(tail), dtype=torch.float64) + 0.5) / len(tail)
        beyond = -torch.log1p(-levels) if abs(k) < 1e-9 else ((1 - levels) ** -k - 1) / k
        expected = (sigma * beyond + math.exp(cutoff)).log().clamp(max=0) + log_weights.max().cpu()
        largest = log_weights.argsort()[-len(tail) :]
        log_weights = log_weights.index_put((largest,), expected.to(log_weights.device))
    if not log_weights.max().isfinite():
        raise ValueError("No draw has a finite importance weight, so there is none to choose.")
    return log_weights.softmax(0)


def resampled(log_weights: Tensor, num_draws: int) -> Tensor:
    """Indices of draws, each as often as its smoothed weight says, in random order."""
    weights = smoothed(log_weights)
    # One random number for all keeps each count within one of what is expected.
    points = (torch.arange(num_draws, device=weights.device) + torch.rand(()).item()) / num_draws
    index = torch.searchsorted(weights.cumsum(0), points.to(weights)).clamp(max=len(weights) - 1)
    return index[torch.randperm(num_draws).to(index.device)]


def _pareto(tail: Tensor, cutoff: float) -> tuple[float, float]:
    """Shape and scale of a tail; a scale of zero where there is none to speak of."""
    if len(tail) < 5:
        return math.inf, 0.0
    if -cutoff < TIED:
        return 0.0, 0.0
    try:
        k, sigma = fit_generalized_pareto(tail.exp() - math.exp(cutoff))
    except ZeroDivisionError:  # a quarter of it is one number
        return math.inf, 0.0
    return float(k), float(sigma)


def _tail(log_weights: Tensor) -> tuple[Tensor, float]:
    """The largest log-weights in ascending order, relative to the largest, and what they exceed."""
    count = len(log_weights)
    if count < 5 or log_weights.isnan().any() or not log_weights.max().isfinite():
        return log_weights[:0], 0.0
    ordered = (log_weights - log_weights.max()).double().sort().values.cpu()
    size = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    cutoff = max(math.log(torch.finfo(torch.float64).tiny), ordered[-size - 1].item())
    return ordered[ordered > cutoff], cutoff
