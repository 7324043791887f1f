r"""Pyro code run once, and then again without Python: the tensor operations of a run as a graph.

Handlers, distributions and autograd work while the graph is recorded and never after. What a run
draws from PyTorch's generator is drawn anew each time, ahead of the rest and in the same order, so
under one seed a graph makes the numbers that the code itself makes. Tensors that the code reads
from elsewhere, parameters above all, are held as they are and read at each run.
"""

from __future__ import annotations

import math
import operator
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
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

__all__ = ["Graph", "Refused", "kind_of_tensor", "record", "tidy"]

# Code of these is not where a user's mistake is.
LIBRARIES = [Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parents[1]]

# The same calls, whose arguments are parsed in a quarter of the time.
QUICKER = {torch.ops.aten.randn.default: torch.randn, torch.ops.aten.rand.default: torch.rand}


# Where distributions check what they are given, and where a loop goes over the rows of a plate.
CHECKS = (Distribution.__init__.__code__, Distribution._validate_sample.__code__)
LOOP = IndepMessenger.__iter__.__code__


class Refused(ValueError):  # noqa: N818
    """Why code can't be run as a graph, and what to do."""


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
        with _Readings() as seen, _Escapes(seen.readings), _Aside(), _WholePlates():
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
    tensors = _lift(module)
    masks = _settle_shapes(module, tensors, len(inputs))
    _let_failures_be_nan(module)
    _refuse_writes(module)
    draw = _draw_ahead(module)
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


class _Escapes(TorchFunctionMode):
    """Refuses to hand numbers that may change to Python as lists or arrays, and notes the others.

    No operation does that, so that recording alone would not see it.
    """

    def __init__(self, readings: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.readings = readings

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            if _is_traced(args[0]):
                raise _escape(_where_now())
            self.readings.append((args[0], args[0]._version))
        return func(*args, **(kwargs or {}))


class _Aside(TorchFunctionMode):
    """Leaves out of the graph what libraries ask of numbers that are settled.

    Distributions find that all they were given is allowed, wherever they were made. A loop over a
    plate that takes all its rows gets their numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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


def _where_now() -> str:
    return _named(traceback.extract_stack())


def _where(trace: TracebackType | None) -> str:
    """The user's line that an error comes from."""
    return _named(traceback.extract_tb(trace))


def _named(frames: traceback.StackSummary) -> str:
    files = [(frame, Path(frame.filename)) for frame in frames if Path(frame.filename).exists()]
    own = [f for f, path in files if not any(path.is_relative_to(p) for p in LIBRARIES)]
    if not own:
        return "The model or the guide"
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}: `{own[-1].line}`"


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Turns tensors from elsewhere into inputs, and returns them."""
    graph = module.graph
    found: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if any(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue  # torch.tensor(1.0) in the code itself, which stays what it is
        if id(tensor) not in found:
            found[id(tensor)] = _add_input(graph, f"tensor_{len(found)}", tensor), tensor
        placeholder, _ = found[id(tensor)]
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    module.recompile()
    return [tensor for _, tensor in found.values()]


def _add_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _settle_shapes(
    module: fx.GraphModule, tensors: list[Tensor], num_inputs: int
) -> list[tuple[Tensor, int]]:
    """Makes selections by fixed masks selections by indices; refuses those by masks that change.

    Returns the tensors that the masks were read from, and their versions.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    held = dict(zip(placeholders[num_inputs:], tensors, strict=True))
    fixed, masks = set(held), []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        found = _masks_of(node)
        if not fixed.issuperset(found):
            raise Refused(
                f"The model or the guide selects by numbers that change ({node.target}), and the "
                "shapes of a graph stay the same. Use poutine.mask, or torch.where; or train by "
                "Trace_ELBO, or fit(..., compile=False)."
            )
        masks += [(node, mask) for mask in found]
        if fixed.issuperset(node.all_input_nodes) and not _is_random(node):
            fixed.add(node)
    read = _ancestors(mask for _, mask in masks)
    by_mask = [pair for pair in masks if pair[0].target is torch.ops.aten.index.Tensor]
    if by_mask:
        part = _part(module, _ancestors(mask for _, mask in by_mask), [m for _, m in by_mask])
        values = part(*[None] * num_inputs, *tensors)
        for (node, mask), value in zip(by_mask, values, strict=True):
            tensors += _select_by_indices(module.graph, node, mask, value)
        tidy(module)
    return [(tensor, tensor._version) for node, tensor in held.items() if node in read]


