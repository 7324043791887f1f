"""Checks of the latents that a guide draws, their concatenation, and their quantiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import biject_to

from .._validation import warn
from ..models.arguments import Args, Kwargs, signature_error
from ..models.masks import density_mask
from ..models.matching import Mismatch
from ..models.traces import full_size, handler_lock, is_point
from ..models.weighted import WeightedParticles
from .init_loc import no_bijection
from .plates import quoted

__all__ = [
    "check_latents",
    "check_loaded",
    "joined",
    "quantiles_of",
    "refuse_subsamples",
    "warn_of_masks",
    "with_discrete",
]


def check_latents(sites: Mapping[str, Any], guide_class: str, guide_name: str) -> None:
    """Raises an error if flows can't draw a latent, or if there is none."""
    for name, site in sites.items():
        if is_point(site["fn"]):
            raise ValueError(
                f"A guide infers values that are not known; site '{name}' is a Delta, whose value "
                f"is known. State it by pyro.deterministic('{name}', value), and a log density by "
                "pyro.factor."
            )
        try:
            with helpful_support_errors(site):
                biject_to(site["fn"].support)
        except NotImplementedError as error:
            raise no_bijection(site, error) from error
        if name.startswith(f"_{guide_name}_"):
            raise ValueError(
                f"Site '{name}' of the model should not begin with '_{guide_name}_', as the "
                f"guide's own sites do. Rename the site, or the guide: {guide_class}(model, "
                "name=...)."
            )
        if site["value"].dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                "Latents should be in torch.float32 or torch.float64, in which PyTorch can solve "
                f"triangular systems; site '{name}' is in {site['value'].dtype}. Give its prior "
                "parameters in one of them, and convert its value in the model."
            )
    if not any(site["value"].numel() for site in sites.values()):
        raise RuntimeError(
            f"{guide_class} found no latent variables: all sites of the model are observed, or of "
            "size zero. An empty function is a guide for such a model."
        )


def check_loaded(ours: Collection[str], theirs: Collection[str]) -> None:
    """Raises a Mismatch if a model's latents are not those of a state that was loaded."""
    if missing := set(theirs) - set(ours):
        raise Mismatch(
            f"The state that was loaded is of a guide with sites {quoted(theirs)}; in this run of "
            f"the model {quoted(missing)} is no latent. Load the state of a guide for this model, "
            "or give the arguments that it was trained with."
        )
    if new := set(ours) - set(theirs):
        raise Mismatch(
            f"Site {quoted(new)} is latent in this run of the model and was observed in training: "
            f"the state that was loaded is of a guide with sites {quoted(theirs)}. Call "
            "guide.setup(...) with its data. To predict it, draw under torch.no_grad(), as "
            "Predictive does."
        )


def warn_of_masks(sites: Mapping[str, Any], lifted: Collection[str]) -> None:
    """Warns of latents that the model masks, unless the guide lifts their masks."""
    for name, site in sites.items():
        mask = density_mask(site)
        if name not in lifted and mask is not None and not mask.all():
            warn(
                f"Site '{name}' is masked in the model, so its prior does not count there. Unless "
                "the data determine it, the guide widens without end. Mask only the likelihood."
            )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The concatenation of vectors; those of improper priors may be on another device."""
    device = next((part.device for part in parts if part.device.type != "cpu"), None)
    loc = torch.cat([part.to(device) for part in parts])
    return loc if loc.is_floating_point() else loc.to(torch.get_default_dtype())


def with_discrete(
    guide: Any, sites: dict[str, Tensor], discrete: bool | str, args: Args, kwargs: Kwargs
) -> dict[str, Tensor]:
    """Draws of a guide with the model's discrete latents, if they are wanted and there are any."""
    if discrete not in (True, False, "map"):
        raise ValueError(f'discrete should be True, False or "map"; got {discrete!r}.')
    if not discrete or guide.discrete is None:
        return sites
    if error := signature_error(guide.model, args, kwargs):
        raise TypeError(
            f"{error} Discrete latents are drawn given the data: give the model's arguments after "
            "the number of draws, as sample_posterior(1000, y, discrete=True)."
        )
    with handler_lock:
        particles = WeightedParticles(guide.model, guide, args, kwargs)
        return particles.with_discrete(sites, most_probable=discrete == "map")[1]


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles along the first axis, of tensors of any size and precision."""
    draws = draws if draws.dtype == torch.float64 else draws.float()  # torch.quantile has no half
    flat = draws.reshape(len(draws), -1)
    at_once = max(1, 2**24 // len(draws))  # torch.quantile takes up to 2**24
    levels = levels.to(flat)
    parts = [part.quantile(levels, dim=0) for part in flat.split(at_once, 1)]
    return torch.cat(parts, 1).reshape(len(levels), *draws.shape[1:])


def refuse_subsamples(latents: Mapping[str, Any]) -> None:
    """Raises an error if a latent is in a plate that is subsampled."""
    for name, site in latents.items():
        for frame in site["cond_indep_stack"]:
            if frame.size != full_size(frame):
                raise NotImplementedError(
                    f"Site '{name}' is local to plate '{frame.name}', which is subsampled: "
                    f"{frame.size} of {full_size(frame)}. AutoIAF draws all latents as one "
                    "vector, so it can't follow a subsample. Take AutoHierarchicalIAF(model), "
                    "which can, or run the model on all the data."
                )
