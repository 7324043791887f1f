"""Checks of a model, a guide, and the arguments of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "Args",
    "Batch",
    "Kwargs",
    "Program",
    "batch_of",
    "check_call",
    "check_pair",
    "flatten_tensors",
    "num_rows",
    "signature_error",
]

# A model or a guide, and its arguments.
Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Batch = tuple[Args, Kwargs]


def signature_error(model: Program, args: Args, kwargs: Kwargs) -> str:
    """Why arguments don't match a model's signature; "" if they do, or if it has no signature."""
    fn = poutine.unwrap(model)
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):  # a builtin
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"The model takes {signature}: {error}."
    return ""


def check_call(args: Any, kwargs: Any, model: Program | None = None) -> Batch:
    """The arguments of a model as a tuple and a dict.

    Raises:
        ValueError: If they are not a tuple and a dict.
        TypeError: If they don't match the model's signature.
    """
    if not isinstance(args, tuple | list):
        raise ValueError(
            f"args should be a tuple of the model's arguments, as args=(x, y) or args=(x,); got "
            f"{type(args).__name__}."
        )
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"kwargs should be a dict of the model's keyword arguments; got "
            f"{type(kwargs).__name__}. Several arguments go into one tuple, args=(x, y)."
        )
    args, kwargs = tuple(args), dict(kwargs or {})
    if model is not None and (error := signature_error(model, args, kwargs)):
        raise TypeError(f"{error} Give them as args=(x, y), args=(x,) or kwargs={{'y': y}}.")
    return args, kwargs


def check_pair(caller: str, model: Any, guide: Any) -> None:
    """Raises a ValueError if one of them is not callable, or the model is a guide of Pyro's."""
    for name, value in (("model", model), ("guide", guide)):
        is_callable = callable(value) and not isinstance(value, type)
        is_swapped = name == "model" and isinstance(value, AutoGuide | GuideMessenger)
        if is_swapped or not is_callable:
            raise ValueError(
                f"{caller} takes a model and then a guide for it, two callables, as "
                f"{caller}(model, AutoIAF(model)); got as {name} "
                f"{type(value) if is_callable else value!r}."
            )


def flatten_tensors(
    args: Args, kwargs: Kwargs
) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors among arguments, and a function that returns arguments with other tensors."""
    if not args and not kwargs:
        return [], lambda _: ((), {})
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def rebuild(others: list[Tensor]) -> Any:
        rest = iter(others)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(filled, spec)

    return tensors, rebuild


def batch_of(item: Any, kwargs: Kwargs) -> Batch:
    """The arguments that a minibatch stands for: a tuple, a dict, or the one argument."""
    if isinstance(item, Mapping):
        return (), {**kwargs, **item}
    return tuple(item) if isinstance(item, tuple | list) else (item,), kwargs


def num_rows(batch: Batch) -> int:
    """The length of the first tensor of a minibatch that is no single number."""
    return next((len(tensor) for tensor in flatten_tensors(*batch)[0] if tensor.dim()), 1)
