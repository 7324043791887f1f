"""The sites of a trace and their log densities, and runs without validation and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

__all__ = [
    "WRAPPERS",
    "bare",
    "compute_log_prob",
    "full_size",
    "handler_lock",
    "is_latent",
    "is_point",
    "is_subsampled",
    "latent_sites",
    "log_prob_of_each",
    "log_prob_of_particles",
    "log_probs_of_particles",
    "plate_nesting",
    "quietly",
    "samples",
    "subsamples",
]

# Held while models run, since Pyro has one stack of handlers for all threads.
handler_lock = RLock()

# Distributions that change the shape or the mask of a base distribution.
WRAPPERS: Any = (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


def is_latent(site: Any) -> bool:
    """Whether a site is a latent that a guide draws: no data, no subsample, nothing auxiliary."""
    excluded = ("is_auxiliary", "was_observed")
    is_drawn = site["type"] == "sample" and not site["is_observed"]
    return is_drawn and not site_is_subsample(site) and not any(map(site["infer"].get, excluded))


def samples(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites of a run, except for the subsamples of plates."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site.get("type") == "sample" and not site_is_subsample(site)
    }


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The latents of a run."""
    return {name: site for name, site in samples(trace).items() if is_latent(site)}


def subsamples(trace: poutine.Trace) -> dict[str, Any]:
    """The sites where plates draw their subsamples."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site for name, site in nodes.items() if site_is_subsample(site)}


def is_subsampled(trace: poutine.Trace) -> bool:
    """Whether a plate draws fewer rows than it has."""
    fns = [site["fn"] for site in subsamples(trace).values()]
    return any(fn.subsample_size not in (None, fn.size) for fn in fns)


def compute_log_prob(trace: poutine.Trace, *, in_double: bool = False) -> None:
    """Computes the log densities of all sample sites of a run, except for subsamples.

    Args:
        trace: The run.
        in_double: Whether to sum the log densities of single observations in double precision, and
            to add the square of their rounding error to each site, as ``squared_rounding``.
    """
    if not in_double:
        trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
        return
    for site in samples(trace).values():
        each, num_event = log_prob_of_each(site)
        each = each if each.is_floating_point() else each.double()
        eps, scale = torch.finfo(each.dtype).eps, site["scale"]
        if num_event:
            flat = each.flatten(-num_event)
            log_prob = flat.sum(-1, dtype=torch.float64)
            size = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
        else:  # sums over a dimension of size 1 would be slow
            log_prob, size = each.double(), each.abs()
        site["log_prob"] = scale * log_prob
        site["squared_rounding"] = (scale * eps * size).square()


def log_prob_of_each(site: Any) -> tuple[Tensor, int]:
    """The log densities of a site before ``to_event`` sums them, and how many dimensions it sums.

    They are 0 where a mask removes them.
    """
    log_prob, num_event = _of_each(site["fn"], site["value"])
    return _masked(log_prob, site["mask"], num_event), num_event


def _of_each(fn: Any, value: Any) -> tuple[Tensor, int]:
    if isinstance(fn, dist.MaskedDistribution) and fn._mask is not False:
        log_prob, num_event = _of_each(fn.base_dist, value)
        return _masked(log_prob, fn._mask, num_event), num_event
    if isinstance(fn, Independent):
        log_prob, num_event = _of_each(fn.base_dist, value)
        return log_prob, num_event + fn.reinterpreted_batch_ndims
    return fn.log_prob(value), 0


def _masked(log_prob: Tensor, mask: Any, num_event: int) -> Tensor:
    if mask is None:
        return log_prob
    mask = torch.as_tensor(mask, device=log_prob.device)
    return torch.where(mask.reshape(mask.shape + (1,) * num_event), log_prob, 0.0)


def plate_nesting(*traces: poutine.Trace) -> int:
    """How many dimensions the plates of these runs take, counted from the right."""
    depth = 0
    for trace in traces:
        for site in samples(trace).values():
            dims = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
            depth = max(depth, len(site["fn"].batch_shape), *dims)
    return depth


def log_prob_of_particles(
    trace: poutine.Trace,
    num_particles: int,
    nesting: int | None,
    weight: float | Tensor = 1.0,
    what: str = "log_prob",
) -> Tensor:
    """The log density of each particle of a run, of shape ``(num_particles,)``.

    Args:
        trace: The run, after :func:`compute_log_prob`.
        num_particles: The number of particles.
        nesting: How many dimensions of plates are right of the dimension of the particles; None
            for a run of one particle without such a dimension.
        weight: Factor of the log densities of sites that are not observed.
        what: What to sum, ``"log_prob"`` or ``"squared_rounding"``.
    """
    sites = samples(trace)
    total: Any = 0.0
    for name, log_prob in log_probs_of_particles(trace, num_particles, nesting, what).items():
        total = total + (log_prob if sites[name]["is_observed"] else weight * log_prob)
    return torch.as_tensor(total).expand(num_particles)


def log_probs_of_particles(
    trace: poutine.Trace, num_particles: int, nesting: int | None, what: str = "log_prob"
) -> dict[str, Tensor]:
    """The terms of :func:`log_prob_of_particles` by site, without the weight."""
    found = {}
    for name, site in samples(trace).items():
        log_prob = site[what]
        dim = -1 if nesting is None else log_prob.dim() - nesting - 1
        if dim < 0:  # the same for all particles
            found[name] = log_prob.sum().expand(num_particles)
        else:
            each = log_prob.movedim(dim, 0)
            found[name] = each.reshape(len(each), -1).sum(-1).expand(num_particles)
    return found


# Validation and warnings are settings of the process: the first thread in turns them off, and the
# last one out restores them.
_quiet_lock, _num_quiet, _restore = Lock(), 0, ExitStack()


@contextmanager
def quietly() -> Iterator[None]:
    """Turns off warnings and Pyro's and PyTorch's validation in a ``with`` block."""
    global _num_quiet
    with _quiet_lock:
        if _num_quiet == 0:
            _restore.enter_context(pyro.validation_enabled(False))
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _num_quiet += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _num_quiet -= 1
            if _num_quiet == 0:
                _restore.close()


def bare(fn: Any) -> Any:
    """A distribution without its wrappers: ``to_event``, ``mask`` and ``expand``."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether a distribution is a Delta."""
    return isinstance(bare(fn), dist.Delta)


def full_size(frame: Any) -> int:
    """How many rows a plate has, whether they are in its subsample or not."""
    return int(frame.full_size or frame.size)
