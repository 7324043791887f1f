"""Checks of arguments, and warnings at the user's line."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

__all__ = [
    "check_callable",
    "check_context",
    "check_levels",
    "check_number",
    "check_order",
    "check_size",
    "check_tensors",
    "check_widths",
    "module_repr",
    "warn",
]
LIBRARIES = tuple(
    f"{Path(module).parent}{os.sep}" for module in (torch.__file__, pyro.__file__, __file__)
)


def module_repr(module: nn.Module, *words: str) -> str:
    """A one-line ``repr``: the module's public name, these words and its number of parameters."""
    count = sum(param.numel() for param in module.parameters())
    name = next(kind.__name__ for kind in type(module).__mro__ if kind.__name__[0] != "_")
    return f"{name}({', '.join(words)}; {count:,} parameters)"


def check_context(context: Tensor, context_dim: int | None) -> None:
    """Raises a ValueError unless ``context`` ends in ``context_dim`` features."""
    if isinstance(context, Tensor) and context.dim() and context_dim in (None, context.shape[-1]):
        return
    got = f"a tensor of shape {tuple(context.shape)}" if isinstance(context, Tensor) else context
    raise ValueError(
        f"context should end in context_dim={context_dim} features, one row per batch element; "
        f"got {got}. An encoder's last layer sets this size."
    )


def check_size(name: str, value: object, smallest: int = 1) -> int:
    """The value as an int; raises a ValueError if it is none, or is too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
        raise ValueError(f"{name} should be an int of at least {smallest}; got {value!r}.")
    return int(value)


def check_number(name: str, value: object) -> float:
    """The value as a float; raises a ValueError if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} should be a finite number; got {value!r}. float(...) makes one.")
    return float(value)


def check_widths(hidden_dims: int | Sequence[int] | None, input_dim: int) -> list[int]:
    """The widths of the hidden layers as a list, by default two of ``max(64, 2 * input_dim)``."""
    if hidden_dims is None:
        return 2 * [max(64, 2 * input_dim)]
    widths = list(hidden_dims) if isinstance(hidden_dims, Iterable) else [hidden_dims]
    if not widths:
        raise ValueError(
            "hidden_dims should be an int, or a list of one int for each hidden layer; got an "
            "empty list. None gives the default."
        )
    return [check_size(f"hidden_dims[{i}]", width) for i, width in enumerate(widths)]


def check_order(order: Sequence[int] | Tensor | None, input_dim: int) -> list[int]:
    """The order as a list; raises a ValueError if it is no permutation."""
    if order is None:
        return list(range(input_dim))
    given = order.tolist() if isinstance(order, Tensor) else order
    as_list = list(given) if isinstance(given, Iterable) else []
    is_integral = all(isinstance(k, Integral) for k in as_list)
    if not is_integral or sorted(as_list) != list(range(input_dim)):
        raise ValueError(
            f"order should be a permutation of 0, ..., {input_dim - 1}, where order[k] is the "
            f"coordinate that comes k-th; got {given}."
        )
    return as_list


def check_callable(name: str, value: object, optional: bool = False) -> None:
    """Raises a ValueError unless the value is a callable, or None where it is optional."""
    if not callable(value) and not (value is None and optional):
        raise ValueError(f"{name} should be a callable; got {value!r}.")


def check_levels(quantiles: Sequence[float] | Tensor | float) -> Tensor:
    """The levels as a tensor of shape ``(n,)``; raises a ValueError if they are not in [0, 1]."""
    try:
        levels = torch.as_tensor(quantiles, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):  # not numbers
        levels = torch.empty(0)
    levels = levels.reshape(-1) if levels.dim() < 2 else torch.empty(0)
    if not (len(levels) and ((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"quantiles should be a level between 0 and 1 or a list of them, as [0.05, 0.5, 0.95]; "
            f"got {quantiles!r}."
        )
    return levels


def warn(message: str) -> None:
    """Gives a UserWarning at the user's line, outside this package, Pyro and PyTorch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def check_tensors(**values: object) -> None:
    """Raises a ValueError unless all these are tensors of floating-point numbers."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} should be a tensor; got {type(value).__name__}. Use torch.tensor(...)."
            )
        if not value.is_floating_point():
            raise ValueError(
                f"{name} should be of floating-point numbers, which a flow scales; got "
                f"{value.dtype}. Convert it with .float() or .to(...)."
            )
