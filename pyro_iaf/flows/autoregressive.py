r"""Inverse autoregressive flows: noise ``x`` to latent ``y`` in one network pass.

.. math::
    y_i = f(x_i; p_i(x)), \qquad
    \log \left| \det \frac{\partial y}{\partial x} \right| =
    \sum_{i=1}^{D} \log f'(x_i; p_i(x)),

where the parameters :math:`p_i` of coordinate :math:`i` depend only on the coordinates before it.
The Jacobian is triangular, so its log-determinant is a sum over the coordinates of the vector.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._validation import check_order, check_size, check_tensors, module_repr
from ..nn.made import MaskedAutoregressiveNetwork, check_network, order_of
from ..nn.univariate import Affine, UnivariateMap, univariate_map
from ..solvers.fixed_point import runs_eagerly
from ..solvers.fused import ScoredPass, flow_inverse, flow_pass, takes_flow
from ..solvers.implicit import attach_gradient, check_round_trip, transposed_solution, walk_back
from ..solvers.path_score import Step, has_explicit_jacobian, pass_with_carrier
from . import pass_cache
from .base import Flow, SinglePass

__all__ = [
    "InverseAutoregressiveFlow",
    "InverseAutoregressiveFlowStack",
    "inverse_autoregressive_flow",
]
F = TypeVar("F")


class NetworkMixin:
    """The network and the univariate map of a flow, with a context or without."""

    network: Any
    univariate: UnivariateMap

    def _set_network(self, network: Callable[..., Any], univariate: str | UnivariateMap) -> None:
        self.univariate = univariate_map(univariate)
        check_network(network, self.univariate)
        self.network = network
        self.input_dim = len(order_of(network))

    @property
    def order(self) -> Tensor:
        """The order, in which coordinate ``order[k]`` comes k-th."""
        return order_of(self.network)

    def repr_fields(self) -> list[str]:
        """Sizes and kind, as in the ``repr`` of the flow and of stacks of it."""
        if isinstance(self.network, MaskedAutoregressiveNetwork):
            fields = self.network.repr_fields()
        else:
            fields = [f"input_dim={self.input_dim}", f"network={type(self.network).__name__}"]
        is_default = self.univariate == Affine()
        return fields if is_default else [*fields, f"univariate={self.univariate}"]

    def __repr__(self) -> str:
        return module_repr(self, *self.repr_fields())  # type: ignore[arg-type]


class InverseAutoregressiveFlow(NetworkMixin, SinglePass):
    r"""One layer of inverse autoregressive flow: a univariate map of each coordinate.

    .. math::
        y_i = f(x_i; p_i(x))

    A network computes the parameters from the coordinates before. The map is affine by default,
    and nearly the identity at first; see :class:`~pyro_iaf.Affine`, :class:`~pyro_iaf.Gated`, and
    :class:`~pyro_iaf.UnivariateMap` for one of your own.

    ``log_abs_det_jacobian`` is summed over the vector, of shape ``batch_shape`` and in nats.
    Forward costs one network pass. The log-determinant of a value that the flow produced is free.
    The inverse of another value takes as long as three to ten passes, see
    :func:`~pyro_iaf.invert`, and gives the log-determinant too. ``flow.inv`` is the masked
    autoregressive flow with the same parameters: it scores in one pass, and its draws are inverses.

    Args:
        network: A :class:`~pyro_iaf.MaskedAutoregressiveNetwork` with the map's ``num_params``, or
            any autoregressive callable with an ``order`` or a ``permutation`` that returns so many
            vectors, as ``pyro.nn.AutoRegressiveNN`` does. Passes of a callable that is not a module
            are not remembered, since its parameters may change unnoticed.
        univariate: The map of each coordinate: ``"affine"``, ``"gated"`` or a
            :class:`~pyro_iaf.UnivariateMap`.

    Raises:
        ValueError: If the network has no order, does not return the map's parameters, or needs a
            context; or if there is no such map.

    References:
        Kingma et al. (2016), equations 10, 13 and 14, https://arxiv.org/abs/1606.04934

    Example:
        >>> flow = InverseAutoregressiveFlow(MaskedAutoregressiveNetwork(3, [16]))
        >>> x = torch.randn(5, 3)
        >>> y = flow(x)
        >>> flow.log_abs_det_jacobian(x, y).shape
        torch.Size([5])
        >>> flow.inv(y) is x  # remembered
        True
    """

    autoregressive = True
    context: Tensor | None = None

    def __init__(
        self, network: Callable[..., Any], *, univariate: str | UnivariateMap = "affine"
    ) -> None:
        super().__init__()
        if getattr(network, "context_dim", 0):
            raise ValueError(
                "InverseAutoregressiveFlow expects a network without a context; got one with "
                f"context_dim={network.context_dim}. Use "  # type: ignore[attr-defined]
                "ConditionalInverseAutoregressiveFlow(network).condition(context)."
            )
        self._set_network(network, univariate)

    @property
    def _sources(self) -> tuple[object, ...]:
        return self.network, self.context, self.univariate

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.univariate.forward(x, *self.params_at(x))

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        return walk_back(self, y, method)

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return attach_gradient(self, x, y)

    def solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        return transposed_solution(self, x, v)

    def pass_with_score(self, x: Tensor, by_kernel: bool) -> tuple[Tensor, Tensor, Step]:
        if has_explicit_jacobian(self, by_kernel):
            return pass_with_carrier(self, x, by_kernel)
        return super().pass_with_score(x, by_kernel)

    def pass_at_once(self, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass | None:
        return flow_pass(self, x, log_prob, score) if takes_flow(self, x) else None

    def undo_at_once(self, y: Tensor, by_kernel: bool) -> Tensor:
        if by_kernel and takes_flow(self, y):
            return flow_inverse(self, y)
        return super().undo_at_once(y, by_kernel)

    def params_at(self, x: Tensor) -> Sequence[Tensor]:
        """The map's parameters at ``x``, in one pass of the network."""
        context = {} if self.context is None else {"context": self.context}
        params: Sequence[Tensor] = self.network(x, **context)
        num_params = self.univariate.num_params
        got = len(params) if isinstance(params, tuple | list) else type(params).__name__
        if got != num_params:
            raise ValueError(
                f"The network should return {num_params} tensors like x, the parameters of "
                f"{self.univariate}; got {got}. "
                f"MaskedAutoregressiveNetwork(..., num_params={num_params}) does."
            )
        if any(param.shape[-1] != self.input_dim for param in params):
            raise ValueError(
                f"The network should return parameters of {self.univariate} for {self.input_dim} "
                f"coordinates; got shapes {' and '.join(str(tuple(p.shape)) for p in params)}."
            )
        return params

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        shape = super().forward_shape(shape)
        if self.context is None or self.context.shape[:-1] == shape[:-1]:
            return shape  # torch.broadcast_shapes takes as long as a small layer
        batch_shape = self.context.shape[:-1]
        try:
            return torch.Size([*torch.broadcast_shapes(shape[:-1], batch_shape), shape[-1]])
        except RuntimeError as error:
            raise ValueError(
                f"The batch shape of the context, {tuple(batch_shape)}, should broadcast with that "
                f"of the value, {tuple(shape[:-1])}."
            ) from error


