r"""Conditional flows: ``flow.condition(context)`` is a flow.

.. math::
    y_i = f(x_i; p_i(x, c))

One set of parameters serves all contexts, for instance an encoder's outputs, the states of a
sequence, or the latents outside a plate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from .._validation import check_context
from ..nn.univariate import UnivariateMap
from .autoregressive import (
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    NetworkMixin,
    StackMixin,
    build_flows,
)
from .base import Flow

__all__ = [
    "ConditionalInverseAutoregressiveFlow",
    "ConditionalInverseAutoregressiveFlowStack",
    "conditional_inverse_autoregressive_flow",
]


class _Unconditioned(ConditionalTransformModule):
    """A bijection on vectors without its context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    compile = Flow.compile

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("A conditional flow waits for its context: flow.condition(context)(x).")


class ConditionalInverseAutoregressiveFlow(NetworkMixin, _Unconditioned):
    r"""An inverse autoregressive flow with a context: ``flow.condition(context)`` is the flow.

    The context feeds every layer of the network and has a batch shape. With a context of shape
    ``(B, C)``, the conditioned flow has ``batch_shape (B,)``, and row b of its values depends on
    row b of the context alone. Shapes ``(C,)`` and ``(P, B, C)`` broadcast likewise.

    Args:
        network: As for :class:`~pyro_iaf.InverseAutoregressiveFlow`, called as
            ``network(x, context=context)``. A :class:`~pyro_iaf.MaskedAutoregressiveNetwork` with
            a ``context_dim``, or ``pyro.nn.ConditionalAutoRegressiveNN``.
        univariate: The map of each coordinate, as for :class:`~pyro_iaf.InverseAutoregressiveFlow`.

    Raises:
        ValueError: If the network has no order, does not return the map's parameters, or takes no
            context, or if there is no such map. From ``condition``: if the context doesn't end in
            ``context_dim`` features.

    References:
        Kingma et al. (2016), https://arxiv.org/abs/1606.04934

    Example:
        >>> network = MaskedAutoregressiveNetwork(3, [16], context_dim=2)
        >>> flow = ConditionalInverseAutoregressiveFlow(network)
        >>> base = DiagonalNormal(torch.zeros(3), torch.ones(3))
        >>> posterior = dist.ConditionalTransformedDistribution(base, [flow])
        >>> posterior.condition(torch.randn(5, 2)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self, network: Callable[..., Any], *, univariate: str | UnivariateMap = "affine"
    ) -> None:
        super().__init__()
        if getattr(network, "context_dim", None) == 0:
            raise ValueError(
                "ConditionalInverseAutoregressiveFlow expects a network with a context; got one "
                "with context_dim=0. Give it a context_dim, or use InverseAutoregressiveFlow."
            )
        self._set_network(network, univariate)

    def condition(self, context: Tensor) -> InverseAutoregressiveFlow:
        """The flow at this context, with the same parameters."""
        check_context(context, getattr(self.network, "context_dim", None))
        return _ConditionedFlow(self, context)


class ConditionalInverseAutoregressiveFlowStack(StackMixin, _Unconditioned):
    """Several conditional flows, one after the other, with the same context.

    Args:
        parts: The flows, all of one ``input_dim``.

    Raises:
        ValueError: If ``parts`` is empty, or its elements are not conditional flows of one size.

    Example:
        >>> stack = conditional_inverse_autoregressive_flow(3, 2, num_flows=2)
        >>> flow = stack.condition(torch.randn(5, 2))
        >>> flow(torch.randn(3)).shape
        torch.Size([5, 3])
    """

    parts: Sequence[ConditionalInverseAutoregressiveFlow]

    def __init__(self, parts: Sequence[ConditionalInverseAutoregressiveFlow]) -> None:
        super().__init__()
        kind = ConditionalInverseAutoregressiveFlow
        self._set_parts(parts, kind, kind.__name__)

    def condition(self, context: Tensor) -> InverseAutoregressiveFlowStack:
        """The stack at this context, with the same parameters."""
        return InverseAutoregressiveFlowStack([part.condition(context) for part in self.parts])


def conditional_inverse_autoregressive_flow(
    input_dim: int,
    context_dim: int,
    hidden_dims: int | Sequence[int] | None = None,
    *,
    num_flows: int = 1,
    univariate: str | UnivariateMap = "affine",
    order: Sequence[int] | Tensor | None = None,
    activation: str | nn.Module = "elu",
) -> ConditionalInverseAutoregressiveFlow | ConditionalInverseAutoregressiveFlowStack:
    """A conditional inverse autoregressive flow with its network, or a stack of them.

    Args:
        input_dim: Number of coordinates, D.
        context_dim: Size of the context's last axis, C.
        hidden_dims: As all that follow, see :func:`inverse_autoregressive_flow`.
        num_flows: Number of flows.
        univariate: The map of each coordinate.
        order: The order of the coordinates in the first flow.
        activation: What follows each hidden layer.

    Raises:
        ValueError: As for :func:`inverse_autoregressive_flow`.

    Example:
        >>> flow = conditional_inverse_autoregressive_flow(10, context_dim=4)
        >>> flow.condition(torch.randn(5, 4))(torch.randn(5, 10)).shape
        torch.Size([5, 10])
    """
    kind = ConditionalInverseAutoregressiveFlow
    flows = build_flows(
        kind, num_flows, input_dim, hidden_dims, univariate, order, activation, context_dim
    )
    return flows[0] if num_flows == 1 else ConditionalInverseAutoregressiveFlowStack(flows)


class _ConditionedFlow(InverseAutoregressiveFlow):
    """A conditional flow with its context."""

    def __init__(self, flow: ConditionalInverseAutoregressiveFlow, context: Tensor) -> None:
        Flow.__init__(self)
        # Module.__setattr__ is slow, and would make a context that is a Parameter one of the flow.
        own = {name: flow.__dict__[name] for name in ("input_dim", "univariate")}
        if isinstance(flow.network, nn.Module):
            self._modules["network"] = flow.network
        else:
            own["network"] = flow.network
        self.__dict__.update(own, context=context)

    def repr_fields(self) -> list[str]:
        return [*super().repr_fields(), f"at a context of shape {tuple(self.context.shape)}"]  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        context = state["context"]
        return {**state, "context": context if context.is_leaf else context.detach()}  # no graph
