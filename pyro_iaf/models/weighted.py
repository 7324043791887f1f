"""Many draws of a guide, weighted by the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    biject_to,
)

from .._validation import warn
from ..importance import COARSE, RELIABLE, imprecise, pareto_k, resampled, smoothed
from .arguments import Args, Kwargs, Program
from .matching import Given, Mismatch, check_guide_site
from .particles import NUM_TRIED, Particles, numbers_in
from .traces import (
    bare,
    compute_log_prob,
    is_latent,
    is_subsampled,
    log_prob_of_particles,
    log_probs_of_particles,
    plate_nesting,
    quietly,
    samples,
    subsamples,
)

__all__ = ["Draws", "WeightedParticles", "check_latents"]

# At so many draws a density has to stand still before a latent is said to move none.
NUM_LOOKS = 3

# Rounding is looked for at so many draws.
NUM_NUDGED = 16


class Draws(NamedTuple):
    """Draws from a guide.

    Attributes:
        log_weights: Their log-weights, of shape ``(S,)``, in double precision.
        sites: The latents, with ``S`` in front.
        rounding: By how many nats the rounding of densities moves a log-weight.
    """

    log_weights: Tensor
    sites: dict[str, Tensor]
    rounding: float

    @property
    def khat(self) -> float:
        """The shape of the weights' tail."""
        return pareto_k(self.log_weights, self.rounding)

    @property
    def weights(self) -> Tensor:
        """The weights, smoothed and normalised."""
        return smoothed(self.log_weights, self.rounding)

    def resampled(self, num_draws: int) -> dict[str, Tensor]:
        """So many of the draws, chosen by their weights.

        Warns:
            UserWarning: If the weights can't be relied on.
        """
        if self.rounding > COARSE:
            warn(f"Resampled draws are no draws from the posterior: {imprecise(self.rounding)}")
        elif self.khat > RELIABLE:
            warn(
                f"The guide's importance weights have a k-hat above {RELIABLE}: resampled draws "
                "are no draws from the posterior. Train the guide further, or make it wider; "
                "diagnose says how far off it is."
            )
        index = resampled(self.log_weights, num_draws, self.rounding)
        return {name: draws[index] for name, draws in self.sites.items()}


