"""Checks of arguments, and warnings, in words that tell what to do."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

__all__ = [
    "check_callable",
    "check_context",
    "check_levels",
    "check_order",
    "check_size",
    "check_tensors",
    "check_widths",
    "in_one_line",
    "warn",
]
LIBRARIES = tuple(
    f"{Path(module).parent}{os.sep}" for module in (torch.__file__, pyro.__file__, __file__)
)


def in_one_line(module: nn.Module, *words: str) -> str:
    """A module's public name, these words, and how many parameters it has."""
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
    """The value as an int, or a ValueError that names what it is of."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
        raise ValueError(f"{name} should be an int of at least {smallest}; got {value!r}.")
    return int(value)


def check_number(name: str, value: object) -> float:
    """The value as a float, or a ValueError if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} should be a finite number; got {value!r}. float(...) makes one.")
    return float(value)


def check_widths(hidden_dims: int | Sequence[int] | None, input_dim: int) -> list[int]:
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
    """The order as a list, or a ValueError if it is no permutation."""
    if order is None:
        return list(range(input_dim))
    given = order.tolist() if isinstance(order, Tensor) else order
    as_list = list(given) if isinstance(given, Iterable) else []
    whole = all(isinstance(k, Integral) for k in as_list)
    if not whole or len(as_list) != input_dim or set(as_list) != set(range(input_dim)):
        raise ValueError(
            f"order should be a permutation of 0, ..., {input_dim - 1}, where order[k] is the "
            f"coordinate that comes k-th; got {given}."
        )
    return as_list


def check_callable(word: str, thing: Any, may_be_missing: bool) -> None:
    """Raises a ValueError unless this argument is a callable."""
    if not callable(thing) and not (thing is None and may_be_missing):
        raise ValueError(f"{word} should be a callable; got {thing!r}.")


def check_levels(quantiles: Sequence[float] | Tensor | float) -> Tensor:
    """Levels of quantiles, of shape ``(n,)``; raises a ValueError for others."""
    try:
        levels = torch.as_tensor(quantiles, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):  # of what is no number
        levels = torch.full((), math.nan)
    levels = levels.reshape(-1) if levels.dim() < 2 else torch.full((1,), math.nan)
    if not (len(levels) and ((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"quantiles should be a level between 0 and 1 or a list of them, as [0.05, 0.5, 0.95]; "
            f"got {quantiles!r}."
        )
    return levels


def warn(message: str) -> None:
    """Gives a UserWarning at the line that called into the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def check_tensors(**given: Any) -> None:
    """Raises a ValueError unless all these are tensors of floating-point numbers."""
    for name, thing in given.items():
        if not isinstance(thing, Tensor):
            raise ValueError(
                f"{name} should be a tensor; got {type(thing).__name__}. Use torch.tensor(...)."
            )
        if not thing.is_floating_point():
            raise ValueError(
                f"{name} should be of floating-point numbers, which a flow scales; got "
                f"{thing.dtype}. Convert it with .float() or .to(...)."
            )
