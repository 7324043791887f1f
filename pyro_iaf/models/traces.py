"""Runs of models: their sites, their densities, and quiet."""

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
from pyro.distributions import MaskedDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

__all__ = [
    "bare",
    "compute_log_prob",
    "full_size",
    "is_latent",
    "is_point",
    "is_subsampled",
    "log_prob_of_each",
    "log_prob_of_particles",
    "log_probs_of_particles",
    "plate_nesting",
    "quietly",
    "samples",
    "subsamples",
    "taking_turns",
]

# Held while models run, since Pyro has one stack of handlers for all threads.
taking_turns = RLock()


def is_latent(site: Any) -> bool:
    """Whether a sample site is drawn by a guide: no data, no subsample, nothing auxiliary."""
    hidden = ("is_auxiliary", "was_observed")
    is_free = site["type"] == "sample" and not site["is_observed"]
    return is_free and not site_is_subsample(site) and not any(map(site["infer"].get, hidden))


def samples(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites of a run, but for the subsamples of plates."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        n: site for n, site in nodes.items() if site["type"] == "sample" and not _is_index(site)
    }


def subsamples(trace: poutine.Trace) -> dict[str, Any]:
    """The sites where plates draw their subsamples."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {n: site for n, site in nodes.items() if _is_index(site)}


def is_subsampled(trace: poutine.Trace) -> bool:
    """Whether some plate takes fewer than all."""
    fns = [site["fn"] for site in subsamples(trace).values()]
    return any(fn.subsample_size not in (None, fn.size) for fn in fns)


def _is_index(site: Any) -> bool:
    """Whether a site is a plate's, which draws its subsample."""
    return site["type"] == "sample" and site_is_subsample(site)


def compute_log_prob(trace: poutine.Trace, *, in_double: bool = False) -> None:
    """Scores all sites of a run; a plate's subsample has no density.

    Args:
        trace: The run.
        in_double: Whether to sum the log densities of single observations in double precision, and
            to note the square of what their rounding comes to, as ``squared_rounding``.
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
    """The log density of each observation, also where a site sums over many; 0 if masked out.

    And how many of the last dimensions are those of the event.
    """
    log_prob, num_event = _of_each(site["fn"], site["value"])
    return _masked(log_prob, site["mask"], num_event), num_event


def _of_each(fn: Any, value: Any) -> tuple[Tensor, int]:
    if isinstance(fn, MaskedDistribution) and fn._mask is not False:
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
    """The log densities of a run's particles, which lie left of ``nesting`` plates.

    Those of sites that are not observed are weighted. Without a nesting there is one particle.
    """
    sites = samples(trace)
    total: Any = 0.0
    for name, log_prob in log_probs_of_particles(trace, num_particles, nesting, what).items():
        total = total + (log_prob if sites[name]["is_observed"] else weight * log_prob)
    return torch.as_tensor(total).expand(num_particles)


def log_probs_of_particles(
    trace: poutine.Trace, num_particles: int, nesting: int | None, what: str = "log_prob"
) -> dict[str, Tensor]:
    """The same, site by site."""
    found = {}
    for name, site in samples(trace).items():
        log_prob = site[what]
        beyond = -1 if nesting is None else log_prob.dim() - nesting - 1
        if beyond < 0:  # the same for all
            found[name] = log_prob.sum().expand(num_particles)
        else:
            each = log_prob.movedim(beyond, 0)
            found[name] = each.reshape(len(each), -1).sum(-1).expand(num_particles)
    return found


class _Quiet:
    """Turns a switch of the whole process once, for all threads that want it turned."""

    def __init__(self) -> None:
        self.lock, self.num_inside, self.restore = Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.num_inside == 0:
                self.restore.enter_context(pyro.validation_enabled(False))
                self.restore.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.num_inside += 1

    def leave(self) -> None:
        with self.lock:
            self.num_inside -= 1
            if self.num_inside == 0:
                self.restore.close()


_quiet = _Quiet()


@contextmanager
def quietly() -> Iterator[None]:
    """Without checks and warnings of Pyro and PyTorch about densities that are not finite."""
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()


def bare(fn: Any) -> Any:
    """A distribution without what Pyro wraps around it."""
    while isinstance(fn, Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether a distribution has one value."""
    return isinstance(bare(fn), dist.Delta)


def full_size(frame: Any) -> int:
    """How many rows a plate has, drawn or not."""
    return int(frame.full_size or frame.size)
