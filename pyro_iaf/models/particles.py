"""Many draws of a guide, weighted by the model, at once or one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
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
from .matching import Given, Mismatch, check_guide_site
from .traces import (
    bare,
    compute_log_prob,
    is_latent,
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

__all__ = ["MAX_NUMBERS", "Draws", "Particles", "check_latents"]

# Numbers that a model's sites hold at most in one run, and the graph of a Hessian's rows.
MAX_NUMBERS = 2**24

# At so many draws a density has to stand still before a latent is said to move none.
NUM_LOOKS = 3

# Rounding is looked for at so many draws.
NUM_NUDGED = 16

# Whether draws can go at once is tried on so many: a number that few plates have.
NUM_TRIED = 7


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


class Particles:
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

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.at_once = False
        with torch.no_grad(), quietly(), poutine.block():
            self.first_model, self.first_guide = first = self._first_runs()
        self.nesting = plate_nesting(*first)
        self.latents = _latents(self.first_model)
        _check_devices(self.first_model)
        _check_supports(self.guide, self.latents)
        shapes = [torch.as_tensor(s["value"]).shape for s in samples(self.first_model).values()]
        self.num_numbers = sum(max(1, shape.numel()) for shape in shapes)
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
        self.at_once = True
        self.at_once = self._go_at_once()

    @torch.no_grad()
    def weighted(self, num_draws: int) -> Draws:
        """Draws from the guide and their log-weights, ``-inf`` where the model has no density.

        Raises:
            RuntimeError: If the model raises an error at each draw.
        """
        parts, errors = [], []
        # A subsample of its own for each draw, where there are subsamples.
        most = 1 if self.subsampled else self.most_at_once
        for size in split_sizes(num_draws, most):
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
        size = min(NUM_NUDGED, self.most_at_once) if self.at_once else None
        try:
            with torch.random.fork_rng([]), quietly(), poutine.block():
                guide = self._run_guide(size)
                here, again = (self._scored(self._run_model(guide, size), size)[0] for _ in "12")
                for site in _latents(guide).values():
                    if not site["fn"].support.is_discrete:
                        site["value"] = site["value"].nextafter(site["value"].new_tensor(math.inf))
                there, _ = self._scored(self._run_model(guide, size), size)
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
            log_q, rounding_q = self._scored(guide, size)
            errors: list[Exception] = []
            try:
                log_p, rounding_p = self._scored(self._run_model(guide, size), size)
            except Mismatch:
                raise
            except Exception:  # at some draw a matrix has no Cholesky factor, or a check fails
                log_p, rounding_p, errors = self._one_by_one(guide, size)
        log_p, rounding_p = log_p.to(log_q), rounding_p.to(rounding_q)
        rounding = (rounding_p + rounding_q)[(log_p - log_q).isfinite()]
        nats = rounding.median().sqrt().item() if len(rounding) else 0.0
        return Draws(log_p - log_q, self.values(guide, size), nats), errors

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
        self, guide: poutine.Trace, size: int
    ) -> tuple[Tensor, Tensor, list[Exception]]:
        """The same at draws of the guide, each by itself; ``-inf`` where there is an error."""
        kept, drawn = _kept(guide), self.values(guide, size)
        log_p = torch.full((size,), -math.inf, dtype=torch.float64, device="cpu")
        rounding, errors = torch.zeros_like(log_p), []
        for k in range(size):
            try:
                run = self._alone({name: draws[k] for name, draws in drawn.items()}, kept)
                log_p[k : k + 1], rounding[k : k + 1] = self._scored(run, None)
            except Mismatch:
                raise
            except Exception as error:  # whatever a model may raise there
                errors.append(error)
        return log_p, rounding, errors

    def _alone(self, values: dict[str, Any], kept: dict[str, Any]) -> poutine.Trace:
        """A run of the model by itself at these values."""
        with poutine.block(), Given(values, kept, _shapes(values)):
            return poutine.trace(self.model).get_trace(*self.args, **self.kwargs)

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

    def _first_runs(self) -> tuple[poutine.Trace, poutine.Trace]:
        """A run of the model at a draw of the guide where it raises no error, and of the guide."""
        for _ in range(NUM_TRIED):
            guide = self._run_guide(None)
            try:
                return self._run_model(guide, None), guide
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

    def _run_model(self, guide: poutine.Trace, num_draws: int | None) -> poutine.Trace:
        """A run of the model at the draws of the guide."""
        values = {name: site["value"] for name, site in _latents(guide).items()}
        run = poutine.trace(self.in_plate(self.model, num_draws))
        is_single = num_draws is None or not self.at_once
        with Given(values, _kept(guide), _shapes(values) if is_single else None):
            return run.get_trace(*self.args, **self.kwargs)

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
        leaves = [samples(guide)[name]["value"].detach().requires_grad_() for name in names]
        for name, leaf in zip(names, leaves, strict=True):
            guide.nodes[name]["value"] = leaf
        with torch.enable_grad():
            model = self._run_model(guide, None)
            compute_log_prob(model)
            log_p = log_prob_of_particles(model, 1, None).sum()
            if not log_p.requires_grad:
                return dict.fromkeys(names)
            slopes = torch.autograd.grad(log_p, leaves, allow_unused=True)
        return dict(zip(names, slopes, strict=True))

    def _go_at_once(self) -> bool:
        """Whether draws at once have the densities that they have one after the other."""
        try:
            with torch.no_grad(), quietly(), poutine.block():
                guide = self._run_guide(NUM_TRIED)
                model = self._run_model(guide, NUM_TRIED)
                compute_log_prob(model)
                together = log_probs_of_particles(model, NUM_TRIED, self.nesting)
                kept, drawn = _kept(model), self.values(guide, NUM_TRIED)
                alone = []
                for k in range(NUM_TRIED):
                    trace = self._alone({n: v[k] for n, v in drawn.items()}, kept)
                    compute_log_prob(trace)
                    alone.append(log_probs_of_particles(trace, 1, None))
            return same(together, join(alone))
        except Exception:  # whatever a model that isn't made for it may raise
            return False


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


def check_latents(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raises a Mismatch if the guide's sites are not the model's latents, and no other error."""
    try:
        Particles(model, guide, args, kwargs)
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


def _is_flat(fn: Any) -> bool:
    """Whether a prior has the same density everywhere, and no total."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded = constraints.interval, type(constraints.simplex), type(constraints.corr_cholesky)
    return isinstance(bare(fn), dist.ImproperUniform) and not isinstance(support, bounded)


def _shapes(values: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: torch.as_tensor(value).shape for name, value in values.items()}
