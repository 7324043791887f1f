r"""Passes through networks and flows, and their gradients, as one operation each.

With a flow's pass go density and score of the noise,

.. math::
    (x, \log q, s) \mapsto \bigl(y, \log q - \log |\det J|,
    J^{-\mathsf T} (s - \nabla_x \log |\det J|)\bigr).

A small flow takes two hundred operations of PyTorch for that. Each costs a few microseconds, a
tenth of which is arithmetic. They are differentiable once. The kernels are in ``cpp/``; what these
don't know goes through :mod:`~pyro_iaf.solvers.path_score` operation by operation.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Affine, Gated, UnivariateMap
from .blockwise import Autoregressive, can_be_cut
from .kernels import define
from .score_kernel import num_threads_for

__all__ = ["NetworkPass", "ScoredPass", "flow_inverse", "flow_pass", "last_step_pass"]
__all__ += ["network_pass", "takes_flow", "takes_network"]

# The maps that the kernel knows, with their numbers in cpp/maps.h.
MAPS: dict[type[UnivariateMap], int] = {Affine: 0, Gated: 1}


# PyTorch's operations take 64 arguments, some ten of which are not of hidden layers.
MAX_LAYERS = 24


class NetworkPass(NamedTuple):
    """A pass through a network.

    Attributes:
        outputs: What the network returns, in one tensor of shape ``(K, num_params * D)``.
        weights: The masked matrices of the hidden layers and of the outputs, without a graph.
        activation_slopes: The derivatives of the activations, without a graph.
    """

    outputs: Tensor
    weights: Sequence[Tensor]
    activation_slopes: Sequence[Tensor]


class ScoredPass(NamedTuple):
    """A value with its graph, and its log density and score without one."""

    value: Tensor
    log_prob: Tensor
    score: Tensor


def takes_network(network: MaskedAutoregressiveNetwork, x: Tensor, context: Tensor | None) -> bool:
    """Whether :func:`network_pass` takes this network: small, with ELU, and without a context."""
    activation = network.activation
    return (
        context is None
        and len(network.weights) == 1
        and len(network.hidden_dims) <= MAX_LAYERS
        and type(activation) is nn.ELU
        and activation.alpha == 1
        and x.dtype == network.mask.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch._C._are_functorch_transforms_active()
    )


def takes_flow(flow: Autoregressive, x: Tensor) -> bool:
    """Whether :func:`flow_pass` takes this flow and noise."""
    return (
        type(flow.univariate) in MAPS
        and x.dim() == 2
        and can_be_cut(flow)
        and takes_network(flow.network, x, flow.context)
    )


def network_pass(network: MaskedAutoregressiveNetwork, x: Tensor) -> NetworkPass:
    """The network at ``x`` of shape ``(K, D)``."""
    sizes = network.num_params, *network.hidden_dims
    outputs, masked, *layers = _Network.apply(x, network.weights[0], network.mask, *sizes)
    return NetworkPass(outputs, network.matrices(masked)[:-1], layers[1::2])


def flow_pass(flow: Autoregressive, x: Tensor, log_prob: Tensor, score: Tensor) -> ScoredPass:
    """The pass of a flow from ``x`` of shape ``(K, D)``."""
    network, weights = flow.network, flow.network.weights[0]
    threads = num_threads_for(x, weights.numel())
    numbers = MAPS[type(flow.univariate)], _bias_of(flow), threads
    given = x, log_prob, score, weights, network.mask, network.order, network.starts
    return ScoredPass(*_Flow.apply(*given, *numbers, *network.hidden_dims))


def _bias_of(flow: Autoregressive) -> int:
    """The bits of the bias of a flow's map, as operations take it."""
    found: int = struct.unpack("q", struct.pack("d", getattr(flow.univariate, "bias", 0.0)))[0]
    return found


def flow_inverse(flow: Autoregressive, y: Tensor) -> Tensor:
    """The noise of ``y`` of shape ``(K, D)``, without a graph, in the arithmetic of a pass."""
    network = flow.network
    given = y, network.weights[0], network.mask, network.order, network.starts
    run = _operation("inverse", len(network.hidden_dims))
    x: Tensor = run(*given, MAPS[type(flow.univariate)], _bias_of(flow), *network.hidden_dims)
    return x


def last_step_pass(
    x: Tensor, log_prob: Tensor, score: Tensor, coefficients: Tensor, frame: Tensor
) -> ScoredPass:
    """The pass of a :class:`~pyro_iaf.flows.sinh_arcsinh.LocScale` from ``x``, likewise."""
    return ScoredPass(*_LastStep.apply(x, log_prob, score, coefficients, frame))


