"""The tensor operations of one run of Pyro code, as a graph that runs again without the code.

Handlers, distributions and autograd run only while the graph is recorded. Random numbers are drawn
anew at each run, before the other operations and in the same order, so under one seed a graph and
the code give the same numbers. A graph refers to the parameters and other outside tensors that the
code reads, and so uses their current values. Numbers and shapes that the code computes from its
data become constants.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn.modules.module import register_module_forward_pre_hook

from . import graph_passes
from .constants import Constants, PythonReader, Reader, user_line, value_in_python
from .graph_passes import Refused

__all__ = ["Graph", "Refused", "kind_of_tensor", "record"]


class Graph(NamedTuple):
    """A recorded run.

    Attributes:
        module: The operations. It takes the inputs, ``tensors`` and what ``draw`` returns.
        tensors: The outside tensors that the code reads.
        draw: Draws the random numbers. It takes the inputs and ``tensors``.
        kinds: The :func:`kind_of_tensor` of each of ``tensors``.
        constants: The numbers that the code took out of its data.
        modules: The modules that ran, and their state.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    draw: fx.GraphModule
    kinds: list[Any]
    constants: Constants
    modules: list[tuple[weakref.ref[nn.Module], Any]]

    @property
    def is_current(self) -> bool:
        """Whether everything visible is as it was when recorded, except values of tensors."""
        return self.kinds == [kind_of_tensor(tensor) for tensor in self.tensors] and all(
            (m := ref()) and _state_of(m) == state for ref, state in self.modules
        )

    @property
    def fits_all(self) -> bool:
        """Whether it has no constants that depend on data."""
        return not self.constants.sources

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether its constants are right for these inputs, and for ``tensors`` as they are now."""
        return self.constants.hold_for([*inputs, *self.tensors])


def kind_of_tensor(tensor: Tensor) -> Any:
    """The properties of a tensor that a graph assumes: all but its values."""
    shape = tensor.shape, tensor.stride() if tensor.layout == torch.strided else None
    return *shape, tensor.dtype, tensor.device, tensor.requires_grad


def _state_of(module: nn.Module) -> Any:
    """The properties of a module that a graph assumes: its mode and which tensors it has."""
    return module.training, [*map(id, (*module._parameters.values(), *module._buffers.values()))]


def record(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    data: Collection[int] = (),
) -> Graph:
    """Runs a function once and records its tensor operations.

    Args:
        fn: A function of tensors that returns a list of tensors. It has run before with success,
            so the argument checks of distributions, which read values, are taken to pass.
        inputs: Example inputs. Their shapes and dtypes matter. Of their values only those matter
            that became constants.
        data: The positions of inputs that are data. Numbers that the function takes out of these,
            or out of outside tensors other than parameters, become constants.

    Raises:
        Refused: If the operations depend on other values of tensors.
    """
    modules: dict[int, nn.Module] = {}
    reader = Reader(data)

    def reading(*inputs: Tensor) -> list[Tensor]:
        return [*fn(*inputs), *reader.outputs]

    # One mode for the properties of all nodes; otherwise make_fx makes one for each.
    context = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    hook = register_module_forward_pre_hook(lambda m, _: modules.update({id(m): m}))
    try:
        with context, reader, PythonReader(reader), _WholePlates():
            module = make_fx(reading)(*inputs)
    except Refused:
        raise
    except Exception as error:  # the code itself has run, so recording is what fails
        if isinstance(error.__cause__, Refused):  # Pyro adds the name of the site
            raise Refused(f"{str(error).splitlines()[0]} {error.__cause__}") from error
        line = user_line(reversed(traceback.extract_tb(error.__traceback__)))
        if any(sign in str(error) for sign in ("tracing tensor", "data-dependent")):
            raise value_in_python(line) from error
        raise Refused(
            f"{line} can't be recorded as a graph: {type(error).__name__}: {str(error)[:300]}. "
            "Train by Trace_ELBO, or fit(..., compile=False)."
        ) from error
    finally:
        hook.remove()
    tensors = graph_passes.lift_tensors(module)
    part, sources = graph_passes.split_outputs(module, len(reader.outputs))
    graph_passes.replace_failures_by_nan(module)
    graph_passes.refuse_writes(module)
    draw = graph_passes.draw_ahead(module)
    graph_passes.remove_identities(module)
    module.recompile()
    return Graph(
        module,
        tensors,
        draw,
        list(map(kind_of_tensor, tensors)),
        Constants(part, sources, reader.values, [*inputs, *tensors]),
        [(weakref.ref(m), _state_of(m)) for m in modules.values()],
    )


class _WholePlates(Messenger):
    """Keeps the row indices of plates without subsampling out of the graph."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None and fn.subsample_size in (None, fn.size):
            with disable_proxy_modes_tracing():
                msg["value"] = fn()
