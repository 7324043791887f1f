r"""From a graph of operations to something that runs: replayed one by one, or compiled.

A :class:`Backend` makes a function of tensors fast, and says where it can and what it costs.
``"graph"`` calls the operations from generated Python, without handlers, distributions or autograd
around them. ``"inductor"`` hands them to PyTorch's compiler, as one C++ program, or CUDA graph.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from . import inductor
from .graph_passes import tidy

__all__ = ["BACKENDS", "Backend", "CudaGraphs", "Inductor", "Lowered", "Replay", "able_backends"]
__all__ += ["choose_backend", "has_compiler", "lower", "worthwhile_backend"]

#: A function of a list of tensors that may be emptied.
Lowered = Callable[[list[Tensor]], Sequence[Tensor]]


class Backend:
    """A way to make a function of tensors fast.

    A subclass says its ``name``, where it :meth:`is_available`, and how to :meth:`lower` a
    function; and what it costs and saves, if that differs from a replay. It is used once it stands
    in :data:`BACKENDS`. Several may share a name, each for devices of its own.

    Attributes:
        name: What ``backend=`` and ``FitResult.backend`` call it.
        seconds_to_build: What building costs: in any case, and for each operation of the graph.
        seconds_saved: What each step saves, for each operation of the graph.
        fewest_steps: Runs of fewer steps are not worth a recording.
    """

    name: str
    seconds_to_build = (0.0, 0.0)
    seconds_saved = 2.5e-6
    fewest_steps = 500

    def is_available(self, device: torch.device) -> bool:
        """Whether it runs on this machine, for tensors on this device."""
        raise NotImplementedError

    def can_take(self, example: Sequence[Tensor]) -> bool:
        """Whether it is meant for functions of such tensors."""
        return True

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        """The function, made fast; see :func:`lower`. May fail by any exception."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Begins what building needs first, in the background."""

    def gain(self, num_steps: int, num_operations: int) -> float:
        """How many seconds so many steps save by a graph of so many operations.

        Example:
            >>> Replay().gain(1000, 400), Inductor().gain(1000, 400)
            (1.0, -4.2)
        """
        start, each = self.seconds_to_build
        return (self.seconds_saved * num_steps - each) * num_operations - start


class Replay(Backend):
    """The operations one after the other, called without the Python that torch.ops puts around."""

    name = "graph"

    def is_available(self, device: torch.device) -> bool:
        return True

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        if not isinstance(fn, fx.GraphModule):
            fn = make_fx(fn, tracing_mode="fake")(*example)
        return _replayed(fn)


class Inductor(Backend):
    """One C++ program for the CPU, by PyTorch's compiler."""

    name = "inductor"
    seconds_to_build = (3.0, 0.008)
    seconds_saved = 5e-6

    def is_available(self, device: torch.device) -> bool:
        has_one = shutil.which(os.environ.get("CXX", "g++")) is not None
        return device.type != "cuda" and has_one

    def can_take(self, example: Sequence[Tensor]) -> bool:
        return not any(tensor.is_cuda for tensor in example)

    def lower(self, fn: Callable[..., Any], example: Sequence[Tensor]) -> Lowered:
        try:
            return inductor.compile_for_cpu(fn, example)
        except Exception:  # of a PyTorch that writes its code in other ways, perhaps
            return inductor.compile_for_cpu(fn, example, keeping=nullcontext)

    def warm_up(self) -> None:
        inductor.warm_up()


class CudaGraphs(Backend):
    """CUDA graphs, whose outputs the next call overwrites, so that they are copied."""

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


#: What there is, the fastest first. One more is one more entry.
BACKENDS: list[Backend] = [CudaGraphs(), Inductor(), Replay()]


def able_backends(device: torch.device) -> list[Backend]:
    """Those that run on this machine, for tensors on this device."""
    return [backend for backend in BACKENDS if backend.is_available(device)]


def has_compiler(device: torch.device) -> bool:
    """Whether steps on this device can be compiled."""
    return able_backends(device)[0].name != Replay.name


def worthwhile_backend(device: torch.device, num_steps: int, num_operations: int) -> Backend:
    """The one that so many steps of a graph of so many operations repay most."""
    return max(able_backends(device), key=lambda b: b.gain(num_steps, num_operations))


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend of this name; ``"auto"`` is the fastest.

    Warns:
        UserWarning: If that is a replay, for want of a compiler.
    """
    if name != "auto":
        return max((b for b in BACKENDS if b.name == name), key=lambda b: b.is_available(device))
    if not has_compiler(device):
        _warn(
            "There is no C++ compiler here, so steps are replayed operation by operation, "
            'backend="graph": up to twice as fast as Pyro, where compiled ones are up to sixty '
            "times as fast. Install g++, or name a compiler in CXX."
        )
    return able_backends(device)[0]


def lower(fn: Callable[..., Any], example: Sequence[Tensor], backend: str) -> tuple[Lowered, str]:
    """Makes a function of tensors fast.

    Args:
        fn: A function that any tracer can follow, of tensors, which returns a tuple of tensors. It
            may write into its arguments.
        example: Tensors to trace it with; they are left alone.
        backend: A name.

    Returns:
        The function on a list of tensors, and the backend that it became.

    Warns:
        UserWarning: If the compiler fails; then the backend is ``"graph"``.
    """
    example = [tensor.detach() for tensor in example]
    chosen = next(b for b in BACKENDS if b.name == backend and b.can_take(example))
    try:
        return chosen.lower(fn, example), chosen.name
    except Exception as error:  # whatever goes wrong in a compiler, or for want of headers
        if isinstance(chosen, Replay):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        _warn(f"The compiler failed, so steps are replayed operation by operation: {first_line}")
        return lower(fn, example, Replay.name)


def _warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=4)


def _replayed(module: fx.GraphModule) -> Lowered:
    """The operations one after the other, called without the Python that torch.ops puts around."""
    _leave_out_views(module)
    code = module.graph.python_code("self")
    names: dict[str, Any] = {}

    def direct(found: re.Match[str]) -> str:
        space, packet, overload = found.groups()
        name = f"{space}_{packet}_{overload}"
        names[name] = getattr(getattr(getattr(torch.ops, space), packet), overload)._op
        return name

    source = re.sub(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)", direct, code.src)
    space: dict[str, Any] = {**code.globals, **names}
    exec(source, space)
    forward = space["forward"]
    return lambda tensors: forward(module, *tensors)


def _leave_out_views(module: fx.GraphModule) -> None:
    """Leaves out what makes a tensor of what it is already, or the same view twice."""
    aten = torch.ops.aten
    same = (aten.detach.default, aten.alias.default)
    shaped = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
    views: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.args:
            continue
        source, value = node.args[0], node.meta.get("val")
        is_same = node.target in same or (
            node.target in shaped and value.shape == source.meta["val"].shape
        )
        key = (node.target, repr(node.args), repr(node.kwargs))
        if not is_same and node.target in (*shaped, aten.t.default, aten.slice.Tensor):
            source = views.setdefault(key, node)
            is_same = source is not node
        if is_same:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    tidy(module)