class WeightedParticles(Particles):
    """A model and a guide, run for many draws at once where they can be.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        args: What they take.
        kwargs: Likewise.

    Raises:
        Mismatch: If the guide's sites are not the model's latents, or have other shapes.

    Warns:
        UserWarning: If the prior of a latent is improper, and nothing depends on it.
    """

    def __init__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        with torch.no_grad(), quietly(), poutine.block():
            self.at_once = False
            self.first_model, self.first_guide = first = self._first_runs()
        super().__init__(plate_nesting(*first), numbers_in(self.first_model))
        self.latents = _latents(self.first_model)
        _check_devices(self.first_model)
        _check_supports(self.guide, self.latents)
        self.subsampled = is_subsampled(self.first_model)
        self.loose = self._loose_latents()
        if self.loose:
            names = ", ".join(f"'{name}'" for name in self.loose)
            warn(
                f"Each latent should have a proper prior, or data that depend on it; {names} has a "
                "flat prior without ends, and the model's density does not change with it. Its "
                "posterior is improper, and nothing holds the guide, which widens without end. "
                "Give it a proper prior."
            )
        self._try_at_once()

    @torch.no_grad()
    def weighted(self, num_draws: int) -> Draws:
        """Draws from the guide and their log-weights, ``-inf`` where the model has no density.

        Raises:
            RuntimeError: If the model raises an error at each draw.
        """
        parts, errors = [], []
        # A subsample of its own for each draw, where there are subsamples.
        for size in [1] * num_draws if self.subsampled else self.sizes(num_draws):
            part, failures = self._weigh(size)
            parts.append(part)
            errors += failures
        if len(errors) == num_draws:
            raise RuntimeError(
                f"The model should have a density at some draws of the guide, and raises an error "
                f"at each of {num_draws}, the first {type(errors[0]).__name__}: {errors[0]}. Mend "
                "the model where the error above comes from."
            ) from errors[0]
        log_weights = torch.cat([part.log_weights for part in parts])
        log_weights = log_weights.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
        sites = {n: torch.cat([part.sites[n] for part in parts]) for n in parts[0].sites}
        roundings = [self._found_rounding(), *(part.rounding for part in parts)]
        return Draws(log_weights, sites, max(roundings))

    def _found_rounding(self) -> float:
        """What rounding moves a log density by, as it shows when latents move by their own.

        An error that all observations share, as that of a rate's logarithm, is the sum of theirs.
        """
        if self.subsampled:
            return 0.0
        size = min(NUM_NUDGED, self.num_at_once)
        try:
            with torch.random.fork_rng([]), quietly(), poutine.block():
                guide = self._run_guide(size)
                drawn, kept = self.values(guide, size), _kept(guide)
                nudged = {
                    n: v if _is_discrete(self.latents[n]) else v.nextafter(v.new_tensor(math.inf))
                    for n, v in drawn.items()
                }
                here, again, there = (
                    self._scored(self.run_model(values, kept, size), size)[0]
                    for values in (drawn, drawn, nudged)
                )
        except Exception:  # whatever a model may raise there
            return 0.0
        moves = (there - here)[(there - here).isfinite()]
        if not (len(moves) and torch.equal(here, again)):  # or chance moves it
            return 0.0
        return moves.square().mean().sqrt().item() / math.sqrt(2)

    def _weigh(self, size: int) -> tuple[Draws, list[Exception]]:
        """Draws of one run, and the errors that the model raises at them one by one."""
        with quietly(), poutine.block():
            guide = self._run_guide(size)
            drawn, kept = self.values(guide, size), _kept(guide)
            log_q, rounding_q = self._scored(guide, size)
            errors: list[Exception] = []
            try:
                run = self.run_model(drawn, kept, size)
                log_p, rounding_p = self._scored(run, size)
            except Mismatch:
                raise
            except Exception:  # at some draw a matrix has no Cholesky factor, or a check fails
                log_p, rounding_p, errors = self._one_by_one(drawn, kept, size)
        log_p, rounding_p = log_p.to(log_q), rounding_p.to(rounding_q)
        rounding = (rounding_p + rounding_q)[(log_p - log_q).isfinite()]
        nats = rounding.median().sqrt().item() if len(rounding) else 0.0
        return Draws(log_p - log_q, drawn, nats), errors

    def _scored(self, trace: poutine.Trace, size: int | None) -> tuple[Tensor, Tensor]:
        """The log densities of a run's draws, and the square of what their rounding comes to."""
        nesting = self.nesting if self.at_once and size is not None else None
        compute_log_prob(trace, in_double=True)
        log_prob, squared_rounding = (
            log_prob_of_particles(trace, size or 1, nesting, what=what)
            for what in ("log_prob", "squared_rounding")
        )
        return log_prob, squared_rounding

    def _one_by_one(
        self, drawn: dict[str, Tensor], kept: dict[str, Any], size: int
    ) -> tuple[Tensor, Tensor, list[Exception]]:
        """The same at draws of the guide, each by itself; ``-inf`` where there is an error."""
        log_p = torch.full((size,), -math.inf, dtype=torch.float64, device="cpu")
        rounding, errors = torch.zeros_like(log_p), []
        for k in range(size):
            try:
                run = self.run_model({name: draws[k] for name, draws in drawn.items()}, kept)
                log_p[k : k + 1], rounding[k : k + 1] = self._scored(run, None)
            except Mismatch:
                raise
            except Exception as error:  # whatever a model may raise there
                errors.append(error)
        return log_p, rounding, errors

    def run_model(
        self,
        values: Mapping[str, Any],
        kept: Mapping[str, Any],
        num_draws: int | None = None,
        model: Program | None = None,
    ) -> poutine.Trace:
        """A run of the model at these values of its latents.

        Args:
            values: With the draws in front, if there is a number of them.
            kept: Values of subsamples and auxiliary sites.
            num_draws: How many draws there are; by default one, without a dimension of its own.
            model: What is run, by default the model; with other data, say.
        """
        shapes = None
        if num_draws is None or not self.at_once:
            values = values if num_draws is None else {n: v[0] for n, v in values.items()}
            shapes = {name: torch.as_tensor(value).shape for name, value in values.items()}
        else:
            values = dict(values)
            for name, draws in values.items():
                num_batch = len(self.latents[name]["fn"].batch_shape)
                values[name] = draws.reshape(num_draws, *self.placed(draws.shape[1:], num_batch))
        run = poutine.trace(self.in_plate(model or self.model, num_draws))
        with poutine.block(), Given(values, kept, shapes):
            return run.get_trace(*self.args, **self.kwargs)

    def values(self, trace: poutine.Trace, num_draws: int) -> dict[str, Tensor]:
        """The guide's latents in a run, with the draws in front and no plate beside them."""
        sites, first = _latents(trace), _latents(self.first_guide)
        if strange := sites.keys() ^ first.keys():
            raise Mismatch(
                "Importance weights need a guide that draws the same sites each time; it draws "
                f"site '{min(strange)}' in some runs only. Sum the site out of the model that "
                "decides on it."
            )
        return {
            name: self.freed(sites[name]["value"], site["value"].shape, num_draws)
            for name, site in first.items()
        }

    def _first_runs(self) -> tuple[poutine.Trace, poutine.Trace]:
        """A run of the model at a draw of the guide where it raises no error, and of the guide."""
        for _ in range(NUM_TRIED):
            guide = self._run_guide(None)
            values = {name: site["value"] for name, site in _latents(guide).items()}
            try:
                return self.run_model(values, _kept(guide)), guide
            except Mismatch:
                raise
            except Exception as error:  # there, but perhaps not elsewhere
                failure = error
        raise failure

    def _run_guide(self, num_draws: int | None) -> poutine.Trace:
        run = poutine.trace(self.in_plate(self.guide, num_draws))
        trace = run.get_trace(*self.args, **self.kwargs)
        runs_the_model = isinstance(poutine.unwrap(self.guide), GuideMessenger)
        for name, site in samples(trace).items():
            if runs_the_model and site["is_observed"]:
                del trace.nodes[name]
            else:
                check_guide_site(site)
        return trace

    def _loose_latents(self) -> list[str]:
        """Latents of flat, unbounded priors that move no density, in whole or in part."""
        loose = [name for name, site in self.latents.items() if _is_flat(site["fn"])]
        for _ in range(NUM_LOOKS if loose else 0):
            try:
                with quietly(), poutine.block():
                    slopes = self._slopes(loose)
            except Exception:  # whatever a model may raise there
                return []
            loose = [n for n, s in slopes.items() if s is None or bool((s == 0).any())]
        return loose

    def _slopes(self, names: list[str]) -> dict[str, Tensor | None]:
        """The slope of the model's log density in some latents, at a draw of the guide."""
        guide = self._run_guide(None)
        values = {name: site["value"] for name, site in _latents(guide).items()}
        leaves = [values[name].detach().requires_grad_() for name in names]
        values.update(zip(names, leaves, strict=True))
        with torch.enable_grad():
            model = self.run_model(values, _kept(guide))
            compute_log_prob(model)
            log_p = log_prob_of_particles(model, 1, None).sum()
            if not log_p.requires_grad:
                return dict.fromkeys(names)
            slopes = torch.autograd.grad(log_p, leaves, allow_unused=True)
        return dict(zip(names, slopes, strict=True))

    def _try_at_once(self) -> None:
        """Finds out whether draws at once have the densities that they have one after the other."""
        kept = _kept(self.first_model)

        def log_probs(rows: Sequence[int], at_once: bool) -> dict[str, Tensor]:
            values = {name: draws[rows if at_once else rows[0]] for name, draws in drawn.items()}
            size = len(rows) if at_once else None
            trace = self.run_model(values, kept, size)
            compute_log_prob(trace)
            return log_probs_of_particles(trace, size or 1, self.nesting if at_once else None)

        try:
            with torch.no_grad(), quietly(), poutine.block():
                drawn = self.values(self._run_guide(NUM_TRIED), NUM_TRIED)
                self.probe(NUM_TRIED, log_probs)
        except Exception:  # whatever a guide that isn't made for it may raise
            self.at_once = False


