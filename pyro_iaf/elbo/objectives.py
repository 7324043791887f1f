r"""The losses that :func:`~pyro_iaf.fit` minimises: negative ELBOs, and their gradients.

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
from ..models.matching import LatentCheck, check_guide_site
from ..models.particles import threads_for
from ..models.rows import RowsInTurn
from ..models.traces import is_latent
from .anchor import Anchor
from .compiled import CompiledTrace_ELBO
from .stl import TraceSTL_ELBO
from .trace import Call, recordable_loss

__all__ = ["RECORDABLE", "LatentLoss", "Loss", "TraceLoss"]

# The losses that a graph can hold.
RECORDABLE = (Trace_ELBO, CompiledTrace_ELBO, TraceSTL_ELBO)

# Amounts to add to the tails' log weight, tried in turn; the largest cost in nats; the Pareto k-hat
# to reach; and the number of draws that it is estimated from, each of at most so many numbers.
TAILS, TAIL_COST, GOOD_K, NUM_TAIL, MOST_WORK = (0.01, 0.02, 0.04), 0.02, 0.5, 4000, 2**15


class Loss:
    """The negative ELBO of a model and a guide, and its gradient.

    Attributes:
        mass_covering: Whether the gradient is importance-weighted; 0 or 1 in a graph.
        flow_dim: The number of latents of the guide's flows; 0 if unknown.
        relative_ess: The effective sample size of the particles, as a share of their number,
            averaged over some hundred steps.
        rows: Says which rows a step sees, where plates subsample.
        anchor: A point at which all rows are known.
    """

    mass_covering: bool | Tensor = False
    flow_dim = 0
    rows = RowsInTurn()
    anchor: Anchor | None = None

    def __init__(self, model: Program, guide: Any) -> None:
        self.model, self.guide = model, guide
        self.relative_ess = torch.zeros((), dtype=torch.float64)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors besides parameters and arguments whose values change between its calls."""
        return [*self.rows.tensors, *([] if self.anchor is None else self.anchor.tensors)]

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        """An estimate of the loss, in nats. Its gradient is added to that of the parameters.

        ``weight`` is that of the KL divergence to the prior; 1 gives the ELBO.
        """
        raise NotImplementedError

    def recordable(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        """The same, in operations that a graph can hold; raises Refused if there are none."""
        return self(args, kwargs, weight)

    def fit_weights(self) -> None:
        """Sets the weights of a guide with components to their shares of the posterior."""

    def adjust_tails(self) -> None:
        """Makes the guide's tails heavier if importance weights need it and the ELBO hardly falls.

        Training draws few points in the tails, but they decide on the largest importance weights.
        """


class TraceLoss(Loss):
    """The loss of any model and guide, by a Pyro ELBO."""

    def __init__(self, model: Program, guide: Program, elbo: Any) -> None:
        super().__init__(model, guide)
        self.elbo = elbo

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        model, guide = self._weighted(weight)
        with self.rows:
            return torch.as_tensor(self.elbo.loss_and_grads(model, guide, *args, **kwargs))

    def recordable(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        if type(self.elbo) not in RECORDABLE:
            raise Refused(
                f"{type(self.elbo).__name__} can't be compiled. fit compiles its own loss, "
                "Trace_ELBO and TraceSTL_ELBO; with another, give compile=False."
            )
        with self.rows:
            loss = recordable_loss(self.elbo, Call(*self._weighted(weight), args, kwargs))
        loss.backward()
        return loss.detach()

    def _weighted(self, weight: float | Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
        model, guide = self.model, self.guide
        runs_the_model = isinstance(poutine.unwrap(guide), Messenger)
        if type(self.elbo) in RECORDABLE and not runs_the_model:  # others enumerate, or redraw
            drawn = _DrawnLatents()
            model, guide = LatentCheck(lambda: drawn.names)(model), drawn(guide)
        if isinstance(weight, float) and weight == 1:
            return model, guide
        # Observed sites of a guide are factors of its density.
        return _Weighted(weight)(model), _Weighted(weight, observed_too=True)(guide)


class _DrawnLatents(Messenger):
    """Collects the names of the latents that a guide draws, and checks the guide's sites."""

    names: frozenset[str] = frozenset()

    def __enter__(self) -> _DrawnLatents:
        self.names = frozenset()
        super().__enter__()
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        check_guide_site(msg)
        if is_latent(msg):
            self.names |= {msg["name"]}


class _Weighted(Messenger):
    """Scales the log densities of latent sites, and with ``observed_too`` of all sites."""

    def __init__(self, weight: float | Tensor, observed_too: bool = False) -> None:
        super().__init__()
        self.weight, self.observed_too = weight, observed_too

    def _pyro_sample(self, msg: Any) -> None:
        if self.observed_too or not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class LatentLoss(Loss):
    """The loss of a guide over one vector of latents that scores its own draws.

    Its gradient sticks the landing: it goes through the draws alone, without the gradient of the
    guide's density in its parameters. It is unbiased, and of small variance near the posterior. If
    ``mass_covering`` is set, it is importance-weighted, so that it covers mass that the guide
    misses. ``joint`` is the model's log density in unconstrained space, of one
    minibatch; ``whole`` that of all rows, if it can be had.
    """

    def __init__(
        self, model: Program, guide: ScoredGuide, num_particles: int, joint: LogJoint
    ) -> None:
        super().__init__(model, guide)
        self.num_particles, self.joint = num_particles, joint
        self.whole: LogJoint | None = None
        self.flow_dim = joint.latent_dim

    def __call__(self, args: Args, kwargs: Kwargs, weight: float | Tensor) -> Tensor:
        draws = self.guide.sample_with_score(self.num_particles, *args, **kwargs)
        weights: Tensor | None = getattr(draws, "weights", None)
        held = None if weights is None else weights.detach()
        z, log_q, score = draws[0], draws[1].detach(), draws[2].detach()
        share = 1 / len(z) if held is None else held.unsqueeze(-1)
        log_p, slope = self._of_model(z.detach(), held, args, kwargs, weight)
        slope = slope + weight * share * score
        log_w = log_p - weight * log_q
        loss = -_mean(log_w, held)
        if len(z) > 1:
            alike = log_w if held is None else log_w + (len(z) * held).log()
            change = _relative_ess(alike) - self.relative_ess
            self.relative_ess = self.relative_ess + 0.01 * change
            if self.mass_covering is not False and not self.joint.subsampled:
                extra = self.mass_covering * _extra_weights(alike, self.relative_ess)
                slope = slope * (1 + extra).unsqueeze(-1)
        surrogate = (z * slope).sum()  # not z.backward(slope), which imports sympy
        if weights is not None:
            surrogate = surrogate - weights @ log_w
        surrogate.backward()
        return loss

    def _of_model(
        self, z: Tensor, held: Tensor | None, args: Args, kwargs: Kwargs, weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The model's log densities at draws, and the gradient of minus their mean in each."""
        joint, anchor = self.joint.with_data(args, kwargs, weight), self.anchor
        joint.turn = self.rows
        latent = z if anchor is None else torch.cat([z, anchor.point.unsqueeze(0)])
        latent = latent.detach().requires_grad_()
        log_p = joint.density(latent)
        objective = -_mean(log_p[: len(z)], held)
        if log_p.requires_grad:  # not so with flat priors and no data
            (objective if anchor is None else objective - log_p[-1]).backward()
        slope = torch.zeros_like(latent) if latent.grad is None else latent.grad
        log_p = log_p.detach()
        if anchor is None:
            return log_p, slope
        corrected, more = anchor.correct(log_p[:-1], z, log_p[-1], -slope[-1])
        share = 1 / len(z) if held is None else held.unsqueeze(-1)
        return corrected, slope[:-1] - share * more

    def fit_weights(self) -> None:
        fit = getattr(self.guide, "fit_weights", None)
        if fit is not None and self.whole is not None:
            fit(self.whole)

    @torch.no_grad()
    def adjust_tails(self) -> None:
        widen = getattr(self.guide, "widen_tails", None)
        whole = self.whole
        if widen is None or whole is None or not whole.at_once or whole.work > MOST_WORK:
            return
        log_weights = self._log_weights(whole, NUM_TAIL)
        if pareto_k(log_weights) < GOOD_K:
            return
        state = torch.get_rng_state()
        for more in TAILS:
            torch.set_rng_state(state)
            undo = widen(more)
            wider = self._log_weights(whole, NUM_TAIL)
            is_cheap = not log_weights.mean() - wider.mean() > TAIL_COST  # also if both are -inf
            if is_cheap and pareto_k(wider) < GOOD_K:
                return
            undo()
            if not is_cheap:
                return

    def _log_weights(self, joint: LogJoint, num_draws: int) -> Tensor:
        """Log importance weights of new draws."""
        posterior = self.guide.get_posterior(*joint.args, **joint.kwargs)
        sizes = joint.sizes(num_draws)
        with threads_for(max(sizes) * joint.num_numbers):
            draws = (posterior.sample((size,)) for size in sizes)
            return torch.cat([joint(z) - posterior.log_prob(z) for z in draws])


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over a guide of a value for each of its draws."""
    return values.mean() if weights is None else weights @ values


def _relative_ess(log_weights: Tensor) -> Tensor:
    """The effective sample size of particles, as a share of their number."""
    share = 1 / log_weights.softmax(0).square().sum() / len(log_weights)
    return share.nan_to_num(0.0, 0.0, 0.0)


def _extra_weights(log_weights: Tensor, relative_ess: Tensor) -> Tensor:
    """The weights of the particles' gradients, less 1, for a mass-covering gradient.

    Weights proportional to w (1 - w), where w are the normalised importance weights (Tucker et al.
    2018, https://arxiv.org/abs/1810.04152), are mixed with equal ones. They are all equal while the
    relative effective sample size is below a half, as it is far from the posterior.
    """
    share = log_weights.softmax(0)
    share = share * (1 - share)
    share = share / share.sum().clamp(min=1e-9)
    return (2 * relative_ess - 1).clamp(min=0).to(share.dtype) * (len(share) * share - 1)
