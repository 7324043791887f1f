"""What one call of a model is: its tensors, and all else that makes it another than the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .capture import Refused, kind_of_tensor

__all__ = ["MAX_BUILDS", "MAX_GRAPHS", "MAX_KINDS", "agree", "by_hash", "kind_of", "opened"]

# Arguments, besides tensors, that are part of a graph.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
NUMPY_SCALARS = ("float64", "float32", "int64", "int32", "bool")

# Graphs that one loss holds at most, and how many kinds of calls it remembers beyond.
MAX_GRAPHS, MAX_KINDS = 8, 64

# How often the graph for one kind of call is built, where what it took for granted changes.
MAX_BUILDS = 4

# How far a graph's numbers may be from those of the code, relative to 1 + their size: loss and
# gradients, which are sums of what nearly cancels.
TOLERANCES = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-4, 2e-3)}


def opened(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors among arguments, and what puts others in their place."""
    if not args and not kwargs:
        return [], lambda _: ((), {})
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def rebuild(others: list[Tensor]) -> Any:
        rest = iter(others)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(filled, spec)

    return tensors, rebuild


def kind_of(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """All that makes a call another one than the last, but for the numbers in tensors."""
    leaves, spec = tree_flatten((args, kwargs)) if args or kwargs else ([], None)
    owners = [getattr(fn, "__self__", fn) for fn in (model, guide)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    return (
        spec,
        tuple(map(_kind, leaves)),
        tuple(module.training for owner in modules for module in owner.modules()),
        torch.get_default_dtype(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch.is_grad_enabled(),
    )


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return kind_of_tensor(leaf)
    if isinstance(leaf, PLAIN) or callable(leaf) or type(leaf).__name__ in NUMPY_SCALARS:
        return type(leaf), by_hash(leaf)
    raise Refused(
        f"An argument is of type {type(leaf).__name__}, and a graph can't see it change. Give "
        "tensors, as torch.as_tensor(...) makes them of arrays, numbers and strings."
    )


def by_hash(thing: Any) -> Any:
    """The thing, or what stands for it where it has no hash."""
    try:
        hash(thing)
    except TypeError:
        return _ById(thing)
    return thing


class _ById:
    """A thing without a hash, as itself and no other."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.thing is self.thing


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a loss and gradients are the same, but for rounding."""
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        tolerance = TOLERANCES.get(b.dtype, (5e-2, 5e-2))[min(k, 1)]
        if (a - b).norm() > tolerance * (1 + b.norm()):
            return False
    return True
