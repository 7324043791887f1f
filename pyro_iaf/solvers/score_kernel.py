r"""The score of a density, carried through flows by one operation.

.. math::
    J^{\mathsf T} u = v, \qquad v = \nabla_x \log q(x) - \nabla_x \log |\det J|

The Jacobian of an autoregressive map is triangular, so the coordinates of :math:`u` are solved one
after the other, each with the network's units that no earlier coordinate needs. This is the work of
one backward pass, cut into D small parts, which are slow as operations of PyTorch. So there is a
kernel in C++ (``cpp/score.h``). Where it can't run, the Jacobian is solved as a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Derivatives
from .kernels import define

__all__ = ["MAX_JACOBIAN_DIM", "MAX_TENSORS", "Carrier", "carry", "carry_by_jacobian"]
__all__ += ["num_threads_for"]

# Without the kernel, the Jacobian is computed as a matrix for at most this many coordinates.
MAX_JACOBIAN_DIM = 64

# PyTorch's operations take 64 arguments: the score, these tensors and four numbers.
MAX_TENSORS = 59

# The least number of multiplications for each thread.
WORK_PER_THREAD = 2_000_000


class Carrier(NamedTuple):
    """The derivatives of one pass through a flow, which carry a score.

    Attributes:
        slopes: The derivatives of the univariate map, of the noise's shape.
        activation_slopes: The derivatives of the activations, a tensor for each hidden layer.
        weights: The masked weights of the hidden layers and of the outputs.
        network: The network, for its sizes and its order.
    """

    slopes: Derivatives
    activation_slopes: Sequence[Tensor]
    weights: Sequence[Tensor]
    network: MaskedAutoregressiveNetwork

    @property
    def layout(self) -> tuple[int, int, int]:
        """The numbers of hidden layers and parameters, and bits for the log slope's derivatives."""
        _, by_params, log_by_x, log_by_params = self.slopes
        given = sum(2**k for k, by in enumerate([log_by_x, *log_by_params]) if by is not None)
        return len(self.activation_slopes), len(by_params), given

    @property
    def num_tensors(self) -> int:
        """How many tensors :func:`carry` hands to its operation."""
        L, P, given = self.layout
        return 2 * L + P + given.bit_count() + 4


def carry(score: Tensor, flows: Sequence[Carrier]) -> Tensor:
    """The score at the flows' output, as few operations.

    Args:
        score: The score at the noise, of shape ``batch_shape + (D,)``.
        flows: The flows, all of one layout, of at most ``MAX_TENSORS`` tensors; the first acts on
            the noise.
    """
    most = MAX_TENSORS // flows[0].num_tensors
    if most < len(flows):
        return carry(carry(score, flows[:most]), flows[most:])
    K, D = score.shape[:-1].numel(), score.shape[-1]
    tensors: list[Tensor] = []
    _, P, given = flows[0].layout
    for (by_x, by_params, log_by_x, log_by_params), activation_slopes, weights, network in flows:
        own = [by_x, *by_params, log_by_x, *log_by_params, *activation_slopes]
        for part in own:
            if part is not None and part.shape[:-1] != (K,):
                part = part.expand(*score.shape[:-1], -1).reshape(K, -1)
            tensors += [] if part is None else [part]
        tensors += [*weights, network.order.contiguous(), network.starts]
    num_weights = sum(weight.numel() for _, _, weights, _ in flows for weight in weights)
    flat = score if score.dim() == 2 else score.reshape(K, D)
    numbers = len(flows), num_threads_for(flat, num_weights), P, given
    found: Tensor = _operation(len(tensors))(flat, *tensors, *numbers)
    return found.reshape(score.shape)


def num_threads_for(x: Tensor, num_weights: int) -> int:
    """The number of threads for the rows of ``x``, each of which meets so many weights."""
    return max(1, min(torch.get_num_threads(), len(x), len(x) * num_weights // WORK_PER_THREAD))


@functools.cache
def _operation(count: int) -> Any:
    tensors = ["Tensor score", *(f"Tensor t{k}" for k in range(count))]
    numbers = ["int num_flows", "int num_threads", "int num_params", "int given"]
    return define(
        "carry",
        f"carry_{count}",
        [*tensors, *numbers],
        1,
        lambda score, *_: score.new_empty(score.shape),
    )


def carry_by_jacobian(
    score: Tensor,
    slopes: Derivatives,
    activation_slopes: Sequence[Tensor],
    weights: Sequence[Tensor],
    order: Tensor,
) -> Tensor:
    """The score at one flow's output, by its Jacobian as a matrix."""
    by_x, by_params, log_by_x, log_by_params = slopes
    *hidden, output = weights
    H = output.shape[1] - score.shape[-1]
    rows: Any = None
    for weight, slope in zip(hidden, activation_slopes, strict=True):
        rows = slope.unsqueeze(-1) * (weight if rows is None else weight @ rows)
    of_params = (output[:, :H] @ rows + output[:, H:]).chunk(len(by_params), -2)
    score = score if log_by_x is None else score - log_by_x
    jacobian = by_params[0].unsqueeze(-1) * of_params[0]
    for by, of in zip(by_params[1:], of_params[1:], strict=True):
        jacobian = torch.addcmul(jacobian, by.unsqueeze(-1), of)
    for log_by, of in zip(log_by_params, of_params, strict=True):
        if log_by is not None:
            score = score - (log_by.unsqueeze(-2) @ of).squeeze(-2)
    jacobian.diagonal(dim1=-2, dim2=-1).add_(by_x)
    jacobian, rows = jacobian[..., order, :][..., order], score[..., order].unsqueeze(-2)
    solved: Tensor = torch.linalg.solve_triangular(jacobian, rows, upper=False, left=False)
    return solved.squeeze(-2)[..., torch.argsort(order)]
