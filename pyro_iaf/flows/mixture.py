r"""A mixture of distributions that flows make of noise.

.. math::
    q(z) = \sum_{k=1}^K \pi_k \, q_k(z)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..importance import smoothed
from ..models.log_joint import LogJoint
from ..models.traces import quietly
from ..solvers.fused import ScoredPass
from ..solvers.path_score import draw_scored, goes_by_kernel
from .posterior import Posterior
from .scored_guide import WeightedDraws

__all__ = ["SMALLEST_WEIGHT", "Component", "GivenComponent", "MixedPosterior"]

# Draws of each component from which the weights are found, and the steps of the algorithm. Where
# the model runs for one draw at a time, there are fewer.
NUM_DRAWS, NUM_DRAWS_ALONE, NUM_STEPS = 1000, 100, 300

# The fewest draws of each component in a gradient.
FEWEST = 4

# No weight falls below this, so that its logarithm stays finite.
SMALLEST_WEIGHT = 1e-6


class MixedPosterior(dist.TorchDistribution):
    """The distribution of a guide with several components, over vectors.

    Args:
        components: The components, each made by one stack of flows of standard normal noise.
        logits: The logarithms of their weights, up to a constant.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, components: Sequence[Posterior], logits: Tensor) -> None:
        self.components, self.logits = components, logits
        self.flows = [component.transforms[0] for component in components]
        super().__init__(torch.Size(), components[0].event_shape, validate_args=False)

    def noise(self, *sample_shape: int) -> Tensor:
        """Noise of shape ``sample_shape + (D,)``."""
        loc: Tensor = self.components[0].base_dist.loc
        return torch.randn(*sample_shape, *loc.shape, dtype=loc.dtype, device=loc.device)

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the weights."""
        return self.logits.log_softmax(0)

    def component(self) -> Component:
        """The distribution of the number of a draw's component."""
        return Component(logits=self.logits, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, each of a component that is drawn first."""
        with torch.no_grad():
            return GivenComponent(self, self.component().sample(sample_shape)).rsample()

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, in nats, by an inverse of each component."""
        return (self.log_weights + self.log_probs(value)).logsumexp(-1)

    def log_probs(self, value: Tensor) -> Tensor:
        """The log densities of the components, in a new last dimension."""
        with quietly():  # far from a component its inverse may be inexact, and hardly matters
            found = [component.log_prob(value) for component in self.components]
        stacked = torch.stack(found, -1)
        return stacked.where(~stacked.isnan(), -torch.inf)  # so far out that numbers overflow

    def stratified(self, num: int) -> WeightedDraws:
        """About ``num`` draws, as many of each component, and at least four."""
        size = max(FEWEST, round(num / len(self.flows)))
        pairs = zip(self.flows, self.noise(len(self.flows), size), strict=True)
        value = torch.cat([draw_scored(flow.parts, noise).value for flow, noise in pairs])
        with torch.no_grad():
            found = [_scored_at(flow, value.detach()) for flow in self.flows]
            parts = self.log_weights + torch.stack([known.log_prob for known in found], -1)
            shares = parts.softmax(-1).unsqueeze(-1)
            scores = torch.stack([known.score for known in found], -2)
            score = (shares * scores).where(shares > 0, 0.0).sum(-2)
        weights = self.log_weights.exp().repeat_interleave(size) / size
        return WeightedDraws(value, parts.logsumexp(-1), score, weights)

    @torch.no_grad()
    def fitted_logits(self, joint: LogJoint) -> Tensor:
        """The logits of the weights that maximise the mean log density of the posterior.

        The posterior is represented by draws of all components, weighted by the balance heuristic;
        the weights are found by expectation maximisation.
        """
        num = NUM_DRAWS if joint.at_once else NUM_DRAWS_ALONE
        z = torch.cat([component.sample((num,)) for component in self.components])
        log_probs = self.log_probs(z).double()
        log_ratio = joint(z).double() - log_probs.logsumexp(-1)
        log_ratio = log_ratio.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        if not log_ratio.max().isfinite():
            return self.logits
        of_draws = smoothed(log_ratio)
        weights = self.log_weights.double().exp()
        for _ in range(NUM_STEPS):
            weights = of_draws @ (weights.log() + log_probs).softmax(-1).nan_to_num(0.0)
            weights = weights.clamp(min=SMALLEST_WEIGHT)
        return (weights / weights.sum()).log().to(self.logits)


class Component(dist.Categorical):
    """The number of a draw's component; its log density is zero, with the usual gradient.

    So its score function is that of the weights, and its density is stated where the draw's is.
    """

    has_enumerate_support = False  # without a density it can't be summed out

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = super().log_prob(value)
        return found - found.detach()


class GivenComponent(dist.TorchDistribution):
    """Draws of the given components of a mixture; their log density is zero.

    Pyro's ELBOs weight a score function by the densities of the model's sites, and leave out those
    of auxiliary sites as this one. So a guide states :attr:`log_density`, that of the mixture, at a
    site of the model.

    Args:
        mixture: The mixture.
        component: Numbers of components.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: MixedPosterior, component: Tensor) -> None:
        self.mixture, self.component = mixture, component
        super().__init__(component.shape, mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GivenComponent:
        return GivenComponent(self.mixture, self.component.expand(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, by one pass through every component."""
        shape = self.shape(sample_shape)
        noise = self.mixture.noise(*shape[:-1])
        values = torch.stack([flow(noise) for flow in self.mixture.flows], -2)
        index = self.component.expand(shape[:-1]).unsqueeze(-1).unsqueeze(-1)
        return values.gather(-2, index.expand(*shape[:-1], 1, shape[-1])).squeeze(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero."""
        return value.new_zeros(value.shape[:-1])

    def log_density(self, value: Tensor) -> Tensor:
        """The log density of the mixture, less that of the component, which is zero.

        The gradients of both sites together are those of the mixture.
        """
        of_component = self.mixture.component().log_prob(self.component)
        return self.mixture.log_prob(value) - of_component


def _scored_at(flow: Any, value: Tensor) -> ScoredPass:
    """The log density of a component and its gradient at draws of any component."""
    noise = value
    for part in reversed(flow.parts):
        noise = part.undo_at_once(noise, goes_by_kernel(value))
    found = draw_scored(flow.parts, noise)
    return found._replace(log_prob=found.log_prob.nan_to_num(-torch.inf, -torch.inf, -torch.inf))
