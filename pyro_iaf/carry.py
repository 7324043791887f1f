r"""The score of a density, carried through one flow, as one operation of a graph.

.. math::
    J^{\mathsf T} u = v, \qquad v = \nabla_x \log q(x) - \nabla_x \log |\det J|

The Jacobian of an autoregressive map is triangular, so the coordinates of :math:`u` are found one
after the other, and with each the units of the network that hear of no other. That is the work of
one backward pass, in as many small parts as there are coordinates: nothing for PyTorch, so there is
a kernel in C++ for it, and where there is no compiler the same in slow.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .networks import MaskedAutoregressiveNetwork

__all__ = ["carried", "load_kernel"]

# A thread should have so many multiplications to do.
WORK_PER_THREAD = 400_000

_kernel: list[ctypes.CDLL] = []


def load_kernel() -> None:
    """Compiles the kernel, or loads it where that was done; raises what the compiler raises."""
    if not _kernel:
        from torch._inductor.codecache import CppCodeCache

        source = Path(__file__).with_suffix(".cpp").read_text()
        _kernel.append(CppCodeCache.load(source))


def carried(
    network: MaskedAutoregressiveNetwork,
    score: Tensor,
    slopes: Sequence[Tensor],
    bends: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Tensor:
    """The score of the value that a flow on this network made, as one operation.

    Args:
        network: The network; its sizes and its order are used.
        score: Of the noise, of shape ``batch_shape + (D,)``.
        slopes: The scale, the value's slopes in the shift and in the log-scale that the network
            returned, and the slope of the log-determinant in the latter; each like ``score``.
        bends: The slopes of the activations, one tensor for each hidden layer.
        weights: Masked, of the hidden layers and of the outputs.

    Example:
        >>> flow = inverse_autoregressive_flow(3, hidden_dims=[4])
        >>> ones, hidden = torch.ones(5, 3), torch.ones(5, 4)
        >>> weight, output, _ = (factor[0].detach() for factor in flow.network.factors())
        >>> u = carried(flow.network, ones, [ones, ones, ones, 0 * ones], [hidden], [weight, output])
        >>> u.shape
        torch.Size([5, 3])
    """
    with _disable_current_modes():  # it follows from the sizes, so it is not part of a graph
        bounds = torch.arange(network.input_dim + 1, device=score.device)
        starts = torch.stack([torch.searchsorted(d, bounds) for d in network.hidden_degrees()])
    flat = [part.reshape(-1, part.shape[-1]) for part in (score, *slopes, *bends)]
    flat = [part.expand(len(flat[0]), -1) for part in flat]
    solved = _operation()(flat[0], flat[1:5], flat[5:], list(weights), network.order, starts)
    return solved.reshape(score.shape)  # type: ignore[no-any-return]


@functools.cache
def _operation() -> Any:
    library = torch.library.Library("pyro_iaf", "DEF")
    library.define(
        "carry(Tensor score, Tensor[] slopes, Tensor[] bends, Tensor[] weights, Tensor order, "
        "Tensor starts) -> Tensor"
    )
    library.impl("carry", _on_cpu, "CPU")
    library.impl("carry", lambda score, *_: torch.empty_like(score), "Meta")
    globals()["_library"] = library  # an operation lasts as long as its library
    return torch.ops.pyro_iaf.carry.default


def _on_cpu(
    score: Tensor,
    slopes: list[Tensor],
    bends: list[Tensor],
    weights: list[Tensor],
    order: Tensor,
    starts: Tensor,
) -> Tensor:
    if not _kernel or score.dtype not in (torch.float32, torch.float64):
        return _in_slow(score, slopes, bends, weights, order, starts)
    (K, D), L = score.shape, len(bends)
    tensors = [part.contiguous() for part in (score, *slopes, *bends, *weights)]
    pointers = (ctypes.c_void_p * len(tensors))(*[part.data_ptr() for part in tensors])
    widths = (ctypes.c_int64 * L)(*[bend.shape[1] for bend in bends])
    solved = torch.empty_like(tensors[0])
    work = K * sum(weight.numel() for weight in weights)
    threads = max(1, min(torch.get_num_threads(), K, work // WORK_PER_THREAD))
    (kernel,) = _kernel
    run = kernel.carry_float if score.dtype == torch.float32 else kernel.carry_double
    indices = [ctypes.c_void_p(part.data_ptr()) for part in (order, starts)]
    out = ctypes.c_void_p(solved.data_ptr())
    run(*map(ctypes.c_int64, (K, threads, D, L)), widths, pointers, *indices, out)
    return solved


def _in_slow(
    score: Tensor,
    slopes: list[Tensor],
    bends: list[Tensor],
    weights: list[Tensor],
    order: Tensor,
    starts: Tensor,
) -> Tensor:
    """The same without the kernel, for all particles at once."""
    scale, by_m, by_s, slope = slopes
    *hidden, output = weights
    D, H = score.shape[1], bends[-1].shape[1]
    in_x = torch.zeros_like(score)
    in_units = [torch.zeros_like(bend) for bend in bends]
    solved = torch.empty_like(score)
    for p in range(D - 1, -1, -1):
        for k in range(len(hidden) - 1, -1, -1):
            if p + 1 < D:
                units = slice(*starts[k, p + 1 : p + 3].tolist())
                below = in_units[k - 1] if k else in_x
                below += (in_units[k][:, units] * bends[k][:, units]) @ hidden[k][units]
        i = int(order[p])
        solved[:, i] = u = (score[:, i] - in_x[:, i]) / scale[:, i]
        pair = torch.stack([by_m[:, i] * u, by_s[:, i] * u + slope[:, i]], 1)
        pushed = pair @ output[[i, D + i]]
        in_units[-1] += pushed[:, :H]
        in_x += pushed[:, H:]
    return solved