class StackMixin:
    """The parts of a stack of flows, with a context or without."""

    parts: Sequence[Any]

    def _set_parts(self, parts: Iterable[Any], kind: type, name: str) -> None:
        """Sets the parts, or raises a ValueError if these can't form a stack."""
        given = list(parts) if isinstance(parts, Iterable) else []
        others = [type(part).__name__ for part in given if not isinstance(part, kind)]
        sizes = [] if others else [part.input_dim for part in given]
        if others or len(set(sizes)) != 1:
            raise ValueError(
                f"A stack expects one {name} or more, all of one input_dim; got "
                f"{', '.join(others) or f'input_dim {sizes}'}. For other transforms use "
                "pyro.distributions.transforms.ComposeTransformModule."
            )
        self.parts = nn.ModuleList(given)  # type: ignore[assignment]

    def __repr__(self) -> str:
        flows = [part for part in self.parts if isinstance(part, NetworkMixin)]
        kinds = {tuple(flow.repr_fields()) for flow in flows}
        if len(kinds) != 1:
            return nn.Module.__repr__(self)  # type: ignore[arg-type]
        input_dim, *others = kinds.pop()
        rest = [part.extra_repr() for part in self.parts if not isinstance(part, NetworkMixin)]
        return module_repr(self, input_dim, f"num_flows={len(flows)}", *others, *rest)  # type: ignore[arg-type]