def _masks_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose numbers the shape of this one hangs on."""
    aten = torch.ops.aten
    if node.target is aten.index.Tensor:
        indices = [n for n in node.args[1] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        return [n for n in indices if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    if node.target is aten.masked_select.default:
        return node.all_input_nodes[1:]
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        return node.all_input_nodes
    return []


def _select_by_indices(
    graph: fx.Graph, node: fx.Node, mask: fx.Node, value: Tensor
) -> Sequence[Tensor]:
    """Puts indices in the place of a mask; returns them, as further inputs of the graph."""
    indices = value.nonzero(as_tuple=True)
    inputs = [_add_input(graph, f"{node.name}_{k}", index) for k, index in enumerate(indices)]
    expanded: list[Any] = []
    for index in node.args[1]:  # type: ignore[union-attr]
        expanded += inputs if index is mask else [index]
    node.args = (node.args[0], expanded)
    return indices


def _let_failures_be_nan(module: fx.GraphModule) -> None:
    """Makes a matrix that can't be factorised NaN, instead of an error that would end a replay."""
    aten, graph = torch.ops.aten, module.graph
    for node in list(graph.nodes):
        if node.target is not aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        (result,) = (n for n in info.args[0].users if n.args[1] == 0)
        graph.erase_node(node)
        with graph.inserting_after(max(info, result)):
            failed = graph.call_function(aten.ne.Scalar, (info, 0))
            failed.meta["val"] = info.meta["val"] != 0
        for _ in range(result.meta["val"].dim() - info.meta["val"].dim()):
            with graph.inserting_after(failed):
                wider = graph.call_function(aten.unsqueeze.default, (failed, -1))
                wider.meta["val"] = failed.meta["val"].unsqueeze(-1)
                failed = wider
        with graph.inserting_after(failed):
            filled = graph.call_function(aten.masked_fill.Scalar, (result, failed, math.nan))
            filled.meta.update(result.meta)
        result.replace_all_uses_with(filled, lambda user, new=filled: user is not new)
    module.recompile()


def _refuse_writes(module: fx.GraphModule) -> None:
    """Refuses writing into tensors that outlive the step."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = [
            part
            for argument, value in zip(schema.arguments, node.args, strict=False)
            if argument.is_write
            for part in (value if isinstance(value, list | tuple) else [value])
        ]
        if any(_base(part).op == "placeholder" for part in written if isinstance(part, fx.Node)):
            raise _writes(node)
    for node in module.graph.nodes:
        # Its schema does not say that it writes into the averages it is given.
        is_norm = node.target is torch.ops.aten.native_batch_norm.default
        if is_norm and node.args[3] is not None and node.args[5]:
            raise _writes(node)


def _writes(node: fx.Node) -> Refused:
    return Refused(
        f"The model or the guide writes into a tensor that outlives the step ({node.target}), as "
        "BatchNorm does with its averages. Call .eval() on such modules; or train by Trace_ELBO, "
        "or fit(..., compile=False)."
    )


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while getattr(node.target, "is_view", False) or node.target is operator.getitem:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _draw_ahead(module: fx.GraphModule) -> fx.GraphModule:
    """Takes the random numbers out of a graph, which gets them as inputs; returns what draws them.

    All that a draw hangs on is computed ahead too, so the order of draws stays what it was.
    """
    drawn: list[fx.Node] = []
    random = [node for node in module.graph.nodes if _is_random(node)]
    for node in random:
        drawn += [node] if isinstance(node.meta["val"], Tensor) else list(node.users)
    ahead = _part(module, _ancestors(drawn), drawn)
    for k, node in enumerate(drawn):
        noise = _add_input(module.graph, f"noise_{k}", node.meta["val"])
        node.replace_all_uses_with(noise)
    for node in reversed(module.graph.nodes):
        if node in random or node in drawn:
            module.graph.erase_node(node)
    tidy(module)
    for node in ahead.graph.nodes:
        node.target = QUICKER.get(node.target, node.target)
    ahead.recompile()
    return ahead


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they hang on."""
    found, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _part(module: fx.GraphModule, nodes: set[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """A part of a graph, of the same inputs."""
    part: fx.Graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in nodes:
            twins[node] = part.node_copy(node, twins.__getitem__)
    part.output(tuple(twins[node] for node in outputs))
    return fx.GraphModule(module, part)


def tidy(module: fx.GraphModule) -> None:
    """Leaves out what nobody needs."""

    def is_needed(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and schema.is_mutable)

    module.graph.eliminate_dead_code(is_needed)
    module.recompile()
