r"""The posterior in the coordinates of a guide's noise, where it is nearly a standard normal.

.. math::
    \log \pi(k, x) = \log p(T_k(x)) + \log |\det T_k'(x)| + \log r_k(T_k(x))

Here :math:`T_k` carries noise to the latents in unconstrained space under component k, and
:math:`r_k` is the component's share of the guide's density there. So for pairs of a component and
noise from :math:`\pi` the latents are from the posterior. With one component :math:`r` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
)

from ..compiler import lowering
from ..compiler.capture import Graph, record
from ..distributions import DiagonalNormal
from ..models.masks import Unmasked, sites_to_unmask
from ..models.traces import (
    compute_log_prob,
    is_point,
    log_probs_of_particles,
    quietly,
    samples,
)
from ..models.weighted import WeightedParticles

__all__ = ["Evaluated", "NoiseCoordinates", "Places"]

# Noise of shape (C, D), to latents and log-determinants.
NoiseMap = Callable[[Tensor], tuple[Tensor, Tensor]]

# Compiling larger graphs takes longer than they run.
MOST_COMPILED = 1200


class Evaluated(NamedTuple):
    """The posterior at points of noise, but for the shares of their components.

    Attributes:
        log_density: Of shape ``(C,)``; ``-inf`` where it is not finite.
        slope: Its gradient in the noise, of shape ``(C, D)``; zero where that is not finite.
        latent: The latents in unconstrained space, of shape ``(C, D)``.
    """

    log_density: Tensor
    slope: Tensor
    latent: Tensor


class Places(NamedTuple):
    """Places where chains are, or may go.

    Attributes:
        noise: Their noise, of shape ``(C, D)``.
        component: The numbers of their components.
        found: The posterior there.
        share: The log share of the component in the guide's density.
        log_weight: The log of the ratio of posterior and guide, up to a constant.
    """

    noise: Tensor
    component: Tensor
    found: Evaluated
    share: Tensor
    log_weight: Tensor

    def moved(self, accept: Tensor, other: Places) -> Places:
        """Those of ``other`` where accepted, of shape ``(C,)``, and else these."""
        each = accept.unsqueeze(-1)

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(each if old.dim() > 1 else accept, new, old)

        found = Evaluated(*map(chosen, other.found, self.found))
        return Places(
            chosen(other.noise, self.noise),
            chosen(other.component, self.component),
            found,
            chosen(other.share, self.share),
            chosen(other.log_weight, self.log_weight),
        )


class NoiseCoordinates:
    """The posterior as a density of a guide's noise.

    Args:
        particles: The model and its guide.

    Attributes:
        dim: The number of latents, and of numbers of noise.
        backend: What evaluates the density: ``"eager"``, or a backend of a graph.

    Raises:
        ValueError: If the guide does not carry as many numbers of normal noise to all latents.
    """

    def __init__(self, particles: WeightedParticles) -> None:
        self.particles, self.joint = particles, particles.log_joint()
        self.dim = self.joint.latent_dim
        if not hasattr(particles.guide, "lifted"):  # as ours do, so that all latents have a density
            call = particles.args, particles.kwargs
            if names := sites_to_unmask(particles.model, self.joint.latents, *call):
                self.joint.model = Unmasked(names)(self.joint.model)
        self.like = self.joint.unconstrained(
            {name: site["value"].unsqueeze(0) for name, site in self.joint.latents.items()}
        )
        self.mixture: Any = None
        if isinstance(particles.guide, AutoContinuous):
            with poutine.block():
                posterior: Any = particles.guide.get_posterior(*particles.args, **particles.kwargs)
            if hasattr(posterior, "components"):
                self.mixture = posterior
            self.maps = [noise_map(part) for part in getattr(posterior, "components", [posterior])]
        else:
            self._count_noise()
            self.maps = [self._through_the_guide]
        self.backend = "eager"
        self._run: Callable[[Tensor, Tensor], Sequence[Tensor]] = self._by_code
        self._graph: Graph | None = None

    def latents(self, x: Tensor, component: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of noise, and the log-determinants, of shapes ``(C, D)`` and ``(C,)``."""
        if self.mixture is None:
            return self.maps[0](x)
        found, log_dets = zip(*(carry(x) for carry in self.maps), strict=True)
        index = component.unsqueeze(-1)
        z = torch.stack(found, 1).gather(1, index.unsqueeze(-1).expand(-1, 1, self.dim))
        return z.squeeze(1), torch.stack(log_dets, 1).gather(1, index).squeeze(1)

    def log_share(self, z: Tensor, component: Tensor) -> Tensor:
        """The log share of the component of each point in the guide's density there."""
        if self.mixture is None:
            return z.new_zeros(len(z))
        shares = (self.mixture.log_weights + self.mixture.log_probs(z)).log_softmax(-1)
        found: Tensor = shares.gather(1, component.unsqueeze(-1)).squeeze(-1)
        return found.nan_to_num(-math.inf, -math.inf, -math.inf)

    def log_weight(
        self, x: Tensor, component: Tensor, log_density: Tensor, share: Tensor
    ) -> Tensor:
        """The log ratio of posterior and guide; the guide's density is a component's by share."""
        log_normal = -(x.square().sum(-1) + self.dim * math.log(2 * math.pi)) / 2
        of_component: Any = 0.0 if self.mixture is None else self.mixture.log_weights[component]
        found: Tensor = log_density + share - log_normal - of_component
        return found.nan_to_num(-math.inf, -math.inf, -math.inf)

    def evaluate(self, x: Tensor, component: Tensor) -> Evaluated:
        """The log density and its gradient."""
        log_density, slope, z = self._run(x, component)
        # Chains are right whatever the slope is; it only makes them fast.
        return Evaluated(
            log_density.masked_fill(~log_density.isfinite(), -math.inf),
            slope.masked_fill(~slope.isfinite(), 0.0),
            z,
        )

    def at(self, x: Tensor, component: Tensor) -> Places:
        """The places with this noise."""
        return self.places(x, component, self.evaluate(x, component))

    def places(self, x: Tensor, component: Tensor, found: Evaluated) -> Places:
        """The places with this noise, where the posterior is known."""
        share = self.log_share(found.latent, component)
        weight = self.log_weight(x, component, found.log_density, share)
        return Places(x, component, found, share, weight)

    def _by_code(
        self, x: Tensor, component: Tensor, is_recorded: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        density = self.joint.density if is_recorded else self.joint
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z, log_det = self.latents(x, component)
            value = density(z) + log_det
            if not value.requires_grad:  # the model raises an error at all of them
                return value, torch.zeros_like(x), z.detach()
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope, z.detach()

    @torch.no_grad()
    def record(self, x: Tensor, component: Tensor) -> None:
        """Records :meth:`evaluate` for points of this shape, if that can be."""
        if not self.joint.at_once or len(x) > self.joint.num_at_once:
            return
        with torch.random.fork_rng():
            try:
                self._by_code(x, component, is_recorded=True)
                self._graph = record(
                    lambda x, component: self._by_code(x, component, is_recorded=True),
                    [x, component],
                )
            except Exception:  # Refused, or an error at these points: the code goes on
                return
        self._example = [x, component]

    @torch.no_grad()
    def compile(self, num_calls: int) -> None:
        """Chooses what evaluates the recorded graph, if so many calls are to come."""
        if self._graph is None:
            return
        graph = self._graph
        nodes = list(graph.module.graph.nodes)
        found = [node.meta.get("val") for node in nodes]
        numbers = sum(value.numel() for value in found if isinstance(value, Tensor))
        tensors, draw, module = graph.tensors, graph.draw.forward, graph.module
        chosen: lowering.Backend = lowering.Replay()
        if len(nodes) <= MOST_COMPILED:
            device = self.like.device
            chosen = lowering.worthwhile_backend(device, num_calls, len(nodes), numbers)
        if chosen.name == self.backend:
            return
        with torch.random.fork_rng():
            example = [*self._example, *tensors, *draw(*self._example, *tensors)]
            lowered, self.backend = lowering.lower(
                lambda *given: tuple(module(*given)), example, chosen.name
            )
        self._run = lambda x, k: lowered([x, k, *tensors, *draw(x, k, *tensors)])
        if self.backend != chosen.name:  # it failed, and would again
            self._graph = None

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Noise and components of independent draws of the guide."""
        noise = self.like.new_empty(num, self.dim).normal_()
        if self.mixture is None:
            return noise, torch.zeros(num, dtype=torch.long, device=noise.device)
        return noise, self.mixture.component().sample(torch.Size((num,)))

    @torch.no_grad()
    def log_weights(self, noise: Tensor, component: Tensor) -> Tensor:
        """The log ratios of posterior and guide at draws of the guide, without gradients."""
        z, log_det = self.latents(noise, component)
        share = self.log_share(z, component)
        return self.log_weight(noise, component, self.joint(z) + log_det, share)

    def sites(self, z: Tensor) -> dict[str, Tensor]:
        """The latents of the model, by name, in its units."""
        values, _ = self.joint.constrained(z)
        shapes = {name: site["value"].shape for name, site in self.joint.latents.items()}
        return {name: value.reshape(len(z), *shapes[name]) for name, value in values.items()}

    # Guides that are no one vector

    def _count_noise(self) -> None:
        if not self.particles.at_once:
            raise ValueError(
                "refine runs all chains at once, and this guide or its model takes one draw at a "
                "time. Write torch.where for code that asks for values, or use AutoIAF(model)."
            )
        first = samples(self.particles.first_guide)
        found = sum(s["value"].numel() for s in first.values() if _is_drawn(s))
        if found != self.dim:
            raise ValueError(
                f"refine needs a guide that carries as many numbers of normal noise as there are "
                f"latents; this one has {found} for {self.dim}. Use AutoIAF(model)."
            )

    def _through_the_guide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the guide with this noise at its sites."""
        particles = self.particles
        with quietly(), poutine.block(), _GivenNoise(x) as given:
            trace = particles.run_guide(len(x))
        z = self.joint.unconstrained(particles.values(trace, len(x)))
        compute_log_prob(trace)
        of_sites = log_probs_of_particles(trace, len(x), particles.nesting)
        log_det, free = given.log_det, self.joint.split(z)
        for name, site in self.joint.latents.items():
            if not _is_drawn(samples(trace)[name]):  # a point states how it is made of noise
                log_det = log_det - of_sites[name]
            to_support = biject_to(site["fn"].support)
            own = to_support.log_abs_det_jacobian(free[name], to_support(free[name]))
            log_det = log_det - own.reshape(len(z), -1).sum(-1)
        return z, log_det


def _is_drawn(site: Any) -> bool:
    """Whether a guide draws a site from noise."""
    return not site["is_observed"] and not is_point(site["fn"])


class _GivenNoise(Messenger):
    """Draws the sites of a guide from given noise, of shape ``(C, D)``.

    Attributes:
        log_det: The sum of the log-determinants, of shape ``(C,)``.
    """

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise, self.used = noise, 0
        self.log_det = noise.new_zeros(len(noise))

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_drawn(msg) or msg["done"] or site_is_subsample(msg):
            return
        shape = torch.Size(msg["fn"].shape())
        num = shape[1:].numel()
        noise = self.noise[:, self.used : self.used + num].reshape(shape)
        self.used += num
        msg["value"], log_det = noise_map(msg["fn"])(noise)
        self.log_det = self.log_det + log_det.reshape(len(self.noise), -1).sum(-1)
        msg["done"] = True


def noise_map(fn: Any) -> NoiseMap:
    """The map from standard normal noise to draws of a distribution.

    Raises:
        ValueError: If the distribution is not made of normal noise.
    """
    if isinstance(fn, TransformedDistribution):
        first, transforms = noise_map(fn.base_dist), fn.transforms

        def carry(x: Tensor) -> tuple[Tensor, Tensor]:
            y, total = first(x)
            for transform in transforms:
                x, y = y, transform(y)
                log_det = transform.log_abs_det_jacobian(x, y)
                num_batch = min(total.dim(), log_det.dim())
                total, log_det = (sum_rightmost(t, t.dim() - num_batch) for t in (total, log_det))
                total = total + log_det
            return y, total

        return carry
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        loc, scale = fn.loc.detach(), fn.scale_tril.detach()
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return lambda x: (loc + (scale @ x.unsqueeze(-1)).squeeze(-1), log_det.expand(x.shape[:-1]))
    if isinstance(fn, Independent):
        each, num_event = noise_map(fn.base_dist), fn.reinterpreted_batch_ndims

        def together(x: Tensor) -> tuple[Tensor, Tensor]:
            y, log_det = each(x)
            return y, sum_rightmost(log_det, num_event)

        return together
    if isinstance(fn, Normal | DiagonalNormal):
        loc, scale, event_dim = fn.loc.detach(), fn.scale.detach(), len(fn.event_shape)

        def affine(x: Tensor) -> tuple[Tensor, Tensor]:
            return loc + scale * x, sum_rightmost(scale.log().expand(x.shape), event_dim)

        return affine
    raise ValueError(
        "refine needs a guide whose draws are made of normal noise, as AutoIAF or "
        f"AutoMultivariateNormal; this one draws from {type(fn).__name__}."
    )
