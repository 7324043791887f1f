r"""Inverse autoregressive flows: noise ``x`` to latent ``y`` in one network pass.

.. math::
    y = m(x) + e^{s(x)} \odot x, \qquad
    \log \left| \det \frac{\partial y}{\partial x} \right| = \sum_{i=1}^{D} s_i(x),

where coordinate :math:`i` of :math:`m` and :math:`s` listens only to the coordinates before it. The
Jacobian is triangular, so its log-determinant is a sum over the vector: one number per vector.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._validation import (
    check_flag,
    check_number,
    check_order,
    check_size,
    check_tensors,
    in_one_line,
)
from ..nn.made import MaskedAutoregressiveNetwork, check_network, order_of
from ..solvers.fixed_point import runs_eagerly
from ..solvers.implicit import attach_gradient, check_round_trip, transposed_solution, walk_back
from . import pass_cache
from .base import Flow, SinglePass

__all__ = [
    "InverseAutoregressiveFlow",
    "InverseAutoregressiveFlowStack",
    "inverse_autoregressive_flow",
]

# Networks speak freely; scales stay within e^-10 and e^10. Smooth, so gradients are the true ones.
LOG_SCALE_BOUND = 10.0


class OnNetwork:
    """What a flow and its conditional twin share: a network, and how it is read."""

    network: Any

    def _adopt(self, network: Callable[..., Any], gated: bool, gate_bias: float) -> None:
        self.gated = check_flag("gated", gated)
        self.gate_bias = check_number("gate_bias", gate_bias)
        self.network = network
        self.input_dim = len(order_of(network))

    @property
    def order(self) -> Tensor:
        """The order of the coordinates, of which ``order[k]`` comes k-th."""
        return order_of(self.network)

    def words(self) -> list[str]:
        """Sizes and kind, as they stand in the ``repr`` of the flow and of what is made of it."""
        if isinstance(self.network, MaskedAutoregressiveNetwork):
            found = self.network.words()
        else:
            found = [f"input_dim={self.input_dim}", f"network={type(self.network).__name__}"]
        return [*found, f"gated=True, gate_bias={self.gate_bias}"] if self.gated else found

    def __repr__(self) -> str:
        return in_one_line(self, *self.words())  # type: ignore[arg-type]


class InverseAutoregressiveFlow(OnNetwork, SinglePass):
    r"""One layer of inverse autoregressive flow, affine or gated.

    Affine, with a network that returns :math:`m` and :math:`s`:

    .. math::
        y = m(x) + \sigma(x) \odot x, \qquad \sigma = e^{s}

    Gated, which can only contract:

    .. math::
        y = \sigma(x) \odot x + (1 - \sigma(x)) \odot m(x), \qquad
        \sigma = \mathrm{sigmoid}(s + \mathrm{gate\_bias})

    :math:`s` is bounded by :math:`10 \tanh(s / 10)`. A fresh affine flow is nearly the identity, a
    fresh gated one nearly ``x * sigmoid(gate_bias)``.

    The event is the vector: ``log_abs_det_jacobian`` is summed over it, of shape ``batch_shape``
    and in nats. Forward costs one network pass, and the log-determinant of a value that the flow
    made nothing. The inverse of a value from elsewhere takes as long as three to ten passes, see
    :func:`~pyro_iaf.invert`, and knows the log-determinant too. ``flow.inv`` is the masked
    autoregressive flow with the same parameters: it scores in one pass, and its draws are inverses.

    Args:
        network: A :class:`~pyro_iaf.MaskedAutoregressiveNetwork` with two parameters, or any
            autoregressive callable with an ``order`` or a ``permutation`` that returns two vectors,
            as ``pyro.nn.AutoRegressiveNN`` does. Passes of a callable that is no module are not
            remembered, since nobody can tell when its parameters change.
        gated: Whether to gate instead of shift and scale.
        gate_bias: Added to the gate; at 2 a fresh flow keeps 88 % of the noise.

    Raises:
        ValueError: If the network has no order, does not return two vectors, or wants a context; if
            ``gated`` is no bool, or ``gate_bias`` no finite number.

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
        self, network: Callable[..., Any], *, gated: bool = False, gate_bias: float = 2.0
    ) -> None:
        super().__init__()
        if getattr(network, "context_dim", 0):
            raise ValueError(
                "InverseAutoregressiveFlow expects a network without a context; got one with "
                f"context_dim={network.context_dim}. Use "  # type: ignore[attr-defined]
                "ConditionalInverseAutoregressiveFlow(network).condition(context)."
            )
        check_network(network)
        self._adopt(network, gated, gate_bias)

    @property
    def _sources(self) -> tuple[object, ...]:
        return self.network, self.context, self.gated, self.gate_bias

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._coefficients(x)
        return torch.addcmul(shift, log_scale.exp(), x), log_scale

    def _undo(self, y: Tensor, method: str = "auto") -> tuple[Tensor, Tensor]:
        return walk_back(self, y, method)

    def _undo_known(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return attach_gradient(self, x, y)

    def _solve_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        return transposed_solution(self, x, v)

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context = {} if self.context is None else {"context": self.context}
        out = self.network(x, **context)
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise ValueError(
                "The network should return two tensors like x, a shift and a log-scale; got "
                f"{type(out).__name__}. MaskedAutoregressiveNetwork(..., num_params=2) does."
            )
        shift, log_scale = out
        if shift.shape[-1] != self.input_dim or log_scale.shape[-1] != self.input_dim:
            raise ValueError(
                f"The network should return a shift and a log-scale for {self.input_dim} "
                f"coordinates; got shapes {tuple(shift.shape)} and {tuple(log_scale.shape)}."
            )
        return self._read(shift, log_scale)

    @property
    def _read(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return functools.partial(read_outputs, self.gate_bias if self.gated else None)

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


def read_outputs(
    gate_bias: float | None, shift: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The shift and the log-scale of what a network returns; gated, if there is a bias."""
    log_scale = LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)
    if gate_bias is None:
        return shift, log_scale
    gate = log_scale + gate_bias
    return torch.sigmoid(-gate) * shift, functional.logsigmoid(gate)


class InverseAutoregressiveFlowStack(Flow):
    """Several flows, one after the other; the first acts on the noise.

    The log-determinant, in nats and of shape ``batch_shape``, is the sum of theirs. For a value
    that the stack made, it walks back over the values in between and costs nothing; otherwise one
    network pass for each flow.

    Args:
        parts: The flows, all of one ``input_dim``.

    Raises:
        ValueError: If there are no parts, or they are no flows, or of several sizes.

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
        parts = check_parts(parts, SinglePass, "InverseAutoregressiveFlow")
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]

    def __repr__(self) -> str:
        return stack_in_one_line(self)

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
        x, remembered = y, True
        for part in reversed(self.parts):
            x, known = part._walk_back(x)
            remembered = remembered and known
        if not remembered and runs_eagerly():
            with torch.no_grad():
                check_round_trip(self, self(x.detach()), y)
        return x

    def _noise_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse and its log-determinant at once, each part asked once if it remembers."""
        known = self._walk(pass_cache.pass_to, reversed(self.parts), y)
        if known is not None:
            x, _, terms = known
            return x, functools.reduce(torch.add, terms)
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
        """The parts' log-determinants on the way between ``x`` and ``y``, if remembered."""
        for recall, parts, start, end in (
            (pass_cache.pass_to, reversed(self.parts), y, x),
            (pass_cache.pass_back, self.parts, x, y),
        ):
            known = self._walk(recall, parts, start)
            if known is not None and (known[0] is end or known[1] is end):
                return known[2]
        return None

    def _walk(
        self,
        recall: Callable[[tuple[object, ...], Tensor], pass_cache.Pass | None],
        parts: Iterable[SinglePass],
        value: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]] | None:
        """Where remembered passes lead, that before it was widened, and their log-determinants."""
        given, terms = value, []
        for part in parts:
            known = recall(part._sources, value)
            if known is None:
                return None
            value, given = known.partner, known.given
            pass_cache.settle(value)
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
    gated: bool = False,
    gate_bias: float = 2.0,
    order: Sequence[int] | Tensor | None = None,
    activation: str | nn.Module = "elu",
) -> InverseAutoregressiveFlow | InverseAutoregressiveFlowStack:
    """An inverse autoregressive flow with its network, or a stack of them.

    Args:
        input_dim: Number of coordinates, D.
        hidden_dims: Widths of each network's hidden layers, a list or one int. By default two
            layers of ``max(64, 2 * input_dim)``.
        num_flows: How many flows; more than one make a stack, each with the order of the one before
            it reversed.
        gated: Whether to gate instead of shift and scale.
        gate_bias: Added to the gate.
        order: The order of the coordinates in the first flow; by default as they stand.
        activation: What follows each hidden layer, by name or as a module.

    Raises:
        ValueError: If a size is not positive, ``order`` is no permutation, ``gated`` no bool, or
            ``gate_bias`` no finite number.

    Example:
        >>> flow = inverse_autoregressive_flow(10, num_flows=2)
        >>> base = DiagonalNormal(torch.zeros(10), torch.ones(10))
        >>> posterior = dist.TransformedDistribution(base, [flow])
        >>> posterior.log_prob(posterior.rsample()).shape
        torch.Size([])
    """
    parts = [
        InverseAutoregressiveFlow(network, gated=gated, gate_bias=gate_bias)
        for network in fresh_networks(num_flows, input_dim, hidden_dims, 0, order, activation)
    ]
    return parts[0] if num_flows == 1 else InverseAutoregressiveFlowStack(parts)