def _check_once() -> None:
    """Raises an error within a backward pass that is to be differentiated again.

    PyTorch's ``once_differentiable`` raises none where the second gradient is taken by
    ``torch.autograd.grad``, whose result lacks what went through the operation.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Draws of flows with their score are differentiable once: take their gradient without "
            "create_graph=True. The draws of the flow itself, flow(x), are differentiable twice."
        )


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, mask: Tensor, *sizes: int) -> Any:
        outputs, masked, *layers = _operation("network", len(sizes) - 1)(x, weights, mask, *sizes)
        ctx.save_for_backward(x, masked, mask, *layers)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(masked, *layers)
        ctx.set_materialize_grads(False)
        return outputs, masked, *layers

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> Any:
        _check_once()
        num_params, *widths = ctx.sizes
        run, is_wanted = _operation("network_backward", len(widths)), ctx.needs_input_grad[0]
        of_x, of_weights = run(slope, *ctx.saved_tensors, num_params, int(is_wanted))
        return of_x if is_wanted else None, of_weights, None, *[None] * len(ctx.sizes)


class _Flow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_prob: Tensor, score: Tensor, *others: Any) -> Any:
        num_layers = len(others) - 7
        y, log_prob, score, *rest = _operation("flow", num_layers)(x, log_prob, score, *others)
        ctx.save_for_backward(x, others[1], *rest)
        ctx.num_layers = num_layers
        ctx.mark_non_differentiable(log_prob, score)
        ctx.set_materialize_grads(False)
        return y, log_prob, score

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> Any:
        _check_once()
        of_x, of_weights = _operation("flow_backward", ctx.num_layers)(slope, *ctx.saved_tensors)
        return of_x, None, None, of_weights, *[None] * (6 + ctx.num_layers)


class _LastStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Any:
        y, log_prob, score, bent = _operation("last_step")(*given)
        x, _, _, coefficients, frame = given
        ctx.save_for_backward(x, bent, coefficients, frame)
        ctx.mark_non_differentiable(log_prob, score)
        ctx.set_materialize_grads(False)
        return y, log_prob, score

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> Any:
        _check_once()
        of_x, of_coefficients = _operation("last_step_backward")(slope, *ctx.saved_tensors)
        return of_x, None, None, of_coefficients, None


# The operations: their arguments, see cpp/operations.cpp, and empty tensors like their results.


@functools.cache
def _operation(kind: str, num_layers: int = 0) -> Any:
    tensors, numbers, num_results, empty = OPERATIONS[kind]
    names = [f"Tensor {name}" for name in tensors.split()]
    if kind.endswith("_backward"):
        names += [f"Tensor layer{k}" for k in range(2 * num_layers)]
    names += [f"int {name}" for name in numbers.split()]
    if not kind.endswith("_backward"):
        names += [f"int width{k}" for k in range(num_layers)]
    has_layers = kind in ("network", "flow")
    num_results += 2 * num_layers if has_layers else 0
    return define(kind, f"{kind}_{num_layers}", names, num_results, empty)


def _layers(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    return [x.new_empty(len(x), width) for width in widths for _ in range(2)]


def _empty_network(x: Tensor, weights: Tensor, mask: Tensor, P: int, *widths: int) -> Any:
    outputs = x.new_empty(len(x), P * x.shape[1])
    return outputs, torch.empty_like(mask), *_layers(x, widths)


def _empty_network_backward(slope: Tensor, x: Tensor, masked: Tensor, *others: Any) -> Any:
    of_x = x.new_empty(len(x) if others[-1] else 0, x.shape[1])
    return of_x, torch.empty_like(masked)


def _empty_flow(x: Tensor, log_prob: Tensor, score: Tensor, weights: Tensor, *others: Any) -> Any:
    by = x.new_empty(3 * len(x), x.shape[1])
    alike = [x.new_empty(x.shape), log_prob.new_empty(len(x)), x.new_empty(x.shape)]
    return *alike, weights.new_empty(weights.shape), by, *_layers(x, others[6:])


def _empty_inverse(y: Tensor, *_: Any) -> Any:
    return y.new_empty(y.shape)


def _empty_flow_backward(slope: Tensor, x: Tensor, mask: Tensor, *_: Tensor) -> Any:
    return x.new_empty(x.shape), torch.empty_like(mask)


def _empty_last_step(x: Tensor, log_prob: Tensor, *_: Tensor) -> Any:
    empty = [x.new_empty(x.shape) for _ in range(3)]
    return empty[0], log_prob.new_empty(len(x)), *empty[1:]


def _empty_last_step_backward(
    slope: Tensor, x: Tensor, bent: Tensor, coefficients: Tensor, frame: Tensor
) -> Any:
    return x.new_empty(x.shape), coefficients.new_empty(coefficients.shape)


# Tensors and numbers among the arguments, the number of results, and empty results; without those
# of each layer.
OPERATIONS: dict[str, tuple[str, str, int, Any]] = {
    "network": ("x weights mask", "num_params", 2, _empty_network),
    "network_backward": (
        "slope x masked mask",
        "num_params is_wanted",
        2,
        _empty_network_backward,
    ),
    "flow": (
        "x log_prob score weights mask order starts",
        "map bias num_threads",
        5,
        _empty_flow,
    ),
    "flow_backward": ("slope x mask masked by", "", 2, _empty_flow_backward),
    "inverse": ("y weights mask order starts", "map bias", 1, _empty_inverse),
    "last_step": ("x log_prob score coefficients frame", "", 4, _empty_last_step),
    "last_step_backward": ("slope x bent coefficients frame", "", 2, _empty_last_step_backward),
}
