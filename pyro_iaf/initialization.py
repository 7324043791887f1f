"""Where a guide starts: a location found before SVI begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["or_draw"]


def or_draw(init_loc_fn: Callable[..., Any]) -> Callable[[dict[str, Any]], Tensor]:
    """Starts where ``init_loc_fn`` says, and at a draw where that says nothing of use.

    It can't where a site can't be sampled; and a mean may be infinite.
    """

    def init(site: dict[str, Any]) -> Tensor:
        to_support = biject_to(site["fn"].support)
        try:
            value = init_loc_fn(site)
        except NotImplementedError:
            shape = to_support.inverse_shape(site["fn"].shape())
            drawn: Tensor = to_support(torch.empty(shape).uniform_(-2, 2))
            return drawn
        if not isinstance(value, Tensor):
            raise ValueError(
                f"init_loc_fn should return a tensor for site '{site['name']}'; got {value!r}."
            )
        free = to_support.inv(value)
        if not free.isfinite().all():
            warnings.warn(
                f"init_loc_fn starts site '{site['name']}' outside of its support, or infinitely "
                "far out. What is not finite in unconstrained space starts at a draw instead.",
                UserWarning,
                stacklevel=2,
            )
            draw = torch.empty_like(free).uniform_(-2, 2)
            value = to_support(torch.where(free.isfinite(), free, draw))
        checked: Tensor = value
        return checked

    return init
