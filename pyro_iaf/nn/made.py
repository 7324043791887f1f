r"""Masked autoregressive networks: each output depends only on the coordinates before its own.

A masked autoregressive network (MADE) gives every unit a *degree*: the number of coordinates, in
the network's order, that it may depend on. Units are connected where their degrees allow it,

.. math::
    M^{\text{hidden}}_{ab} = [\deg a \ge \deg b], \qquad
    M^{\text{output}}_{ab} = [\deg a > \deg b],

so the Jacobian of every output is strictly triangular in the order, with exact zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._validation import check_context, check_order, check_size, check_widths, module_repr
from .univariate import UnivariateMap

__all__ = ["MaskedAutoregressiveNetwork"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
MAX_SHARED = 2**17  # weights, half a megabyte; sharing makes steps of SVI faster up to about there


class MaskedAutoregressiveNetwork(nn.Module):
    r"""A masked autoregressive network: parameters for each coordinate from those before it.

    Returns ``num_params`` vectors :math:`p(x)` with :math:`\partial p_i / \partial x_j = 0`
    exactly, unless :math:`j` comes before :math:`i` in ``order``. All these dependences exist
    whatever the widths, since the output layer reads both the last hidden layer and the input. A
    context feeds every layer and every output. One call costs as much as a dense network of the
    same widths, :math:`O(D H + H^2)` per row.

    Hidden units are sorted by degree. For inputs of order one, the outputs of a fresh network are
    within about 1e-3 of zero. Each weight of the output layer has a fixed factor of about one over
    the square root of its unit's number of inputs, each of a hidden layer half of that, so that one
    learning rate suits all widths. Biases have none.

    Args:
        input_dim: Number of coordinates, D.
        hidden_dims: Widths of the hidden layers, a list or one int. By default two layers of
            ``max(64, 2 * input_dim)``.
        context_dim: Size of the context's last axis; 0 for none.
        num_params: Number of vectors to return.
        order: The order of the coordinates: ``order[k]`` comes k-th. By default as they stand.
        activation: What follows each hidden layer: a name (``"elu"``, ``"relu"``, ``"tanh"``,
            ``"gelu"``, ``"silu"``, ...) or a module that acts elementwise. Inverses are fastest
            with PyTorch's own modules without parameters.

    Raises:
        ValueError: If a size is not positive, ``order`` is not a permutation, or the activation is
            unknown.

    References:
        Germain et al. (2015), MADE, https://arxiv.org/abs/1502.03509

    Example:
        >>> network = MaskedAutoregressiveNetwork(3, hidden_dims=[16], order=[2, 0, 1])
        >>> loc, log_scale = network(torch.randn(5, 3))
        >>> loc.shape
        torch.Size([5, 3])
        >>> slope = torch.func.jacrev(lambda x: network(x)[0])(torch.randn(3))
        >>> slope != 0  # 0 depends on 2, and 1 on both
        tensor([[False, False,  True],
                [ True, False,  True],
                [False, False, False]])
    """

    order: Tensor
    mask: Tensor
    starts: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dims: int | Sequence[int] | None = None,
        *,
        context_dim: int = 0,
        num_params: int = 2,
        order: Sequence[int] | Tensor | None = None,
        activation: str | nn.Module = "elu",
    ) -> None:
        super().__init__()
        self.input_dim = check_size("input_dim", input_dim)
        self.hidden_dims = check_widths(hidden_dims, input_dim)
        self.context_dim = check_size("context_dim", context_dim, smallest=0)
        self.num_params = check_size("num_params", num_params)
        self.activation = _activation(activation)
        order = torch.tensor(check_order(order, self.input_dim), dtype=torch.long)
        self.register_buffer("order", order)

        # The number of units of each layer, the outputs last. The shapes of the weights, outputs by
        # inputs: the output layer reads the input too, and the last matrix is added to all units.
        self._widths = [*self.hidden_dims, num_params * input_dim]
        inputs = [input_dim, *self.hidden_dims[:-1], self.hidden_dims[-1] + input_dim]
        offsets = (sum(self._widths), 1 + self.context_dim)
        self._shapes = [*zip(self._widths, inputs, strict=True), offsets]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        # One more tensor costs an optimiser as much as thousands of numbers, so small matrices
        # share a parameter. Large ones do not, since a tensor of many megabytes is allocated anew,
        # page by page, at every step.
        self._shared = sum(self._sizes) <= MAX_SHARED
        sizes = [sum(self._sizes)] if self._shared else self._sizes
        self.weights = nn.ParameterList(torch.empty(size) for size in sizes)
        self._build_mask()
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_rebuild_mask)  # for another order, or device

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns ``num_params`` tensors, each of shape ``batch_shape + (D,)``.

        Args:
            x: Of shape ``batch_shape + (input_dim,)``.
            context: Of shape ``batch_shape + (context_dim,)``; the batch shapes broadcast.
        """
        self.check_inputs(x, context)
        *hidden, output, offsets = map(product, self.factors())
        *shifts, last_shift = self.shifts(offsets, context)
        linear = functional.linear if context is None else _linear_plus
        h = x
        for weight, shift in zip(hidden, shifts, strict=True):
            h = self.activation(linear(h, weight, shift))
        if context is not None:
            x = x.expand(*h.shape[:-1], -1)
        out = linear(torch.cat([h, x], -1), output, last_shift)
        return torch.split(out, self.input_dim, -1)

    def shifts(self, offsets: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """What is added to the units of each layer; ``offsets`` is the last matrix of weights."""
        if context is None:
            return offsets.squeeze(-1).split_with_sizes(self._widths)
        shift = functional.linear(context, offsets[:, 1:], offsets[:, 0])
        return shift.split_with_sizes(self._widths, -1)

    def get_extra_state(self) -> Tensor:
        """The sizes, which the number of weights does not determine."""
        return torch.tensor([self.input_dim, self.context_dim, self.num_params, *self.hidden_dims])

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing, since loading has compared the sizes."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        sizes = state_dict.get(f"{prefix}_extra_state")
        if sizes is None or sizes.tolist() == self.get_extra_state().tolist():
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        error_messages: list[str] = args[4]
        theirs, ours = (_described(s.tolist()) for s in (sizes, self.get_extra_state()))
        error_messages.append(
            f"{prefix}: the state is of a network with {theirs}; this has {ours}."
        )

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """The matrices of all layers in a vector of all weights, or in ``mask``.

        Each has shape outputs by inputs; the output layer reads the last hidden layer and then the
        input. One more matrix has a row for every unit of all layers: its bias and its weights on
        the context.
        """
        parts = flat.split_with_sizes(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def factors(self) -> list[tuple[Tensor, ...]]:
        """The factors, one or two, of each masked matrix; see ``matrices`` for their order.

        A shared parameter is masked here, at once. Large matrices are not, so that a caller that
        needs a part of one masks that part only.
        """
        if self._shared:
            return [(matrix,) for matrix in self.matrices(self.weights[0] * self.mask)]
        masks = self.matrices(self.mask)
        return [(w.view(m.shape), m) for w, m in zip(self.weights, masks, strict=True)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws fresh weights from PyTorch's generator; the outputs start near zero."""
        num_outputs = self._widths[-1]
        flat = nn.init.normal_(torch.empty_like(self.mask))
        *_, output, offsets = weights = self.matrices(flat)
        output.mul_(3e-5)
        offsets[-num_outputs:].mul_(3e-5)
        nn.init.uniform_(offsets[:, 0], -1, 1)
        nn.init.zeros_(offsets[-num_outputs:, 0])
        for own, fresh in zip(self.weights, [flat] if self._shared else weights, strict=True):
            own.copy_(fresh.reshape(-1))

    def hidden_degrees(self) -> list[Tensor]:
        """The degree of each unit of each hidden layer, in ascending order.

        A unit of degree d depends on the first d coordinates. Degrees run from 1 to D - 1 without a
        context. With one they start at 0: these units depend on the context alone.
        """
        lowest, choices = self._degrees()
        # Unit a has the degree at the middle of the a-th of H equal parts of the range.
        return [
            lowest + (2 * torch.arange(H, device=self.order.device) + 1) * choices // (2 * H)
            for H in self.hidden_dims
        ]

    def units_between(self, layer: int, first: int, last: int) -> slice:
        """The units of a hidden layer with degrees from ``first`` up to, not including, ``last``.

        Example:
            >>> network = MaskedAutoregressiveNetwork(4, hidden_dims=[6])
            >>> network.hidden_degrees()
            [tensor([1, 1, 2, 2, 3, 3])]
            >>> network.units_between(0, 2, 4)
            slice(2, 6, None)
        """
        (lowest, choices), H = self._degrees(), self.hidden_dims[layer]
        # Unit a has degree d or more if (2 a + 1) choices >= 2 H (d - lowest).
        below = [-((choices - 2 * H * (d - lowest)) // (2 * choices)) for d in (first, last)]
        return slice(*(min(max(count, 0), H) for count in below))

    def _degrees(self) -> tuple[int, int]:
        """The lowest degree of hidden units, and the number of different degrees."""
        lowest = 0 if self.context_dim or self.input_dim == 1 else 1
        return lowest, self.input_dim - lowest

    def _build_mask(self) -> None:
        degree = torch.argsort(self.order) + 1  # of each coordinate
        natural = torch.arange(self.input_dim, device=self.order.device)
        self.in_natural_order = not self.order.is_meta and torch.equal(self.order, natural)
        degrees = [degree, *self.hidden_degrees()]
        masks = []
        for before, after in pairwise(degrees):
            connections = after[:, None] >= before
            # Half in hidden layers: Adam moves all layers at once, and flows exponentiate.
            masks.append(connections * 0.5 * _factor(connections.sum(-1, keepdim=True)))
        # The last hidden layer, the input and the context have a factor each, by their sizes.
        sizes = [self.hidden_dims[-1], self.input_dim, self.context_dim]
        factors = _factor(degree.new_tensor(sizes))
        columns = torch.cat([factors[0].expand(sizes[0]), factors[1].expand(sizes[1])])
        connections = degree.repeat(self.num_params)[:, None] > torch.cat([degrees[-1], degree])
        masks.append(connections * columns)
        bias_and_context = torch.cat([torch.ones_like(factors[:1]), factors[2].expand(sizes[2])])
        masks.append(bias_and_context.expand(self._shapes[-1]))
        mask = torch.cat([mask.reshape(-1) for mask in masks])
        # Not in the state: it follows from the order and the sizes.
        self.register_buffer("mask", mask.to(self.weights[0]), persistent=False)
        # The first unit of each degree, for each hidden layer.
        bounds = torch.arange(self.input_dim + 1, device=degree.device)
        starts = [torch.searchsorted(units, bounds) for units in degrees[1:]]
        self.register_buffer("starts", torch.stack(starts), persistent=False)

    def check_inputs(self, x: Tensor, context: Tensor | None) -> None:
        """Raises a ValueError unless the network can take these."""
        if x.dim() == 0 or x.shape[-1] != self.input_dim:
            raise ValueError(
                f"x should end in input_dim={self.input_dim} coordinates; got a tensor of shape "
                f"{tuple(x.shape)}."
            )
        if context is None:
            if self.context_dim:
                raise ValueError(
                    f"This network expects a context with context_dim={self.context_dim} features; "
                    "got none. Call network(x, context), or flow.condition(context)."
                )
        elif not self.context_dim:
            raise ValueError(
                "This network was built without a context, yet got one of shape "
                f"{tuple(context.shape)}. Build it with a context_dim."
            )
        else:
            check_context(context, self.context_dim)
        dtype = self.weights[0].dtype
        got = {x.dtype, x.dtype if context is None else context.dtype}
        if got != {dtype} and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x and context should have the network's dtype, {dtype}; got "
                f"{' and '.join(sorted(map(str, got)))}. Convert the network with .double() or "
                ".float(), or the inputs with .to(...)."
            )

    def repr_fields(self) -> list[str]:
        """The sizes, as in the ``repr`` of the network and of flows on it."""
        fields = [f"input_dim={self.input_dim}", f"hidden_dims={self.hidden_dims}"]
        return [*fields, f"context_dim={self.context_dim}"] if self.context_dim else fields

    def __repr__(self) -> str:
        return module_repr(self, *self.repr_fields(), f"num_params={self.num_params}")


def product(factors: Sequence[Tensor]) -> Tensor:
    """The product of one or two factors."""
    return factors[0] if len(factors) == 1 else factors[0] * factors[1]


def _linear_plus(h: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    return functional.linear(h, weight) + shift


def _factor(num_inputs: Tensor) -> Tensor:
    """The factor of a unit's weights: about one over the square root of their number.

    Adam moves all weights of a unit by its learning rate at once. The factor bounds the change of
    their sum, whatever the width. A power of two is the same number in every dtype.
    """
    return torch.exp2(torch.round(-0.5 * torch.log2(num_inputs.clamp(min=1))))


@torch.inference_mode(False)
def _rebuild_mask(network: MaskedAutoregressiveNetwork, _: object) -> None:
    if not network.order.is_meta:
        check_order(network.order, network.input_dim)
    network._build_mask()


def _described(sizes: list[int]) -> str:
    input_dim, context_dim, num_params, *hidden_dims = sizes
    return f"{input_dim=}, {hidden_dims=}, {context_dim=}, {num_params=}"


def order_of(network: Any) -> Tensor:
    """The order of the coordinates in an autoregressive network of this package or of Pyro."""
    order = getattr(network, "order", None)
    return getattr(network, "permutation", None) if order is None else order  # type: ignore[return-value]


def check_network(network: Any, univariate: UnivariateMap) -> None:
    """Raises a ValueError unless a flow with this map can use the network."""
    if not callable(network) or not isinstance(order_of(network), Tensor):
        raise ValueError(
            "A flow expects an autoregressive network: a callable whose `order` or `permutation` "
            "is the order of the coordinates, such as MaskedAutoregressiveNetwork and "
            f"pyro.nn.AutoRegressiveNN; got {type(network).__name__}. Give it such an attribute."
        )
    if not isinstance(network, MaskedAutoregressiveNetwork):  # this one has checked its order
        check_order(order_of(network), len(order_of(network)))
    expected = univariate.num_params
    num_params = getattr(network, "num_params", expected)
    if num_params != expected:
        raise ValueError(
            f"A flow with univariate={univariate} expects a network with num_params={expected}; "
            f"got one with num_params={num_params}."
        )


def _activation(activation: str | nn.Module) -> nn.Module:
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation should be one of {', '.join(ACTIVATIONS)}, or a module; got "
                f"{activation!r}."
            )
        return ACTIVATIONS[activation]()
    if not isinstance(activation, nn.Module):
        raise ValueError(
            f"activation should be a name or a module; got {activation!r}. Wrap a function in an "
            "nn.Module, or use its class: nn.Tanh() for torch.tanh."
        )
    return activation
