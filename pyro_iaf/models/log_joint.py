r"""The log joint density of a model, as a function of its latents in unconstrained space.

.. math::
    \ell(z) = \log p(x, T(z)) + \log |\det \partial T / \partial z|

It is computed for many :math:`z` at once, as in a particle plate outside the model's own plates, or
for one after the other if the model does not broadcast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd import grad
from torch.distributions import biject_to
from torch.distributions.transforms import identity_transform

from .arguments import Args, Kwargs, Program
from .matching import FixedLatents, Mismatch
from .particles import MAX_NUMBERS, Particles, mapped, numbers_in
from .rows import FirstRows, Part, chosen_rows, times_of
from .traces import (
    compute_log_prob,
    is_subsampled,
    latent_sites,
    log_prob_of_particles,
    log_probs_of_particles,
    plate_nesting,
    quietly,
    subsamples,
)

__all__ = ["LogJoint"]


class LogJoint(Particles):
    """The log joint density of a model at latents of shape ``(K, D)``, of shape ``(K,)``, in nats.

    The model runs outside of the caller's handlers, on the subsamples of ``trace``, and without
    validation of its distributions: the log density outside their support is ``-inf``.

    Args:
        model: A Pyro model.
        trace: One run of the model, with its sites, plates and subsamples.
        latents: The sites that make up the vector, in order; by default all latents of the trace.

    Attributes:
        latent_dim: The length D of the vector.
    """

    def __init__(
        self,
        model: Program,
        trace: poutine.Trace,
        args: Args,
        kwargs: Kwargs,
        latents: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(plate_nesting(trace), numbers_in(trace))
        self.model, self.args, self.kwargs = model, args, kwargs
        self.subsamples = {name: site["value"] for name, site in subsamples(trace).items()}
        self.subsampled = is_subsampled(trace)
        self.latents = latent_sites(trace) if latents is None else latents
        self._shapes = {name: site["value"].shape for name, site in self.latents.items()}
        self._layout = []
        for name, site in self.latents.items():
            to_support = biject_to(site["fn"].support)
            shape = to_support.inv(site["value"]).shape  # its inverse_shape imports sympy
            padded = self.padded_shape(shape, len(shape) - to_support.domain.event_dim)
            self._layout.append((name, to_support, padded, shape.numel()))
        self.latent_dim = sum(self.sizes_of_sites)
        self.weight: float | Tensor = 1.0
        self.turn: Messenger = Messenger()
        self.rows: Mapping[str, Tensor] = {}
        self.parts: Sequence[Part] = ()
        self._work = self._usual = self.num_numbers

    @property
    def work(self) -> int:
        return self._work

    @property
    def sizes_of_sites(self) -> list[int]:
        """How many numbers each site has in unconstrained space."""
        return [size for *_, size in self._layout]

    def with_data(self, args: Args, kwargs: Kwargs, weight: float | Tensor = 1.0) -> LogJoint:
        """The same density on other data and fresh subsamples, the latents' densities weighted."""
        other = copy.copy(self)
        other.args, other.kwargs, other.subsamples, other.weight = args, kwargs, {}, weight
        return other

    def on_parts(self, parts: Sequence[Part]) -> LogJoint:
        """The same density of these parts of the rows together."""
        other = copy.copy(self)
        other.subsamples, other.subsampled, other.turn = {}, False, FirstRows()
        other.num_numbers = math.ceil(self.num_numbers * max(times_of(parts)))
        other._work = math.ceil(self.num_numbers * sum(times_of(parts)))
        if len(parts) > 1:
            other.parts, other._usual = parts, self.num_numbers
        else:
            other._go_to(parts[0])
        return other

    def _go_to(self, part: Part) -> None:
        self.parts, self.rows = (), part.rows
        self.args, self.kwargs = part.batch or (self.args, self.kwargs)

    def _of_parts(self) -> Iterator[tuple[float, LogJoint]]:
        """The densities of parts, each with its share: their mean is that of all."""
        for part in self.parts:
            other = copy.copy(self)
            other._go_to(part)
            other.num_numbers = math.ceil(self._usual * part.times)
            yield part.share, other

    def __call__(self, z: Tensor, group_size: int = 1) -> Tensor:
        """The log densities; ``-inf`` for particles at which the model raises an error.

        Args:
            z: Latents of shape ``(K, D)``.
            group_size: An error at one particle makes its whole group of this size ``-inf``.
        """
        if self.parts:  # the outer loop, as they may be read from a disk
            return sum((w * part(z, group_size) for w, part in self._of_parts()), z.new_zeros(()))
        if len(z) > max(self.num_at_once, group_size):
            size = group_size * max(1, self.num_at_once // group_size)
            return torch.cat([self(part, group_size) for part in z.split(size)])
        try:
            with quietly():
                return self.density(z)
        except Mismatch:
            raise
        except Exception:  # at some point a matrix has no Cholesky factor, or a check fails
            if len(z) <= group_size:
                return z.new_full((len(z),), -torch.inf)
            half = group_size * (len(z) // group_size // 2) or group_size
            return torch.cat([self(part, group_size) for part in (z[:half], z[half:])])

    def density(self, z: Tensor) -> Tensor:
        """The log densities of all particles in one run; the model's errors are raised."""
        if self.mapped:
            with quietly():  # checks of values can't be mapped
                found: Tensor = mapped(lambda row: self._scored(row.unsqueeze(0), False)[0], z)
                return found
        if self.at_once:
            return self._scored(z, True)
        return torch.cat([self._scored(row, False) for row in z.split(1)])

    def check(self, z: Tensor) -> str | None:
        """Why the density can't be used at these points, if so; sets ``at_once`` and ``mapped``.

        Args:
            z: Two points at least, not too near to each other.
        """

        def log_probs(indices: Sequence[int], at_once: bool) -> dict[str, Tensor]:
            def of_one(row: Tensor) -> dict[str, Tensor]:
                trace = self._trace(self.constrained(row.unsqueeze(0))[0], False)
                return log_probs_of_particles(trace, 1, None)

            if at_once and self.mapped:
                return {n: found.squeeze(1) for n, found in mapped(of_one, z[indices]).items()}
            trace = self._trace(self.constrained(z[indices])[0], at_once)
            return log_probs_of_particles(trace, len(indices), self.nesting if at_once else None)

        return self.probe(len(z), log_probs)

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients, of shapes ``(K,)`` and ``(K, D)``."""
        if self.parts:  # one after the other, so that no graph has all rows
            value, slope = z.new_zeros(len(z)), torch.zeros_like(z)
            for share, part in self._of_parts():
                own_value, own_slope = part.gradient(z)
                value, slope = value + share * own_value, slope + share * own_slope
            return value, slope
        if len(z) > self.num_at_once:
            parts = [self.gradient(part) for part in z.split(self.num_at_once)]
            values, slopes = zip(*parts, strict=True)
            return torch.cat(values), torch.cat(slopes)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self(z)
            if not value.requires_grad:
                return value, torch.zeros_like(z)
            (slope,) = grad(value.sum(), z)
        return value.detach(), slope

    def hessian(self, z: Tensor) -> Tensor:
        """Second derivatives, of shape ``(K, D, D)``."""
        K, D = z.shape
        if self.at_once and K * D * self.num_numbers <= MAX_NUMBERS:
            return self._rows(z.expand(D, K, D).reshape(D * K, D)).view(D, K, D).transpose(0, 1)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = grad(self(z).sum(), z, create_graph=True)
            if not slope.requires_grad:
                return z.new_zeros(K, D, D)
            rows = [grad(slope[:, k].sum(), z, retain_graph=True)[0] for k in range(D)]
        return torch.stack(rows, 1)

    def _rows(self, z: Tensor) -> Tensor:
        """Of D equal parts of points, the k-th with the k-th row of the Hessian at each."""
        D = z.shape[1]
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = grad(self(z).sum(), z, create_graph=True)
            if not slope.requires_grad:
                return torch.zeros_like(z)
            chosen = slope.view(D, -1, D).diagonal(dim1=0, dim2=2)
            # Not of many outputs at once by autograd itself, which then imports sympy.
            return grad(chosen.sum(), z)[0]

    def diagonal(self, z: Tensor, num_probes: int = 16) -> Tensor:
        """Estimates of the second derivatives in each latent alone, at ``z`` of shape ``(D,)``.

        Averages products of the Hessian with random signs (Bekas et al. 2007). Off-diagonal entries
        make the error. A mean smaller than a tenth of the products' root mean square is replaced by
        minus that tenth.
        """
        z = z.expand(min(num_probes, self.num_at_once), -1)
        estimates = []
        for _ in range(-(-num_probes // len(z))):
            with torch.enable_grad():
                z = z.detach().clone().requires_grad_()
                (slope,) = grad(self(z).sum(), z, create_graph=True)
                signs = torch.empty_like(z).bernoulli_() * 2 - 1
                estimates.append(signs * grad((slope * signs).sum(), z)[0])
        found = torch.cat(estimates)
        mean, size = found.mean(0), found.square().mean(0).sqrt()
        return torch.where(mean.abs() > size / 10, mean, -size / 10)

    def _scored(self, z: Tensor, at_once: bool) -> Tensor:
        values, log_det = self.constrained(z)
        trace, nesting = self._trace(values, at_once), self.nesting if at_once else None
        log_prob = log_prob_of_particles(trace, len(z), nesting, self.weight)
        return log_prob + self.weight * log_det

    def _trace(self, values: dict[str, Tensor], at_once: bool) -> poutine.Trace:
        # Densities broadcast over the dimension of the particles without a plate for it.
        if not at_once:
            values = {name: value.reshape(self._shapes[name]) for name, value in values.items()}
        fixed = FixedLatents(values, self.subsamples, self._shapes)
        with poutine.block(expose_types=["param"]), fixed, self.turn, chosen_rows(self.rows):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            compute_log_prob(trace)
        return trace

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """The sites in unconstrained space, with the particles left of all plates."""
        parts = z.split(self.sizes_of_sites, -1)
        layout = zip(parts, self._layout, strict=True)
        return {name: part.reshape(len(z), *shape) for part, (name, _, shape, _) in layout}

    def constrained(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The sites' values, with the particles left of all plates, and the log-determinants."""
        values, log_det = self.split(z), z.new_zeros(len(z))
        for name, to_support, *_ in self._layout:
            part, values[name] = values[name], to_support(values[name])
            if to_support is not identity_transform:
                own = to_support.log_abs_det_jacobian(part, values[name])
                log_det = log_det + own.reshape(len(z), -1).sum(-1)
        return values, log_det

    def sites_at(self, z: Tensor) -> dict[str, Tensor]:
        """The values of the model's sites at one point of shape ``(D,)``, in their own shapes."""
        values, _ = self.constrained(z.unsqueeze(0))
        return {name: value.reshape(self._shapes[name]) for name, value in values.items()}

    @torch.no_grad()
    def prior_draws(self, num_draws: int) -> Tensor:
        """Draws of the prior, of shape ``(K, D)``: all at once, or fewer of them one by one.

        There are none if the prior is improper, or where the model raises an error.
        """
        at_once = self.broadcasts
        size, num_runs = (min(num_draws, self.num_at_once), 1) if at_once else (1, num_draws)
        run, draws = poutine.trace(self.in_plate(self.model, size if at_once else None)), []
        for _ in range(num_runs):
            try:
                with quietly(), poutine.block():
                    found = latent_sites(run.get_trace(*self.args, **self.kwargs))
                values = {
                    name: self.unpadded(found[name]["value"], shape, size)
                    for name, shape in self._shapes.items()
                }
                draws.append(self.unconstrained(values))
            except Exception:  # an improper prior has no draws, and a model may raise anything
                pass
        if draws:
            return torch.cat(draws)
        value = next(iter(self.latents.values()))["value"]
        return value.new_zeros(0, self.latent_dim)  # type: ignore[no-any-return]

    def vectors(self, values: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
        """Vectors of shape ``(K, D)`` of values in a run, and the shape of one number for each.

        In a run for many draws at once their dimension is left of all plates, where that shape has
        it too.
        """
        name, shape = next(iter(self._shapes.items()))
        num = max(values[n].numel() // max(1, own.numel()) for n, own in self._shapes.items())
        is_one = num == 1 and values[name].dim() == len(shape)
        lead = [] if is_one else [num, *[1] * self.nesting]
        sites = {n: self.unpadded(values[n], own, num) for n, own in self._shapes.items()}
        return self.unconstrained(sites), lead

    def unconstrained(self, sites: Mapping[str, Tensor]) -> Tensor:
        """The vectors of shape ``(K, D)`` of draws whose sites have ``K`` in front."""
        parts = [t.inv(sites[name]).reshape(len(sites[name]), -1) for name, t, *_ in self._layout]
        return torch.cat(parts, -1)
