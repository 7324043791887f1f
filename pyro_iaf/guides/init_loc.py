"""Start values of sites, from a user's ``init_loc_fn``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from .._validation import warn
from ..models.traces import bare, full_size

__all__ = ["no_bijection", "or_draw"]


def or_draw(init_loc_fn: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """An ``init_loc_fn`` that gives a draw where the user's gives no usable value.

    The user's fails where a site can't be sampled, and it may give an infinite mean. A value that
    broadcasts to the site is expanded. One for all rows of a subsampled plate is indexed.
    """

    def init(site: dict[str, Any]) -> Any:
        try:
            to_support = biject_to(site["fn"].support)
        except NotImplementedError as error:
            try:
                return init_loc_fn(site)  # a reparameteriser may replace this site
            except NotImplementedError:
                raise no_bijection(site, error) from error
        try:
            value = init_loc_fn(site)
        except NotImplementedError:
            shape = to_support.inverse_shape(site["fn"].shape())
            return to_support(torch.empty(shape).uniform_(-2, 2))
        except AssertionError as error:
            if getattr(bare(site["fn"]), "duration", 0) is not None:
                raise
            raise ValueError(
                f"Site '{site['name']}' is a time series without a length, so a guide can't draw "
                "it. Give duration=num_steps to its distribution."
            ) from error
        if not isinstance(value, Tensor):
            raise ValueError(
                f"init_loc_fn should return a tensor for site '{site['name']}'; got {value!r}."
            )
        value = _in_shape(value, site)
        free = to_support.inv(value)
        if not free.isfinite().all():
            warn(
                f"init_loc_fn starts site '{site['name']}' outside of its support or at infinity. "
                "Numbers that are not finite in unconstrained space start at a draw instead."
            )
            draw = torch.empty_like(free).uniform_(-2, 2)
            free = torch.where(free.isfinite(), free, draw)
            value = to_support(free)
        if not to_support(free).isfinite().all():
            raise ValueError(
                f"Site '{site['name']}' has an interval without end as its support, to which "
                "PyTorch has no bijection. Draw u from Uniform(0, 1) instead, and transform it by "
                "the icdf of the distribution."
            )
        return value

    return init


def no_bijection(site: dict[str, Any], error: Exception) -> NotImplementedError:
    """The error for a site to whose support no bijection leads; ``error`` says why."""
    why = str(error) or f"that of {type(bare(site['fn'])).__name__}"
    return NotImplementedError(
        f"A flow can't draw site '{site['name']}', since there is no bijection from real vectors "
        f"to its support: {why}. Hide the site from the guide by poutine.block, or draw a latent "
        "of another distribution and transform it in the model."
    )


def _in_shape(value: Tensor, site: dict[str, Any]) -> Tensor:
    """A start value as floating-point numbers in the shape of its site."""
    fn = site["fn"]
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    shape = torch.Size(fn.shape())
    if value.shape == shape:
        return value
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    of_event = shape[len(shape) - support.event_dim :]
    candidates = [value]
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and full_size(f) != f.size]
    if frames and all(
        value.shape[frame.dim - fn.event_dim] in (1, full_size(frame))
        for frame in frames
        if value.dim() >= fn.event_dim - frame.dim
    ):
        with pyro.validation_enabled(False):  # other sizes are an error below
            candidates.append(pyro.subsample(value, event_dim=fn.event_dim))
    for candidate in candidates:
        with contextlib.suppress(RuntimeError):
            whole = candidate.expand(shape)
            # One number can't be expanded to a simplex. A whole event is checked by the caller.
            is_whole = candidate.shape[max(0, candidate.dim() - support.event_dim) :] == of_event
            if is_whole or support.check(whole).all():
                return whole
    raise ValueError(
        f"init_loc_fn should return a value of shape {tuple(shape)} for site '{site['name']}', or "
        f"one that broadcasts to it and is in its support; got shape {tuple(value.shape)}."
    )