def fresh_networks(
    num_flows: int,
    input_dim: int,
    hidden_dims: int | Sequence[int] | None,
    context_dim: int,
    order: Sequence[int] | Tensor | None,
    activation: str | nn.Module,
) -> Iterator[MaskedAutoregressiveNetwork]:
    """A network for each flow of a stack, each with the order of the one before it reversed."""
    order = check_order(order, check_size("input_dim", input_dim))
    for _ in range(check_size("num_flows", num_flows)):
        yield MaskedAutoregressiveNetwork(
            input_dim,
            hidden_dims,
            context_dim=context_dim,
            order=order,
            activation=copy.deepcopy(activation),  # one for each, if it has parameters
        )
        order = order[::-1]


def stack_in_one_line(stack: Any) -> str:
    """What flows of a stack have in common; part by part where they are not alike."""
    flows = [part for part in stack.parts if isinstance(part, OnNetwork)]
    kinds = {tuple(flow.words()) for flow in flows}
    if len(kinds) != 1:
        return nn.Module.__repr__(stack)
    (input_dim, *others) = kinds.pop()
    rest = [part.extra_repr() for part in stack.parts if not isinstance(part, OnNetwork)]
    return in_one_line(stack, input_dim, f"num_flows={len(flows)}", *others, *rest)


def check_parts(parts: Iterable[Any], kind: type, name: str) -> list[Any]:
    """The parts as a list, or a ValueError if no stack of this kind can be made of them."""
    given = list(parts) if isinstance(parts, Iterable) else []
    strangers = [type(part).__name__ for part in given if not isinstance(part, kind)]
    sizes = [] if strangers else [part.input_dim for part in given]
    if strangers or len(set(sizes)) != 1:
        raise ValueError(
            f"A stack expects one {name} or more, all of one input_dim; got "
            f"{', '.join(strangers) or f'input_dim {sizes}'}. For other transforms use "
            "pyro.distributions.transforms.ComposeTransformModule."
        )
    return given
