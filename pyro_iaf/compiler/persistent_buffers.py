"""Compiled code that keeps its buffers from one call to the next.

A small step uses some sixty buffers and sixty views of them. PyTorch's compiler allocates each of
them at each call, which takes longer than filling them. Here buffers and views are made at the
first call and live as long as the process. Outputs are copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["kept_buffers"]

# The largest total size of the kept buffers of a program. Others are allocated at each call: large
# buffers take longer to fill than to allocate, and would hold memory that others need.
MOST_NUMBERS = 2**20

_lock = threading.RLock()

# Replaces RAIIAtenTensorHandle of the compiler's own code, with those methods that buffers need.
KEPT = r"""
#include <initializer_list>
#include <mutex>
#include <type_traits>

struct Kept {
  AtenTensorHandle handle;
  void* data = nullptr;
  explicit Kept(AtenTensorHandle made) : handle(made) {
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(made, &data));
  }
  operator AtenTensorHandle() const { return handle; }
  AtenTensorHandle get() const { return handle; }
  void* data_ptr() const { return data; }
  void reset() const {}
};

static AtenTensorHandle copy_of(AtenTensorHandle tensor) {
  AtenTensorHandle copy;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_clone(tensor, &copy));
  return copy;
}

static AtenTensorHandle new_buffer(std::initializer_list<int64_t> sizes,
                                   std::initializer_list<int64_t> strides, int32_t dtype) {
  AtenTensorHandle made;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides.begin(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return made;
}

#define VIEW_OF(base, made)                                \
  ([&] {                                                   \
    if constexpr (std::is_same_v<decltype(base), Kept>) {  \
      static Kept view(made);                              \
      return view;                                         \
    } else {                                               \
      return RAIIAtenTensorHandle(made);                   \
    }                                                      \
  }())
"""

# One thread at a time, since all would write into the same buffers.
LOCK = "static std::mutex busy; std::lock_guard<std::mutex> alone(busy);"

FRESH_VIEW = "wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper("


@contextmanager
def kept_buffers() -> Iterator[None]:
    """A context in which programs compiled for the CPU with the C++ wrapper keep their buffers."""
    from torch._inductor.codegen import common

    common.init_backend_registration()
    config: Any = torch.compiler.config
    # The cache also holds code by other wrappers, and by other versions of this one.
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    with _lock:
        usual = common.device_codegens["cpu"]
        ours = dataclasses.replace(usual, cpp_wrapper_codegen=_wrapper_class())
        common.device_codegens["cpu"] = ours
        try:
            with config.patch(cache_key_tag=config.cache_key_tag + own):
                yield
        finally:
            common.device_codegens["cpu"] = usual


def _wrapper_class() -> Any:
    from torch._inductor import ir
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    class KeepsBuffers(CppWrapperCpu):
        """Generates the code around the kernels, which allocates buffers and calls the kernels."""

        num_kept = 0

        @staticmethod
        def create(*_: Any, **__: Any) -> KeepsBuffers:
            return KeepsBuffers()

        def write_prefix(self) -> None:
            super().write_prefix()
            self.prefix.splice(KEPT)

        def write_wrapper_decl(self) -> None:
            super().write_wrapper_decl()
            self.prefix.writeline(LOCK)

        def make_allocation(
            self,
            name: str,
            device: Any,
            dtype: Any,
            shape: Sequence[Any],
            stride: Sequence[Any],
            allocation_shape: Sequence[Any] | None = None,
            is_pinned: bool = False,
        ) -> str:
            is_padded = allocation_shape is not None and list(allocation_shape) != list(shape)
            num_kept = self.num_kept + math.prod(map(int, shape))
            if is_padded or is_pinned or num_kept > MOST_NUMBERS:
                return super().make_allocation(  # type: ignore[no-any-return]
                    name, device, dtype, shape, stride, allocation_shape, is_pinned
                )
            self.num_kept = num_kept
            sizes, strides = (
                "{" + ", ".join(f"{int(k)}L" for k in numbers) + "}" for numbers in (shape, stride)
            )
            return (
                f"static Kept {name}(new_buffer({sizes}, {strides}, {self.codegen_dtype(dtype)}));"
            )

        def codegen_reinterpret_view(self, data: Any, *arguments: Any, **others: Any) -> str:
            code: str = super().codegen_reinterpret_view(data, *arguments, **others)
            if not code.startswith(FRESH_VIEW):
                return code
            return f"VIEW_OF({data.get_name()}, {code.split('(', 1)[1]}"

        def generate_return(self, output_refs: list[str]) -> None:
            # An output that is no argument may lie in a buffer that the next call overwrites.
            named = []
            for k, ref in enumerate(output_refs):
                is_tensor = not isinstance(V.graph.graph_outputs[k], ir.ShapeAsConstantBuffer)
                if is_tensor and ref != "nullptr" and ref not in V.graph.graph_inputs:
                    self.wrapper_call.writeline(f"RAIIAtenTensorHandle output_{k}(copy_of({ref}));")
                    ref = f"output_{k}"
                named.append(ref)
            super().generate_return(named)

    return KeepsBuffers
