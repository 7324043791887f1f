r"""From a graph of operations to something that runs: replayed one by one, or compiled.

``"graph"`` calls the operations from generated Python, without handlers, distributions or autograd
around them. ``"inductor"`` hands them to PyTorch's compiler, as one C++ program, or CUDA graph.
"""

from __future__ import annotations

import logging
import operator
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .graph_passes import tidy
from .persistent_buffers import kept_buffers

__all__ = ["BACKENDS", "Lowered", "choose_backend", "has_compiler", "lower", "warm_up"]

BACKENDS = ("auto", "inductor", "graph")

#: A function of a list of tensors that may be emptied.
Lowered = Callable[[list[Tensor]], Sequence[Tensor]]

# Loops over fewer numbers than this stay in one thread: it takes microseconds to wake another.
NUMBERS_PER_THREAD = 16384

# A program that compiles to nothing, with all headers.
NOTHING = """
#include <torch/csrc/inductor/cpp_wrapper/cpu.h>
void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*) {}
"""


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
        'backend="graph": up to twice as fast as Pyro, where compiled ones are up to sixty times '
        "as fast. Install g++, or name a compiler in CXX.",
        UserWarning,
        stacklevel=3,
    )
    return "graph"


def warm_up() -> None:
    """Begins what compiling needs first on a machine, in other processes.

    That is what the compiler can make for the processor, and PyTorch's headers in its own form.
    """
    # Imported here, as a thread that imports when the process forks leaves a lock behind.
    from torch._inductor import codecache, cpu_vec_isa  # noqa: F401

    if not _warming:
        _warming.append(threading.Thread(target=_warm_up, daemon=True))
        _warming[0].start()


_warming: list[threading.Thread] = []
_processor_is_known = threading.Event()


def _warm_up() -> None:
    try:
        from torch._inductor import config, cpu_vec_isa
        from torch._inductor.codecache import CppWrapperCodeCache

        with config.patch(_settings()):
            cpu_vec_isa.pick_vec_isa()
        _processor_is_known.set()
        CppWrapperCodeCache.load_pybinding(
            argtypes=["std::vector<AtenTensorHandle>"],
            main_code=NOTHING,
            device_type="cpu",
            needs_vec_isa=True,
            num_outputs=0,
        )
    except Exception as error:  # whoever compiles next meets it again, and says so
        logging.getLogger(__name__).debug("not warmed up: %s", error)
    finally:
        _processor_is_known.set()


def _forget_threads() -> None:
    """A forked process has none of the threads that its parent started."""
    global _processor_is_known
    _warming.clear()
    _processor_is_known = threading.Event()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _settings() -> dict[str, Any]:
    """What differs from the compiler's defaults, as far as its version knows it."""
    from torch._inductor import config

    settings: dict[str, Any] = {
        "cpp.min_chunk_size": NUMBERS_PER_THREAD,
        "size_asserts": False,  # whoever calls has compared shapes and strides
        "use_post_grad_passes": False,  # on small matrices addmm is slower than what it is made of
    }
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        settings["cpp.vec_isa_ok"] = True  # PyTorch's own kernels are of that kind: don't try again
    return {name: value for name, value in settings.items() if name in config.get_config_copy()}


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
            try:
                return _compiled(fn, example, kept_buffers), backend
            except Exception:  # of a PyTorch that writes its code in other ways, perhaps
                return _compiled(fn, example, nullcontext), backend
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
    tidy(module)


def _compiled(fn: Callable[..., Any], example: list[Tensor], keeping: Callable[[], Any]) -> Lowered:
    if any(tensor.is_cuda for tensor in example):
        return _on_cuda(fn)
    warm_up()
    # Not torch.compile: it would trace once more, and guard at each call what is known here.
    from torch._decomp import get_decompositions
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    functional = torch.func.functionalize(fn, remove="mutations")
    decompositions = {**select_decomp_table(), **get_decompositions([torch.ops.aten.addmm])}
    module = make_fx(functional, decompositions, tracing_mode="fake")(*example)
    _use_known_solver(module)
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = values[0].fake_mode
    _processor_is_known.wait()
    with (
        config.patch(_settings()),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        _without_remarks(),
        keeping(),
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
