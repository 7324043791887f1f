r"""Pyro code run once, and then again without Python: the tensor operations of a run as a graph.

Handlers, distributions and autograd work while the graph is recorded and never after. What a run
draws from PyTorch's generator is drawn anew each time, ahead of the rest and in the same order, so
under one seed a graph makes the numbers that the code itself makes. Tensors that the code reads
from elsewhere, parameters above all, are held as they are and read at each run.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import re
import shutil
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BACKENDS",
    "Graph",
    "Lowered",
    "Refused",
    "choose_backend",
    "has_compiler",
    "kind_of_tensor",
    "lower",
    "record",
    "warm_up",
]

BACKENDS = ("auto", "inductor", "graph")

#: A function of a list of tensors that may be emptied.
Lowered = Callable[[list[Tensor]], Sequence[Tensor]]

# Loops over fewer numbers than this stay in one thread: it takes microseconds to wake another.
NUMBERS_PER_THREAD = 16384

# Code of these is not where a user's mistake is.
LIBRARIES = [Path(torch.__file__).parent, Path(pyro.__file__).parent, Path(__file__).parent]


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
        fn: A function of tensors that returns a list of tensors.
        inputs: What to run it with; their numbers don't matter, their shapes and dtypes do.

    Raises:
        Refused: If what it does hangs on the numbers themselves.
    """
    modules: dict[int, nn.Module] = {}

    def note(module: nn.Module, _: Any) -> None:
        modules[id(module)] = module

    hook = register_module_forward_pre_hook(note)
    try:
        with _Readings() as seen, _Escapes(seen.readings):
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
            mode = get_proxy_mode()
            if mode is not None and args[0] in mode.tracer.tensor_tracker:
                raise _escape(_where_now())
            self.readings.append((args[0], args[0]._version))
        return func(*args, **(kwargs or {}))


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
        _tidy(module)
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
    _tidy(module)
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


def _tidy(module: fx.GraphModule) -> None:
    """Leaves out what nobody needs."""

    def is_needed(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and schema.is_mutable)

    module.graph.eliminate_dead_code(is_needed)
    module.recompile()


# From a graph to something that runs


def has_compiler(device: torch.device) -> bool:
    """Whether steps on this device can be compiled."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that ``"auto"`` stands for on this machine.

    Warns:
        UserWarning: If there is no compiler, so that it is ``"graph"``.
    """
    if backend != "auto":
        return backend
    if has_compiler(device):
        return "inductor"
    warnings.warn(
        "There is no C++ compiler here, so steps are replayed operation by operation, "
        'backend="graph": about twice as fast as Pyro, where compiled ones are ten to forty times '
        "as fast. Install g++, or name a compiler in CXX.",
        UserWarning,
        stacklevel=3,
    )
    return "graph"


def warm_up() -> None:
    """Begins what compiling needs first: trying what the processor can, in other processes."""

    def probe() -> None:
        from torch._inductor import cpu_vec_isa

        cpu_vec_isa.pick_vec_isa()

    threading.Thread(target=probe, daemon=True).start()


def lower(fn: Callable[..., Any], example: Sequence[Tensor], backend: str) -> tuple[Lowered, str]:
    """Makes a function of tensors fast.

    Args:
        fn: A function that any tracer can follow, of tensors, which returns a tuple of tensors. It
            may write into its arguments.
        example: Tensors to trace it with; they are left alone.
        backend: ``"inductor"`` or ``"graph"``.

    Returns:
        The function on a list of tensors, and the backend that it became.

    Warns:
        UserWarning: If the compiler fails; then the backend is ``"graph"``.
    """
    example = [tensor.detach() for tensor in example]
    if backend == "inductor":
        try:
            return _compiled(fn, example), backend
        except Exception as error:  # whatever goes wrong in a compiler, or for want of headers
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"The compiler failed, so steps are replayed operation by operation: {first_line}",
                UserWarning,
                stacklevel=3,
            )
    if not isinstance(fn, fx.GraphModule):
        fn = make_fx(fn, tracing_mode="fake")(*example)
    return _replayed(fn), "graph"


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
    _tidy(module)


def _compiled(fn: Callable[..., Any], example: list[Tensor]) -> Lowered:
    if any(tensor.is_cuda for tensor in example):
        return _on_cuda(fn)
    # Not torch.compile: it would trace once more, and guard at each call what is known here.
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    functional = torch.func.functionalize(fn, remove="mutations")
    module = make_fx(functional, select_decomp_table(), tracing_mode="fake")(*example)
    _use_known_solver(module)
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = values[0].fake_mode
    settings = {
        "cpp.min_chunk_size": NUMBERS_PER_THREAD,
        "size_asserts": False,  # whoever calls has compared shapes and strides
    }
    settings = {name: value for name, value in settings.items() if name in config.get_config_copy()}
    with (
        config.patch(settings),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        _without_remarks(),
    ):
        compiled: Any = compile_fx_inner(module, values, cpp_wrapper=True, is_inference=True)
    return compiled.current_callable  # type: ignore[no-any-return]


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Without what the compiler remarks on its own ways."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.triangular_solve(torch.ones(1, 1), torch.ones(1, 1))  # it warns but once
            yield
    finally:
        logger.setLevel(level)


def _on_cuda(fn: Callable[..., Any]) -> Lowered:
    """By CUDA graphs, whose outputs the next call overwrites."""
    compiled = torch.compile(fn, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def run(tensors: list[Tensor]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return [out.clone() for out in compiled(*tensors)]

    return run


def _use_known_solver(module: fx.GraphModule) -> None:
    """Writes triangular systems in the one form that compiled code calls without Python."""
    aten = torch.ops.aten
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not aten.linalg_solve_triangular.default:
            continue
        matrix, rows = node.args
        upper, left = node.kwargs["upper"], node.kwargs.get("left", True)
        if node.kwargs.get("unitriangular", False):
            continue

        def call(target: Any, *args: Any) -> fx.Node:
            new = graph.call_function(target, args)
            given = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
            with node.meta["val"].fake_mode:  # noqa: B023
                new.meta["val"] = target(*given)
            return new

        def flipped(x: fx.Node) -> fx.Node:
            *batch, i, j = range(x.meta["val"].dim())
            return call(aten.permute.default, x, [*batch, j, i])

        with graph.inserting_before(node):
            if left:
                solved = call(aten.triangular_solve.default, rows, matrix, upper)
            else:  # x A = b is A' x' = b'
                solved = call(aten.triangular_solve.default, flipped(rows), matrix, upper, True)
            solved = call(operator.getitem, solved, 0)
            solved = solved if left else flipped(solved)
        node.replace_all_uses_with(solved)
        graph.erase_node(node)
    module.recompile()
