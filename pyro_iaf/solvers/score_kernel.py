r"""The score of a density, carried through flows by one operation.

.. math::
    J^{\mathsf T} u = v, \qquad v = \nabla_x \log q(x) - \nabla_x \log |\det J|

The Jacobian of an autoregressive map is triangular, so the coordinates of :math:`u` are solved one
after the other, each with the network's units that no earlier coordinate needs. This is the work of
one backward pass, cut into D small parts, which are slow as operations of PyTorch. So there is a
kernel in C++, and the same in PyTorch for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..nn.made import MaskedAutoregressiveNetwork
from ..nn.univariate import Derivatives

__all__ = ["MAX_JACOBIAN_DIM", "Carrier", "carry", "carry_by_jacobian", "has_kernel", "load_kernel"]

# Without the kernel, the Jacobian is computed as a matrix for at most this many coordinates.
MAX_JACOBIAN_DIM = 64

# PyTorch's operations take 64 arguments: the score, these tensors and four numbers.
MAX_TENSORS = 59

# The least number of multiplications for each thread.
WORK_PER_THREAD = 2_000_000

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread"]

_kernel: list[ctypes.CDLL] = []
_libraries: dict[str, torch.library.Library] = {}  # an operation exists as long as its library
_loading = threading.Lock()


def load_kernel() -> None:
    """Loads the kernel, compiled if need be; logs a warning if that fails."""
    with _loading:
        try:
            if not _kernel and shutil.which(os.environ.get("CXX", "g++")):
                _kernel.append(ctypes.CDLL(str(_compiled_kernel())))
                for name in list(_libraries):
                    _register(name)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            logging.getLogger(__name__).warning("no kernel for scores: %s", why)


@functools.cache
def has_kernel() -> bool:
    """Loads the kernel; returns whether that worked."""
    load_kernel()
    return bool(_kernel)


def _compiled_kernel() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # changes the warning filters

    source = Path(__file__).with_suffix(".cpp")
    libraries = Path(torch.__file__).parent / "lib"
    command = [os.environ.get("CXX", "g++"), *FLAGS, str(source)]
    command += [f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    key = [source.read_text(), *command, torch.__version__, platform.platform(), _processor()]
    name = f"pyro_iaf_carry_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    library = Path(cache_dir()) / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / name
            command += ["-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(library)  # atomic, so that no other process sees half a file
    return library


def _register(name: str) -> None:
    if _kernel[0].register_carry(name.encode()):
        raise OSError(f"PyTorch refused to register the kernel of {name}")


def _processor() -> str:
    """The processor's features, since several machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


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
        flows: The flows, all of one layout; the first acts on the noise.
    """
    most = MAX_TENSORS // flows[0].num_tensors
    if 0 < most < len(flows):
        return carry(carry(score, flows[:most]), flows[most:])
    K, D = score.shape[:-1].numel(), score.shape[-1]
    tensors: list[Tensor] = []
    _, P, given = flows[0].layout
    for (by_x, by_params, log_by_x, log_by_params), activation_slopes, weights, network in flows:
        own = [by_x, *by_params, log_by_x, *log_by_params, *activation_slopes]
        expanded = [part.expand(*score.shape[:-1], -1) for part in own if part is not None]
        tensors += [part.reshape(K, -1) for part in expanded]
        with _disable_current_modes():  # a constant, so no part of a graph
            bounds = torch.arange(D + 1, device=score.device)
            starts = torch.stack([torch.searchsorted(d, bounds) for d in network.hidden_degrees()])
        tensors += [*weights, network.order.contiguous(), starts]
    numbers = K * sum(weight.numel() for _, _, weights, _ in flows for weight in weights)
    num_threads = max(1, min(torch.get_num_threads(), K, numbers // WORK_PER_THREAD))
    is_taken = most and score.dtype in (torch.float32, torch.float64)
    run = _operation(len(tensors)) if is_taken else _without_kernel
    found: Tensor = run(score.reshape(K, D), *tensors, len(flows), num_threads, P, given)
    return found.reshape(score.shape)


@functools.cache
def _operation(count: int) -> Any:
    # An argument for each tensor, since for a list compiled code includes headers that take the
    # compiler six seconds to read.
    name = f"carry_{count}"
    arguments = ", ".join(["Tensor score", *(f"Tensor t{k}" for k in range(count))])
    library = torch.library.Library("pyro_iaf", "FRAGMENT")
    numbers = "int num_flows, int num_threads, int num_params, int given"
    library.define(f"{name}({arguments}, {numbers}) -> Tensor")
    library.impl(name, _without_kernel, "CompositeExplicitAutograd")  # if no kernel is registered
    library.impl(name, lambda score, *_: score.new_empty(score.shape), "Meta")
    _libraries[name] = library
    if _kernel:
        _register(name)
    return getattr(torch.ops.pyro_iaf, name).default


def _without_kernel(score: Tensor, *arguments: Any) -> Tensor:
    """The operation in PyTorch code."""
    *tensors, num_flows, _, P, given = arguments
    L = (len(tensors) // num_flows - P - given.bit_count() - 4) // 2
    rest = iter(tensors)
    for _ in range(num_flows):
        by_x, *by_params = itertools.islice(rest, 1 + P)
        log_by_x, *log_by_params = [next(rest) if given >> k & 1 else None for k in range(1 + P)]
        slopes = Derivatives(by_x, by_params, log_by_x, log_by_params)
        activation_slopes = list(itertools.islice(rest, L))
        flow = slopes, activation_slopes, list(itertools.islice(rest, L + 1)), next(rest)
        starts = next(rest)
        if score.shape[1] <= MAX_JACOBIAN_DIM:
            score = carry_by_jacobian(score, *flow)
        else:
            score = _coordinate_by_coordinate(score, *flow, starts)
    return score.contiguous()


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


def _coordinate_by_coordinate(
    score: Tensor,
    slopes: Derivatives,
    activation_slopes: Sequence[Tensor],
    weights: Sequence[Tensor],
    order: Tensor,
    starts: Tensor,
) -> Tensor:
    """The kernel's algorithm, for all particles at once."""
    by_x, by_params, log_by_x, log_by_params = slopes
    score = score if log_by_x is None else score - log_by_x
    *hidden, output = weights
    D, H = score.shape[1], activation_slopes[-1].shape[1]
    in_x = torch.zeros_like(score)
    in_units = [torch.zeros_like(slope) for slope in activation_slopes]
    solved = torch.empty_like(score)
    coordinates, first_units = order.tolist(), starts.tolist()
    for p in range(D - 1, -1, -1):
        for k in range(len(hidden) - 1, -1, -1):
            if p + 1 < D:
                units = slice(*first_units[k][p + 1 : p + 3])
                below = in_units[k - 1] if k else in_x
                below += (in_units[k][:, units] * activation_slopes[k][:, units]) @ hidden[k][units]
        i = coordinates[p]
        solved[:, i] = u = (score[:, i] - in_x[:, i]) / by_x[:, i]
        of_params = [
            by[:, i] * u if log_by is None else by[:, i] * u + log_by[:, i]
            for by, log_by in zip(by_params, log_by_params, strict=True)
        ]
        pushed = torch.stack(of_params, 1) @ output[i::D]
        in_units[-1] += pushed[:, :H]
        in_x += pushed[:, H:]
    return solved
