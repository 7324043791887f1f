r"""The transform from a guide's noise to its latents: flows, and a last step after them.

.. math::
    z = c + R \, \bigl( \mu + S \, b(f(x)) \bigr)

where :math:`f` is a stack of inverse autoregressive flows, nearly the identity at first. The guide
starts at the frame :math:`c, R`. Bend :math:`b`, scale :math:`S` and loc :math:`\mu` are learned in
its units (:mod:`pyro_iaf.flows.sinh_arcsinh`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributions import DiagonalNormal
from ..flows.autoregressive import InverseAutoregressiveFlowStack, inverse_autoregressive_flow
from ..flows.base import SinglePass
from ..flows.conditional import (
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from ..flows.posterior import Posterior
from ..flows.sinh_arcsinh import LocScale
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import UnivariateMap
from .pathfinder import Start

__all__ = ["ConditionalGuideTransform", "GuideTransform", "fresh_transform", "settings_of"]


class _FlowsAndLastStep:
    """Properties that transforms with and without a context share."""

    parts: Any  # the flows, and the last step

    @property
    def latent_dim(self) -> int:
        """How many numbers it draws."""
        return int(self.parts[-1].input_dim)

    @property
    def context_dim(self) -> int:
        """Size of the context that its networks take, also once it is given; 0 for none."""
        return self.networks[0].context_dim

    @property
    def networks(self) -> list[MaskedAutoregressiveNetwork]:
        """The networks of its flows."""
        return [flow.network for flow in self.parts[:-1]]

    @property
    def num_flows(self) -> int:
        """How many flows it has."""
        return len(self.networks)

    @property
    def num_units(self) -> int:
        """Units of the widest layer plus the size of the context, per draw."""
        return max(max(net.hidden_dims) for net in self.networks) + self.context_dim

    @property
    def is_dense(self) -> bool:
        """Whether the last step learns a triangular matrix."""
        return len(self.parts[-1].coefficients) > 4

    @property
    def origin(self) -> Tensor:
        """Where the guide started, of shape ``(D,)``."""
        frame: Tensor = self.parts[-1].frame
        return frame[0]

    def noise(self) -> DiagonalNormal:
        """The distribution of its input: a standard normal over vectors."""
        zeros = torch.zeros_like(self.origin)
        return DiagonalNormal(zeros, torch.ones_like(zeros), validate_args=False)

    @torch.no_grad()
    def widen_tails(self, by: float) -> Callable[[], None]:
        """Adds ``by`` to the log weight of each latent's tails; returns a function to undo it."""
        log_tail: Tensor = self.parts[-1].coefficients[3]
        before = log_tail.clone()
        log_tail.add_(by)

        def undo() -> None:
            with torch.no_grad():
                log_tail.copy_(before)

        return undo


class GuideTransform(_FlowsAndLastStep, InverseAutoregressiveFlowStack):
    """Flows, of which the first acts on the noise, and a last step, as one transform.

    A subclass with another last step overrides what depends on it: :attr:`origin`,
    :attr:`is_dense` and :meth:`widen_tails`. A guide makes its transform in ``_fresh_transform``.
    """

    def __init__(self, flows: Sequence[Any], last: SinglePass) -> None:
        super().__init__([*flows, last])  # type: ignore[list-item]

    def posterior(self) -> Posterior:
        """The distribution of its output."""
        return Posterior(self.noise(), [self], validate_args=False)


class ConditionalGuideTransform(_FlowsAndLastStep, ConditionalInverseAutoregressiveFlowStack):
    """The same with flows that depend on a context; the last step does not."""

    def __init__(self, flows: Sequence[Any], last: LocScale) -> None:
        super().__init__(flows)
        self.parts.append(last)

    def condition(self, context: Tensor) -> GuideTransform:
        """The transform at this context, with the same parameters."""
        *flows, last = self.parts
        return GuideTransform([flow.condition(context) for flow in flows], last)


Transform = GuideTransform | ConditionalGuideTransform


def fresh_transform(
    start: Start,
    log_scale: float,
    *,
    context_dim: int = 0,
    num_flows: int,
    hidden_dims: Sequence[int] | None,
    univariate: UnivariateMap,
    dense: bool,
) -> Transform:
    """A fresh transform, close to ``loc + exp(log_scale) * R x`` for noise ``x``.

    The start has the loc, and the scale ``R``. A ``context_dim`` of 0 means no context; by default
    ``hidden_dims`` are two of ``max(64, D)``; ``dense`` is as for
    :class:`~pyro_iaf.flows.sinh_arcsinh.LocScale`.
    """
    D = len(start.loc)
    settings: dict[str, Any] = {
        "hidden_dims": 2 * [max(64, D)] if hidden_dims is None else hidden_dims,
        "num_flows": num_flows,
        "univariate": univariate,
        # The last flow has the model's order, in which causes come before effects.
        "order": torch.arange(D) if num_flows % 2 else torch.arange(D).flip(0),
    }
    # Fresh flows change the scale, gated ones most; the last step compensates.
    zeros = torch.zeros(1 + univariate.num_params, dtype=torch.float64, device="cpu")
    log_scale -= num_flows * float(univariate.forward(*zeros)[1])
    if context_dim:
        flows: Any = conditional_inverse_autoregressive_flow(D, context_dim, **settings)
    else:
        flows = inverse_autoregressive_flow(D, **settings)
    kind: Any = ConditionalGuideTransform if context_dim else GuideTransform
    last = LocScale(start.loc, start.scale, log_scale, dense)
    # In the model's own precision, which may not be the default.
    transform: Transform = kind([flows] if num_flows == 1 else flows.parts, last).to(start.loc)
    return transform


def settings_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of :func:`fresh_transform` for a transform with this state; None if it has none."""
    sizes = [v for k, v in state.items() if k.endswith(".network._extra_state")]
    last = f"parts.{len(sizes)}"
    learned, frame = state.get(f"{last}.coefficients"), state.get(f"{last}.frame")
    if not sizes or learned is None or frame is None:
        return None
    _, context_dim, _, *hidden_dims = sizes[0].tolist()
    return {
        "start": Start(frame[0].clone(), frame[1:].clone().squeeze(0)),
        "num_flows": len(sizes),
        "hidden_dims": hidden_dims,
        "context_dim": context_dim,
        "dense": len(learned) > 4,
    }


def entries_below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
