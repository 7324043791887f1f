"""Which sites and parameters make a loss infinite or NaN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .arguments import Args, Kwargs, Program
from .traces import bare, compute_log_prob, is_point, quietly, samples

__all__ = ["describe_nonfinite", "impossible_data"]

NUM_DRAWS = 16


def describe_nonfinite(
    model: Program, guide: Program, args: Args, kwargs: Kwargs, params: Mapping[str, Tensor]
) -> str:
    """Lists what is not finite in a few runs of guide and model, and among the parameters."""
    found: Counter[str] = Counter()
    for _ in range(NUM_DRAWS):
        try:
            with quietly():
                model_trace, guide_trace = _run(model, guide, args, kwargs)
                for trace in (guide_trace, model_trace):
                    compute_log_prob(trace)
        except (RuntimeError, ValueError) as error:
            found[f"an error of the model, {type(error).__name__}: {str(error)[:200]}"] += 1
            continue
        found.update(f"site '{name}' ({what})" for name, what in _sites(model_trace, guide_trace))
    texts = [f"{text} in {count} of {NUM_DRAWS} draws" for text, count in found.items()]
    for name, param in params.items():
        for what, tensor in (("its value", param), ("its gradient", param.grad)):
            if tensor is not None and not tensor.isfinite().all():
                texts.append(f"parameter '{name}' ({what})")
    return "; ".join(texts) or f"nothing that {NUM_DRAWS} more draws could show"


def impossible_data(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> str:
    """Says which data are NaN or outside the support of their distribution; "" if none are."""
    with quietly(), torch.no_grad(), poutine.block():
        model_trace, _ = _run(model, guide, args, kwargs)
    for name, site in samples(model_trace).items():
        value, fn = torch.as_tensor(site["value"]), site["fn"]
        if not site["is_observed"] or isinstance(bare(fn), dist.Delta | dist.Unit):
            continue
        try:
            is_wrong = ~fn.support.check(value)
        except NotImplementedError:
            continue
        for mask in (site["mask"], getattr(fn, "_mask", None)):
            if mask is not None:
                is_wrong = is_wrong & torch.as_tensor(mask)
        if is_wrong.any():
            return (
                f"The data of site '{name}' should be in the support of "
                f"{type(bare(fn)).__name__}, which is {bare(fn).support}; {int(is_wrong.sum())} of "
                f"{is_wrong.numel()} are not, the first at index "
                f"{is_wrong.nonzero()[0].tolist()}. Leave out missing data, or put a number in "
                "their place and mask them."
            )
    return ""


def _run(
    model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> tuple[poutine.Trace, poutine.Trace]:
    """The traces of the model and the guide, at a draw of the guide."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, guide_trace)
    return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def _sites(model: poutine.Trace, guide: poutine.Trace) -> Iterator[tuple[str, str]]:
    """Sites whose value, log density or gradient is not finite, and which of the three it is."""
    draws = {name: torch.as_tensor(site["value"]) for name, site in samples(guide).items()}
    for name, draw in draws.items():
        if not draw.isfinite().all():
            yield name, "its value in the guide is not finite"
    leaves = [draw for draw in draws.values() if draw.requires_grad]
    for name, site in samples(model).items():
        log_prob = site["log_prob_sum"]
        if not log_prob.isfinite():
            is_delta = is_point(site["fn"]) and not site["is_observed"]
            hint = (
                ", as a Delta's, whose value is known: use pyro.deterministic" if is_delta else ""
            )
            yield name, f"its log density is {log_prob.item()}{hint}"
        elif log_prob.requires_grad and leaves:
            slopes = torch.autograd.grad(log_prob, leaves, retain_graph=True, allow_unused=True)
            if any(slope is not None and not slope.isfinite().all() for slope in slopes):
                yield name, "the gradient of its log density is not finite"
