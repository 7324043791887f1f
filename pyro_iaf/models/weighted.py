"""Draws of a guide with their importance weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from .._validation import warn
from ..importance import (
    MAX_KHAT,
    MAX_ROUNDING,
    hardly_differ,
    pareto_k,
    resampled,
    rounding_message,
    smoothed,
)
from .arguments import Args, Kwargs, Program
from .discrete import discrete_draws
from .enumeration import SummedOut, summed_out
from .log_joint import LogJoint
from .matching import FixedLatents, Mismatch, check_guide_site
from .particles import NUM_PROBED, Particles, mapped, numbers_in, threads_for
from .supports import check_supports
from .traces import (
    bare,
    compute_log_prob,
    is_latent,
    is_subsampled,
    latent_sites,
    log_prob_of_particles,
    log_probs_of_particles,
    plate_nesting,
    quietly,
    samples,
    subsamples,
)

__all__ = ["Draws", "WeightedParticles", "check_latents"]

# A latent counts as improper if the gradient in it is zero at so many draws.
NUM_GRADIENTS = 3

# The rounding error is measured at so many draws.
NUM_NUDGED = 16


class Draws(NamedTuple):
    """Draws from a guide, with importance weights.

    Attributes:
        log_weights: Their log-weights, of shape ``(S,)``, in double precision.
        sites: The latents by name, with ``S`` in front.
        rounding: The rounding error of a log-weight, in nats.
    """

    log_weights: Tensor
    sites: dict[str, Tensor]
    rounding: float

    @property
    def khat(self) -> float:
        """The Pareto k-hat of the weights."""
        return pareto_k(self.log_weights, self.rounding)

    @property
    def weights(self) -> Tensor:
        """The weights, smoothed and normalised."""
        return smoothed(self.log_weights, self.rounding)

    @property
    def _hardly_differ(self) -> bool:
        log_w, count = self.log_weights, len(self.log_weights)
        ess = 1 / log_w.softmax(0).square().sum().item()
        gap = (log_w.logsumexp(0) - math.log(count) - log_w.mean()).item()
        return hardly_differ(ess, gap, count)

    def resampled(self, num_draws: int) -> dict[str, Tensor]:
        """So many of the draws, chosen by their weights.

        Warns:
            UserWarning: If the weights are unreliable.
        """
        if self.rounding > MAX_ROUNDING:
            message = rounding_message(self.rounding)
            warn(f"Resampled draws are no draws from the posterior: {message}")
        elif self.khat > MAX_KHAT and not self._hardly_differ:
            warn(
                f"The guide's importance weights have a k-hat above {MAX_KHAT}: resampled draws "
                "are no draws from the posterior. Train the guide further, or make it wider; "
                "pyro_iaf.diagnose measures its error."
            )
        index = resampled(self.log_weights, num_draws, self.rounding)
        return {name: draws[index] for name, draws in self.sites.items()}


class WeightedParticles(Particles):
    """A model and its guide, run for many draws to compute importance weights.

    Raises:
        Mismatch: If the guide's sites are not the model's latents, or have other shapes.

    Warns:
        UserWarning: If a latent has an improper posterior.
    """

    def __init__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
        self.model, self.guide = summed_out(model, guide), guide
        self.args, self.kwargs = args, kwargs
        with torch.no_grad(), quietly(), poutine.block():
            self.at_once = False
            self.first_model, self.first_guide = first = self._first_runs()
        super().__init__(plate_nesting(*first), numbers_in(self.first_model))
        self.latents = latent_sites(self.first_model)
        _check_devices(self.first_model)
        check_supports(self.guide, self.latents)
        self.subsampled = is_subsampled(self.first_model)
        self.improper = self._improper_latents()
        if self.improper:
            names = ", ".join(f"'{name}'" for name in self.improper)
            warn(
                f"Each latent should have a proper prior, or data that depend on it; {names} has a "
                "flat prior without ends, and the model's density does not depend on it. Its "
                "posterior is improper, and the guide widens without end. Give it a proper prior."
            )
        self._probe()

    @torch.no_grad()
    def weighted(self, num_draws: int) -> Draws:
        """Draws from the guide and their log-weights, ``-inf`` where the model has no density.

        Raises:
            RuntimeError: If the model raises an error at each draw.
        """
        parts, errors = [], []
        # With subsampling, each draw has a subsample of its own.
        sizes = [1] * num_draws if self.subsampled else self.sizes(num_draws)
        with threads_for(max(sizes) * self.num_numbers):
            for size in sizes:
                part, failures = self._weigh(size)
                parts.append(part)
                errors += failures
        if len(errors) == num_draws:
            raise RuntimeError(
                f"The model should have a density at some draws of the guide, and raises an error "
                f"at each of {num_draws}, the first {type(errors[0]).__name__}: {errors[0]}. "
                "Correct the model where the error above is raised."
            ) from errors[0]
        log_weights = torch.cat([part.log_weights for part in parts])
        log_weights = log_weights.nan_to_num(-math.inf, posinf=-math.inf, neginf=-math.inf)
        sites = {n: torch.cat([part.sites[n] for part in parts]) for n in parts[0].sites}
        roundings = [self._measured_rounding(), *(part.rounding for part in parts)]
        return Draws(log_weights, sites, max(roundings))

    def _measured_rounding(self) -> float:
        """The rounding error of the log density, measured by moving latents by their rounding.

        Unlike ``squared_rounding``, this includes errors that observations share, such as that of a
        rate's logarithm.
        """
        if self.subsampled:
            return 0.0
        size = min(NUM_NUDGED, self.num_at_once)
        try:
            with torch.random.fork_rng([]), quietly(), poutine.block():
                guide = self.run_guide(size)
                drawn, auxiliary = self.values(guide, size), _auxiliary_values(guide)
                nudged = {
                    name: value.nextafter(value.new_tensor(math.inf))
                    for name, value in drawn.items()
                    if not self.latents[name]["fn"].support.is_discrete
                }
                first, repeated, moved = (
                    self._score(values, auxiliary, size)[0]
                    for values in (drawn, drawn, drawn | nudged)
                )
        except Exception:  # any error of the model
            return 0.0
        changes = (moved - first)[(moved - first).isfinite()]
        if not (len(changes) and torch.equal(first, repeated)):  # the density is random
            return 0.0
        return changes.square().mean().sqrt().item() / math.sqrt(2)

    def _weigh(self, size: int) -> tuple[Draws, list[Exception]]:
        """Draws of one run, and the errors that the model raises at single draws."""
        with quietly(), poutine.block():
            guide = self.run_guide(size)
            drawn, auxiliary = self.values(guide, size), _auxiliary_values(guide)
            log_q, rounding_q = self._scored(guide, size)
            errors: list[Exception] = []
            try:
                log_p, rounding_p = self._score(drawn, auxiliary, size)
            except Mismatch:
                raise
            except Exception:  # at some draw a matrix has no Cholesky factor, or a check fails
                log_p, rounding_p, errors = self._one_by_one(drawn, auxiliary, size)
        log_p, rounding_p = log_p.to(log_q), rounding_p.to(rounding_q)
        rounding = (rounding_p + rounding_q)[(log_p - log_q).isfinite()]
        nats = rounding.median().sqrt().item() if len(rounding) else 0.0
        return Draws(log_p - log_q, drawn, nats), errors

    def _score(
        self, values: Mapping[str, Tensor], auxiliary: Mapping[str, Any], size: int
    ) -> tuple[Tensor, Tensor]:
        """The model's :meth:`_scored` at so many draws."""
        if not self.mapped:
            return self._scored(self.run_model(values, auxiliary, size), size)
        rows = _auxiliary_values(self.first_model)
        of_one = mapped(lambda draw: self._scored(self.run_model(draw, rows), None), dict(values))
        log_p, rounding = (found.squeeze(1) for found in of_one)
        return log_p, rounding

    def _scored(self, trace: poutine.Trace, size: int | None) -> tuple[Tensor, Tensor]:
        """The log densities of a run's draws, and the squares of their rounding errors."""
        nesting = self.nesting if self.at_once and size is not None else None
        compute_log_prob(trace, in_double=True)
        log_prob, squared_rounding = (
            log_prob_of_particles(trace, size or 1, nesting, what=what)
            for what in ("log_prob", "squared_rounding")
        )
        return log_prob, squared_rounding

    def _one_by_one(
        self, drawn: dict[str, Tensor], auxiliary: dict[str, Any], size: int
    ) -> tuple[Tensor, Tensor, list[Exception]]:
        """The model's :meth:`_scored` in a run for each draw; ``-inf`` where it raises an error."""
        log_p = torch.full((size,), -math.inf, dtype=torch.float64, device="cpu")
        rounding, errors = torch.zeros_like(log_p), []
        for k in range(size):
            try:
                run = self.run_model({name: draws[k] for name, draws in drawn.items()}, auxiliary)
                log_p[k : k + 1], rounding[k : k + 1] = self._scored(run, None)
            except Mismatch:
                raise
            except Exception as error:  # any error of the model
                errors.append(error)
        return log_p, rounding, errors

    def run_model(
        self,
        values: Mapping[str, Any],
        auxiliary: Mapping[str, Any],
        num_draws: int | None = None,
        model: Program | None = None,
    ) -> poutine.Trace:
        """A run of the model at these values of its latents.

        Args:
            values: Values of all latents, with a dimension of draws in front if ``num_draws`` is
                given.
            auxiliary: Values of subsamples and auxiliary sites.
            num_draws: The number of draws; None means one draw without a dimension for it.
            model: A model to run in place of this one, with other data for example.
        """
        shapes = None
        if num_draws is None or not self.at_once:
            values = values if num_draws is None else {n: v[0] for n, v in values.items()}
            shapes = {name: torch.as_tensor(value).shape for name, value in values.items()}
        else:
            sites = self.latents
            values = {n: self.padded(v, sites[n]["fn"].event_dim) for n, v in values.items()}
        run = poutine.trace(self.in_plate(model or self.model, num_draws))
        with poutine.block(), FixedLatents(values, auxiliary, shapes):
            return run.get_trace(*self.args, **self.kwargs)

    def with_discrete(
        self, draws: dict[str, Tensor], most_probable: bool = False
    ) -> tuple[WeightedParticles, dict[str, Tensor]]:
        """The same with the discrete latents that are summed out here, and draws of all latents.

        A model that is mapped here runs for one draw after the other there.
        """
        other = copy.copy(self)
        other.at_once, other.mapped = self.broadcasts, False
        if not (isinstance(self.model, SummedOut) and self.model.guide.discrete):
            return other, draws
        if self.subsampled:
            raise ValueError(
                "Discrete latents are drawn for all rows of their plates, and this model "
                "subsamples them. Run it on all its rows, with subsample_size=None."
            )
        model, discrete = self.model.model, self.model.guide.discrete
        drawn = discrete_draws(other, model, discrete, draws, self.args, self.kwargs, most_probable)
        draws, other.model = draws | drawn, model
        auxiliary = _auxiliary_values(self.first_model)
        with torch.no_grad(), quietly():
            first = {name: values[0] for name, values in draws.items()}
            other.first_model = other.run_model(first, auxiliary)
        other.latents = latent_sites(other.first_model)
        return other, draws

    def values(self, trace: poutine.Trace, num_draws: int) -> dict[str, Tensor]:
        """The values of the guide's latents in a run, with a dimension of draws in front."""
        sites, first = latent_sites(trace), latent_sites(self.first_guide)
        if varying := sites.keys() ^ first.keys():
            raise Mismatch(
                "Importance weights need a guide that draws the same sites each time; it draws "
                f"site '{min(varying)}' in some runs only. Sum out the site that decides whether "
                "it is drawn."
            )
        return {
            name: self.unpadded(sites[name]["value"], site["value"].shape, num_draws)
            for name, site in first.items()
        }

    def _first_runs(self) -> tuple[poutine.Trace, poutine.Trace]:
        """A run of the model without an error, and of the guide whose draw it is at."""
        for _ in range(NUM_PROBED):
            guide = self.run_guide(None)
            values = {name: site["value"] for name, site in latent_sites(guide).items()}
            try:
                return self.run_model(values, _auxiliary_values(guide)), guide
            except Mismatch:
                raise
            except Exception as error:  # perhaps at this draw only
                failure = error
        raise failure

    def log_joint(self) -> LogJoint:
        """The log joint density of the model; the guide's own, if it has a method for it."""
        make = getattr(self.guide, "log_joint", LogJoint)
        joint: LogJoint = make(self.model, self.first_model, self.args, self.kwargs)
        joint.at_once, joint.mapped = self.at_once, self.mapped
        return joint

    def run_guide(self, num_draws: int | None) -> poutine.Trace:
        """A run of the guide for so many draws, or for one without a dimension for it."""
        run = poutine.trace(self.in_plate(self.guide, num_draws))
        trace = run.get_trace(*self.args, **self.kwargs)
        runs_the_model = isinstance(poutine.unwrap(self.guide), GuideMessenger)
        for name, site in samples(trace).items():
            if runs_the_model and site["is_observed"]:
                del trace.nodes[name]
            else:
                check_guide_site(site)
        return trace

    def _improper_latents(self) -> list[str]:
        """Latents with flat, unbounded priors on which the density doesn't depend, even in part."""
        improper = [name for name, site in self.latents.items() if _is_flat(site["fn"])]
        for _ in range(NUM_GRADIENTS if improper else 0):
            try:
                with quietly(), poutine.block():
                    found = zip(improper, self._gradients(improper), strict=True)
            except Exception:  # any error of the model
                return []
            improper = [name for name, g in found if g is None or bool((g == 0).any())]
        return improper

    def _gradients(self, names: list[str]) -> Sequence[Tensor | None]:
        """The gradients of the model's log density in some latents, at a draw of the guide."""
        guide = self.run_guide(None)
        values = {name: site["value"] for name, site in latent_sites(guide).items()}
        leaves = [values[name].detach().requires_grad_() for name in names]
        values.update(zip(names, leaves, strict=True))
        with torch.enable_grad():
            model = self.run_model(values, _auxiliary_values(guide))
            compute_log_prob(model)
            log_p = log_prob_of_particles(model, 1, None).sum()
            if not log_p.requires_grad:
                return [None] * len(names)
            return torch.autograd.grad(log_p, leaves, allow_unused=True)

    def _probe(self) -> None:
        """Sets ``at_once`` and ``mapped`` by comparing densities of draws with those one by one."""
        auxiliary = _auxiliary_values(self.first_model)

        def of_run(values: Mapping[str, Tensor], size: int | None) -> dict[str, Tensor]:
            trace = self.run_model(values, auxiliary, size)
            compute_log_prob(trace)
            nesting = None if size is None else self.nesting
            return log_probs_of_particles(trace, size or 1, nesting)

        def log_probs(indices: Sequence[int], at_once: bool) -> dict[str, Tensor]:
            if not at_once:
                return of_run({name: draws[indices[0]] for name, draws in drawn.items()}, None)
            values = {name: draws[indices] for name, draws in drawn.items()}
            if not self.mapped:
                return of_run(values, len(indices))
            found = mapped(lambda draw: of_run(draw, None), values)
            return {name: log_prob.squeeze(1) for name, log_prob in found.items()}

        try:
            with torch.no_grad(), quietly(), poutine.block():
                drawn = self.values(self.run_guide(NUM_PROBED), NUM_PROBED)
                self.probe(NUM_PROBED, log_probs)
                # Auxiliary sites of the model may differ from draw to draw, and a guide that
                # cancels masked priors runs the model for all draws at once.
                others = auxiliary.keys() - subsamples(self.first_model).keys()
                corrections: Sequence[str] = getattr(self.guide, "corrections", ())
                if self.mapped and (others or corrections):
                    self.at_once = self.mapped = False
        except Exception:  # any error of a guide that doesn't broadcast
            self.at_once = self.mapped = False


