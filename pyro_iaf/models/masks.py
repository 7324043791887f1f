r"""Latents that a mask leaves without a density, and nothing else depends on.

Where a model's mask takes a latent's density away, as ``obs_mask`` does at observed places, the
posterior of that latent is flat, and a guide would widen there without end. Nothing depends on it,
so its prior given all else may be put back without a change for the others:

.. math::
    p(z, x) \, p(w \mid z) \quad\text{has the marginal}\quad p(z, x).

Our guides lift the masks of such sites: their own density has what the model's lacks as a factor,
so that both cancel where they meet.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, biject_to

from .arguments import Args, Kwargs, Program
from .matching import Told
from .traces import compute_log_prob, quietly, subsamples

__all__ = ["Unmasked", "log_priors", "sites_to_lift", "where_counted"]

# How far, in unconstrained space, and how often other values are tried for what is masked.
SIZES, NUM_MOVES = (2.0, 2.0, 0.5, 0.1, 0.01), 2

# What may stand around a distribution that has a mask.
WRAPPERS: Any = (Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


class Unmasked(Messenger):
    """Takes the masks off sites."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["fn"], msg["mask"] = _unmasked(msg["fn"]), None


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if not isinstance(fn, WRAPPERS):
        return fn
    twin = copy.copy(fn)
    twin.base_dist = _unmasked(fn.base_dist)
    return twin


def where_counted(site: Any) -> Tensor | None:
    """Which numbers of a site's value have a density, of its shape; None for all."""
    value: Tensor = site["value"]
    masks = [(site["mask"], site["fn"].event_dim)]
    fn: Any = site["fn"]
    while isinstance(fn, WRAPPERS):
        masks.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    found = None
    for mask, event_dim in masks:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=value.device)
            own = mask.reshape(mask.shape + (1,) * event_dim).expand(value.shape)
            found = own if found is None else found & own
    return found


def log_priors(
    model: Program, names: Collection[str], values: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> dict[str, Tensor]:
    """What masks take from the log densities of sites, by name.

    Args:
        model: A Pyro model.
        names: The sites.
        values: Those of all latents, and the subsamples of plates, by name.
        args: What the model takes.
        kwargs: Likewise.
    """
    with poutine.block(), Told(values):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    found = {}
    for name in names & trace.nodes.keys():
        site: Any = trace.nodes[name]
        if not site["is_observed"]:
            whole = _unmasked(site["fn"]).log_prob(site["value"])
            counted = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                mask = torch.as_tensor(site["mask"], device=counted.device)
                counted = torch.where(mask, counted, torch.zeros_like(counted))
            found[name] = whole - counted
    return found


@torch.no_grad()
def sites_to_lift(
    model: Program, latents: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> set[str]:
    """The masked latents whose values make no difference where they are masked.

    Found by trying: with other values there the joint density is the very same number.

    Args:
        model: A Pyro model.
        latents: All latents as in a run of it, by name.
        args: What the model takes.
        kwargs: Likewise.
    """
    masked = [name for name, site in latents.items() if where_counted(site) is not None]
    if not masked:
        return set()

    def run(values: dict[str, Any]) -> poutine.Trace:
        with poutine.block(), Told(values):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            compute_log_prob(trace)
        return trace

    starts = {name: site["value"] for name, site in latents.items()}
    still: set[str] = set()
    changing: set[str] = set()
    try:
        with quietly():
            first = run(starts)
            kept = {name: site["value"] for name, site in subsamples(first).items()}
            for size in SIZES:
                values = {n: _moved(site, starts[n], size) for n, site in latents.items()} | kept
                density = torch.as_tensor(run(values).log_prob_sum())
                for name in masked if density.isfinite() else ():
                    counts: Any = where_counted(first.nodes[name])
                    for _ in range(NUM_MOVES):
                        others = _moved(latents[name], values[name], size)
                        moved = {**values, name: torch.where(counts, values[name], others)}
                        again = torch.as_tensor(run(moved).log_prob_sum())
                        (changing if again != density else still).add(name)
    except Exception:  # of the model, whatever it is, at values that it doesn't expect
        return set()
    return still - changing


def _moved(site: Any, value: Tensor, size: float) -> Tensor:
    """Another value in the support of a site."""
    to_support = biject_to(site["fn"].support)
    free = to_support.inv(value)
    moved: Tensor = to_support(free + size * torch.randn_like(free))
    return moved
