r"""What :func:`~pyro_iaf.fit` minimises: the negative ELBO, and gradients worth their time.

.. math::
    -\mathrm{ELBO} = \mathbb{E}_{z \sim q} \bigl[ \log q(z) - \log p(x, z) \bigr]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..compiler.capture import Refused
from ..flows.scored_guide import ScoredGuide
from ..importance import pareto_k
from ..models.arguments import Args, Kwargs, Program
from ..models.log_joint import LogJoint
from ..models.matching import Matching, check_guide_site
from ..models.traces import is_latent
from ..solvers.score_kernel import load_kernel
from .compiled import CompiledTrace_ELBO
from .stl import TraceSTL_ELBO
from .trace import recordable_loss

__all__ = ["RECORDABLE", "LatentLoss", "Loss", "TraceLoss"]

# Pyro's losses, and ours in their place, that a graph can hold.
RECORDABLE = (Trace_ELBO, CompiledTrace_ELBO, TraceSTL_ELBO)

# How much heavier tails may become, at which cost in nats, so that weights of so many draws have
# a tail of this shape.
TAILS, TAIL_COST, GOOD_K, NUM_TAIL = (0.01, 0.02, 0.04), 0.02, 0.5, 10_000


class Loss:
    """The negative ELBO of a model and a guide, and its gradient.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
    """

    # Whether the gradient is mass-covering: weighted by importance; 0 or 1 in a graph.
    covers: bool | Tensor = False

    # Over how many latents its flows are; 0 if it knows of none.
    flow_dim = 0

    def __init__(self, model: Program, guide: Any) -> None:
        self.model, self.guide = model, guide
        # The effective sample size as a share of the particles, averaged over a hundred steps.
        self.health = torch.zeros((), dtype=torch.float64)

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        """An estimate of the loss, in nats; its gradient is added to that of the parameters.

        Args:
            args: What model and guide take.
            kwargs: Likewise.
            weight: Of the KL divergence to the prior; 1 is the ELBO.
        """
        raise NotImplementedError

    def recordable(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        """The same, in operations that a graph can hold; raises ``Refused`` if there are none."""
        return self(args, kwargs, weight)

    def prepare(self) -> None:
        """Loads what a compiled step needs, while it is compiled."""


class TraceLoss(Loss):
    """The loss of any model and guide, by one of Pyro's ELBOs."""

    def __init__(self, model: Program, guide: Program, elbo: Any) -> None:
        super().__init__(model, guide)
        self.elbo = elbo

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        model, guide = self._weighted(weight)
        return torch.as_tensor(self.elbo.loss_and_grads(model, guide, *args, **kwargs))

    def recordable(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        if type(self.elbo) not in RECORDABLE:
            raise Refused(
                f"{type(self.elbo).__name__} can't be compiled. fit compiles its own loss, "
                "Trace_ELBO and TraceSTL_ELBO; with another, give compile=False."
            )
        loss = recordable_loss(self.elbo, *self._weighted(weight), args, kwargs)
        loss.backward()
        return loss.detach()

    def _weighted(self, weight: float | Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
        model, guide = self.model, self.guide
        runs_the_model = isinstance(poutine.unwrap(guide), Messenger)
        if type(self.elbo) in RECORDABLE and not runs_the_model:  # others enumerate, or draw anew
            drawn = _Drawn()
            model, guide = Matching(lambda: drawn.names)(model), drawn(guide)
        if isinstance(weight, float) and weight == 1:
            return model, guide
        # What a guide observes are factors of its density.
        return _Weighted(weight)(model), _Weighted(weight, observed_too=True)(guide)


class _Drawn(Messenger):
    """Notes the latents that a guide draws, and sees to it that it observes nothing."""

    names: frozenset[str] = frozenset()

    def __enter__(self) -> _Drawn:
        self.names = frozenset()
        super().__enter__()
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        check_guide_site(msg)
        if is_latent(msg):
            self.names |= {msg["name"]}


class _Weighted(Messenger):
    """Weighs the densities of all sites that are not observed, or of those too."""

    def __init__(self, weight: float | Tensor, observed_too: bool = False) -> None:
        super().__init__()
        self.weight, self.observed_too = weight, observed_too

    def _pyro_sample(self, msg: Any) -> None:
        if self.observed_too or not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class LatentLoss(Loss):
    """The loss of a guide over one vector of latents that scores its own draws.

    Its gradient goes through the draws alone, with the guide's score held still: exact in mean, and
    of little variance near the posterior. Where ``covers`` is set, it is
    importance-weighted, so that it covers mass that the guide misses.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        num_particles: How many draws a step takes.
        joint: The model's log density in unconstrained space.
    """

    def __init__(
        self, model: Program, guide: ScoredGuide, num_particles: int, joint: LogJoint
    ) -> None:
        super().__init__(model, guide)
        self.num_particles, self.joint = num_particles, joint
        self.flow_dim = joint.latent_dim

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        z, log_q, score = self.guide.sample_with_score(self.num_particles, *args, **kwargs)
        log_q, score = log_q.detach(), score.detach()
        latent = z.detach().requires_grad_()
        log_p = self.joint.on(args, kwargs, weight).density(latent)
        slope = weight * score / len(z)
        if log_p.requires_grad:  # else the model has flat priors and no data
            (-log_p.mean()).backward()
            assert latent.grad is not None
            slope = latent.grad + slope
        log_w = log_p.detach() - weight * log_q
        if len(z) > 1:
            self.health = self.health + 0.01 * (_effective(log_w) - self.health)
            if self.covers is not False and not self.joint.subsampled:
                more = self.covers * _covering(log_w, self.health)
                slope = slope * (1 + more).unsqueeze(-1)
        z.backward(slope)
        loss: Tensor = -log_w.mean()
        return loss

    def prepare(self) -> None:
        load_kernel()

    @torch.no_grad()
    def see_to_tails(self, batch: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Makes the guide's tails a shade heavier if weights have heavy ones, and it costs little.

        Training hardly sees the tails, and importance weights are about nothing else.

        Args:
            batch: Gives what model and guide take.
        """
        widen, joint = getattr(self.guide, "widen_tails", None), self.joint
        if widen is None or joint.subsampled or joint.num_at_once < NUM_TAIL / 100:
            return
        weights = self._log_weights(*batch(), NUM_TAIL)
        if pareto_k(weights) < GOOD_K:
            return
        state = torch.get_rng_state()
        for more in TAILS:
            torch.set_rng_state(state)
            undo = widen(more)
            wider = self._log_weights(*batch(), NUM_TAIL)
            is_cheap = weights.mean() - wider.mean() <= TAIL_COST
            if is_cheap and pareto_k(wider) < GOOD_K:
                return
            undo()
            if not is_cheap:
                return

    def _log_weights(self, args: Args, kwargs: Kwargs, num_draws: int) -> Tensor:
        """Logarithms of importance weights of fresh draws."""
        joint = self.joint.on(args, kwargs)
        parts = []
        for size in joint.sizes(num_draws):
            z, log_q, _ = self.guide.sample_with_score(size, *args, **kwargs)
            parts.append(joint(z) - log_q)
        return torch.cat(parts)


def _effective(log_weights: Tensor) -> Tensor:
    """The effective sample size of particles, as a share of their number."""
    share = 1 / log_weights.softmax(0).square().sum() / len(log_weights)
    return share.nan_to_num(0.0, 0.0, 0.0)


def _covering(log_weights: Tensor, health: Tensor) -> Tensor:
    """How much more than one each particle's gradient counts, by its importance weight.

    It counts less for a particle that has nearly all the weight (Tucker et al. 2018,
    https://arxiv.org/abs/1810.04152). Far from the posterior the effective sample size is small,
    and all particles count the same.
    """
    share = log_weights.softmax(0)
    share = share * (1 - share)
    share = share / share.sum().clamp(min=1e-9)
    return (2 * health - 1).clamp(min=0).to(share.dtype) * (len(share) * share - 1)
