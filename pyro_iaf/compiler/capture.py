"""The tensor operations of one run of Pyro code, as a graph that runs again without the code.

Handlers, distributions and autograd run only while the graph is recorded. Random numbers are drawn
anew at each run, before the other operations and in the same order, so under one seed a graph and
the code give the same numbers. A graph refers to the parameters and other outside tensors that the
code reads, and so uses their current values.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
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

# Error messages name a line of the user's code, so none of these.
LIBRARIES = [Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1]]

# The code of distributions' argument checks, and of a loop over the rows of a plate.
CHECKS = (Distribution.__init__.__code__, Distribution._validate_sample.__code__)
LOOP = IndepMessenger.__iter__.__code__


class Graph(NamedTuple):
    """A recorded run.

    Attributes:
        module: The operations. It takes the inputs, ``tensors`` and what ``draw`` returns.
        tensors: The outside tensors that the code reads.
        draw: Draws the random numbers. It takes the inputs and ``tensors``.
        kinds: The :func:`kind_of_tensor` of each of ``tensors``.
        readings: Tensors whose values became constants of the graph, and their versions.
        modules: The modules that ran, and their state.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    draw: fx.GraphModule
    kinds: list[Any]
    readings: list[tuple[Tensor, int]]
    modules: list[tuple[weakref.ref[nn.Module], Any]]

    @property
    def is_current(self) -> bool:
        """Whether everything visible is as it was when recorded, except values of ``tensors``."""
        return (
            all(tensor._version == version for tensor, version in self.readings)
            and self.kinds == [kind_of_tensor(tensor) for tensor in self.tensors]
            and all((m := ref()) and _state_of(m) == state for ref, state in self.modules)
        )


def kind_of_tensor(tensor: Tensor) -> Any:
    """The properties of a tensor that a graph assumes: all but its values."""
    shape = tensor.shape, tensor.stride() if tensor.layout == torch.strided else None
    return *shape, tensor.dtype, tensor.device, tensor.requires_grad


def _state_of(module: nn.Module) -> Any:
    """The properties of a module that a graph assumes: its mode and which tensors it has."""
    return module.training, [*map(id, (*module._parameters.values(), *module._buffers.values()))]


def record(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Runs a function once and records its tensor operations.

    Args:
        fn: A function of tensors that returns a list of tensors. It has run before with success,
            so the argument checks of distributions, which read values, are taken to pass.
        inputs: Example inputs. Their shapes and dtypes matter, their values don't.

    Raises:
        Refused: If the operations depend on values of tensors.
    """
    modules: dict[int, nn.Module] = {}
    hook = register_module_forward_pre_hook(lambda m, _: modules.update({id(m): m}))
    try:
        with _ScalarReadings() as seen, _ValuesInPython(seen.readings), _WholePlates():
            module = make_fx(fn)(*inputs)
    except Refused:
        raise
    except Exception as error:  # the code itself has run, so recording is what fails
        line = _user_line(traceback.extract_tb(error.__traceback__))
        if any(sign in str(error) for sign in ("tracing tensor", "data-dependent")):
            raise _value_in_python(line) from error
        raise Refused(
            f"{line} can't be recorded as a graph: {type(error).__name__}: {str(error)[:300]}. "
            "Train by Trace_ELBO, or fit(..., compile=False)."
        ) from error
    finally:
        hook.remove()
    tensors = graph_passes.lift_tensors(module)
    masks = graph_passes.replace_masks_by_indices(module, tensors, len(inputs))
    graph_passes.replace_failures_by_nan(module)
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


def _value_in_python(line: str) -> Refused:
    return Refused(
        f"{line} takes a number out of a tensor, by a branch, int(), item() or the like, and a "
        "graph can't record what Python does with it. Use torch.where, poutine.mask or shapes "
        "instead; or train by Trace_ELBO, or fit(..., compile=False)."
    )


class _ScalarReadings(TorchDispatchMode):
    """Collects the tensors from which Python reads a number."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.readings.append((args[0], args[0]._version))
        return func(*args, **(kwargs or {}))


class _ValuesInPython(TorchFunctionMode):
    """Handles values that Python reads from tensors without an operation that is recorded.

    Conversions to lists and arrays are refused for tensors that the graph computes, and collected
    for others. Argument checks of distributions pass. A loop over a plate with all its rows runs
    outside of the graph.
    """

    def __init__(self, readings: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.readings = readings

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            if _is_traced(args[0]):
                raise _value_in_python(_user_line(traceback.extract_stack()))
            self.readings.append((args[0], args[0]._version))
        if func is Tensor.__bool__ and _is_within(CHECKS):
            return True
        if _is_within((LOOP,)) and not any(map(_is_traced, args[:1])):
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _WholePlates(Messenger):
    """Keeps the row indices of plates without subsampling out of the graph."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None and fn.subsample_size in (None, fn.size):
            with disable_proxy_modes_tracing():
                msg["value"] = fn()


def _is_within(codes: Sequence[CodeType]) -> bool:
    """Whether one of these functions is on the call stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def _is_traced(thing: Any) -> bool:
    mode = get_proxy_mode()
    return isinstance(thing, Tensor) and mode is not None and thing in mode.tracer.tensor_tracker


def _user_line(frames: traceback.StackSummary) -> str:
    """The innermost line of the user's code among these frames."""
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.exists() and not any(path.is_relative_to(library) for library in LIBRARIES):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}: `{frame.line}`"
    return "The model or the guide"