def _check_devices(model: poutine.Trace) -> None:
    """Raises a Mismatch if a model's latents are on one device and its data on another."""
    latents: dict[torch.device, str] = {}
    data: dict[torch.device, str] = {}
    for name, site in samples(model).items():
        value, is_observed = site["value"], site["is_observed"]
        if isinstance(value, Tensor) and not (is_observed and value.dim() == 0):
            (data if is_observed else latents).setdefault(value.device, name)
    if latents and data and not latents.keys() & data.keys():
        (here, latent), (there, observed) = next(iter(latents.items())), next(iter(data.items()))
        raise Mismatch(
            f"Latents and data should be on one device; site '{latent}' is on {here}, and the data "
            f"of site '{observed}' on {there}. Put the parameters of the prior there, as in "
            f"dist.Normal(torch.tensor(0.0, device='{there}'), 1.0)."
        )


def check_latents(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
    """Raises a Mismatch if the guide's sites are not the model's latents, and no other error."""
    try:
        WeightedParticles(model, guide, args, kwargs)
    except Mismatch:
        raise
    except Exception:  # reported elsewhere
        pass


def _auxiliary_values(trace: poutine.Trace) -> dict[str, Any]:
    """The values of the subsamples and auxiliary sites of a run."""
    sites: dict[str, Any] = {**samples(trace), **subsamples(trace)}
    return {n: s["value"] for n, s in sites.items() if not (s["is_observed"] or is_latent(s))}


def _is_flat(fn: Any) -> bool:
    """Whether a prior is improper: the same density on an unbounded support."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded = constraints.interval, type(constraints.simplex), type(constraints.corr_cholesky)
    return isinstance(bare(fn), dist.ImproperUniform) and not isinstance(support, bounded)