class InverseAutoregressiveFlowStack(StackMixin, Flow):
    """Several flows, one after the other; the first acts on the noise.

    The log-determinant, in nats and of shape ``batch_shape``, is the sum of theirs. It is free for
    a value that the stack produced, and costs one network pass for each flow otherwise.

    Args:
        parts: The flows, all of one ``input_dim``.

    Raises:
        ValueError: If ``parts`` is empty, or its elements are not flows of one size.

    Example:
        >>> stack = inverse_autoregressive_flow(3, num_flows=2)
        >>> [part.order.tolist() for part in stack.parts]
        [[0, 1, 2], [2, 1, 0]]
        >>> x = torch.randn(5, 3)
        >>> stack.log_abs_det_jacobian(x, stack(x)).shape
        torch.Size([5])
    """

    parts: Sequence[SinglePass]

    def __init__(self, parts: Sequence[InverseAutoregressiveFlow]) -> None:
        super().__init__()
        self._set_parts(parts, SinglePass, "InverseAutoregressiveFlow")

    def single_passes(self) -> Sequence[SinglePass]:
        """The passes that it consists of, the first acts on the noise."""
        return self.parts

    def __call__(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def _call(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part._call(x)
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part._inverse(y)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        x, all_remembered = y, True
        for part in reversed(self.parts):
            x, remembered = part._recall_or_invert(x)
            all_remembered = all_remembered and remembered
        if not all_remembered and runs_eagerly():
            with torch.no_grad():
                check_round_trip(self, self(x.detach()), y)
        return x

    def noise_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of ``y``, and the log-determinant there, with one lookup for each part."""
        known = self._recall(pass_cache.pass_to, reversed(self.parts), y)
        if known is not None:
            return known[0], functools.reduce(torch.add, known[2])
        x = self._inv_call(y)
        return x, self.log_abs_det_jacobian(x, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant of the Jacobian at ``x``, in nats, of shape ``batch_shape``."""
        check_tensors(x=x, y=y)
        terms = self._remembered(x, y)
        if terms is None:
            terms = []
            for k, part in enumerate(self.parts, 1):
                after = y if k == len(self.parts) else part(x)
                terms.append(part.log_abs_det_jacobian(x, after))
                x = after
        return functools.reduce(torch.add, terms)

    def _remembered(self, x: Tensor, y: Tensor) -> list[Tensor] | None:
        """The parts' log-determinants between ``x`` and ``y``, if these passes are remembered."""
        for lookup, parts, start, end in (
            (pass_cache.pass_to, reversed(self.parts), y, x),
            (pass_cache.pass_back, self.parts, x, y),
        ):
            known = self._recall(lookup, parts, start)
            if known is not None and (known[0] is end or known[1] is end):
                return known[2]
        return None

    def _recall(
        self,
        lookup: Callable[[tuple[object, ...], Tensor], pass_cache.Pass | None],
        parts: Iterable[SinglePass],
        value: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """The end of remembered passes, the same before expansion, and the log-determinants."""
        given, terms = value, []
        for part in parts:
            known = lookup(part._sources, value)
            if known is None:
                return None
            value, given = known.partner, known.given
            pass_cache.unlink(value)
            terms.append(known.log_det())
        return value, given, terms

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape


def inverse_autoregressive_flow(
    input_dim: int,
    hidden_dims: int | Sequence[int] | None = None,
    *,
    num_flows: int = 1,
    univariate: str | UnivariateMap = "affine",
    order: Sequence[int] | Tensor | None = None,
    activation: str | nn.Module = "elu",
) -> InverseAutoregressiveFlow | InverseAutoregressiveFlowStack:
    """An inverse autoregressive flow with its network, or a stack of them.

    Args:
        input_dim: Number of coordinates, D.
        hidden_dims: Widths of each network's hidden layers, a list or one int. By default two
            layers of ``max(64, 2 * input_dim)``.
        num_flows: Number of flows. More than one make a stack; each has the reversed order of the
            one before.
        univariate: The map of each coordinate: ``"affine"``, ``"gated"`` or a
            :class:`~pyro_iaf.UnivariateMap`.
        order: The order of the coordinates in the first flow; by default as they stand.
        activation: What follows each hidden layer, by name or as a module.

    Raises:
        ValueError: If a size is not positive, ``order`` is not a permutation, or there is no such
            map.

    Example:
        >>> flow = inverse_autoregressive_flow(10, num_flows=2)
        >>> base = DiagonalNormal(torch.zeros(10), torch.ones(10))
        >>> posterior = dist.TransformedDistribution(base, [flow])
        >>> posterior.log_prob(posterior.rsample()).shape
        torch.Size([])
    """
    flows = build_flows(
        InverseAutoregressiveFlow, num_flows, input_dim, hidden_dims, univariate, order, activation
    )
    return flows[0] if num_flows == 1 else InverseAutoregressiveFlowStack(flows)


def build_flows(
    kind: Callable[..., F],
    num_flows: int,
    input_dim: int,
    hidden_dims: int | Sequence[int] | None,
    univariate: str | UnivariateMap,
    order: Sequence[int] | Tensor | None,
    activation: str | nn.Module,
    context_dim: int = 0,
) -> list[F]:
    """Flows of one kind with their networks, each with the reversed order of the one before."""
    univariate = univariate_map(univariate)
    order = check_order(order, check_size("input_dim", input_dim))
    flows = []
    for _ in range(check_size("num_flows", num_flows)):
        network = MaskedAutoregressiveNetwork(
            input_dim,
            hidden_dims,
            context_dim=context_dim,
            num_params=univariate.num_params,
            order=order,
            activation=copy.deepcopy(activation),  # one for each, if it has parameters
        )
        flows.append(kind(network, univariate=univariate))
        order = order[::-1]
    return flows
