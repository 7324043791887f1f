"""A posterior for ArviZ's plots and tables."""

from __future__ import annotations

import inspect
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
    is_point,
    log_prob_of_each,
    quietly,
    samples,
    subsamples,
    taking_turns,
)
from ..models.weighted import WeightedParticles

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    resample: bool = False,
) -> Any:
    """Draws from a guide for ArviZ, as one chain: ``az.summary``, ``az.plot_trace``, ``az.loo``.

    Groups: the posterior of all latents and deterministic sites; the posterior predictive, the log
    likelihood (of each observation, in nats) and the data of all observed sites. Dimensions are
    called after the plates.

    Args:
        model: A Pyro model.
        guide: A guide for it.
        args: What they take, the data included.
        kwargs: Likewise.
        num_samples: How many draws.
        resample: Whether to resample the draws by their importance weights.

    Returns:
        What ``arviz.from_dict`` makes, an ``InferenceData``, or a ``DataTree`` from ArviZ 1.0 on.

    Threads take turns, as in :func:`diagnose`.

    Raises:
        ImportError: If ArviZ is not there.
        ValueError: As :func:`diagnose`.
        RuntimeError: Likewise.

    Warns:
        UserWarning: As :func:`diagnose`; with ``resample`` also if the weights say that resampling
            can't repair the guide.

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
    check_pair("to_arviz", model, guide)
    args, kwargs = check_call(args, kwargs, model)
    with taking_turns:
        particles = WeightedParticles(model, guide, args, kwargs)
        draws = particles.weighted(4 * num_samples if resample else num_samples)
        latents = draws.resampled(num_samples) if resample else draws.sites
        groups, dims = _groups(particles, latents, num_samples)
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
    particles: WeightedParticles, latents: dict[str, Tensor], num_draws: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """ArviZ's groups, each with its sites, and the names of the sites' dimensions."""
    sites = {n: s for n, s in samples(particles.first_model).items() if not _is_factor(s)}
    observed = {n: s for n, s in sites.items() if s["is_observed"] and not _is_deterministic(s)}
    found: dict[str, dict[str, list[Tensor]]] = {
        "posterior": {name: [] for name in sites.keys() - observed.keys() - latents.keys()},
        "posterior_predictive": {name: [] for name in observed},
        "log_likelihood": {name: [] for name in observed},
    }
    kept = {name: site["value"] for name, site in subsamples(particles.first_model).items()}
    models = particles.model, _Freed()(particles.model)  # with its data, and without them
    start = 0
    for size in particles.sizes(num_draws):
        given = {name: draws[start : start + size] for name, draws in latents.items()}
        start += size
        with quietly():
            runs = [particles.run_model(given, kept, size, model) for model in models]
        conditioned, free = map(samples, runs)
        for name, parts in found["posterior"].items():
            shape = sites[name]["value"].shape
            parts.append(particles.freed(conditioned[name]["value"], shape, size))
        for name, site in observed.items():
            shape = _value(site).shape
            predicted = particles.freed(_value(free[name]), shape, size)
            found["posterior_predictive"][name].append(predicted)
            each = _log_prob_of_each(conditioned[name])
            shape = _log_prob_of_each(site).shape
            found["log_likelihood"][name].append(particles.freed(each, shape, size))
    groups = {
        group: {name: torch.cat(parts).unsqueeze(0) for name, parts in values.items()}
        for group, values in found.items()
    }
    drawn = {name: draws.unsqueeze(0) for name, draws in latents.items()}
    groups["posterior"] = {**drawn, **groups["posterior"]}
    groups["observed_data"] = {name: _value(site) for name, site in observed.items()}
    return groups, {name: _dims(name, site, sites) for name, site in sites.items()}


class _Freed(UnconditionMessenger):
    """Draws what is observed; what other sites determine is no data."""

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_deterministic(msg):
            super()._pyro_sample(msg)


def _value(site: Any) -> Tensor:
    """A site's value; one number may be all the data of a plate."""
    value, shape = torch.as_tensor(site["value"]), torch.Size(site["fn"].shape())
    return value.expand(torch.broadcast_shapes(value.shape, shape))


def _log_prob_of_each(site: Any) -> Tensor:
    """The log density of each observation, also where a site sums over many; 0 if masked out."""
    return log_prob_of_each({**site, "value": _value(site)})[0]


def _is_factor(site: Any) -> bool:
    return isinstance(bare(site["fn"]), dist.Unit)


def _is_deterministic(site: Any) -> bool:
    return is_point(site["fn"])  # as reparameterised sites are, too


def _dims(name: str, site: Any, sites: Mapping[str, Any]) -> list[str]:
    """Names of a site's dimensions: its plates, then the numbers of its event."""
    batch = len(site["fn"].batch_shape)
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}
    dims = []
    value = _value(site) if site["is_observed"] and not _is_deterministic(site) else site["value"]
    for i in range(value.dim()):
        own = plates.get(i - batch, f"{name}_dim_{i}")
        dims.append(f"{own}_plate" if own in sites else own)
    return dims
