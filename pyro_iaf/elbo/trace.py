"""What is recorded of Pyro's trace ELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from torch import Tensor

from ..compiler.capture import Refused
from ..models.traces import samples

__all__ = ["ScoredSite", "not_reparameterised", "recordable_loss", "structure_of", "trace_loss"]


class ScoredSite(NamedTuple):
    """What a graph takes for granted of a site."""

    name: str
    kind: type
    shape: tuple[int, ...]
    is_observed: bool
    enumerated: bool
    scored: bool  # whether Trace_ELBO's gradient has a term with its score


def trace_loss(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """The negative ELBO of a run; its gradient is Trace_ELBO's if all draws are reparameterised."""
    elbo: Any = 0.0
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for site in trace.nodes.values():
            if site["type"] == "sample":
                elbo = elbo + sign * site["log_prob_sum"]
    return -torch.as_tensor(elbo)


def recordable_loss(
    elbo: Trace_ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """What ``elbo`` is of these, in operations that a graph can hold.

    An ELBO with gradients of its own says in ``recordable_particle`` what they are.

    Raises:
        Refused: If a site is enumerated, or not reparameterised.
    """
    total: Any = 0.0
    for model_trace, guide_trace in elbo._get_traces(model, guide, args, kwargs):
        site = not_reparameterised(list(structure_of(guide_trace)), list(structure_of(model_trace)))
        if site:
            raise Refused(
                f"The guide's draws at site '{site}' are not reparameterised, which takes a "
                "gradient of another kind than a graph has: compile=False."
            )
        of_traces = getattr(elbo, "recordable_particle", trace_loss)
        total = total + of_traces(model_trace, guide_trace) / elbo.num_particles
    return torch.as_tensor(total)


def structure_of(trace: poutine.Trace) -> Iterator[ScoredSite]:
    """The sample sites of a run, but for the numbers in them."""
    for name, site in samples(trace).items():
        shape = tuple(torch.as_tensor(site["value"]).shape)
        enumerated = bool(site["infer"].get("enumerate"))
        # The site's own word, as wrappers and has_rsample_() change that of the class.
        scored = "score_parts" in site and not is_identically_zero(site["score_parts"][1])
        yield ScoredSite(name, type(site["fn"]), shape, site["is_observed"], enumerated, scored)


def not_reparameterised(guide: list[ScoredSite], model: list[ScoredSite]) -> str | None:
    """A site of the guide whose gradient takes its score, if there is one."""
    for site in [*guide, *model]:
        if site.enumerated:
            raise Refused(
                f"Site '{site.name}' is enumerated, which is for TraceEnum_ELBO; "
                "CompiledTrace_ELBO draws at each site."
            )
    return next((site.name for site in guide if site.scored), None)