def _check_devices(model: poutine.Trace) -> None:
    """Raises a Mismatch if a model's latents are on one device and its data on another."""
    places: dict[bool, dict[torch.device, str]] = {False: {}, True: {}}
    for name, site in samples(model).items():
        value = site["value"]
        if isinstance(value, Tensor) and not (site["is_observed"] and value.dim() == 0):
            places[site["is_observed"]].setdefault(value.device, name)
    latents, data = places.values()
    if latents and data and not latents.keys() & data.keys():
        (here, latent), (there, observed) = next(iter(latents.items())), next(iter(data.items()))
        raise Mismatch(
            f"Latents and data should be on one device; site '{latent}' is on {here}, and the data "
            f"of site '{observed}' on {there}. Put the parameters of the prior there, as in "
            f"dist.Normal(torch.tensor(0.0, device='{there}'), 1.0)."
        )


def _check_supports(guide: Any, latents: dict[str, Any]) -> None:
    """Raises a Mismatch if a guide was made for sites of other supports."""
    trace = getattr(guide, "prototype_trace", None)
    if not isinstance(trace, poutine.Trace):
        return
    for name, site in _latents(trace).items():
        own, here = (s["fn"].support for s in (site, latents.get(name, site)))
        if _bijection_onto(own) != _bijection_onto(here):
            raise Mismatch(
                f"A guide should draw values in the supports that the model's sites have; at site "
                f"'{name}' it draws in {own}, and the model has {here}. Make a "
                "guide for this model and these arguments."
            )


