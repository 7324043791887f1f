"""Draws from a guide in ArviZ's format."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from .._validation import check_size
from ..models.arguments import check_call, check_pair
from ..models.traces import (
    bare,
    handler_lock,
    is_point,
    log_prob_of_each,
    quietly,
    samples,
    subsamples,
)
from ..models.weighted import WeightedParticles
from .refine import Refined

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any] | Refined,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    resample: bool = False,
) -> Any:
    """Draws from a guide, or chains, as ArviZ data for ``az.summary``, ``az.loo`` and so on.

    The groups are the posterior of all latent and deterministic sites, drawn discrete latents
    included, and for all observed sites the posterior predictive, the log likelihood of each
    observation (in nats), given the discrete latents too, and the data. Dimensions are named after
    the plates. Threads take turns, as in :func:`diagnose`.

    Args:
        model: A Pyro model.
        guide: A guide for it, whose draws are one chain, or what :func:`refine` returned.
        args: Positional arguments of both, the data included.
        kwargs: Keyword arguments of both.
        num_samples: The number of draws of a guide; chains have all of theirs.
        resample: Whether to resample the draws of a guide by their importance weights.

    Returns:
        The result of ``arviz.from_dict``: a ``DataTree``, or an ``InferenceData`` before ArviZ 1.0.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: As :func:`diagnose`.
        RuntimeError: As :func:`diagnose`.

    Warns:
        UserWarning: As :func:`diagnose`; with ``resample`` also if the weights are too unreliable
            for resampling.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3))
        >>> draws = to_arviz(model, AutoIAF(model), num_samples=100)
        >>> draws.log_likelihood["y"].dims
        ('chain', 'draw', 'data')
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ: pip install 'pyro_iaf[arviz]', or pip install arviz."
        ) from error
    check_size("num_samples", num_samples)
    refined = guide if isinstance(guide, Refined) else None
    guide = guide.guide if isinstance(guide, Refined) else guide
    check_pair("to_arviz", model, guide)
    args, kwargs = check_call(args, kwargs, model)
    with handler_lock:
        particles = WeightedParticles(model, guide, args, kwargs)
        shape: Sequence[int] = (1, num_samples)
        if refined is not None:
            shape = next(iter(refined.chains.values())).shape[:2]
            latents = {name: draws.flatten(0, 1) for name, draws in refined.chains.items()}
        else:
            draws = particles.weighted(4 * num_samples if resample else num_samples)
            latents = draws.resampled(num_samples) if resample else draws.sites
        particles, latents = particles.with_discrete(latents)
        groups, dims = _groups(particles, latents, shape)
    arrays: Any = {
        group: {name: value.detach().cpu().numpy() for name, value in values.items()}
        for group, values in groups.items()
        if values
    }
    if "data" in inspect.signature(arviz.from_dict).parameters:  # ArviZ 1.0
        return arviz.from_dict(arrays, dims=dims)
    return arviz.from_dict(**arrays, dims=dims)


@torch.no_grad()
def _groups(
    particles: WeightedParticles, latents: dict[str, Tensor], shape: Sequence[int]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """The values of the sites by ArviZ group, and the names of the sites' dimensions.

    Args:
        particles: The model and its guide.
        latents: Draws of all latents, with chains one after the other.
        shape: How many chains there are, and draws in each.
    """
    sites = {
        name: site
        for name, site in samples(particles.first_model).items()
        if not isinstance(bare(site["fn"]), dist.Unit)  # of a pyro.factor
    }
    observed = {name: site for name, site in sites.items() if _is_data(site)}
    deterministic = sites.keys() - observed.keys() - latents.keys()
    indices = {name: site["value"] for name, site in subsamples(particles.first_model).items()}
    models = particles.model, _UnconditionData()(particles.model)
    parts = {("posterior", name): [draws] for name, draws in latents.items()}
    start = 0
    for size in particles.sizes(math.prod(shape)):
        given = {name: draws[start : start + size] for name, draws in latents.items()}
        start += size
        with quietly():
            runs = [particles.run_model(given, indices, size, model) for model in models]
        conditioned, predicted = map(samples, runs)
        found = {
            ("posterior", name): (conditioned[name]["value"], sites[name]["value"])
            for name in deterministic
        }
        for name, site in observed.items():
            found["posterior_predictive", name] = _value(predicted[name]), _value(site)
            of_each = _log_prob_of_each(conditioned[name]), _log_prob_of_each(site)
            found["log_likelihood", name] = of_each
        for key, (value, single) in found.items():
            parts.setdefault(key, []).append(particles.unpadded(value, single.shape, size))
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (group, name), values in parts.items():
        groups[group][name] = torch.cat(values).unflatten(0, shape)
    groups["observed_data"] = {name: _value(site) for name, site in observed.items()}
    return groups, {name: _dims(name, site, sites) for name, site in sites.items()}


class _UnconditionData(UnconditionMessenger):
    """Draws the data, but not deterministic sites, which Pyro also marks as observed."""

    def _pyro_sample(self, msg: Any) -> None:
        if _is_data(msg):
            super()._pyro_sample(msg)


def _is_data(site: Any) -> bool:
    return site["is_observed"] and not is_point(site["fn"])  # as deterministic sites are


def _value(site: Any) -> Tensor:
    """A site's value, broadcast to the distribution's shape, as data may be a single number."""
    value, shape = torch.as_tensor(site["value"]), torch.Size(site["fn"].shape())
    return value.expand(torch.broadcast_shapes(value.shape, shape))


def _log_prob_of_each(site: Any) -> Tensor:
    return log_prob_of_each({**site, "value": _value(site)})[0]


def _dims(name: str, site: Any, sites: Mapping[str, Any]) -> list[str]:
    """Names of a site's dimensions: its plates, then ``name_dim_0`` and so on."""
    batch = len(site["fn"].batch_shape)
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}
    dims = []
    value = _value(site) if _is_data(site) else site["value"]
    for i in range(value.dim()):
        own = plates.get(i - batch, f"{name}_dim_{i}")
        dims.append(f"{own}_plate" if own in sites else own)
    return dims
