"""Whether a guide draws in the supports that a model's sites have."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch.distributions import AffineTransform, ComposeTransform, IndependentTransform, biject_to

from .matching import Mismatch
from .traces import latent_sites

__all__ = ["check_supports"]


def check_supports(guide: Any, latents: dict[str, Any]) -> None:
    """Raises a Mismatch if a guide was made for other supports of the sites."""
    trace = getattr(guide, "prototype_trace", None)
    if not isinstance(trace, poutine.Trace):
        return
    for name, site in latent_sites(trace).items():
        own, here = (s["fn"].support for s in (site, latents.get(name, site)))
        if _bijection_onto(own) != _bijection_onto(here):
            raise Mismatch(
                f"A guide should draw values in the supports that the model's sites have; at site "
                f"'{name}' it draws in {own}, and the model has {here}. Make a "
                "guide for this model and these arguments."
            )


def _bijection_onto(support: Any) -> tuple[str, ...]:
    """The kinds of the transforms onto a support; none for a discrete support."""
    try:
        return _kinds(biject_to(support))
    except NotImplementedError:
        return ()


def _kinds(transform: Any) -> tuple[str, ...]:
    """The classes of a transform's parts, without shifts and positive scales."""
    if isinstance(transform, IndependentTransform):
        return _kinds(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return tuple(kind for part in transform.parts for kind in _kinds(part))
    if isinstance(transform, AffineTransform) and (torch.as_tensor(transform.scale) > 0).all():
        return ()  # the transform to the unit interval has no affine part
    return (type(transform).__name__,)
