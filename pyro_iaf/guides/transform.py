r"""What carries a guide's noise to its latents: flows, and the last step behind them.

.. math::
    z = c + R \, \bigl( \mu + S \, b(f(x)) \bigr)

where :math:`f` is a stack of inverse autoregressive flows, nearly the identity at first. The frame
:math:`c, R` is where the guide starts; bend, scale and loc are learnt in its units
(:mod:`pyro_iaf.flows.sinh_arcsinh`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributions import DiagonalNormal
from ..flows.autoregressive import InverseAutoregressiveFlowStack, inverse_autoregressive_flow
from ..flows.conditional import (
    ConditionalInverseAutoregressiveFlowStack,
    conditional_inverse_autoregressive_flow,
)
from ..flows.posterior import Posterior
from ..flows.sinh_arcsinh import LocScale
from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import UnivariateMap
from .pathfinder import Start

__all__ = ["ConditionalGuideTransform", "GuideTransform", "fresh_transform", "make_of"]


class _FlowsAndLastStep:
    """Names for what others need of it, whether it waits for a context or not."""

    parts: Any  # the flows, and the last step

    @property
    def latent_dim(self) -> int:
        """How many numbers it draws."""
        size: int = self.parts[-1].input_dim
        return size

    @property
    def context_dim(self) -> int:
        """Size of the context that its flows listen to; 0 without."""
        size: int = self.networks[0].context_dim
        return size

    @property
    def networks(self) -> list[MaskedAutoregressiveNetwork]:
        """Those of its flows."""
        return [flow.network for flow in self.parts[:-1]]

    @property
    def num_units(self) -> int:
        """How many numbers the widest layer holds for one draw, with the context."""
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
        """What it takes: a standard normal over vectors."""
        zeros = torch.zeros_like(self.origin)
        return DiagonalNormal(zeros, torch.ones_like(zeros), validate_args=False)

    @torch.no_grad()
    def widen_tails(self, by: float) -> Callable[[], None]:
        """Adds to the weight of each latent's tail; returns a function that undoes it."""
        log_tail: Tensor = self.parts[-1].coefficients[3]
        before = log_tail.clone()
        log_tail.add_(by)

        def undo() -> None:
            with torch.no_grad():
                log_tail.copy_(before)

        return undo


class GuideTransform(_FlowsAndLastStep, InverseAutoregressiveFlowStack):
    """Flows and the last step of a guide, as one transform.

    Args:
        flows: The flows, the first acts on the noise.
        last: The last step.
    """

    def __init__(self, flows: Sequence[Any], last: LocScale) -> None:
        super().__init__([*flows, last])  # type: ignore[list-item]

    def posterior(self) -> Posterior:
        """What it makes of that noise."""
        return Posterior(self.noise(), [self], validate_args=False)


class ConditionalGuideTransform(_FlowsAndLastStep, ConditionalInverseAutoregressiveFlowStack):
    """The same of flows that wait for a context; the last step is the same for all contexts."""

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
    """A transform that carries noise to a start, or nearly so.

    Args:
        start: Where to, and in which units.
        log_scale: The logarithm of the scale in these units.
        context_dim: Size of the context, 0 for none.
        num_flows: How many flows.
        hidden_dims: Widths of each network's hidden layers, by default two of ``max(64, D)``.
        univariate: How a flow maps each coordinate.
        dense: Whether the last step learns a triangular matrix.
    """
    D = len(start.loc)
    settings: dict[str, Any] = {
        "hidden_dims": 2 * [max(64, D)] if hidden_dims is None else hidden_dims,
        "num_flows": num_flows,
        "univariate": univariate,
        # The last flow takes the latents as the model draws them: causes before effects.
        "order": torch.arange(D) if num_flows % 2 else torch.arange(D).flip(0),
    }
    # What the maps of fresh flows do to the scale, gates above all, is made up for.
    zeros = torch.zeros(1 + univariate.num_params, dtype=torch.float64, device="cpu")
    log_scale -= num_flows * float(univariate.forward(*zeros)[1])
    flows: Any
    if context_dim:
        flows = conditional_inverse_autoregressive_flow(D, context_dim, **settings)
        kind: Any = ConditionalGuideTransform
    else:
        flows = inverse_autoregressive_flow(D, **settings)
        kind = GuideTransform
    last = LocScale(start.loc, start.scale, log_scale, dense)
    # In the model's own precision, whatever the default is.
    transform: Transform = kind([flows] if num_flows == 1 else flows.parts, last).to(start.loc)
    return transform


def make_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What :func:`fresh_transform` takes to build what a state is of; None if it is of none."""
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


def part_of(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state below a prefix."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
