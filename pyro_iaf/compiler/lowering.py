"""Backends that run a graph of operations: replayed one by one, or compiled.

``"graph"`` calls the operations from C++, without handlers, distributions, autograd or Python.
``"inductor"`` compiles them to one C++ program, or on a GPU to a CUDA graph.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._validation import warn
from . import inductor

__all__ = ["BACKENDS", "Backend", "CudaGraphs", "Inductor", "Lowered", "Replay"]
__all__ += ["available_backends", "choose_backend", "has_compiler", "lower", "worthwhile_backend"]

#: A function of a list of tensors. It may empty the list.
Lowered = Callable[[list[Tensor]], Sequence[Tensor]]


class Backend:
    """A way to make a function of tensors fast.

    A subclass defines ``name``, :meth:`is_available` and :meth:`lower`, and its costs where they
    differ from those of a replay. An instance in :data:`BACKENDS` is used. Backends for different
    devices may share a name.

    Attributes:
        name: Its name in ``backend=`` and ``FitResult.backend``.
        seconds_to_build: What building costs, in all and for each operation of the graph.
        seconds_saved: What each step saves for each operation of the graph, and for each number
            that they return.
        fewest_steps: Shorter runs are not worth a recording.
    """

    name: str
    seconds_to_build = (0.0, 0.0)
    seconds_saved = (7e-6, 0.0)
    fewest_steps = 500

    def is_available(self, device: torch.device) -> bool:
        """Whether it runs on this machine, for tensors on this device."""
        raise NotImplementedError

    def can_take(self, example: Sequence[Tensor]) -> bool:
        """Whether it runs functions of such tensors."""
        return True

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        """The function, made fast; see :func:`lower`. May raise any exception."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Starts in the background what building needs first."""

    def gain(self, num_steps: int, num_operations: int, num_numbers: int = 0) -> float:
        """The seconds that this backend saves over a run, after the cost of building.

        They depend on counts alone and not on a clock, so that a run is the same each time.

        Example:
            >>> Replay().gain(1000, 400), Inductor().gain(1000, 400)
            (2.8, -2.2)
        """
        start, each = self.seconds_to_build
        by_operation, by_number = self.seconds_saved
        saved = by_operation * num_operations + by_number * num_numbers
        return saved * num_steps - each * num_operations - start


class Replay(Backend):
    """Calls the operations one after the other, by PyTorch's interpreter of traced functions."""

    name = "graph"

    def is_available(self, device: torch.device) -> bool:
        return True

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        replayed = _replayed(fn, example)

        def run(tensors: list[Tensor]) -> Sequence[Tensor]:
            # Unless it is told not to optimise, the first runs are slow.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found: Sequence[Tensor] = replayed(*tensors)
            return found

        return run


@torch.no_grad()
def _replayed(fn: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    """The operations of a function, called from C++ where PyTorch's tracer knows all of them."""
    copies = tuple(tensor.clone() for tensor in example)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            traced: Callable[..., Any] = torch.jit.trace(fn, copies, check_trace=False)
    except Exception:  # the function itself has run before
        return fn
    return traced


class Inductor(Backend):
    """Compiles to one C++ program for the CPU."""

    name = "inductor"
    seconds_to_build = (3.0, 0.008)
    seconds_saved = (10e-6, 0.4e-9)

    def is_available(self, device: torch.device) -> bool:
        return device.type != "cuda" and bool(shutil.which(os.environ.get("CXX", "g++")))

    def can_take(self, example: Sequence[Tensor]) -> bool:
        return not any(tensor.is_cuda for tensor in example)

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        try:
            return inductor.compile_for_cpu(fn, example)
        except Exception:  # perhaps this PyTorch generates other code than kept_buffers expects
            return inductor.compile_for_cpu(fn, example, keeping=nullcontext)

    def warm_up(self) -> None:
        inductor.warm_up()


class CudaGraphs(Backend):
    """CUDA graphs. Outputs are copied, since the next call overwrites them."""

    name = "inductor"
    seconds_to_build = Inductor.seconds_to_build
    seconds_saved = Inductor.seconds_saved

    def is_available(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def can_take(self, example: Sequence[Tensor]) -> bool:
        return any(tensor.is_cuda for tensor in example)

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        compiled = torch.compile(fn, fullgraph=True, dynamic=False, mode="reduce-overhead")

        def run(tensors: list[Tensor]) -> list[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            return [out.clone() for out in compiled(*tensors)]

        return run


#: All backends, the fastest first.
BACKENDS: list[Backend] = [CudaGraphs(), Inductor(), Replay()]


def available_backends(device: torch.device) -> list[Backend]:
    """The backends that run on this machine, for tensors on this device."""
    return [backend for backend in BACKENDS if backend.is_available(device)]


def has_compiler(device: torch.device) -> bool:
    """Whether steps on this device can be compiled."""
    return available_backends(device)[0].name != Replay.name


def worthwhile_backend(
    device: torch.device, num_steps: int, num_operations: int, num_numbers: int = 0
) -> Backend:
    """The backend with the largest :meth:`Backend.gain`."""
    size = num_steps, num_operations, num_numbers
    return max(available_backends(device), key=lambda backend: backend.gain(*size))


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend of this name; ``"auto"`` gives the fastest.

    Warns:
        UserWarning: If ``"auto"`` gives a replay, since there is no compiler.
    """
    if name != "auto":
        return max((b for b in BACKENDS if b.name == name), key=lambda b: b.is_available(device))
    if not has_compiler(device):
        warn(
            "There is no C++ compiler here, so steps are replayed operation by operation, "
            'backend="graph": up to eight times as fast as Pyro, where compiled ones are up to '
            "fifty times as fast. Install g++, or name a compiler in CXX."
        )
    return available_backends(device)[0]


def lower(fn: Callable[..., Any], example: Sequence[Tensor], backend: str) -> tuple[Lowered, str]:
    """Makes a function of tensors fast.

    Args:
        fn: A function of tensors that ``make_fx`` can trace. It returns a tuple of tensors, and may
            write into its arguments.
        example: Tensors to trace it with. They are not written to.
        backend: The name of a backend.

    Returns:
        The function, of a list of tensors, and the name of the backend that runs it.

    Warns:
        UserWarning: If the compiler fails; then the backend is ``"graph"``.
    """
    example = [tensor.detach() for tensor in example]
    chosen = next(b for b in BACKENDS if b.name == backend and b.can_take(example))
    try:
        return chosen.lower(fn, example), chosen.name
    except Exception as error:  # anything can fail in a compiler, or headers are missing
        if isinstance(chosen, Replay):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(f"The compiler failed, so steps are replayed operation by operation: {first_line}")
        return lower(fn, example, Replay.name)
