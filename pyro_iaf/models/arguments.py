"""What users hand over, checked: a model, a guide, and what the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import nn

__all__ = ["Args", "Batch", "Kwargs", "Program", "check_call", "check_pair", "refusal"]

# A model or a guide, what it takes, and both in one.
Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Batch = tuple[Args, Kwargs]


def refusal(model: Program, args: Args, kwargs: Kwargs) -> str:
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


def check_call(args: Any, kwargs: Any, model: Program | None = None) -> Batch:
    """The arguments of a model.

    Raises:
        ValueError: If they are not a tuple and a dict.
        TypeError: If they are not what this model takes.
    """
    if not isinstance(args, tuple | list):
        raise ValueError(
            f"args should be a tuple of what the model takes, as args=(x, y) or args=(x,); got "
            f"{type(args).__name__}."
        )
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"kwargs should be a dict of what the model takes by keyword; got "
            f"{type(kwargs).__name__}. Several arguments go into one tuple, args=(x, y)."
        )
    args, kwargs = tuple(args), dict(kwargs or {})
    if model is not None and (why := refusal(model, args, kwargs)):
        raise TypeError(f"{why} Give them as args=(x, y), args=(x,) or kwargs={{'y': y}}.")
    return args, kwargs


def check_pair(caller: str, model: Any, guide: Any) -> None:
    """Raises a ValueError unless these are a model and a guide, as far as that shows outside."""
    for word, thing in (("model", model), ("guide", guide)):
        is_swapped = word == "model" and isinstance(thing, AutoGuide | GuideMessenger)
        if is_swapped or isinstance(thing, type) or not callable(thing):
            got = thing if isinstance(thing, type) or not callable(thing) else type(thing)
            raise ValueError(
                f"{caller} takes a model and then a guide for it, two callables, as "
                f"{caller}(model, AutoIAF(model)); got as {word} {got!r}."
            )
