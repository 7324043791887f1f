r"""Pyro code run once, and then again without Python: the tensor operations of a run as a graph.

Handlers, distributions and autograd work while the graph is recorded and never after. What a run
draws from PyTorch's generator is drawn anew each time, ahead of the rest and in the same order, so
under one seed a graph makes the numbers that the code itself makes. Tensors that the code reads
from elsewhere, parameters above all, are held as they are and read at each run.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
)
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import graph_passes
from .graph_passes import Refused

__all__ = ["Graph", "Refused", "kind_of_tensor", "record"]

# Code of these is not where a user's mistake is.
LIBRARIES = [Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1]]

# Where distributions check what they are given, and where a loop goes over the rows of a plate.
CHECKS = (Distribution.__init__.__code__, Distribution._validate_sample.__code__)
LOOP = IndepMessenger.__iter__.__code__


class Graph(NamedTuple):
    """A recorded run.

    Attributes:
        module: The operations, of inputs, ``tensors`` and what ``draw`` returns, in that order.
        tensors: What the code read from elsewhere.
        draw: The random numbers, of inputs and ``tensors``.
        kinds: What is known of these besides their numbers.
        readings: Tensors whose numbers became constants of the graph, and their versions.
        modules: The modules that ran, and what else of them counts.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    draw: fx.GraphModule
    kinds: list[Any]
    readings: list[tuple[Tensor, int]]
    modules: list[tuple[weakref.ref[nn.Module], Any]]

    @property
    def is_current(self) -> bool:
        """Whether all that can be seen to change is as it was, but for the numbers in tensors."""
        return (
            all(tensor._version == version for tensor, version in self.readings)
            and self.kinds == [kind_of_tensor(tensor) for tensor in self.tensors]
            and all((m := ref()) and _state_of(m) == state for ref, state in self.modules)
        )


def kind_of_tensor(tensor: Tensor) -> Any:
    """What a graph takes for granted of a tensor."""
    shape = tensor.shape, tensor.stride() if tensor.layout == torch.strided else None
    return *shape, tensor.dtype, tensor.device, tensor.requires_grad


def _state_of(module: nn.Module) -> Any:
    """What a graph takes for granted of a module: its mode, and whose numbers it reads."""
    return module.training, [
        id(t) for t in (*module._parameters.values(), *module._buffers.values())
    ]


def record(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Runs a function once and writes down what it does.

    Args:
        fn: A function of tensors that returns a list of tensors. It has run before, so that checks
            by distributions, which would ask for numbers, are taken to pass.
        inputs: What to run it with; their numbers don't matter, their shapes and dtypes do.

    Raises:
        Refused: If what it does hangs on the numbers themselves.
    """
    modules: dict[int, nn.Module] = {}

    def note(module: nn.Module, _: Any) -> None:
        modules[id(module)] = module

    hook = register_module_forward_pre_hook(note)
    try:
        with _Readings() as seen, _NumbersInPython(seen.readings), _WholePlates():
            module = make_fx(fn)(*inputs)
    except Refused:
        raise
    except Exception as error:  # the code itself runs, so it is the recording that it can't bear
        if not any(sign in str(error) for sign in ("tracing tensor", "data-dependent")):
            raise Refused(
                f"{_where(error.__traceback__)} can't be recorded as a graph: "
                f"{type(error).__name__}: {str(error)[:300]}. Train by Trace_ELBO, or "
                "fit(..., compile=False)."
            ) from error
        raise _escape(_where(error.__traceback__)) from error
    finally:
        hook.remove()
    tensors = graph_passes.lift_tensors(module)
    masks = graph_passes.settle_shapes(module, tensors, len(inputs))
    graph_passes.let_failures_be_nan(module)
    graph_passes.refuse_writes(module)
    draw = graph_passes.draw_ahead(module)
    return Graph(
        module,
        tensors,
        draw,
        list(map(kind_of_tensor, tensors)),
        seen.readings + masks,
        [(weakref.ref(m), _state_of(m)) for m in modules.values()],
    )


def _escape(where: str) -> Refused:
    return Refused(
        f"{where} takes a number out of a tensor, by a branch, int(), item() or the like, and a "
        "graph can't follow what becomes of it. Say it with torch.where, poutine.mask or shapes; "
        "or train by Trace_ELBO, or fit(..., compile=False)."
    )


class _Readings(TorchDispatchMode):
    """Notes which tensors gave Python a number."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.readings.append((args[0], args[0]._version))
        return found


class _NumbersInPython(TorchFunctionMode):
    """Sees to numbers that leave tensors.

    It refuses to hand those that may change to Python as lists or arrays, which is no operation, so
    that recording alone would not see it; and notes the others. What libraries ask of numbers that
    are settled is left out of the graph: distributions find that all they were given is allowed,
    and a loop over a plate that takes all its rows gets their numbers.
    """

    def __init__(self, readings: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.readings = readings

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            if _is_traced(args[0]):
                raise _escape(_named(traceback.extract_stack()))
            self.readings.append((args[0], args[0]._version))
        if func is Tensor.__bool__ and _is_within(CHECKS):
            return True
        if _is_within((LOOP,)) and not _is_traced(args[0]):
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _WholePlates(Messenger):
    """Makes the rows of plates that take all of them outside of the graph."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None and fn.subsample_size in (None, fn.size):
            with disable_proxy_modes_tracing():
                msg["value"] = fn()


def _is_within(codes: Sequence[CodeType]) -> bool:
    """Whether one of these functions is being called."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def _is_traced(thing: Any) -> bool:
    mode = get_proxy_mode()
    return isinstance(thing, Tensor) and mode is not None and thing in mode.tracer.tensor_tracker


def _where(trace: TracebackType | None) -> str:
    """The user's line that an error comes from."""
    return _named(traceback.extract_tb(trace))


def _named(frames: traceback.StackSummary) -> str:
    files = [(frame, Path(frame.filename)) for frame in frames if Path(frame.filename).exists()]
    own = [f for f, path in files if not any(path.is_relative_to(p) for p in LIBRARIES)]
    if not own:
        return "The model or the guide"
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}: `{own[-1].line}`"
