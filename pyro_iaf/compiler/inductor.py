"""PyTorch's compiler on the CPU, without tracing again and without guards."""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .persistent_buffers import kept_buffers

__all__ = ["compile_for_cpu", "warm_up"]

# Loops over fewer numbers stay in one thread, since it takes microseconds to wake another.
NUMBERS_PER_THREAD = 16384

# Compiles the code that calls kernels with fewer optimisations than the kernels: a third faster.
IN_TWO_PARTS = "cpp_wrapper_build_separate"

# An empty program that includes all headers, in two parts: what calls, and what computes.
EMPTY_PROGRAM = """
#include <torch/csrc/inductor/cpp_wrapper/cpu.h>
void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*) {}
"""
EMPTY_KERNELS = "#include <torch/csrc/inductor/cpp_prefix.h>"


def compile_for_cpu(
    fn: Callable[..., Any], example: Sequence[Tensor], keeping: Callable[[], Any] = kept_buffers
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Compiles a function to one C++ program.

    Args:
        fn: A function of tensors that ``make_fx`` can trace. It returns a tuple of tensors, and may
            write into its arguments.
        example: Tensors to trace it with.
        keeping: A context manager around the compiler, by default :func:`kept_buffers`.
    """
    warm_up()
    # Not torch.compile, which would trace once more, and check its guards at each call.
    from torch._decomp import get_decompositions
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    functional = torch.func.functionalize(fn, remove="mutations")
    aten = torch.ops.aten
    decompositions = {**select_decomp_table(), **get_decompositions([aten.addmm])}
    decompositions[aten.linalg_solve_triangular.default] = _solve_triangular
    with _quiet_compiler():
        module = make_fx(functional, decompositions, tracing_mode="fake")(*example)
        values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        mode = values[0].fake_mode
        _processor_is_known().wait()
        with (
            config.patch(_settings()),
            tracing(TracingContext(mode)),
            V.set_fake_mode(mode),
            keeping(),
        ):
            compiled: Any = compile_fx_inner(module, values, cpp_wrapper=True, is_inference=True)
    return compiled.current_callable  # type: ignore[no-any-return]


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silences the compiler's warnings about its own code."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.triangular_solve(torch.ones(1, 1), torch.ones(1, 1))  # it warns only once
            yield
    finally:
        logger.setLevel(level)


def warm_up() -> None:
    """Starts in the background what compiling needs first on a machine.

    That is to find the processor's vector instructions, and to precompile PyTorch's headers.
    """
    # Imported here, since a fork during an import in a thread leaves a lock behind.
    from torch._inductor import codecache, cpu_vec_isa  # noqa: F401

    _processor_is_known()


@functools.cache
def _processor_is_known() -> threading.Event:
    known = threading.Event()
    threading.Thread(target=_warm_up, args=(known,), daemon=True).start()
    return known


if hasattr(os, "register_at_fork"):  # a forked process lacks the threads of its parent
    os.register_at_fork(after_in_child=_processor_is_known.cache_clear)


def _warm_up(processor_is_known: threading.Event) -> None:
    try:
        from torch._inductor import config, cpu_vec_isa
        from torch._inductor.codecache import CppWrapperCodeCache

        settings = _settings()
        with config.patch(settings):
            cpu_vec_isa.pick_vec_isa()
        processor_is_known.set()
        parts: dict[str, Any] = {"needs_vec_isa": True}
        if IN_TWO_PARTS in settings:
            parts = {"needs_vec_isa": False, "kernel_needs_vec_isa": True}
            parts["kernel_code"] = EMPTY_KERNELS
        CppWrapperCodeCache.load_pybinding(
            argtypes=["std::vector<AtenTensorHandle>"],
            main_code=EMPTY_PROGRAM,
            device_type="cpu",
            num_outputs=0,
            **parts,
        )
    except Exception as error:  # the next compilation raises it again
        logging.getLogger(__name__).debug("not warmed up: %s", error)
    finally:
        processor_is_known.set()


def _settings() -> dict[str, Any]:
    """Our settings of the compiler, without those that its version lacks."""
    from torch._inductor import config

    settings: dict[str, Any] = {
        "cpp.min_chunk_size": NUMBERS_PER_THREAD,
        "size_asserts": False,  # the caller has compared shapes and strides
        IN_TWO_PARTS: True,
        "use_post_grad_passes": False,  # they form addmm, slower on small matrices than its parts
    }
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        settings["cpp.vec_isa_ok"] = True  # PyTorch's kernels use it, so no test is needed
    return {name: value for name, value in settings.items() if name in config.get_config_copy()}


def _solve_triangular(
    matrix: Tensor, rows: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Triangular systems by ``triangular_solve``, which compiled code calls without Python."""
    if left:
        return torch.triangular_solve(rows, matrix, upper, False, unitriangular)[0]
    # x A = b is A' x' = b'
    return torch.triangular_solve(rows.mT, matrix, upper, True, unitriangular)[0].mT
