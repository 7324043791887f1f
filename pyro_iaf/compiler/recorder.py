"""What one call of a model is: its tensors, and all else that makes it another than the last."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .capture import Refused, kind_of_tensor

__all__ = ["by_hash", "kind_of", "opened", "refusal"]

# Arguments, besides tensors, that are part of a graph.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
NUMPY_SCALARS = ("float64", "float32", "int64", "int32", "bool")


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


def refusal(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a model has against arguments, in words; "" if nothing, or if it doesn't tell."""
    fn = poutine.unwrap(model)
    try:
        takes = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):  # a builtin
        return ""
    try:
        takes.bind(*args, **kwargs)
    except TypeError as error:
        return f"The model takes {takes}: {error}."
    return ""


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
