r"""Masked latents that nothing else depends on, whose masks can be removed.

Where a mask removes the density of a latent :math:`w`, as ``obs_mask`` does at observed places, the
posterior of :math:`w` is flat, and a guide would widen there without bound. If nothing else depends
on :math:`w`, its prior can be put back without changing the posterior of the other latents:

.. math::
    p(z, x) \, p(w \mid z) \quad\text{has the marginal}\quad p(z, x).

Our guides divide their own density by the factor that the mask removed. The ELBO is then the same
as without the mask.
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
from torch.distributions import biject_to

from .arguments import Args, Kwargs, Program
from .matching import FixedValues
from .traces import WRAPPERS, quietly, subsamples

__all__ = ["Unmasked", "density_mask", "masked_log_probs", "masks_of", "sites_to_unmask"]

# Standard deviations, in unconstrained space, of the trial values of a masked latent, and how many
# are tried at each.
SIZES, NUM_MOVES = (2.0, 2.0, 0.5, 0.1, 0.01), 2


class Unmasked(Messenger):
    """Removes the masks of the sites with these names."""

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


def density_mask(site: Any) -> Tensor | None:
    """Which entries of a site's value have a density, in the value's shape; None means all."""
    value: Tensor = site["value"]
    joint = None
    for mask, event_dim in masks_of(site):
        mask = torch.as_tensor(mask, device=value.device)
        mask = mask.reshape(mask.shape + (1,) * event_dim).expand(value.shape)
        joint = mask if joint is None else joint & mask
    return joint


def masks_of(site: Any) -> list[tuple[Any, int]]:
    """The masks of a site and of its distribution, each with the dimensions that it leaves out."""
    fn: Any = site["fn"]
    masks = [(site["mask"], fn.event_dim)]
    while isinstance(fn, WRAPPERS):
        masks.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    return [(mask, event_dim) for mask, event_dim in masks if mask is not None and mask is not True]


def masked_log_probs(
    model: Program, names: Collection[str], values: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> dict[str, Tensor]:
    """The log densities that masks remove from sites, at values of all latents and subsamples."""
    trace = _run(model, values, args, kwargs)
    removed = {}
    for name in names & trace.nodes.keys():
        site: Any = trace.nodes[name]
        if not site["is_observed"]:
            unmasked = _unmasked(site["fn"]).log_prob(site["value"])
            masked = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                mask = torch.as_tensor(site["mask"], device=masked.device)
                masked = torch.where(mask, masked, torch.zeros_like(masked))
            removed[name] = unmasked - masked
    return removed


@torch.no_grad()
def sites_to_unmask(
    model: Program, latents: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> set[str]:
    """The masked latents on whose masked entries nothing depends.

    Their masked entries are changed at random, several times. The joint density must be exactly
    the same each time.
    """
    masked = [name for name, site in latents.items() if density_mask(site) is not None]
    if not masked:
        return set()

    def log_joint(values: dict[str, Any]) -> Tensor:
        return torch.as_tensor(_run(model, values, args, kwargs).log_prob_sum())

    starts = {name: site["value"] for name, site in latents.items()}
    independent: set[str] = set()
    dependent: set[str] = set()
    try:
        with quietly():
            first = _run(model, starts, args, kwargs)
            indices = {name: site["value"] for name, site in subsamples(first).items()}
            for size in SIZES:
                values = {n: _moved(site, starts[n], size) for n, site in latents.items()} | indices
                density = log_joint(values)
                for name in masked if density.isfinite() else ():
                    mask: Any = density_mask(first.nodes[name])
                    for _ in range(NUM_MOVES):
                        others = _moved(latents[name], values[name], size)
                        moved = {**values, name: torch.where(mask, values[name], others)}
                        (independent if log_joint(moved) == density else dependent).add(name)
    except Exception:  # any error of the model, at values that it doesn't expect
        return set()
    return independent - dependent


def _run(model: Program, values: Mapping[str, Any], args: Args, kwargs: Kwargs) -> poutine.Trace:
    with poutine.block(), FixedValues(values):
        return poutine.trace(model).get_trace(*args, **kwargs)


def _moved(site: Any, value: Tensor, size: float) -> Tensor:
    """A random value near this one, in the support of a site."""
    to_support = biject_to(site["fn"].support)
    free = to_support.inv(value)
    moved: Tensor = to_support(free + size * torch.randn_like(free))
    return moved
