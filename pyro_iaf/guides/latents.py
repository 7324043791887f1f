"""Which latents a guide can draw, the vector that they make, and their quantiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import biject_to

from .._validation import warn
from ..models.masks import where_counted
from ..models.matching import Mismatch
from ..models.traces import is_point
from .plates import quoted

__all__ = ["check_latents", "check_loaded", "joined", "quantiles_of", "warn_of_masks"]


def check_latents(sites: Mapping[str, Any], kind: str, prefix: str) -> None:
    """Raises an error if a latent can't be drawn by flows.

    Args:
        sites: The latents by name.
        kind: What the guide's class is called.
        prefix: What the guide is called in the store.
    """
    for name, site in sites.items():
        if is_point(site["fn"]):
            raise ValueError(
                f"A guide finds out values that the model leaves open; site '{name}' is a Delta, "
                f"whose value is known. State it by pyro.deterministic('{name}', value), and a log "
                "density by pyro.factor."
            )
    for name, site in sites.items():
        with helpful_support_errors(site):
            biject_to(site["fn"].support)
        if name.startswith(f"_{prefix}_"):
            raise ValueError(
                f"Site '{name}' of the model is called as sites of the guide are. Give it "
                f"another name, or the guide: {kind}(model, name=...)."
            )
        if site["value"].dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"Latents should be in torch.float32 or torch.float64, which triangular "
                f"matrices can be solved in; site '{name}' is in {site['value'].dtype}. Give "
                "its prior parameters of those, and convert its value in the model."
            )
    if not any(site["value"].numel() for site in sites.values()):
        raise RuntimeError(
            f"{kind} found no latent variables: all sites of the model are "
            "observed, or of size zero. A model without latents needs no guide but an empty "
            "function."
        )


def check_loaded(ours: Collection[str], theirs: Collection[str]) -> None:
    """Raises a Mismatch if a model's latents are not those of a state that was loaded."""
    if missing := set(theirs) - set(ours):
        raise Mismatch(
            f"The state that was loaded is of a guide with sites {quoted({*theirs})}; in this "
            f"run of the model {quoted(missing)} is no latent. Load the state of a guide for "
            "this model, or give the arguments that it was trained with."
        )
    if new := set(ours) - set(theirs):
        raise Mismatch(
            f"Site {quoted(new)} is latent in this run of the model, and the state that was "
            f"loaded is of a guide with sites {quoted({*theirs})}: it was observed in "
            "training. Call guide.setup(...) with its data. To predict it, draw under "
            "torch.no_grad(), as Predictive does."
        )


def warn_of_masks(sites: Mapping[str, Any], lifted: Collection[str]) -> None:
    """Warns of latents that are masked in the model, unless the guide undoes it."""
    for name, site in sites.items():
        mask = where_counted(site)
        if name not in lifted and mask is not None and not mask.all():
            warn(
                f"Site '{name}' is masked in the model: its density counts nothing there. "
                "Unless the data hold it, the guide widens without end. Mask the likelihood "
                "alone."
            )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a vector, some of them perhaps of an improper prior, which knows of no device."""
    device = next((part.device for part in parts if part.device.type != "cpu"), None)
    loc = torch.cat([part.to(device) for part in parts])
    return loc if loc.is_floating_point() else loc.to(torch.get_default_dtype())


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles along the first axis, of tensors of any size and precision."""
    draws = draws if draws.dtype == torch.float64 else draws.float()  # no half quantiles
    flat = draws.reshape(len(draws), -1)
    at_once = max(1, 2**24 // len(draws))  # torch.quantile takes no more numbers
    levels = levels.to(flat)
    parts = [part.quantile(levels, dim=0) for part in flat.split(at_once, 1)]
    return torch.cat(parts, 1).reshape(len(levels), *draws.shape[1:])
