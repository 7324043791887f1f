"""Operations with kernels in C++, which are compiled at their first use on a machine.

Where there is no compiler, the same is done in operations of PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["define", "has_kernels"]

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread"]

_library: list[ctypes.CDLL] = []
_loading = threading.Lock()

# By name: its library, since an operation exists as long as that, and the kind of its kernel.
_operations: dict[str, tuple[torch.library.Library, str]] = {}


def define(
    kind: str, name: str, arguments: Sequence[str], num_results: int, empty: Callable[..., Any]
) -> Any:
    """Defines an operation on tensors of the CPU, and returns it.

    Args:
        kind: The name of its kernel in ``cpp/operations.cpp``.
        name: The name of the operation; several may have one kernel.
        arguments: Types and names of its arguments, in PyTorch's notation. They are ints and single
            tensors, since for a list compiled code includes headers that take the compiler six
            seconds.
        num_results: The number of tensors that it returns.
        empty: Returns tensors like its results, without values.
    """
    library = torch.library.Library("pyro_iaf", "FRAGMENT")
    results = ", ".join(["Tensor"] * num_results)
    library.define(f"{name}({', '.join(arguments)}) -> ({results})")
    library.impl(name, empty, "Meta")
    _operations[name] = library, kind
    if _library:
        _register(name, kind)
    return getattr(torch.ops.pyro_iaf, name).default


@functools.cache
def has_kernels() -> bool:
    """Loads the kernels, compiled if need be; returns whether that worked.

    Logs a warning if it failed though there is a compiler.
    """
    with _loading:
        try:
            if not _library and shutil.which(os.environ.get("CXX", "g++")):
                _library.append(ctypes.CDLL(str(_compiled())))
                for name, (_, kind) in list(_operations.items()):
                    _register(name, kind)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            logging.getLogger(__name__).warning("no kernels: %s", why)
    return bool(_library)


def _compiled() -> Path:
    libraries = Path(torch.__file__).parent / "lib"
    command = [os.environ.get("CXX", "g++"), *FLAGS, str(SOURCES / "operations.cpp")]
    command += [f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    texts = [path.read_text() for path in sorted(SOURCES.iterdir())]
    key = [*texts, *command, torch.__version__, platform.platform(), _processor()]
    name = f"pyro_iaf_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    library = _cache() / name
    if not library.exists():
        library.parent.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as build:
            fresh = Path(build) / name
            command += ["-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(library)  # atomic, so that no other process sees half a file
    return library


def _cache() -> Path:
    """The folder for compiled kernels: that of PyTorch's compiler, if the user has named it.

    Its default is not asked for, since importing the compiler takes a second.
    """
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given).absolute()
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"pyro_iaf_{user}"


def _register(name: str, kind: str) -> None:
    if _library[0].register_operation(kind.encode(), name.encode()):
        raise OSError(f"PyTorch refused to register the kernel of {name}")


def _processor() -> str:
    """The processor's features, since several machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