def _bijection_onto(support: Any) -> tuple[str, ...]:
    """The kinds of the transforms to a support; none if it has no bijection, as discrete ones."""
    try:
        return _kinds(biject_to(support))
    except NotImplementedError:
        return ()


def _kinds(transform: Any) -> tuple[str, ...]:
    """What a transform is made of, but for the numbers in it, and for shifts and scales."""
    if isinstance(transform, IndependentTransform):
        return _kinds(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return tuple(kind for part in transform.parts for kind in _kinds(part))
    if isinstance(transform, AffineTransform) and (torch.as_tensor(transform.scale) > 0).all():
        return ()  # the interval from 0 to 1 comes with it or without
    return (type(transform).__name__,)


def check_latents(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
    """Raises a Mismatch if the guide's sites are not the model's latents, and no other error."""
    try:
        WeightedParticles(model, guide, args, kwargs)
    except Mismatch:
        raise
    except Exception:  # whatever else is wrong with them
        pass


def _latents(trace: poutine.Trace) -> dict[str, Any]:
    return {name: site for name, site in samples(trace).items() if is_latent(site)}


def _kept(trace: poutine.Trace) -> dict[str, Any]:
    """Values of what a run draws besides its latents: subsamples, and auxiliary sites."""
    sites: dict[str, Any] = {**samples(trace), **subsamples(trace)}
    return {n: s["value"] for n, s in sites.items() if not (s["is_observed"] or is_latent(s))}


def _is_discrete(site: Any) -> bool:
    support: constraints.Constraint = site["fn"].support
    return support.is_discrete


def _is_flat(fn: Any) -> bool:
    """Whether a prior has the same density everywhere, and no total."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded = constraints.interval, type(constraints.simplex), type(constraints.corr_cholesky)
    return isinstance(bare(fn), dist.ImproperUniform) and not isinstance(support, bounded)
